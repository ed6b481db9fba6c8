"""The figures as JSON and as their section of RESULTS.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.gpu.checks import Accuracy, Agreement, Choice
from benchmarks.gpu.expected import STEPS, expected
from benchmarks.gpu.layers import LAYERS
from benchmarks.gpu.meter import Roofline, Stage
from benchmarks.machine import in_words
from benchmarks.report import duration, grid

MARKERS = ("<!-- gpu: begin -->", "<!-- gpu: end -->")


@dataclass
class Figures:
    """One run. Without a card only ``accuracies`` are measured, on the CPU."""

    machine: dict[str, Any]
    pool: int
    scale: int
    device: str | None
    accuracies: list[Accuracy]
    roofline: Roofline | None = None
    stages: list[Stage] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    end_to_end: float | None = None


def as_json(figures: Figures) -> str:
    document = asdict(figures)
    document["measured"] = figures.device is not None
    document["expected"] = [asdict(row) for row in expected(figures.pool)]
    if figures.roofline is not None:
        for entry, stage in zip(document["stages"], figures.stages, strict=True):
            entry["floor"] = figures.roofline.floor(stage)
    return json.dumps(document, indent=1) + "\n"


def markdown(figures: Figures) -> str:
    parts = [f"Machine: {in_words(figures.machine)}.\n"]
    parts += _measured(figures) if figures.device is not None else _not_measured(figures)
    where = "this CPU (torch's own bfloat16 products)" if figures.device is None else figures.device
    parts += [
        f"Products of the power steps against a float64 Gram matrix, on {where}; two pairs of a spectrum, largest "
        "differences; `low` is bfloat16's share of the arithmetic outside the panels:\n",
        grid(ACCURACY, [_accuracy(row) for row in figures.accuracies]),
    ]
    return "\n".join(parts)


ACCURACY = ("spectrum", "n", "rank", "products", "angle", "Δ values", "Δλ", "λ > 0.85", "low")
STAGES = ("case", "stage", "seconds", "TFLOP", "TFLOP/s", "GB/s", "of roofline", "peak GiB")
AGREEMENT = ("case", "tensor", "shape", "ranks", "CPU", "Δ values", "angle", "Δλ")
CHOICES = ("what", "way", "time")


def _accuracy(row: Accuracy) -> tuple[str, ...]:
    return (
        row.spectrum, str(row.n), str(row.rank), row.products, f"{row.angle:.2g}°", f"{row.values:.0e}",
        f"{row.eigenvalues:.0e}", f"{row.found}/{row.exact}", f"{row.low_share:.0%}",
    )


def _not_measured(figures: Figures) -> list[str]:
    rows = [(r.case, r.stage, f"{r.teraflops:.3g}", duration(r.seconds)) for r in expected(figures.pool)]
    return [
        "**Not measured: no graphics card was present.** `python -m benchmarks.gpu --write` on a machine with one "
        "replaces this section.\n",
        f"Until then, arithmetic: the products of {LAYERS} layers, {figures.pool} vectors ({STEPS} steps of the "
        "iteration, 64 directions), at an H100's data-sheet peaks. A card reaches less, and cores, transfers and "
        "launches come on top:\n",
        grid(("case", "stage", "TFLOP", "at least"), rows),
    ]


def _measured(figures: Figures) -> list[str]:
    roof = figures.roofline
    assert roof is not None
    ceilings = ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in roof.rates.items())
    layers = max((s.layers for s in figures.stages), default=0)
    scaled = "" if figures.scale == 1 else f" Every side is divided by {figures.scale}: a smoke run, no benchmark."
    parts = [
        f"Roofline of {figures.device}, measured: {ceilings}, copy {roof.bandwidth / 1e9:.4g} GB/s.\n",
        f"Layers of Llama-2-7B (7 linears each), {figures.pool} vectors: measured on {layers}, given for {LAYERS}; "
        "deltas and factors stay on the device; apply makes the unique parts of both members of every pair (64 "
        f"directions). `of roofline`: the products' own floor over the time taken.{scaled}\n",
        grid(STAGES, [_stage(stage, roof) for stage in figures.stages]),
    ]
    if figures.end_to_end is not None:
        parts.append(f"One layer, dense, from and to the CPU's memory: {duration(figures.end_to_end)}.\n")
    parts += [
        "Against the function for one matrix on the CPU (first two vectors of one tensor a shape):\n",
        grid(AGREEMENT, [_agreement(row) for row in figures.agreements]),
        "Roads not taken (**bold**: what the library does):\n",
        grid(CHOICES, [(c.what, f"**{c.way}**" if c.taken else c.way, duration(c.seconds)) for c in figures.choices]),
    ]
    return parts


def _stage(stage: Stage, roof: Roofline) -> tuple[str, ...]:
    whole = LAYERS / stage.layers
    flops = sum(stage.flops.values())
    return (
        stage.case, stage.stage, duration(stage.seconds * whole), f"{flops * whole / 1e12:.3g}",
        f"{flops / stage.seconds / 1e12:.3g}", f"{stage.bytes / stage.seconds / 1e9:.4g}",
        f"{roof.floor(stage) / stage.seconds:.0%}", f"{stage.peak / 2**30:.2f}",
    )


def _agreement(row: Agreement) -> tuple[str, ...]:
    return (
        row.case, row.tensor, "x".join(map(str, row.shape)), "/".join(map(str, row.ranks)),
        "/".join(map(str, row.cpu_ranks)), f"{row.values:.0e}", f"{row.angle:.2g}°", f"{row.eigenvalues:.0e}",
    )
