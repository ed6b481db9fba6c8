"""Consensus task arithmetic: only what several tasks need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods.merge.entries import merged, per_vector, stack, total, within
from devec.methods.registry import register


@register("merge", grain="elements", source="arXiv:2405.07813")
def consensus(
    block: Block, scale: float = 0.3, agree: int = 2, threshold: list[float] | float = 0.4
) -> Delta:
    """Task arithmetic on the entries that at least two tasks have in their TALL masks.

    Math        m_i = [|Delta_i| > threshold_i |D - Delta_i|], D = sum_i Delta_i;  M = [sum_i m_i >= agree]
                W = W_0 + scale * M * D
    Symbols     m_i = task i's mask; D = the sum of all tasks; M = the entries that are kept;
                agree = in how many masks an entry must be, k of the paper; threshold_i = lambda_i of the paper
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  agree 0 is task arithmetic; agree above T is the base; linear in scale; permutation up to rounding
    Numerics    sums in float32 or wider in the order given; one pass
    Differs     the authors choose threshold of each task from 0.2 to 0.6, and scale, on validation data; without data
                both are fixed here, threshold in the middle of that range
    Raises      UsageError: a wrong number of thresholds, a negative threshold or agree; InputError: NaN or infinity
    """
    if agree < 0:
        raise UsageError(f"consensus: agree={agree} is negative")
    entries = stack(block)
    both = total(entries)
    masks = tall(entries, both, thresholds(block, threshold, "consensus"))
    return merged(block, (both * (masks.sum(0) >= agree)).mul_(scale))


def thresholds(block: Block, threshold: Sequence[float] | float, method: str) -> list[float]:
    """One a vector."""
    found = per_vector(block, threshold, method, "thresholds")
    for value in found:
        within(method, "threshold", value, 0.0, float("inf"))
    return found


def tall(entries: Tensor, both: Tensor, cuts: Sequence[float]) -> Tensor:
    """``(T, n, m)`` of True where a task's own change outweighs what the others would do to it."""
    masks = entries.new_zeros(entries.shape, dtype=bool)  # type: ignore[call-overload]
    for mask, entry, cut in zip(masks, entries, cuts, strict=True):
        mask.copy_(entry.abs() > (both - entry).abs_() * cut)
    out: Tensor = masks
    return out
