"""What commands print: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from devec.cli.options import Printing

LOUD = frozenset({"nothing-shared", "everything-shared", "edge-above-threshold", "base-is-mean", "shared-seed"})


def print_json(value: Any) -> None:
    """The one thing on stdout under --json."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], how: Printing) -> None:
    """A table on stdout, unless --json or --quiet."""
    if how.as_json or how.quiet:
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table(header_style="bold")
    for i, name in enumerate(columns):
        grid.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(cell(x) for x in row))
    console = Console()
    # A pipe has no width of its own; a table squeezed to 80 columns is unreadable in a log.
    screen = console if console.is_terminal else Console(width=140)
    screen.print(title, style="bold", highlight=False, soft_wrap=True)
    screen.print(grid)


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def say(text: str, how: Printing) -> None:
    """A line of result on stdout, unless --json or --quiet."""
    if not how.as_json and not how.quiet:
        click.echo(text)


def warn(warnings: Iterable[Mapping[str, Any]], *, strict: bool = False) -> None:
    """Warnings on stderr, the loud ones first; with ``strict`` they are an error instead."""
    listed = sorted(warnings, key=lambda w: w["code"] not in LOUD)
    for w in listed:
        names = list(w["tensors"])
        which = ""
        if names:
            which = f" [{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}]"
        click.echo(f"warning ({w['code']}): {w['message']}{which}", err=True)
    if strict and listed:
        from devec.core.errors import IncompatibleError

        codes = ", ".join(dict.fromkeys(str(w["code"]) for w in listed))
        raise IncompatibleError(f"--strict, and there were warnings: {codes}; nothing is written")


@contextmanager
def progress(what: str, how: Printing) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal; elsewhere one plain line every ten seconds; nothing when quiet."""
    if how.quiet:
        yield lambda done, total, name: None
        return
    if not sys.stderr.isatty():
        yield _plain(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, total=total, completed=done, description=f"{what} {name[-40:]}")

        yield advance


def _plain(what: str) -> Callable[[int, int, str], None]:
    last = time.monotonic()

    def line(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10.0:
            last = now
            click.echo(f"{time.strftime('%H:%M:%S')} {what}: {done} of {total} ({name})", err=True)

    return line


def wrote(path: object, written: Any, how: Printing, extra: Mapping[str, Any] | None = None) -> None:
    """The last line of a command that wrote something, or its JSON."""
    if how.as_json:
        data = {"schema": 1, "output": str(path), **dict(extra or {})}
        if written is not None:
            data.update(files=list(written.files), tensors=written.tensors, bytes=written.bytes)
        print_json(data)
        return
    if written is None:
        say(f"wrote {path}", how)
    else:
        say(f"wrote {path}: {written.tensors} tensors, {written.bytes / 1e6:,.1f} MB in {len(written.files)} file(s)", how)
        for note in written.notes:
            click.echo(f"note: {note}", err=True)
