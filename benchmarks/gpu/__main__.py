"""``python -m benchmarks.gpu``: everything that only a graphics card can tell, in one run of a few minutes."""

from __future__ import annotations

from time import perf_counter

import click
import torch
from rich.console import Console

from benchmarks.clock import once
from benchmarks.gpu import checks, report
from benchmarks.gpu.layers import LAYERS, adapter_layer, dense_layer, planted_rank
from benchmarks.gpu.meter import Meter, roofline
from benchmarks.gpu.stages import CASES, Place, decomposed
from benchmarks.machine import machine
from benchmarks.report import HERE, write_results
from devec.api.decompose import place
from devec.api.gpu import available, factored_in_batches
from devec.core.block import Block
from devec.core.options import Factoring
from devec.core.vectors import Pool, TaskVector
from devec.engine.threads import default_workers

CPU = torch.device("cpu")


@click.command()
@click.option("--layers", default=LAYERS, show_default=True, type=click.IntRange(1), help="Layers to measure.")
@click.option("--pool", default=10, show_default=True, type=click.IntRange(2), help="Task vectors.")
@click.option("--scale", default=1, show_default=True, type=click.IntRange(1, 16), help="Divide every side by this.")
@click.option("--device", default="auto", show_default=True, help="auto | cuda | cpu (a smoke run; use --scale).")
@click.option("--minutes", default=5.0, show_default=True, help="Begin no further layer after this.")
@click.option("--write", is_flag=True, help="Write the section of benchmarks/RESULTS.md.")
def main(layers: int, pool: int, scale: int, device: str, minutes: float, write: bool) -> None:
    """Time the stages at the shapes of Llama-2-7B; JSON goes to benchmarks/out/gpu.json."""
    console = Console()
    figures = measure(layers, pool, scale, device, minutes, console)
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    (out / "gpu.json").write_text(report.as_json(figures))
    text = report.markdown(figures)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if write:
        write_results(text, markers=report.MARKERS)


def measure(layers: int, pool: int, scale: int, device: str, minutes: float, console: Console) -> report.Figures:
    """All figures. With ``device="auto"`` and no card: accuracy on the CPU alone."""
    begun, patience = perf_counter(), 0.5 if scale == 1 else 0.0
    chosen = place(device)
    present = device != "auto" or chosen.type == "cuda"
    sizes = [max(n // scale, 256) for n in ((1024, 2048) if chosen.type == "cuda" else (512, 1024))]
    figures = report.Figures(machine(), pool, scale, None, checks.accuracies(list(dict.fromkeys(sizes)), chosen))
    if not present:
        return figures
    figures.device = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "the CPU"
    figures.roofline = roofline(chosen, 8192 // scale, patience)
    spot = Place(chosen, available(chosen), default_workers())
    meter = Meter(chosen)
    for layer in range(-1, layers):  # the first pass counts and warms up
        if layer > 0 and perf_counter() - begun > 60 * minutes:
            console.print(f"stopped after {layer} layers")
            break
        at = max(layer, 0)
        dense = dense_layer(at, pool, scale, chosen)
        for case in CASES:
            blocks = dense if case.rank is None else adapter_layer(at, pool, max(case.rank // scale, 1), scale, chosen)
            found = decomposed(case, blocks, spot, meter, planted_rank(scale))
            if layer < 0:
                figures.agreements += checks.agreements(case, blocks, *found)
        if layer < 0:
            square = [block for block in dense if block.layout.matrix_shape == dense[0].layout.matrix_shape]
            figures.choices = checks.choices(spot, scale, square, patience)
            figures.end_to_end = from_memory(dense, chosen)
            meter.counting = False
        console.print(f"layer {layer + 1} of {layers}: {perf_counter() - begun:.0f} s", style="dim")
    figures.stages = meter.totals()
    return figures


def from_memory(blocks: list[Block], device: torch.device) -> float:
    """Seconds to factor one layer whose deltas lie in the CPU's memory, and to bring the factors back there."""
    held = [block.on(CPU) for block in blocks]
    vectors = []
    for i, name in enumerate(held[0].vectors):
        deltas = {block.name: delta for block in held if (delta := block.deltas[i]) is not None}
        vectors.append(TaskVector(name, deltas, {block.name: block.layout for block in held}))
    pool = Pool(tuple(vectors))
    seconds, _ = once(lambda: list(factored_in_batches(pool, pool.tensors(), Factoring(), device)))
    return seconds.wall


if __name__ == "__main__":
    main()
