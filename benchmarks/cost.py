"""``python -m benchmarks.cost``: how seconds grow with the number of vectors and with the size of the model.

The claim: target and chain linear in the number of vectors k, pairwise quadratic, consensus quadratic to cubic, and all
at most linear in parameters.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import click
from rich.console import Console

from benchmarks import cost_figure, cost_report
from benchmarks.clock import threads
from benchmarks.cost_pools import dense_pool, first, low_rank_pool
from benchmarks.cost_stages import Cost, costs
from benchmarks.machine import in_words, machine
from devec.core.vectors import Pool


@dataclass(frozen=True)
class Sweep:
    """Four sizes by four pools of one kind of delta, at a fixed rank."""

    kind: str
    sides: tuple[int, ...]
    pools: tuple[int, ...]
    tensors: int
    rank: int
    repeats: int

    @property
    def rule(self) -> str:
        """Factors have their own rank; for matrices it is given."""
        return "auto" if self.kind == "low-rank" else str(self.rank)

    def pool(self, side: int, tensors: int) -> Pool:
        if self.kind == "dense":
            return dense_pool(self.pools[-1], side, self.rank)
        return low_rank_pool(self.pools[-1], tensors, side, self.rank)


LOW_RANK = Sweep("low-rank", (512, 1024, 2048, 4096), (3, 6, 12, 24), tensors=4, rank=16, repeats=3)
DENSE = Sweep("dense", (512, 1024, 2048, 4096), (2, 4, 8, 16), tensors=1, rank=32, repeats=2)
QUICK = (
    Sweep("low-rank", (64, 128), (2, 4), tensors=1, rank=4, repeats=1),
    Sweep("dense", (256, 512), (2, 4), tensors=1, rank=8, repeats=1),
)
DEPTHS = (2, 4, 8, 16)
"""Numbers of tensors of one size: the other way for a model to grow."""


def measured(sweep: Sweep) -> Iterator[Cost]:
    """Every side, pool and mode of a sweep."""
    for side in sweep.sides:
        yield from _of_pools(sweep, sweep.pool(side, sweep.tensors), sweep.pools)


def deeper(sweep: Sweep, side: int, depths: tuple[int, ...]) -> Iterator[Cost]:
    """More tensors of one side, at the second pool of the sweep."""
    for tensors in depths:
        yield from _of_pools(sweep, sweep.pool(side, tensors), sweep.pools[1:2])


def _of_pools(sweep: Sweep, pool: Pool, counts: tuple[int, ...]) -> Iterator[Cost]:
    for k in counts:
        yield from costs(sweep.kind, first(pool, k), sweep.rank, sweep.rule, sweep.repeats)


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--write", is_flag=True, help="Write the tables into benchmarks/RESULTS.md, the figures into docs/img/.")
def main(quick: bool, write: bool) -> None:
    """Time 4 sizes x 4 pools x 4 modes and fit exponents; JSON goes to benchmarks/out/cost.json."""
    if quick and write:
        raise click.UsageError("--quick measures nothing that is worth writing")
    console = Console()
    console.width = max(console.width, 144)  # a squeezed table hides figures
    facts, began = machine(), perf_counter()
    console.print(in_words(facts), style="dim")
    sweeps = QUICK if quick else (LOW_RANK, DENSE)
    depths = DEPTHS[:2] if quick else DEPTHS
    with threads(1), console.status("timing") as status:
        found = []
        for sweep in sweeps:
            for c in measured(sweep):
                status.update(f"{c.kind}, side {c.side}, {c.pool} vectors, {c.mode}")
                found.append(c)
        depth = list(deeper(sweeps[0], sweeps[0].sides[1], depths))
    figures = cost_report.Figures(facts, found, depth, perf_counter() - began)
    cost_report.show(console, figures)
    cost_report.save(figures)
    if write:
        cost_report.write(figures)
        for kind in ("low-rank", "dense"):
            path = cost_figure.draw([c for c in found if c.kind == kind], kind)
            console.print(f"wrote docs/img/{path.name}")


if __name__ == "__main__":
    main()
