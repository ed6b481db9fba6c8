"""DELLA: drop entries at random, small ones more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.methods.merge.breadcrumbs import as_rows
from devec.methods.merge.dare import Rescale, draws
from devec.methods.merge.entries import (
    Reduce,
    Then,
    joined,
    l1_factors,
    measured,
    merged,
    of,
    one_of,
    per_vector,
    rescaled,
    stack,
    weigh,
    weights_for,
    within,
)
from devec.methods.registry import register


def measure(
    whole: Whole, *, density: Sequence[float] | float, epsilon: Sequence[float] | float, rescale: str, seed: int,
    **_: Any,
) -> list[float]:
    """With rescale=l1, the factor of every vector; nothing is read otherwise."""
    if rescale != "l1":
        return []
    return l1_factors(whole, lambda b: thinned(b, density, epsilon, seed, divide=False))


@register("merge", grain="rows", source="arXiv:2406.11617", measure=measure,
          looks=lambda given: int(given["rescale"] == "l1"))
def della(
    block: Block,
    density: list[float] | float = 0.7,
    epsilon: list[float] | float = 0.07,
    then: Then = "ties",
    scale: float = 1.1,
    weights: list[float] | None = None,
    rescale: Rescale = "inverse",
    seed: int = 0,
    reduce: Reduce | None = None,
) -> Delta:
    """Keep entries at random, the larger in their row the likelier, rescale, and merge what is left.

    Math        q = density - epsilon + 2 epsilon r / (n - 1), r = 0..n-1 the entry's place in its row by rising |Delta|
                D_i = m_i * Delta_i / q_i, m_i ~ Bernoulli(q_i) an entry
                then=ties: W = W_0 + scale * mean of the w_i D_i that have the sign of their sum
                then=task-arithmetic: W = W_0 + scale * sum_i w_i D_i
    Symbols     q = the entry's probability of being kept, n = the length of a row (n = 1: q = density);
                density 1: q = 1 whatever epsilon; w_i = weights[i], 1 each by default;
                rescale=l1: D_i = m_i * Delta_i * |Delta_i|_1 / |m_i * Delta_i|_1, rescale=none: D_i = m_i * Delta_i;
                reduce: sum, or mean (divided by sum |w_i| of those that agree, or by sum_i w_i), by default the mean
                with then=ties and the sum with then=task-arithmetic
    Shapes      T deltas (n, m) -> one (n, m); a row is one of the matrix out x in, a 1-D parameter is one row
    Guarantees  mask: a function of the row and of (seed, tensor name, vector name, row, column) alone, so that blocks
                and workers change nothing, and no global generator is used or moved; ties in a row rank by column;
                mean: with rescale=inverse the expectation over seeds of D_i is Delta_i; with l1, |D_i|_1 = |Delta_i|_1
                (unless everything was dropped); density 1 drops nothing; permutation up to rounding
    Numerics    53 random bits an entry, q in float64; l1 norms in float64 (one more pass over the inputs)
    Differs     defaults are those of the authors' example (drop rate 0.3, window 0.14, scale 1.1). mergekit: epsilon
                0.15 and rescale=l1, drawn from the global generator
    Raises      UsageError: a wrong number of weights, densities or epsilons,
                density - epsilon <= 0 or density + epsilon > 1, an unknown word; InputError: NaN or infinity
    """
    densities = per_vector(block, density, "della", "densities")
    for d, e in zip(densities, per_vector(block, epsilon, "della", "epsilons"), strict=True):
        within("della", "epsilon", e, 0.0, 1.0)
        if d != 1.0:
            within("della", "density - epsilon", d - e, 0.0, 1.0, open_low=True)
            within("della", "density + epsilon", d + e, 0.0, 1.0 + 1e-12)
    one_of("della", "rescale", rescale, "inverse", "l1", "none")
    w = weights_for(block, weights, "della")
    factors = measured(block, measure, density=density, epsilon=epsilon, rescale=rescale, seed=seed)
    entries = thinned(block, density, epsilon, seed, divide=rescale == "inverse")
    rescaled(entries, factors)
    return merged(block, joined("della", weigh(entries, w), w, then, reduce).mul_(scale))


def thinned(
    block: Block, density: Sequence[float] | float, epsilon: Sequence[float] | float, seed: int, *, divide: bool
) -> Tensor:
    """The entries of every vector, zero where they are dropped, divided by their probabilities with ``divide``."""
    entries = stack(block)
    if entries.numel():
        for i, (entry, name) in enumerate(zip(entries, block.vectors, strict=True)):
            if of(density, i) == 1.0:
                continue
            chance = as_rows(block, probabilities(as_rows(block, entry), of(density, i), of(epsilon, i)))
            if divide:
                entry.copy_(entry / chance)
            entry *= draws(block, name, seed) < chance
    return entries


def rising(sizes: Tensor) -> Tensor:
    """Columns of every row by rising entry, equal ones by column."""
    if sizes.dtype == torch.float64:
        return sizes.sort(dim=-1, stable=True).indices
    # The bits of a float32 and its column in one whole number: numpy sorts these ten times as fast.
    keys = (sizes.contiguous().view(torch.int32).to(torch.int64) << 32) | torch.arange(sizes.shape[-1])
    return torch.from_numpy(np.sort(keys.numpy(), axis=-1)) & 0xFFFF_FFFF


def probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """``q`` of every entry, float64: linear in its rank by magnitude within its row, equal ones by column."""
    n = rows.shape[-1]
    if n == 1:
        return torch.full(rows.shape, density, dtype=torch.float64)
    order = rising(rows.abs())
    step = torch.linspace(density - epsilon, density + epsilon, n, dtype=torch.float64)
    return torch.empty(rows.shape, dtype=torch.float64).scatter_(-1, order, step.expand(rows.shape))
