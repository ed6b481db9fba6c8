"""Weight averaging."""

from __future__ import annotations

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods.merge.task_arithmetic import weighted_sum
from devec.methods.registry import register


@register("merge", grain="elements", source="arXiv:2203.05482", needs_base=False, keeps_rank=True)
def average(block: Block, weights: list[float] | None = None) -> Delta:
    """The (weighted) mean of the models.

    Math        W = W_0 + sum_i w_i Delta_i / sum_i w_i; without a base W_0 = 0 and Delta_i is the weight itself
    Symbols     w_i = weights[i], 1 each by default
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  identity: one model, or equal models, come back; permutation: order does not matter up to rounding
    Numerics    sums in the compute dtype in the order given
    Differs     a module that an adapter lacks counts as a zero delta (the base's weight), not as absent
    Raises      UsageError: number of weights, or weights that sum to zero
    """
    w = [1.0] * len(block.deltas) if weights is None else weights
    total = sum(w)
    if len(w) != len(block.deltas):
        raise UsageError(f"average got {len(w)} weights for {len(block.deltas)} models")
    if total == 0.0:
        raise UsageError("average: the weights sum to zero")
    return weighted_sum(block, [x / total for x in w])
