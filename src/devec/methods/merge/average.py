"""Weight averaging."""

from __future__ import annotations

from typing import Literal

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods.merge.entries import one_of
from devec.methods.merge.task_arithmetic import shares, weighted_sum
from devec.methods.registry import register


@register("merge", grain="elements", source="arXiv:2203.05482", needs_base=False, keeps_rank=True)
def average(
    block: Block, weights: list[float] | None = None, reduce: Literal["mean", "sum"] = "mean"
) -> Delta:
    """The (weighted) mean of the models.

    Math        W = W_0 + sum_i w_i Delta_i / sum_i w_i; without a base W_0 = 0 and Delta_i is the weight itself
    Symbols     w_i = weights[i], 1 each by default; reduce=sum: without the division
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  identity: one model, or equal models, come back; permutation: order does not matter up to rounding
    Numerics    sums in the compute dtype in the order given
    Differs     a module that an adapter lacks counts as a zero delta (the base's weight), not as absent
    Raises      UsageError: a wrong number of weights, weights that sum to zero, an unknown word
    """
    w = [1.0] * len(block.deltas) if weights is None else weights
    one_of("average", "reduce", reduce, "mean", "sum")
    if len(w) != len(block.deltas):
        raise UsageError(f"average got {len(w)} weights for {len(block.deltas)} models")
    return weighted_sum(block, shares(w, "average") if reduce == "mean" else w)
