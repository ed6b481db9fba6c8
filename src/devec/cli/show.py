"""What commands print: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
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
    # Names are printed as they are: brackets and colons in them are no markup. A pipe has no width of its own, and a
    # table squeezed to 80 columns is unreadable in a log.
    console = Console(markup=False, emoji=False)
    screen = console if console.is_terminal else Console(markup=False, emoji=False, width=140)
    with screen.capture() as text:
        screen.print(title, style="bold", highlight=False, soft_wrap=True)
        screen.print(grid)
    click.echo(text.get(), nl=False)


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def size(count: int) -> str:
    """Bytes for people: 512 B, 31.4 kB, 5.0 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError


def stages(planned: Sequence[Any], how: Printing) -> None:
    """What each stage of a run would cost."""
    if planned:
        rows = [
            (s.name, s.tensors, size(s.bytes_read), size(s.bytes_written), flops(s.flops), size(s.memory),
             f"about {s.seconds:,.3g} s")
            for s in planned
        ]
        columns = ["stage", "tensors", "read", "written", "FLOP", "peak memory", "time"]
        table("plan (a disk of 1 GB/s read, 0.4 GB/s written; processor measured)", columns, rows, how)


def flops(count: float) -> str:
    """Operations for people: 5.1 G, 3.2 T."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if count < 1000 or unit == " P":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def say(text: str, how: Printing) -> None:
    """A line of result on stdout, unless --json or --quiet."""
    if not how.as_json and not how.quiet:
        click.echo(text)


BOTH_SIDES = (
    "side both takes P_L W P_R away, which one factor of an adapter cannot hold: unique parts are recompressed and may "
    "have up to twice the rank"
)


def note(text: str, how: Printing) -> None:
    """Something to know that is no warning, on stderr, unless --quiet."""
    if not how.quiet:
        click.echo(f"note: {text}", err=True)


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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
        files = "1 file" if len(written.files) == 1 else f"{len(written.files)} files"
        say(f"wrote {path}: {written.tensors} tensors, {size(written.bytes)} in {files}", how)
        for text in written.notes:
            note(text, how)


def complete(output: str, how: Printing, written: Any = None) -> None:
    """What --resume says where the same command had finished."""
    if how.as_json:
        wrote(output, written, how, {"complete": True})
    else:
        say(f"{output} is complete already; nothing was done", how)


def decomposition(summary: Mapping[str, Any], how: Printing) -> None:
    """Totals of a decomposition, and with -v a row per tensor."""
    if how.verbose:
        per_tensor(summary, how)
    totals, tensors = summary["totals"], list(summary["tensors"].values())
    rows = []
    for name, energy in totals["shared_energy"].items():
        ranks = [t["rank"][name] for t in tensors if name in t["rank"]]
        kept = [t["energy_kept"][name] for t in tensors if name in t["energy_kept"]]
        rows.append((name, _span(ranks), f"{median(kept):.1%}" if kept else None, f"{energy:.2%}"))
    listed = ", ".join(summary["vectors"]) if len(summary["vectors"]) < 4 else f"{len(summary['vectors'])} vectors"
    table(
        f"{summary['mode']} decomposition of {listed}: side {summary['side']}, threshold {summary['threshold']}",
        ["vector", "rank per tensor", "energy kept (median)", "energy called shared"],
        rows,
        how,
    )
    if not totals["directions"]:
        say(f"no direction to compare: the rank rule {summary['rank']!r} found nothing above noise", how)
    else:
        edges = [_largest(v) for t in tensors for v in t["edge"].values()]
        say(
            f"{totals['shared_directions']} of {totals['directions']} directions in {totals['tensors']} tensors are "
            f"called shared; {totals['above_chance']} stand above chance (p < 0.01 each)\n"
            f"largest cos^2 {totals['largest_eigenvalue']:.3f}; chance alone reaches about {median(edges):.3f} "
            "(median over tensors and pairs)",
            how,
        )
    if summary["order_dependent"]:
        note(f"this result depends on the order given ({', '.join(summary['order_dependent'])})", how)
    if summary["side"] == "both":
        note(BOTH_SIDES, how)


def per_tensor(summary: Mapping[str, Any], how: Printing) -> None:
    """One row a tensor of a decomposition."""
    rows = [
        (
            name,
            "x".join(map(str, t["shape"])),
            _span(t["rank"].values()),
            min(t["energy_kept"].values(), default=None),
            max((_largest(v) for v in t["edge"].values()), default=None),
            max((_top(v) for v in t["eigenvalues"].values()), default=None),
            sum(sum(_flat(v)) for v in t["shared_directions"].values()),
            max(t["shared_energy"].values(), default=None),
        )
        for name, t in summary["tensors"].items()
    ]
    columns = ["tensor", "out x in", "rank", "energy kept", "chance edge", "largest cos^2", "shared", "energy shared"]
    table("per tensor", columns, rows, how)


def _flat(value: Any) -> list[Any]:
    """Both sides of ``--side both``, or the one value."""
    return list(value.values()) if isinstance(value, dict) else [value]


def _top(value: Any) -> float:
    return float(max((max(x, default=0.0) for x in _flat(value)), default=0.0))


def _largest(value: Any) -> float:
    return float(max(_flat(value)))


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    if not found:
        return "-"
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"
