"""DARE: drop entries at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.linalg.counter import key_of, uniform
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
)
from devec.methods.registry import register

Rescale = Literal["inverse", "l1", "none"]


def measure(whole: Whole, *, p: Sequence[float] | float, rescale: str, seed: int, **_: Any) -> list[float]:
    """With rescale=l1, the factor of every vector; nothing is read otherwise."""
    return l1_factors(whole, lambda b: thinned(b, p, seed)) if rescale == "l1" else []


@register("merge", grain="elements", source="arXiv:2311.03099", measure=measure,
          looks=lambda given: int(given["rescale"] == "l1"))
def dare(
    block: Block,
    p: list[float] | float = 0.9,
    then: Then = "task-arithmetic",
    scale: float = 0.3,
    weights: list[float] | None = None,
    rescale: Rescale = "inverse",
    seed: int = 0,
    reduce: Reduce | None = None,
) -> Delta:
    """Drop each entry of each vector with probability p, rescale the rest, and merge what is left.

    Math        D_i = m_i * Delta_i / (1 - p), m_i ~ Bernoulli(1 - p) an entry
                then=task-arithmetic: W = W_0 + scale * sum_i w_i D_i
                then=ties: W = W_0 + scale * mean of the w_i D_i that have the sign of their sum (no trimming)
    Symbols     w_i = weights[i], 1 each by default; rescale=l1: D_i = m_i * Delta_i * |Delta_i|_1 / |m_i * Delta_i|_1,
                rescale=none: D_i = m_i * Delta_i; reduce: sum, or mean (divided by sum_i w_i, or by sum |w_i| of those
                that agree), by default the sum with then=task-arithmetic and the mean with then=ties
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  mask: a function of (seed, tensor name, vector name, row, column) alone, so that blocks, order, workers
                and a transposed file change nothing, and no global generator is used or moved;
                mean: with rescale=inverse the expectation over seeds of D_i is Delta_i; with l1, |D_i|_1 = |Delta_i|_1
                (unless everything was dropped); p = 0 is the method in then; permutation up to rounding
    Numerics    53 random bits an entry; l1 norms in float64, summed block by block (one more pass over the inputs)
    Differs     mergekit draws from the global generator, so that its masks depend on the order of work, and its rescale
                is rescale=l1, which is not unbiased draw by draw; then=ties drops entries whose sum is exactly 0.
                scale is that of task-arithmetic; 1.0 is usual for one or two vectors and with then=ties
    Raises      UsageError: a wrong number of weights or p, p outside [0, 1), an unknown word;
                InputError: NaN or infinity
    """
    for value in per_vector(block, p, "dare", "p"):
        if not 0.0 <= value < 1.0:
            raise UsageError(f"dare: p={value:g} is not in [0, 1)")
    one_of("dare", "rescale", rescale, "inverse", "l1", "none")
    w = weights_for(block, weights, "dare")
    factors = measured(block, measure, p=p, rescale=rescale, seed=seed)
    entries = thinned(block, p, seed)
    if rescale == "inverse":
        for i, entry in enumerate(entries):
            entry /= 1.0 - of(p, i)
    rescaled(entries, factors)
    return merged(block, joined("dare", weigh(entries, w), w, then, reduce).mul_(scale))


def thinned(block: Block, p: Sequence[float] | float, seed: int) -> Tensor:
    """The entries of every vector, zero where they are dropped."""
    entries = stack(block)
    for i, (entry, name) in enumerate(zip(entries, block.vectors, strict=True)):
        if of(p, i) > 0.0:
            entry *= draws(block, name, seed) < 1.0 - of(p, i)
    return entries


def draws(block: Block, vector: str, seed: int) -> Tensor:
    """A uniform number in [0, 1) for every entry of one vector: a function of seed, names and place alone."""
    rows, columns = block.layout.matrix_shape
    key = key_of("mask", seed, block.name, vector)
    return uniform(key, rows, columns, block.first_row, flipped=block.flipped)
