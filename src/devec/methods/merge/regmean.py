"""RegMean: the matrix whose outputs are nearest to each fine-tune's outputs on its own task's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta
from devec.core.errors import InputError, UsageError
from devec.linalg.numerics import CORE, compute_dtype
from devec.methods.merge.entries import within
from devec.methods.merge.statistics import given, statistic
from devec.methods.merge.task_arithmetic import weighted_sum
from devec.methods.registry import register

LEAST_RIDGE = 1e-12
"""Below this the sum of rank-deficient moments is singular to float64."""


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """The deltas and the right side; one task's moments as stored and widened, their sum and its factor."""
    n, m = shape
    return 8 * ((tasks + 5) * n * m + 5 * m * m)


@register("merge", grain="matrix", source="arXiv:2212.09849", needs=("moments",), needs_base=True, memory=memory)
def regmean(block: Block, off_diagonal: float = 0.95, ridge: float = 1e-6) -> Delta:
    """RegMean: least squares of each layer's outputs on the inputs that its own fine-tune sees.

    Math        G_i = X_i^T X_i / N_i;  H_i = a G_i + (1 - a) diag(G_i) + (ridge / (T m)) tr(sum_j G_j) I
                W = W_0 + (sum_i Delta_i H_i) (sum_i H_i)^-1
                with a = 1, ridge -> 0: the minimiser of sum_i |X_i (W - W_i)^T|_F^2 / N_i
    Symbols     X_i (N_i, m) = inputs of the layer in fine-tune i on rows of its task; a = off_diagonal;
                G_i = block.stats["moments"][i]
    Shapes      T deltas (n, m), T moments (m, m) -> one (n, m)
    Guarantees  equal models come back; equal multiples of the identity = the mean; one vector = the fine-tuned model;
                permutation up to rounding; no factor on all of the G_i matters; W does not depend on W_0; tasks whose
                inputs lie in orthogonal subspaces keep their outputs (a = 1, ridge -> 0)
    Numerics    one Cholesky solve of size m in float64. ridge is a share of the mean diagonal of the sum; every task
                gets an equal part, so that directions without input go to the mean and not to zero
    Differs     the paper adds no ridge and leaves a to the model: published values are 0.95 for CLIP and 0.6 for GPT-2,
                others use 0.1. Tensors without moments (biases, norms, embeddings, fused attention) are
                averaged, as published. A layer that a task does not use has G_i = 0
    Raises      UsageError: off_diagonal outside [0, 1], ridge below 1e-12, no statistics; InputError: moments of
                another shape, not finite or not positive definite
    """
    within("regmean", "off_diagonal", off_diagonal, 0.0, 1.0)
    if not ridge >= LEAST_RIDGE:
        raise UsageError(f"regmean wants ridge from {LEAST_RIDGE:g} on, got {ridge:g}")
    known, count = given(block, "regmean", "moments"), len(block.deltas)
    n, m = block.layout.matrix_shape
    mean = [1.0 / max(count, 1)] * count
    if all(known[i] is None for i in range(count)):
        return weighted_sum(block, mean)
    total = torch.zeros(m, m, dtype=CORE)
    right, plain = torch.zeros(n, m, dtype=CORE), torch.zeros(n, m, dtype=CORE)
    for i, delta in enumerate(block.deltas):
        D = None if delta is None else delta.dense().to(CORE)
        if D is not None:
            plain += D
        G = statistic(block, known, i, (m, m))
        if G is None:
            continue
        H = off_diagonal * G
        H.diagonal().copy_(G.diagonal())
        total += H
        if D is not None:
            right.addmm_(D, H)
    share = ridge * float(total.diagonal().sum()) / max(m, 1)
    if share <= 0.0:  # no task has any input
        return weighted_sum(block, mean)
    total.diagonal().add_(share)
    right.add_(plain, alpha=share / count)
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):
        raise InputError(
            "the moments are not positive definite, as they are of no inputs or too rounded", tensor=block.name,
            values={"ridge": ridge}, remedy="Set a larger ridge, or a smaller off_diagonal.",
        )
    solved = torch.cholesky_solve(right.T, factor).T
    return DenseDelta(solved.to(compute_dtype(block.dtype)))
