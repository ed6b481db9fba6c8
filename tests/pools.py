"""Pools and decompositions made in memory, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.layout import Layout
from devec.core.options import Factoring, View
from devec.core.vectors import Pool, TaskVector
from devec.methods.decompose.shared_unique import shared_unique

Value = Tensor | tuple[Tensor, Tensor] | Delta
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def delta(value: Value) -> Delta:
    """A matrix, a pair of factors (B, A), or a delta as it is."""
    if isinstance(value, Delta):
        return value
    return DenseDelta(value) if isinstance(value, Tensor) else LowRankDelta(*value)


def vector(name: str, values: Mapping[str, Value], **more: Any) -> TaskVector:
    deltas = {n: delta(v) for n, v in values.items()}
    return TaskVector(name, deltas, {n: Layout(d.shape) for n, d in deltas.items()}, **more)


def pool(*vectors: Mapping[str, Value] | Value) -> Pool:
    """One vector per argument, called A, B, C ...; a bare matrix becomes the tensor "w"."""
    named = [v if isinstance(v, Mapping) else {"w": v} for v in vectors]
    return Pool(tuple(vector(LETTERS[i], v) for i, v in enumerate(named)))


def decomposed(p: Pool, view: View | None = None, **factoring: Any) -> Decomposition:
    choices = Factoring(**factoring)
    tensors = {n: shared_unique(p.block(n), choices) for n in p.tensors()}
    return Decomposition(p, choices, tensors, view or View())


def block(values: Sequence[Value | None], name: str = "w") -> Block:
    deltas = tuple(None if v is None else delta(v) for v in values)
    shape = next(d.shape for d in deltas if d is not None)
    return Block(name, Layout(shape), tuple(LETTERS[: len(deltas)]), deltas)


def dense(part: TaskVector, name: str = "w") -> Tensor:
    return part.deltas[name].dense().double()


def float_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return B.float(), A.float()


def rank_of(part: TaskVector, name: str = "w", rtol: float = 1e-5) -> int:
    s = torch.linalg.svdvals(dense(part, name))
    return int((s > rtol * s[0]).sum()) if float(s[0]) > 0 else 0
