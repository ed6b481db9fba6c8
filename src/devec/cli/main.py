"""The one binary. Verbs are loaded only when they are called, so that help comes at once."""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

import click

from devec import __version__
from devec.cli import process

COMMANDS = {
    "inspect": ("devec.cli.look", "inspect", "Show format, tensors, ranks and norms; check that sources fit."),
    "compare": ("devec.cli.look", "compare", "Cosines, overlaps against chance, and spectra of sources."),
    "extract": ("devec.cli.vectors", "extract", "Make a task vector, or a LoRA, from two checkpoints."),
    "decompose": ("devec.cli.vectors", "decompose", "Split vectors into shared and unique parts."),
    "export": ("devec.cli.vectors", "export", "Write one part of a decomposition."),
    "apply": ("devec.cli.models", "apply_", "Add weighted vectors or parts to a base."),
    "merge": ("devec.cli.models", "merge", "Merge models or adapters with a registered method."),
    "negate": ("devec.cli.unique", "negate", "Remove a behaviour: subtract what is unique to it."),
    "mix": ("devec.cli.unique", "mix", "Mix adapters by their unique parts."),
    "learn": ("devec.cli.learning", "learn", "Learn a merge's coefficients on a suite of tasks."),
    "eval": ("devec.cli.learning", "eval_", "Score a model on a suite of tasks."),
    "join": ("devec.cli.vectors", "join", "Finish an output whose parts --shard-of has written."),
    "verify": ("devec.cli.look", "verify", "Check an output against its own hashes."),
    "methods": ("devec.cli.look", "methods", "List the methods, or show one."),
    "demo": ("devec.cli.demo", "demo", "Run the main job on real data that ships with scikit-learn."),
}


INTERRUPTED = 130
_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())
"""The command line, as the present command was given it."""


class Interrupted(Exception):
    """Ctrl-C; the text says what is kept."""


class ReaderGone(Exception):
    """Standard output was closed before all was printed (devec ... | head)."""


@cache
def _command(name: str) -> click.Command:
    module, attribute, _ = COMMANDS[name]
    command = getattr(import_module(module), attribute)
    assert isinstance(command, click.Command) and command.callback is not None
    command.callback = process.with_torch(command.callback)
    return command


class LazyGroup(click.Group):
    """A group that knows its commands' one-line help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _command(name) if name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from difflib import get_close_matches

        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There is: {', '.join(COMMANDS)}."
            ctx.fail(f"no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Ctrl-C and a closed pipe reach :func:`run`: click would print an empty line, or exit with 1."""
        ctx.meta["devec.words"] = _words.get()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "nothing unfinished stands under a final name") from None
        except BrokenPipeError:
            raise ReaderGone from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="References: PATH, org/name[@revision], BASE+ADAPTER, ARTIFACT#part, name=REFERENCE. See docs/commands.md.",
)
@click.version_option(__version__, prog_name="devec")
def cli() -> None:
    """Split fine-tunes and adapters into shared and unique parts, and recombine them."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code. A user's mistake is one line on stderr, never a traceback."""
    words = sys.argv[1:] if argv is None else argv
    process.keep_memory()
    process.read_ahead(words)
    process.leave(run(words))


def run(argv: list[str]) -> int:
    """Run and return the exit code (docs/commands.md lists them)."""
    # Set before torch is imported: the engine works on several tensors at once, and a team of threads inside each of
    # its small products only gets in the way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not spin where others work
    _words.set(tuple(argv))
    try:
        result = cli.main(args=argv, prog_name="devec", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except Interrupted as error:
        return _say(f"interrupted; {error}", INTERRUPTED)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _say("interrupted; nothing unfinished stands under a final name", INTERRUPTED)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not in every version of click that is supported
            print(error.format_message(), file=sys.stderr)
            return 2
        where = error.ctx.command_path if error.ctx is not None else "devec"
        return _say(f"{error.format_message()} See: {where} --help", 2)
    except click.ClickException as error:
        return _say(error.format_message(), 2)
    except (ReaderGone, BrokenPipeError):
        # Python would complain when it flushes at exit. 141 is what a shell reports for a closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    from devec.core.errors import DevecError

    if isinstance(error, DevecError):
        return _say(error.line(), error.exit_code)
    known = _system_error(error)
    if known is not None:
        return known
    import traceback

    traceback.print_exc()
    return _say(f"internal error: {type(error).__name__}: {error}. This is a bug of devec; please report it", 1)


def _system_error(error: Exception) -> int | None:
    """Errors of the operating system that reach the top: a file that cannot be read, a full disk, no memory."""
    import errno

    more = "".join(f". {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, MemoryError):
        return _say(f"not enough memory; use --exclude, a lower --rank, or a machine with more{more}", 5)
    if isinstance(error, OSError):
        refused = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
        where = f" (in {error.filename})" if error.filename else ""
        return _say(f"{error.strerror or error}{where}{more}", 5 if error.errno in refused else 3)
    return None


def _say(text: str, code: int) -> int:
    print(f"devec: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
