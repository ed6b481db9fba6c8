"""What the arithmetic alone says of a card, for the time before one was measured. Labelled so wherever it is shown."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.layers import LAYERS, SIGNAL, shapes
from benchmarks.gpu.meter import Roofline, Stage

PEAKS = Roofline({"float32": 67e12, "float64": 67e12, "bfloat16": 989e12}, 3.35e12)
"""H100 SXM by its data sheet (dense; float64 on tensor cores). Products reach three quarters of it or less."""

STEPS = 5
"""Steps of the iteration: seen on planted gaps at n = 1024 (4 to 5)."""


@dataclass(frozen=True)
class Expected:
    case: str
    stage: str
    teraflops: float
    seconds: float


def expected(pool: int) -> list[Expected]:
    """The whole model: products only, everything at the peak, no transfers and no cores on the CPU."""
    linears = [(n, m) for _, n, m in shapes()]
    sides = LAYERS * pool * sum(n + m for n, m in linears)
    weights = LAYERS * pool * sum(n * m for n, m in linears)
    width, pairs = SIGNAL * 3 // 2, pool * (pool - 1) // 2
    panels = {"float64": 8.0 * sides * width**2 * STEPS}
    power = 2.0 * weights * width
    rows = [
        Stage("dense, float32 products", "factor", flops={"float32": 2 * STEPS * power, **panels},
              bytes=4.0 * weights * 2 * STEPS),
        Stage("dense, bfloat16 products", "factor",
              flops={"bfloat16": 2 * (STEPS - 1) * power, "float32": 2 * power, **panels},
              bytes=(2.0 * (STEPS - 1) + 4.0) * 2 * weights),
        Stage("dense", "apply", flops={"float32": 2.0 * pairs / pool * 4 * weights * SIGNAL},
              bytes=2.0 * pairs / pool * 4 * 3 * weights),
    ]
    for rank in (64, 256):
        rows.append(Stage(f"LoRA r = {rank}", "factor", flops={"float64": 8.0 * sides * rank**2}))
        rows.append(Stage(f"LoRA r = {rank}", "overlaps",
                          flops={"float32": LAYERS * sum(2.0 * n * (pool * rank) ** 2 for n, _ in linears)}))
    return [Expected(s.case, s.stage, sum(s.flops.values()) / 1e12, PEAKS.floor(s)) for s in rows]
