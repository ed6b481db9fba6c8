"""Pools of any size whose vectors share a quarter of their directions, as factors and as full-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.layout import Layout
from devec.core.vectors import Pool, TaskVector
from devec.linalg.numerics import generator

TILT = torch.pi / 18
"""Each vector's shared directions stand 10 degrees off the common ones: cos^2 of two vectors is .94, above .85."""


def _basis(common: Tensor, rank: int, gen: torch.Generator) -> Tensor:
    """``rank`` orthonormal columns: those of ``common`` tilted into directions of its own, and others."""
    n, shared = common.shape
    own: Tensor = torch.linalg.qr(torch.cat([common, torch.randn(n, rank, generator=gen)], dim=1)).Q[:, shared:]
    tilted = common * torch.cos(torch.tensor(TILT)) + own[:, :shared] * torch.sin(torch.tensor(TILT))
    return torch.cat([tilted, own[:, shared:]], dim=1)


def _common(side: int, rank: int, tensor: int) -> Tensor:
    gen = generator("benchmark", "cost", side, rank, tensor)
    Q: Tensor = torch.linalg.qr(torch.randn(side, rank // 4, generator=gen)).Q
    return Q


def low_rank_pool(count: int, tensors: int, side: int, rank: int) -> Pool:
    """``count`` adapters of ``tensors`` modules ``side x side``."""
    common = [_common(side, rank, t) for t in range(tensors)]

    def delta(i: int, t: int) -> Delta:
        gen = generator("benchmark", "cost", side, rank, t, i)
        B = _basis(common[t], rank, gen) @ torch.linalg.qr(torch.randn(rank, rank, generator=gen)).Q
        return LowRankDelta(B, torch.randn(rank, side, generator=gen) / side**0.5)

    return _pool([[delta(i, t) for t in range(tensors)] for i in range(count)])


def dense_pool(count: int, side: int, rank: int) -> Pool:
    """``count`` full-rank matrices: ``rank`` directions with singular values j^-1/2 above white noise, whose norm is
    half the smallest of them."""
    common = _common(side, rank, 0)
    values = torch.arange(1, rank + 1) ** -0.5

    def delta(i: int) -> Delta:
        gen = generator("benchmark", "cost dense", side, rank, i)
        V = torch.linalg.qr(torch.randn(side, rank, generator=gen)).Q
        W = torch.randn(side, side, generator=gen) * (0.5 * float(values.min()) / (2 * side**0.5))
        return DenseDelta(W.addmm_(_basis(common, rank, gen) * values, V.T))

    return _pool([[delta(i)] for i in range(count)])


def _pool(deltas: list[list[Delta]]) -> Pool:
    vectors = []
    for i, row in enumerate(deltas):
        found = {f"layer{t:02d}.weight": delta for t, delta in enumerate(row)}
        vectors.append(TaskVector(f"v{i}", found, {name: Layout(d.shape) for name, d in found.items()}))
    return Pool(tuple(vectors))


def first(pool: Pool, count: int) -> Pool:
    return Pool(pool.vectors[:count])
