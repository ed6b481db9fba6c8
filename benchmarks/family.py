"""A family of adapters of the size people have: what Python and many small tensors cost."""

from __future__ import annotations

import torch

from benchmarks.clock import Seconds, once
from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, LowRankDelta
from devec.core.layout import Layout
from devec.core.options import Factoring
from devec.core.vectors import Pool, TaskVector
from devec.linalg.numerics import generator
from devec.methods.decompose.shared_unique import shared_unique


def adapters(count: int, tensors: int, rank: int, wide: int, narrow: int) -> Pool:
    """``count`` random LoRAs of ``tensors`` modules, by turns ``wide x narrow`` and ``narrow x narrow``."""
    vectors = []
    for i in range(count):
        gen = generator("benchmark", "family", i)
        found: dict[str, Delta] = {}
        for t in range(tensors):
            rows = wide if t % 2 == 0 else narrow
            B = torch.randn(rows, rank, generator=gen) * 0.01
            found[f"layer{t:03d}.weight"] = LowRankDelta(B, torch.randn(rank, narrow, generator=gen) * 0.01)
        layouts = {name: Layout(delta.shape) for name, delta in found.items()}
        vectors.append(TaskVector(f"adapter{i}", found, layouts))
    return Pool(tuple(vectors))


def family_seconds(
    count: int = 9, tensors: int = 48, rank: int = 8, wide: int = 2304, narrow: int = 768
) -> dict[str, float]:
    """Seconds to factor the whole family, to compute overlaps and decide (cold: with the chance null drawn; warm:
    again at another threshold), and to read every unique part, once each as a command would."""
    pool = adapters(count, tensors, rank, wide, narrow)
    factoring = Factoring()
    spent: dict[str, Seconds] = {}
    spent["factor"], factors = once(lambda: {block.name: shared_unique(block, factoring) for block in pool.blocks()})
    decomposition = Decomposition(pool, factoring, factors)
    spent["overlap"], _ = once(lambda: decomposition.algebra)
    spent["decide, cold"], spectra = once(lambda: decomposition.spectra)
    assert len(spectra) == tensors * count * (count - 1) // 2
    spent["decide, warm"], _ = once(lambda: decomposition.with_view(threshold=0.5).spectra)

    def parts() -> int:
        return sum(1 for name in pool.names for delta in decomposition.unique(name).deltas.values() if delta.shape)

    spent["unique parts"], made = once(parts)
    assert made == count * tensors
    seconds = {stage: s.wall for stage, s in spent.items()}
    seconds["total"] = sum(seconds.values())
    return seconds
