"""Model Breadcrumbs: without the largest and without the smallest entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.methods.merge.entries import (
    Reduce,
    Then,
    joined,
    l1_factors,
    measured,
    merged,
    of,
    one_of,
    order_statistics,
    per_vector,
    rescaled,
    stack,
    weigh,
    weights_for,
    within,
)
from devec.methods.registry import register


def measure(
    whole: Whole, *, scope: str, beta: Sequence[float] | float, gamma: Sequence[float] | float, rescale: str, **_: Any
) -> dict[str, Any]:
    """With scope=tensor, the smallest and the largest magnitude that each vector keeps; with rescale=l1, its factor.

    Nothing is read otherwise.
    """
    found: list[list[float]] = []
    if scope == "tensor":
        found = order_statistics(
            whole, lambda block: stack(block).abs_(), lambda n, i: borders(n, of(beta, i), of(gamma, i))
        )
    factors = l1_factors(whole, lambda b: middle(b, beta, gamma, scope, found)) if rescale == "l1" else []
    return {"borders": found, "factors": factors}


@register("merge", grain="rows", source="arXiv:2312.06795", measure=measure,
          looks=lambda given: 2 * (given["scope"] == "tensor") + (given["rescale"] == "l1"))
def breadcrumbs(
    block: Block,
    beta: list[float] | float = 0.2,
    gamma: list[float] | float = 0.1,
    scale: float = 0.4,
    weights: list[float] | None = None,
    scope: Literal["row", "tensor"] = "row",
    then: Then = "task-arithmetic",
    rescale: Literal["none", "l1"] = "none",
    reduce: Reduce | None = None,
) -> Delta:
    """Drop the largest entries of every row, keep the largest of the rest, and sum.

    Math        of the n entries of a row by falling magnitude, m_i keeps places g + 1 to g + k,
                k = floor(beta n), g = min(floor(gamma n), n - k);  D_i = m_i * Delta_i
                then=task-arithmetic: W = W_0 + scale * sum_i w_i D_i
                then=ties: W = W_0 + scale * mean of the w_i D_i that have the sign of their sum
    Symbols     gamma = the fraction that is dropped as too large; beta = the fraction of all that is kept;
                w_i = weights[i], 1 each by default; scope=tensor: the n entries are those of the tensor;
                rescale=l1: D_i times |Delta_i|_1 / |D_i|_1 of the tensor; reduce: sum, or mean (divided by sum_i w_i,
                or by sum |w_i| of those that agree), by default as said
    Shapes      T deltas (n, m) -> one (n, m); a row is one of the matrix out x in, a 1-D parameter is one row
    Guarantees  borders: exact order statistics, k >= 1; where gamma and beta do not fit together gamma gives way;
                ties: an entry equal to one that is kept is kept, so the order of entries decides nothing;
                beta 1 and gamma 0 is task arithmetic; linear in scale and weights; permutation up to rounding
    Numerics    sorts rows, or selects on the bits (scope=tensor: two more passes); sums in the order given
    Differs     defaults are those of the authors' example (beta, gamma) and of their program (scale). Convolutions: the
                authors take rows along the last dimension, here out x (in k k). mergekit: scope=tensor
    Raises      UsageError: a wrong number of weights, betas or gammas, beta outside (0, 1], gamma outside [0, 1],
                an unknown word; InputError: NaN or infinity
    """
    for value in per_vector(block, beta, "breadcrumbs", "betas"):
        within("breadcrumbs", "beta", value, 0.0, 1.0, open_low=True)
    for value in per_vector(block, gamma, "breadcrumbs", "gammas"):
        within("breadcrumbs", "gamma", value, 0.0, 1.0)
    one_of("breadcrumbs", "scope", scope, "row", "tensor")
    one_of("breadcrumbs", "rescale", rescale, "none", "l1")
    w = weights_for(block, weights, "breadcrumbs")
    found = measured(block, measure, scope=scope, beta=beta, gamma=gamma, rescale=rescale)
    entries = rescaled(middle(block, beta, gamma, scope, found["borders"]), found["factors"])
    return merged(block, joined("breadcrumbs", weigh(entries, w), w, then, reduce).mul_(scale))


def middle(
    block: Block, beta: Sequence[float] | float, gamma: Sequence[float] | float, scope: str,
    found: Sequence[Sequence[float]],
) -> Tensor:
    """The entries of every vector, zero where they are dropped; ``found`` are the borders of a tensor."""
    entries = stack(block)
    if not entries.numel():
        return entries
    for i, entry in enumerate(entries):
        if scope == "tensor":
            low, high = torch.tensor(found[i], dtype=entry.dtype)
        else:
            low, high = row_borders(as_rows(block, entry), of(beta, i), of(gamma, i))
        size = entry.abs()
        entry *= (size >= low) & (size <= high)
    return entries


def borders(n: int, beta: float, gamma: float) -> list[int]:
    """Ranks (0 the smallest) of the smallest and the largest entry that is kept, of n."""
    k = max(int(beta * n), 1)
    g = min(int(gamma * n), n - k)
    return [n - g - k, n - g - 1]


def row_borders(entries: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    low, high = borders(entries.shape[-1], beta, gamma)
    ordered = torch.from_numpy(np.sort(entries.abs().numpy(), axis=-1))  # ten times as fast as torch
    return ordered[..., low, None], ordered[..., high, None]


def as_rows(block: Block, entries: Tensor) -> Tensor:
    """The entries with a 1-D parameter, which is a column, as one row."""
    return entries.transpose(-1, -2) if block.layout.is_vector else entries
