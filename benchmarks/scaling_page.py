"""The generated parts of docs/scaling.md: bytes, operations, time and money, from the rates on record."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks import report
from benchmarks.rates import Rates
from benchmarks.scheduler import POLICY, Curve, Run, amount, duration, money, policy_lines, works
from benchmarks.workload import Work

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"

VOLUME = ("pool", "tensors", "read", "written", "factoring", "pairs", "their time on one core")
WAITS = ("pool", "along", "waits for")


def volume_line(work: Work, rates: Rates) -> tuple[str, ...]:
    """Inner products of matrices are left out of the last cell: a card takes them."""
    core = sum(work.algebra_seconds(shape, rates) for _, shape in work.shapes)
    if work.kind == "low-rank":
        core += sum(work.product_seconds(shape, rates) for _, shape in work.shapes)
    pairs = work.pairs * len(work.shapes)
    return (
        work.name, f"{len(work.shapes):,}", amount(work.total("read_bytes"), "B"),
        amount(work.total("write_bytes"), "B"), amount(work.total("factor_flops"), "FLOP"),
        f"{pairs:,}" if pairs < 1e6 else f"{pairs / 1e6:,.0f} million", duration(core),
    )  # fmt: skip


def place_lines(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """One line a pool, one cell a cluster: simulated time, least time, money, what is waited for."""
    lines = []
    for name, own in groupby(runs, key=lambda r: r.work.name):
        cells = []
        for r in own:
            o = r.outcome
            told = (duration(o.makespan), f"at least {duration(o.least)}", money(r), o.bottleneck)
            cells.append("<br>".join(filter(None, told)))
        lines.append((name, *cells))
    return lines


def waits_line(curve: Curve) -> tuple[str, ...]:
    """``cpu (1 to 32), then shared read (64)``."""
    spans = []
    at = zip(curve.x, curve.runs, strict=True)
    for what, group in groupby(at, key=lambda item: item[1].outcome.bottleneck):
        xs = [x for x, _ in group]
        spans.append(f"{what} ({xs[0]:,}{f' to {xs[-1]:,}' if len(xs) > 1 else ''})")
    return curve.title, curve.axis, ", then ".join(spans)


def arithmetic(rates: Rates) -> dict[str, str]:
    """The parts that need no simulation."""
    return {
        "volume": report.grid(VOLUME, [volume_line(work, rates) for work in works().values()]),
        "rates": report.grid(("rate", "value", "source", "of what"), rates.lines()),
    }


def write(
    rates: Rates, runs: Sequence[Run], curves: Sequence[Curve], policies: Sequence[tuple[str, str, Run]],
    page: Path = PAGE,
) -> None:  # fmt: skip
    header = ("pool", *dict.fromkeys(r.cluster.name for r in runs))
    parts = arithmetic(rates) | {
        "places": report.grid(header, place_lines(runs)),
        "waits": report.grid(WAITS, [waits_line(c) for c in curves]),
        "policies": report.grid(POLICY, policy_lines(policies)),
    }
    for name, text in parts.items():
        report.write_results(text.rstrip(), page, markers=(f"<!-- {name}: begin -->", f"<!-- {name}: end -->"))
