"""Errors that a user can act on.

Every error carries an exit code (see docs/commands.md) and is printed as one line: what is wrong, the tensor,
the values that disagree, the file, and what to do about it. A user's mistake is never a traceback.
"""

from __future__ import annotations

from pathlib import Path


class DevecError(Exception):
    """Base of every error that devec raises on purpose.

    ``passing`` marks what may be over when the same command is given again (a full disk, a vanished file). ``what`` is
    a sentence without a full stop. ``values`` maps a label to the value found there, e.g.
    ``{"A": (4, 4), "B": (4, 5)}``. ``remedy`` is an imperative sentence.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        tensor: str | None = None,
        values: dict[str, object] | None = None,
        file: str | Path | None = None,
        remedy: str | None = None,
        passing: bool = False,
    ) -> None:
        self.what = what
        self.tensor = tensor
        self.values = dict(values or {})
        self.file = None if file is None else str(file)
        self.remedy = remedy
        self.passing = passing
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error as one line of text."""
        text = self.what
        if self.tensor is not None:
            text += f" [tensor {self.tensor}]"
        if self.values:
            text += ": " + ", ".join(f"{label} = {value}" for label, value in self.values.items())
        if self.file is not None:
            text += f" (in {self.file})"
        if self.remedy is not None:
            text += f". {self.remedy}"
        return " ".join(text.split())

    def __str__(self) -> str:
        return self.line()


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C in a run whose finished part is kept; the text says how to go on."""


def resumable(error: BaseException) -> bool:
    """Whether what a run had finished is worth keeping after this error: it is not one that comes again for certain."""
    return error.passing if isinstance(error, DevecError) else True


class UsageError(DevecError):
    """A flag, recipe or reference that cannot be understood."""

    exit_code = 2


class InputError(DevecError):
    """An input that is missing or cannot be read (truncated, wrong magic, broken index)."""

    exit_code = 3


class IncompatibleError(DevecError):
    """Inputs that do not fit one another, or that changed since they were recorded."""

    exit_code = 4


class RefusedError(DevecError):
    """Something that devec could do but will not: overwrite, run a pickle, fill the disk."""

    exit_code = 5


class SideStepError(DevecError):
    """Weights are written, but a side step (card, tokenizer) failed."""

    exit_code = 6


class GuardError(DevecError):
    """A guard or a verification failed."""

    exit_code = 7
