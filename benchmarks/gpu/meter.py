"""What a stage costs: seconds, arithmetic of its products by type, bytes that these move, memory; and the roofline.

Arithmetic is counted on the products that run on the device (matrix times matrix), not guessed from a formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.clock import once, typical

T = TypeVar("T")
aten = torch.ops.aten
OPERANDS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmm_: 1, aten.baddbmm_: 1}
"""Products and where their two factors begin among the arguments."""


class CountedProducts(TorchDispatchMode):
    """Counts products while it is on, of the thread that turned it on: ``flops`` by type, and ``bytes`` of factors and
    results, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        at = OPERANDS.get(func.overloadpacket)
        if at is not None:
            left, right = args[at], args[at + 1]
            self.flops[str(left.dtype).removeprefix("torch.")] += 2 * left.numel() * right.shape[-1]
            self.bytes += sum(t.numel() * t.element_size() for t in (left, right, out))
        return out


@dataclass
class Stage:
    """``seconds``, ``flops`` by type and ``bytes`` summed over ``layers``; ``peak`` is the most memory held."""

    case: str
    stage: str
    seconds: float = 0.0
    layers: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    peak: int = 0


class Meter:
    """Stages by case. Arithmetic is counted on one untimed layer (which also warms up) and is the same in each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: dict[tuple[str, str], Stage] = {}
        self.counting = True

    def run(self, case: str, stage: str, call: Callable[[], T]) -> T:
        entry = self.stages.setdefault((case, stage), Stage(case, stage))
        if self.counting:
            with CountedProducts() as products:
                result = call()
            entry.flops, entry.bytes = dict(products.flops), float(products.bytes)
            return result
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds, result = once(call)
        if self.device.type == "cuda":
            entry.peak = max(entry.peak, torch.cuda.max_memory_allocated(self.device))
        entry.seconds += seconds.wall
        entry.layers += 1
        return result

    def totals(self) -> list[Stage]:
        """Every stage with the arithmetic of all its layers."""
        return [
            Stage(s.case, s.stage, s.seconds, s.layers, {k: v * s.layers for k, v in s.flops.items()},
                  s.bytes * s.layers, s.peak)
            for s in self.stages.values()
        ]


@dataclass(frozen=True)
class Roofline:
    """Measured on the device: products in FLOP/s by type, a copy in bytes read and written per second."""

    rates: dict[str, float]
    bandwidth: float

    def floor(self, stage: Stage) -> float:
        """The fewest seconds that the stage's products could take: arithmetic or traffic, whichever is slower."""
        arithmetic = sum(count / self.rates[kind] for kind, count in stage.flops.items())
        return max(arithmetic, stage.bytes / self.bandwidth)


def roofline(device: torch.device, size: int, patience: float = 0.5) -> Roofline:
    """From square products of ``size`` (random data) and a copy of 16 times as many float32 numbers."""
    gen = torch.Generator(device=device).manual_seed(0)
    rates = {}
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        A, B = (torch.randn(size, size, generator=gen, device=device).to(kind) for _ in range(2))

        def product(A: Tensor = A, B: Tensor = B) -> Tensor:
            return A @ B

        seconds, _ = typical(product, budget=patience, least=1)
        rates[str(kind).removeprefix("torch.")] = 2 * size**3 / seconds.wall
    source = torch.randn(16 * size * size, generator=gen, device=device)
    target = torch.empty_like(source)
    seconds, _ = typical(lambda: target.copy_(source), budget=patience, least=1)
    return Roofline(rates, 2 * source.numel() * source.element_size() / seconds.wall)
