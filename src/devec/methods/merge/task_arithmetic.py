"""Task arithmetic."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.entries import one_of, sum_of
from devec.methods.registry import register


@register("merge", grain="elements", source="arXiv:2212.04089", keeps_rank=True)
def task_arithmetic(
    block: Block, scale: float = 0.3, weights: list[float] | None = None, reduce: Literal["sum", "mean"] = "sum"
) -> Delta:
    """The sum of the task vectors, times one coefficient.

    Math        W = W_0 + scale * sum_i w_i Delta_i
    Symbols     scale = lambda of the paper; w_i = weights[i], 1 each by default; reduce=mean: divided by sum_i w_i
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  linear in scale, weights and deltas; permutation: order does not matter up to rounding;
                one vector with scale 1 = the fine-tuned model
    Numerics    sums in the compute dtype in the order given; factors stay factors (ranks add)
    Differs     scale defaults to 0.3, the value published for eight vision tasks; for one or two vectors 1.0 is usual
    Raises      UsageError: a wrong number of weights, reduce=mean of weights that sum to zero, an unknown word
    """
    one_of("task-arithmetic", "reduce", reduce, "sum", "mean")
    if weights is not None and len(weights) != len(block.deltas):
        raise UsageError(f"task-arithmetic got {len(weights)} weights for {len(block.deltas)} vectors")
    w = weights or [1.0] * len(block.deltas)
    return weighted_sum(block, [scale * x for x in (shares(w, "task-arithmetic") if reduce == "mean" else w)])


def shares(weights: list[float], method: str) -> list[float]:
    """The weights divided by their sum. Raises UsageError if that is zero."""
    whole = sum_of(weights, method)
    return [w / whole for w in weights]


def weighted_sum(block: Block, weights: list[float]) -> Delta:
    """``sum_i w_i Delta_i`` over the vectors that have the tensor; a zero delta of rank 0 if none does."""
    total: Delta | None = None
    own: Tensor | None = None  # a dense total that nobody else holds
    for delta, w in zip(block.deltas, weights, strict=True):
        if delta is None or w == 0.0:
            continue
        term = delta.scale(w)
        if own is not None and term.dtype == own.dtype:
            total = DenseDelta(own.add_(term.dense()))
        else:
            total = term if total is None else total.add(term)
        own = total.value if isinstance(total, DenseDelta) else None
    if total is None:
        n, m = block.layout.matrix_shape
        dtype = next((d.dtype for d in block.deltas if d is not None), torch.float32)
        return LowRankDelta(torch.zeros(n, 0, dtype=dtype), torch.zeros(0, m, dtype=dtype))
    return total
