"""Inner products of many deltas of one tensor, each read once where the pairwise form would read it k times."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from devec.core.delta import Delta, LowRankDelta
from devec.linalg.lowrank import inner_of_many_dense, inner_of_many_products

Pair = tuple[int, int]


def inner_products(deltas: Mapping[int, Delta], target: int | None = None) -> dict[Pair, float]:
    """``<Delta_i, Delta_j>`` for i <= j in float64: of all pairs, or with a ``target`` of the target with each other.
    Factors never become dense against factors. Cost: ``(n + m) r^2`` a pair of factors, ``n m`` a pair of matrices.
    """
    members = sorted(deltas)
    low = [i for i in members if isinstance(deltas[i], LowRankDelta)]
    other = [i for i in members if i not in low]
    found: dict[Pair, float] = {}
    if target is None:
        found |= _upper(low, inner_of_many_products([_factors(deltas[i]) for i in low]))
        found |= _upper(other, inner_of_many_dense([deltas[i].dense() for i in other]))
        mixed = [(min(i, j), max(i, j)) for i in low for j in other]
    else:
        mixed = [(min(i, target), max(i, target)) for i in members if target in deltas and i != target]
    found |= {(i, j): deltas[i].inner(deltas[j]) for i, j in mixed}
    return dict(sorted(found.items()))


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    assert isinstance(delta, LowRankDelta)
    return delta.B, delta.A


def _upper(members: list[int], G: Tensor) -> dict[Pair, float]:
    rows = G.tolist()
    return {(i, j): rows[a][b] for a, i in enumerate(members) for b, j in enumerate(members) if a <= b}
