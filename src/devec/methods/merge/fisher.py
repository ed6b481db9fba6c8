"""Fisher-weighted averaging: every entry is a mean weighted by how much its task depends on it."""

from __future__ import annotations

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta
from devec.core.errors import InputError, UsageError
from devec.linalg.numerics import CORE, compute_dtype
from devec.methods.merge.entries import sum_of
from devec.methods.merge.statistics import given, statistic
from devec.methods.merge.task_arithmetic import weighted_sum
from devec.methods.registry import register


@register("merge", grain="matrix", source="arXiv:2111.09832", needs=("fisher",), needs_base=True)
def fisher(block: Block, weights: list[float] | None = None, normalise: bool = True, floor: float = 1e-6) -> Delta:
    """The mean of fine-tuned models, each entry weighted by its diagonal Fisher information.

    Math        F_i = E_x E_{y ~ p_i(y|x)} [(d log p_i(y|x) / d theta)^2], entry by entry, at the fine-tuned theta_i
                w_i = lambda_i max(F_i / c_i, floor);  W = W_0 + (sum_i w_i o Delta_i) / (sum_i w_i)
    Symbols     lambda_i = weights[i], 1 each by default; o and / entry by entry; c_i = |F_i|_2 over all merged, 1
                with normalise=false; F_i = block.stats["fisher"][i], c_i = block.stats["fisher_norm"][i]
    Shapes      T deltas and T Fisher diagonals (n, m) -> one (n, m)
    Guarantees  equal models come back; each entry lies between the smallest and the largest of the inputs (weights
                above 0); equal Fisher = the weighted mean; one vector = the fine-tuned model; permutation up to
                rounding; with normalise, no factor on all of an F_i matters; W does not depend on W_0
    Numerics    sums in float64
    Differs     the floor is on the normalised Fisher, so that entries which no task depends on are averaged whatever
                the scale of each F_i; the authors' code floors before it normalises. A tensor for which nobody has a
                Fisher (a buffer, a frozen tensor) is averaged with lambda_i; one that a task's network does not use has
                F_i = 0
    Raises      UsageError: number of weights, a weight below 0, floor of 0 or less, no statistics; InputError:
                a Fisher of another shape, not finite or below 0, a whole model's Fisher of zero
    """
    count = len(block.deltas)
    if weights is not None and len(weights) != count:
        raise UsageError(f"fisher got {len(weights)} weights for {count} vectors")
    shares = weights or [1.0] * count
    if min(shares, default=0.0) < 0.0:
        raise UsageError(f"fisher wants weights from 0 on, got {min(shares):g}")
    if not floor > 0.0:
        raise UsageError(f"fisher wants floor above 0, got {floor:g}")
    whole = sum_of(shares, "fisher")
    known = given(block, "fisher", "fisher")
    norms = given(block, "fisher", "fisher_norm") if normalise else [1.0] * count
    if all(known[i] is None for i in range(count)):
        return weighted_sum(block, [w / whole for w in shares])
    shape = block.layout.matrix_shape
    above, below = torch.zeros(shape, dtype=CORE), torch.zeros(shape, dtype=CORE)
    for i, (delta, share) in enumerate(zip(block.deltas, shares, strict=True)):
        weight = _weight(block, i, statistic(block, known, i, shape), norms[i], floor).mul_(share)
        below += weight
        if delta is not None:
            above += weight.mul_(delta.dense().to(CORE))
    return DenseDelta(above.div_(below).to(compute_dtype(block.dtype)))


def _weight(block: Block, i: int, value: Tensor | None, norm: object, floor: float) -> Tensor:
    """``max(F / c, floor)`` in float64."""
    scale = float(norm)  # type: ignore[arg-type]
    if not 0.0 < scale < float("inf"):
        raise InputError(
            f"the Fisher of vector {block.vectors[i]} has no scale over the model", tensor=block.name,
            values={"norm": scale}, remedy="Do the examples reach the network's output? Or set normalise=false.",
        )
    if value is None:
        return torch.full(block.layout.matrix_shape, floor, dtype=CORE)
    if value.numel() and float(value.min()) < 0.0:
        raise InputError(
            f"the Fisher of vector {block.vectors[i]} is below 0", tensor=block.name,
            values={"least": float(value.min())},
        )
    return (value / scale).clamp_(min=floor)
