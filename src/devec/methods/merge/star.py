"""STAR: spectral truncation and rescaling of each task, then the mean."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.linalg.numerics import CORE
from devec.linalg.rank import nuclear_rank
from devec.methods.merge.matrices import Conv, Others, cores, is_matrix, nothing, rest
from devec.methods.registry import register


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """One delta, the result and what is added to it, singular vectors; one Gram matrix with its eigenvectors."""
    (n, m), short = shape, min(shape)
    return 8 * (6 * n * m + (n + m) * short + 4 * short * short)


@register("merge", grain="matrix", source="arXiv:2502.10339", keeps_rank=True, memory=memory)
def star(
    block: Block, eta: float = 0.4, scale: float = 1.0,
    others: Others = "mean", matrices: str = "", conv: Conv = "matrix",
) -> Delta:  # fmt: skip
    """STAR: each task cut to the directions with a part of its nuclear norm and enlarged to all of it; then the mean.

    Math        Delta_i = U S V^T; r = fewest directions with sum_{j<=r} s_j >= eta sum_j s_j
                Delta_i' = (sum_j s_j / sum_{j<=r} s_j) U_r S_r V_r^T
                W = W_0 + scale * 1/T sum_i Delta_i'
    Symbols     eta as a fraction (the paper's 40 is 0.4); T vectors of the pool, with or without the tensor
    Shapes      T deltas (n, m) -> one (n, m); factors in, factors out
    Guarantees  nuclear norm: that of every Delta_i' is that of Delta_i; eta 1: the mean of the tasks;
                permutation: order does not matter up to rounding; homogeneous: degree 1 in the deltas, linear in scale;
                equivariant: Delta_i -> L Delta_i R with orthogonal L, R turns the result alike;
                rank: adapters give an adapter of rank at most the sum of their ranks, the same as their products do
    Numerics    triples and the sum in float64 (linalg.spectral), rounded once to the compute dtype. Directions that are
                rounding of a delta count neither for the norm nor in the result
    Differs     one task does not come back: it is cut (unless eta is 1). eta 0.4 is the default of the paper's
                code. Equal singular values at the cut are told apart by the factorisation, and the result
                then depends on it. Vectors are averaged
    Raises      UsageError: eta outside (0, 1], or matrices that is no regular expression; InputError: NaN or infinity
    """
    if not 0.0 < eta <= 1.0:
        raise UsageError(f"star wants eta as a fraction in (0, 1], got {eta:g}", remedy="40 percent is eta=0.4.")
    if not is_matrix(block, matrices, conv):
        return rest(block, others, scale)
    found = cores(block)
    if found is None:
        return nothing(block)
    weight = scale / len(block.deltas)
    left, right = [], []
    total: Tensor | None = None
    for C in found.each():
        if total is None and found.left is None:
            total = C.new_zeros(found.shape, dtype=CORE)
        kept = found.triples(C, partial(nuclear_rank, fraction=eta))
        if kept.rank == 0:
            continue
        B, A = kept.U * (kept.S * (weight * kept.nuclear / float(kept.S.sum()))), kept.V.T
        if total is None:
            left.append(B)
            right.append(A)
        else:
            total.addmm_(B, A)
    if total is not None:
        return found.whole(total)
    return found.product(torch.cat(left, dim=1), torch.cat(right, dim=0)) if left else nothing(block)
