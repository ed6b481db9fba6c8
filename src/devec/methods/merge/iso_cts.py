"""Iso-CTS: a common subspace and one of each task's own, with all singular values equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.linalg.lowrank import frobenius
from devec.linalg.numerics import CORE
from devec.linalg.spectral import Triples, triples
from devec.methods.merge.matrices import Conv, Cores, Others, cores, is_matrix, nothing, rest
from devec.methods.registry import register


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """The deltas, the sum, one residual and its singular vectors; both stacks of singular vectors, one with its polar
    factor; one Gram matrix with its eigenvectors."""
    (n, m), short = shape, min(shape)
    return 8 * ((tasks + 5) * n * m + 3 * (n + m) * short + 4 * short * short)


@register("merge", name="iso-cts", grain="matrix", source="arXiv:2502.04959", keeps_rank=True, memory=memory)
def iso_cts(
    block: Block, scale: float = 1.5, common: float = 0.8,
    others: Others = "mean", matrices: str = "", conv: Conv = "matrix",
) -> Delta:  # fmt: skip
    """Iso-CTS: the sum's leading directions, and what each task has outside them, all at the same length.

    Math        sum_i Delta_i = U S V^T, rank r; d = round((r - floor(common r)) / T), c = r - T d
                common triples: the c leading ones of the sum
                task triples: the d leading ones of (I - U_c U_c^T) Delta_i, for each i
                U', V' = polar factors of all left and all right vectors, s = mean of all singular values
                W = W_0 + scale * s U' V'^T
    Symbols     scale = alpha of the paper; c = k of the paper; T vectors of the pool, with or without the tensor;
                U_c = left vectors of the common triples; d = task triples of each task
    Shapes      T deltas (n, m) -> one (n, m) of rank at most r; factors in, factors out
    Guarantees  isotropic: with left and right vectors of full rank, all nonzero singular values are scale * s;
                common 1: Iso-C; permutation: order does not matter up to rounding; linear in scale;
                equivariant: Delta_i -> L Delta_i R with orthogonal L, R turns the result alike;
                rank: adapters give an adapter of rank at most the sum of their ranks, the same as their products do
    Numerics    as in iso-c; residuals in float64, without directions that are rounding of their task's delta
    Differs     one task does not come back: its singular values become equal. scale 1.5 is what FusionBench ran for
                eight CLIP ViT-B/32 tasks, common 0.8 the paper's. r is the rank of the sum, so that adapters too have
                task-specific directions; the paper's code takes min(n, m), the same for sums of full rank. That code
                can ask for more task directions than there are (common near 0): here T d stays at most r. Equal
                singular values at either cut are told apart by the factorisation, and the result then depends on it
    Raises      UsageError: common outside [0, 1], or matrices that is no regular expression;
                InputError: NaN or infinity
    """
    if not 0.0 <= common <= 1.0:
        raise UsageError(f"iso-cts wants common between 0 and 1, got {common:g}")
    if not is_matrix(block, matrices, conv):
        return rest(block, others, scale)
    found = cores(block)
    if found is None:
        return nothing(block)
    held = list(found.each())
    total, size = found.total(held)
    whole = triples(total, limit=found.limit(size), exact=found.exact)
    tasks, r = len(block.deltas), whole.rank
    d = min(round((r - int(common * r)) / tasks), r // tasks)
    c = r - tasks * d
    parts = [whole.truncated(c)]
    if d:
        parts += [_outside(found, C, parts[0].U, d) for C in held]
    S = torch.cat([p.S for p in parts])
    if S.numel() == 0:
        return nothing(block)
    U, V = found.orthonormal([p.U for p in parts]), found.orthonormal([p.V for p in parts])
    return found.product(U * (scale * float(S.mean())), V.T)


def _outside(found: Cores, C: Tensor, U: Tensor, rank: int) -> Triples:
    """The leading triples of ``(I - U U^T) C`` among those that are more than rounding of C."""
    X = C.to(CORE)
    left = torch.addmm(X, U, U.T @ X, alpha=-1.0)
    return triples(left, rank, limit=found.limit(frobenius(C)), exact=found.exact)
