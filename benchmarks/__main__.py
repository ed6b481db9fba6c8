"""``python -m benchmarks``: the literal recipe against devec, then devec against its peers, in one run."""

from __future__ import annotations

import os

# Read when torch loads. Threads that spin at a barrier make a pair on two threads four times slower than on one
# as soon as another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import click
from rich.console import Console

from benchmarks import report
from benchmarks.clock import threads as on_threads
from benchmarks.family import family_seconds
from benchmarks.machine import in_words, machine
from benchmarks.peers.__main__ import run as run_peers
from benchmarks.peers.setup import is_ready
from benchmarks.rows import Row, dense_rows, low_rank_rows
from benchmarks.scaling import gpu_timings, thread_timings

SIZES = (768, 1024, 2048, 4096)
RANKS = (64, 16, 256)
"""64 first: at the largest size the literal recipe runs at this rank and lends its time to the others."""


@click.command()
@click.option("--sizes", default=",".join(map(str, SIZES)), show_default=True, help="Sides of the square matrices.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads, for both sides.")
@click.option("--peers/--no-peers", default=True, help="Then benchmarks.peers, where mergekit stands.")
@click.option("--write", is_flag=True, help="Write the tables into benchmarks/RESULTS.md.")
def main(sizes: str, threads: int, peers: bool, write: bool) -> None:
    """Time the literal recipe against devec; JSON goes to benchmarks/out/bench.json."""
    console = Console()
    console.width = max(console.width, 144)  # a squeezed table hides figures
    facts = machine()
    console.print(in_words(facts), style="dim")
    rows: list[Row] = []
    with console.status("timing") as status:
        with on_threads(threads):
            for n in map(int, sizes.split(",")):
                for case, source in (("low-rank", low_rank_rows(n, RANKS)), ("dense", dense_rows(n))):
                    status.update(f"{case}, n = {n}")
                    rows.extend(source)
            status.update("a family of adapters")
            family = family_seconds()
        status.update("threads and devices")
        timings = thread_timings(2048) + gpu_timings((2048, 4096), threads)
    figures = report.Figures(facts, threads, rows, timings, family)
    report.print_figures(console, figures)
    out = report.HERE / "out"
    out.mkdir(exist_ok=True)
    (out / "bench.json").write_text(report.as_json(figures))
    if write:
        report.write_results(report.markdown(figures))
    missed = sum(row.verdict in ("short", "missed") for row in rows)
    console.print(f"{missed} of {len(rows)} rows fall short" if missed else "every required minimum is met")
    if peers and is_ready():
        run_peers(write=write)
    elif peers:
        console.print("not compared with mergekit: make bench-peers sets it up and does so", style="dim")


if __name__ == "__main__":
    main()
