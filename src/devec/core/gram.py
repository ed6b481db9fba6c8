"""Inner products of many deltas of one tensor, each read once where the pairwise form would read it k times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from devec.core.delta import Delta, LowRankDelta
from devec.core.lazy import in_file, row_blocks
from devec.linalg.lowrank import inner_of_many_products
from devec.linalg.numerics import CORE

Pair = tuple[int, int]


def inner_products(
    deltas: Mapping[int, Delta], target: int | None = None, *, transposed: bool = False
) -> dict[Pair, float]:
    """``<Delta_i, Delta_j>`` for i <= j in float64: of all pairs, or with a ``target`` of the target with each other.
    Factors never become dense among themselves; where a dense delta takes part, all are gone through together by blocks
    of the file's rows (``transposed``: the file holds the transposes), so that none is ever whole.
    Cost: ``(n + m) r^2`` a pair of factors, ``n m`` a pair of matrices.
    """
    members = sorted(deltas)
    low = {i for i in members if isinstance(deltas[i], LowRankDelta)}
    found: dict[Pair, float] = {}
    if target is None:
        pairs = [(i, j) for i in members for j in members if i <= j]
        found |= _upper(sorted(low), inner_of_many_products([_factors(deltas[i]) for i in sorted(low)]))
    else:
        pairs = [(min(i, target), max(i, target)) for i in members if target in deltas and i != target]
        found |= {(i, j): deltas[i].inner(deltas[j]) for i, j in pairs if i in low and j in low}
    found |= _by_rows(deltas, [pair for pair in pairs if not low.issuperset(pair)], transposed)
    return dict(sorted(found.items()))


def _by_rows(deltas: Mapping[int, Delta], pairs: Sequence[Pair], transposed: bool) -> dict[Pair, float]:
    filed = {i: in_file(deltas[i], transposed) for i in sorted({i for pair in pairs for i in pair})}
    if not filed:
        return {}
    # Numbers and not tensors: a small tensor that stays between two blocks keeps their memory from being used again.
    sums: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    for start, stop in row_blocks(next(iter(filed.values())).shape):
        rows = {i: delta.rows(start, stop).dense().reshape(-1).to(CORE) for i, delta in filed.items()}
        for i, j in pairs:
            sums[i, j].append(float(torch.dot(rows[i], rows[j])))
    return {pair: float(torch.tensor(parts, dtype=CORE).sum()) for pair, parts in sums.items()}


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    assert isinstance(delta, LowRankDelta)
    return delta.B, delta.A


def _upper(members: list[int], G: Tensor) -> dict[Pair, float]:
    rows = G.tolist()
    return {(i, j): rows[a][b] for a, i in enumerate(members) for b, j in enumerate(members) if a <= b}
