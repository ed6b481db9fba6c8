"""``python -m benchmarks.scheduler``: which part of a machine or cluster a large pool waits for, by simulation.

Nothing is run on a cluster: jobs with the bytes and operations of ``workload.py`` pass through the stations of
``events.py`` at the rates of ``rates.py``. The same rates give the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import click
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.events import Outcome, simulate
from benchmarks.rates import Rates, measured
from benchmarks.workload import (
    Cluster,
    Order,
    Work,
    eight_h200,
    jobs,
    llama_70b,
    many_experts,
    one_h200,
    ray_cluster,
    this_machine,
)

SHORT = {
    "coordinator": "coord.", "shared read": "shared rd", "node read": "node rd", "cpu": "cpu", "pcie": "pcie",
    "gpu": "gpu", "node write": "node wr", "shared write": "shared wr",
}  # fmt: skip
NODES = (1, 2, 4, 8, 16, 32, 64)
SWEEP_NODES = 8


@dataclass(frozen=True)
class Run:
    work: Work
    cluster: Cluster
    outcome: Outcome
    count: int
    price: float = 0.0

    @property
    def dollars(self) -> float:
        """Card-hours at the assumed price; 0 for a machine without cards."""
        return self.outcome.makespan / 3600 * self.cluster.nodes * self.cluster.cards * self.price


def run(
    work: Work, cluster: Cluster, rates: Rates, *, group: int | None = None, order: Order = "largest first"
) -> Run:
    """One pool on one cluster; twice as many jobs in flight on a node as it has cores, as the engine's queue holds."""
    todo = jobs(work, cluster, rates, group=group, order=order)
    outcome = simulate(
        todo, cluster.stations(), nodes=cluster.nodes, memory=cluster.memory, in_flight=2 * cluster.cores
    )
    return Run(work, cluster, outcome, len(todo), rates.gpu_hour.value)


@cache
def works() -> dict[str, Work]:
    """The pools of docs/scaling.md, by a short name."""
    whole, linear, experts = tuple(llama_70b()), tuple(llama_70b(embeddings=False)), tuple(many_experts())
    listed = [
        Work("4 fine-tunes of 70B, target", whole, "dense", 4, 64),
        Work("10 fine-tunes of 70B, target", whole, "dense", 10, 64),
        Work("10 fine-tunes of 70B, pairwise", whole, "dense", 10, 64, "pairwise"),
        Work("1,000 adapters r = 16, target", linear, "low-rank", 1000, 16),
        Work("1,000 adapters r = 64, target", linear, "low-rank", 1000, 64),
        Work("1,000 adapters r = 16, pairwise", linear, "low-rank", 1000, 16, "pairwise"),
        Work("1,000 adapters r = 64, 10,000 tensors, target", experts, "low-rank", 1000, 64),
        Work("1,000 adapters r = 64, 10,000 tensors, pairwise", experts, "low-rank", 1000, 64, "pairwise"),
    ]
    return {work.name: work for work in listed}


def clusters(rates: Rates, nodes: Sequence[int] = (8, 64)) -> list[Cluster]:
    return [this_machine(rates), one_h200(rates), eight_h200(rates), *(ray_cluster(rates, n) for n in nodes)]


def everywhere(rates: Rates) -> list[Run]:
    """Every pool on every cluster."""
    return [run(work, cluster, rates) for work in works().values() for cluster in clusters(rates)]


@dataclass(frozen=True)
class Curve:
    """One pool along one axis."""

    title: str
    axis: str
    x: tuple[int, ...]
    runs: tuple[Run, ...]


def curves(rates: Rates) -> list[Curve]:
    """Three pools against the number of nodes, then against the number of vectors on eight nodes."""
    named = works()
    chosen = [
        ("10 fine-tunes of 70B, target", (2, 4, 8, 16, 32, 64)),
        ("1,000 adapters r = 64, 10,000 tensors, target", (10, 30, 100, 300, 1000, 3000)),
        ("1,000 adapters r = 16, pairwise", (10, 30, 100, 300, 1000)),
    ]
    found = [
        Curve(name, "nodes", NODES, tuple(run(named[name], ray_cluster(rates, n), rates) for n in NODES))
        for name, _ in chosen
    ]
    for name, counts in chosen:
        work = named[name]
        rest = name.partition(" ")[2]
        grown = [Work(f"{k} {rest}", work.shapes, work.kind, k, work.rank, work.mode) for k in counts]
        runs = tuple(run(w, ray_cluster(rates, SWEEP_NODES), rates) for w in grown)
        found.append(Curve(f"k {rest}", "vectors", counts, runs))
    return found


def policies(rates: Rates) -> list[tuple[str, str, Run]]:
    """What order and grouping change: (pool, policy, run)."""
    named, eight = works(), ray_cluster(rates, SWEEP_NODES)
    rows: list[tuple[str, str, Run]] = []
    for name, group in (("10 fine-tunes of 70B, target", 2), ("1,000 adapters r = 64, target", 100)):
        work = named[name]
        rows.append((name, "one job a tensor, as in the file", run(work, eight, rates, order="as in the file")))
        rows.append((name, "one job a tensor, largest first", run(work, eight, rates)))
        rows.append((name, f"groups of {group} vectors, largest first", run(work, eight, rates, group=group)))
    dense = named["10 fine-tunes of 70B, target"]
    cut = Work("cut", tuple(pieces(dense.shapes, 8192)), "dense", 10, 64)
    rows.append((dense.name, "tables in blocks of 8,192 rows, largest first", run(cut, eight, rates)))
    return rows


def pieces(shapes: Sequence[tuple[str, tuple[int, int]]], rows: int) -> list[tuple[str, tuple[int, int]]]:
    """Embedding tables as blocks of rows, each counted as a tensor: what the two passes over rows would allow, but for
    a second reading."""
    found: list[tuple[str, tuple[int, int]]] = []
    for name, (n, m) in shapes:
        if n <= 4 * rows:
            found.append((name, (n, m)))
        else:
            found += [(f"{name}, rows {i}", (min(rows, n - i), m)) for i in range(0, n, rows)]
    return found


# --- output --------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def amount(value: float, unit: str) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def money(run: Run) -> str:
    if not run.cluster.cards:
        return ""
    return f"{run.dollars:,.0f} USD" if run.dollars >= 10 else f"{run.dollars:.2f} USD"


def shares(outcome: Outcome) -> str:
    """Utilisation of the three busiest stations."""
    top = sorted(outcome.busy, key=outcome.utilisation, reverse=True)[:3]
    return ", ".join(f"{name} {outcome.utilisation(name):.0%}" for name in top)


PLACES = ("pool", "on", "jobs", "time", "cost", "waits for", "busy")
POLICY = ("pool", "policy", "jobs", "time", "waits for", "busy")
SATURATION = ("pool", "along", "at", "time", "waits for", "busy")


def place_lines(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    return [
        (r.work.name, r.cluster.name, f"{r.count:,}", duration(r.outcome.makespan), money(r), r.outcome.bottleneck,
         shares(r.outcome))
        for r in runs
    ]  # fmt: skip


def policy_lines(rows: Sequence[tuple[str, str, Run]]) -> list[tuple[str, ...]]:
    return [
        (pool, policy, f"{r.count:,}", duration(r.outcome.makespan), r.outcome.bottleneck, shares(r.outcome))
        for pool, policy, r in rows
    ]


def saturation_lines(found: Sequence[Curve]) -> list[tuple[str, ...]]:
    return [
        (c.title, c.axis, f"{x:,}", duration(r.outcome.makespan), r.outcome.bottleneck, shares(r.outcome))
        for c in found
        for x, r in zip(c.x, c.runs, strict=True)
    ]


def as_json(rates: Rates, runs: Sequence[Run], found: Sequence[Curve]) -> str:
    def entry(r: Run) -> dict[str, object]:
        o = r.outcome
        return {
            "pool": r.work.name, "cluster": r.cluster.name, "nodes": r.cluster.nodes, "vectors": r.work.k,
            "jobs": r.count, "seconds": o.makespan, "waits_for": o.bottleneck, "longest_job": o.longest,
            "usd": r.dollars, "utilisation": {name: o.utilisation(name) for name in o.busy},
            "bounds": {name: o.bound(name) for name in o.busy}, "peak_memory": o.peak_memory,
        }  # fmt: skip

    document = {
        "rates": {name: asdict(getattr(rates, name)) for name in vars(rates)},
        "runs": [entry(r) for r in runs],
        "curves": [{"title": c.title, "axis": c.axis, "x": c.x, "runs": [entry(r) for r in c.runs]} for c in found],
    }
    return json.dumps(document, indent=1) + "\n"


def _print(console: Console, title: str, header: Sequence[str], lines: Sequence[tuple[str, ...]]) -> None:
    table = Table(*header, title=title, box=box.SIMPLE_HEAD)
    for line in lines:
        table.add_row(*line)
    console.print(table)


@click.command()
@click.option("--measure", is_flag=True, help="Measure the rates of this machine anew instead of those on record.")
@click.option("--write", is_flag=True, help="Write the tables into docs/scaling.md and the figure into docs/img/.")
def main(measure: bool, write: bool) -> None:
    """Simulate large pools on this machine, H200s and a Ray cluster; JSON goes to benchmarks/out/scheduler.json."""
    if measure and write:
        raise click.UsageError("the page is made of the rates on record: put new ones into benchmarks/rates.py")
    console = Console()
    console.width = max(console.width, 150)  # a squeezed table hides figures
    rates = measured() if measure else Rates()
    _print(console, "rates", ("rate", "value", "source", "of what"), rates.lines())
    runs, found, tried = everywhere(rates), curves(rates), policies(rates)
    _print(console, "pools on machines", PLACES, place_lines(runs))
    _print(console, f"order and grouping, {SWEEP_NODES} nodes", POLICY, policy_lines(tried))
    _print(console, "what saturates", SATURATION, saturation_lines(found))
    out = report.HERE / "out"
    out.mkdir(exist_ok=True)
    (out / "scheduler.json").write_text(as_json(rates, runs, found))
    if write:
        from benchmarks import scaling_page, scheduler_figure

        scaling_page.write(rates, runs, found, tried)
        scheduler_figure.draw(found)
        console.print("wrote docs/scaling.md and docs/img/scheduler.svg")


if __name__ == "__main__":
    main()
