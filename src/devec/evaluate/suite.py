"""A suite of tasks: a strict YAML file that says which network, which data, which heads and which splits.

Every path in it is seen from the suite's own folder.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from devec.core.errors import InputError, UsageError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class NetworkSpec(Strict):
    """How weights become a network: exactly one of the two."""

    transformers: Literal["image-classification", "sequence-classification", "clip-image"] | None = None
    python: str | None = None

    @model_validator(mode="after")
    def _one(self) -> NetworkSpec:
        if (self.transformers is None) == (self.python is None):
            raise ValueError("give either transformers or python")
        return self


class HeadSpec(Strict):
    """A frozen classifier on the network's features: ``scale * f W^T + b``, with ``cosine`` on features of norm 1 (the
    zero-shot heads of CLIP). ``weight`` and ``bias`` are tensor names in ``file`` (of the model itself without one)."""

    file: str | None = None
    weight: str
    bias: str | None = None
    cosine: bool = False
    scale: float = 1.0


class InputSpec(Strict):
    """From stored pictures (uint8) to what the network takes: ``(x / 255 - mean) / std`` per channel, grey repeated to
    ``channels``, resized bilinearly to ``size``. Both default to what a network of transformers is configured for."""

    mean: list[float] = [0.0]
    std: list[float] = [1.0]
    channels: int | None = Field(default=None, ge=1)
    size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _sound(self) -> InputSpec:
        if not self.mean or not self.std or any(s <= 0.0 for s in self.std):
            raise ValueError("mean and std need a number each, and std is above 0")
        return self


class SelectSpec(Strict):
    """Where the selection split comes from: rows of ``train``, or a part of ``test`` that is then no longer reported.

    ``fraction`` of the rows, by a seeded hash of the row (default: all of train, half of test); ``rows`` at most.
    """

    source: Literal["train", "test"] = Field(alias="from")
    fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    rows: int | None = Field(default=None, ge=1)

    @property
    def share(self) -> float:
        return self.fraction if self.fraction is not None else (1.0 if self.source == "train" else 0.5)

    @model_validator(mode="after")
    def _leaves_some(self) -> SelectSpec:
        if self.source == "test" and self.share >= 1.0:
            raise ValueError("a selection split of the whole test split leaves nothing to report")
        return self


class TaskSpec(Strict):
    """One task: arrays ``x_test, y_test`` and, for a selection split of it, ``x_train, y_train``."""

    name: str = Field(pattern=r"^[^\s,]+$")
    data: str
    head: HeadSpec | None = None
    input: InputSpec | None = None
    batch: int | None = Field(default=None, ge=1)


class Suite(Strict):
    """What ``--suite`` reads. ``input`` and ``batch`` (rows scored at once) are what a task without its own has."""

    version: Literal[1] = 1
    model: NetworkSpec
    tasks: list[TaskSpec] = Field(min_length=1)
    select: SelectSpec | None = None
    input: InputSpec = InputSpec()
    batch: int = Field(default=128, ge=1)
    metrics: list[str] = Field(default=["accuracy"], min_length=1)
    seed: int = 0
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _names(self) -> Suite:
        names = [t.name for t in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have the same name")
        return self

    def path(self, text: str) -> Path:
        return self.folder / text


def read_suite(path: str | Path) -> Suite:
    """Parse a suite. Raises InputError (exit 3) if it cannot be read, UsageError (exit 2) naming the key if wrong."""
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the suite: {error.strerror}", file=file) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the suite is not YAML: {' '.join(str(error).split())}", file=file) from None
    if not isinstance(data, dict) or "folder" in data:
        raise UsageError("a suite is a mapping with model and tasks", file=file)
    try:
        return Suite.model_validate({**data, "folder": file.parent})
    except ValidationError as error:
        raise _explained(error, file) from None


def _explained(error: ValidationError, file: Path) -> UsageError:
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"]) or "suite"
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        return UsageError(f"the suite has an unknown key {where!r}", file=file, remedy=remedy)
    if first["type"] == "missing":
        return UsageError(f"the suite lacks {where!r}", file=file)
    values = {} if isinstance(first["input"], (dict, Strict)) else {"found": first["input"]}
    return UsageError(f"the suite's {where!r} does not fit: {first['msg']}", values=values, file=file)


_PLACES: dict[str, type[Strict]] = {
    "model": NetworkSpec, "tasks": TaskSpec, "select": SelectSpec, "input": InputSpec, "head": HeadSpec,
}  # fmt: skip


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    place = next((_PLACES[str(x)] for x in reversed(loc) if str(x) in _PLACES), Suite)
    return [f.alias or n for n, f in place.model_fields.items() if not f.exclude]
