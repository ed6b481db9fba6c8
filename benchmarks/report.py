"""The figures as a table on the screen, as JSON, and as the generated section of RESULTS.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import in_words
from benchmarks.rows import Row
from benchmarks.scaling import Timing

HERE = Path(__file__).parent
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"

COLUMNS = (
    *("case", "n", "rank", "parts", "literal", "devec", "ratio", "cpu", "least", "verdict", "found"),
    *("Δλ lit", "Δλ exact", "Δ parts"),
)
STAGES = ("case", "n", "rank", "parts", "factor", "overlap", "apply")
TIMINGS = ("case", "n", "where", "pair", "factor", "overlap", "apply", "Δλ")
FAMILY = ("9 adapters x 48 tensors, r = 8", "seconds")


@dataclass(frozen=True)
class Figures:
    """Everything that one run measured."""

    machine: dict[str, Any]
    threads: int
    rows: list[Row]
    timings: list[Timing]
    family: dict[str, float]


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _error(value: float) -> str:
    return "" if isnan(value) else f"{value:.0e}"


def in_threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _rank(row: Row) -> str:
    return f"auto ({row.rank})" if row.case == "dense" and row.rule == "auto" else str(row.rank)


def cells(row: Row) -> tuple[str, ...]:
    found = f"{row.found}/{row.planted}" + (f" +{row.surplus}" if row.surplus > 0 else "")
    return (
        row.case,
        str(row.n),
        _rank(row),
        row.output,
        ("~" if row.literal_reused else "") + duration(row.literal.wall),
        duration(row.devec.wall),
        f"{row.ratio:.0f}x",
        f"{row.cpu_ratio:.0f}x",
        f"{row.required:.0f}x" if row.required else "",
        row.verdict,
        found,
        _error(row.literal_error),
        _error(row.exact_error),
        _error(row.parts),
    )


def _print_rows(console: Console, rows: list[Row], threads: int) -> None:
    title = f"literal recipe against devec, one pair, float32, {in_threads(threads)}"
    table = Table(*COLUMNS, title=title, box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[4:9] + table.columns[10:]:
        column.justify = "right"
    for i, row in enumerate(rows):
        style = {"PASS": "green", "short": "red", "missed": "red"}.get(row.verdict)
        last = i + 1 < len(rows) and (rows[i + 1].case, rows[i + 1].n) != (row.case, row.n)
        table.add_row(*cells(row), style=style, end_section=last)
    console.print(table)
    console.print("ratio: wall time, cpu: processor time; ~: literal time of the row above; Δ: difference", style="dim")


def stage_lines(rows: list[Row]) -> list[tuple[str, ...]]:
    return [
        (row.case, str(row.n), _rank(row), row.output, *map(duration, row.stages.values()))
        for row in rows
    ]


def timing_lines(timings: list[Timing]) -> list[tuple[str, ...]]:
    return [
        (t.case, str(t.n), t.where, duration(t.seconds), *map(duration, t.stages.values()), f"{t.difference:.0e}")
        for t in timings
    ]


def family_lines(family: dict[str, float]) -> list[tuple[str, ...]]:
    return [(stage, duration(seconds)) for stage, seconds in family.items()]


def print_figures(console: Console, figures: Figures) -> None:
    _print_rows(console, figures.rows, figures.threads)
    _print_table(console, "where devec's time goes", STAGES, stage_lines(figures.rows))
    _print_table(console, "devec: threads and devices", TIMINGS, timing_lines(figures.timings))
    _print_table(console, "devec: a family of adapters", FAMILY, family_lines(figures.family))


def _print_table(console: Console, title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    table = Table(*header, title=title, box=box.SIMPLE_HEAD)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def as_json(figures: Figures) -> str:
    main = []
    for row in figures.rows:
        entry = asdict(row) | {"devec": row.devec._asdict(), "literal": row.literal._asdict()}
        entry |= {name: getattr(row, name) for name in ("ratio", "cpu_ratio", "required", "verdict")}
        main.append({k: None if isinstance(v, float) and isnan(v) else v for k, v in entry.items()})
    document = {
        "machine": figures.machine,
        "threads": figures.threads,
        "rows": main,
        "timings": [asdict(t) for t in figures.timings],
        "family": figures.family,
    }
    return json.dumps(document, indent=1) + "\n"


def markdown(figures: Figures) -> str:
    """The generated section of RESULTS.md, without its markers."""
    return "\n".join(
        [
            f"Machine: {in_words(figures.machine)}. {in_threads(figures.threads)}.\n",
            grid(COLUMNS, [cells(row) for row in figures.rows]),
            "Where devec's time goes (last repeat):\n",
            grid(STAGES, stage_lines(figures.rows)),
            "Threads and devices:\n",
            grid(TIMINGS, timing_lines(figures.timings)),
            "A family of adapters:\n",
            grid(FAMILY, family_lines(figures.family)),
        ]
    )


def grid(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    all_lines = [header, tuple("---" for _ in header), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in all_lines)


def write_results(text: str, path: Path = HERE / "RESULTS.md", *, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands in ``path`` between the lines ``begin`` and ``end``, and nothing else."""
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name} lacks the lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
