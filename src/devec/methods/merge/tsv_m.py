"""TSV-Merge: task singular vectors, made orthogonal between tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods.merge.matrices import Conv, Others, cores, is_matrix, nothing, rest
from devec.methods.registry import register


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """Both stacks of singular vectors, one with its polar factor; one Gram matrix with its eigenvectors."""
    (n, m), short = shape, min(shape)
    return 8 * (3 * n * m + 3 * (n + m) * short + 5 * short * short)


@register("merge", name="tsv-m", grain="matrix", source="arXiv:2412.00081", keeps_rank=True, memory=memory)
def tsv_m(
    block: Block, scale: float = 1.0, rank: int | None = None,
    others: Others = "mean", matrices: str = "", conv: Conv = "matrix",
) -> Delta:  # fmt: skip
    """TSV-Merge: each task's leading singular vectors, made orthogonal to those of the other tasks.

    Math        Delta_i = U_i S_i V_i^T, thin, cut to its k leading triples, k = floor(min(n, m) / T)
                U = [U_1 .. U_T], V = [V_1 .. V_T], S = diag(S_1 .. S_T)
                U' = nearest matrix to U with orthonormal columns = P Q^T of its SVD P D Q^T; V' likewise
                W = W_0 + scale * U' S V'^T
    Symbols     scale = alpha of the paper; k = rank, if that is less; T vectors of the pool, with or without the tensor
    Shapes      T deltas (n, m) -> one (n, m) of rank at most T k; factors in, factors out
    Guarantees  identity: one task with scale 1 comes back exactly; equal tasks give their leading k triples;
                orthogonal: tasks whose leading directions are orthogonal on both sides are summed as they are;
                permutation: order does not matter up to rounding; linear in scale;
                equivariant: Delta_i -> L Delta_i R with orthogonal L, R turns the result alike;
                rank: adapters give an adapter of rank at most min(T k, sum of ranks), the same as their products do
    Numerics    singular vectors and polar factors in float64 (linalg.spectral), the result rounded to the compute
                dtype: on 768 x 768 and 3072 x 768, T = 8, within 3e-8 (relative, Frobenius) of the same in float64
                SVDs, where float32 SVDs are off by 8e-4. Directions that are rounding of the deltas are left out
    Differs     scale 1 is FusionBench's default; the paper's code searches (0, 3] on validation data. That code also
                averages tensors named text_projection and kernels of convolutions: matrices=^(?!.*text_projection),
                conv=other. It keeps k directions even where a delta has fewer, and a full basis where the stack is
                rank-deficient; what the SVD returns there is arbitrary (it makes the merge of a model with itself
                arbitrary), and here it is left out. A tensor with fewer rows or columns than tasks (k = 0) would
                become zero; here it is treated like the other ones (others). Equal singular values at the cut are told
                apart by the factorisation, and the result then depends on it
    Raises      UsageError: rank below 1, or matrices that is no regular expression;
                InputError: NaN or infinity, naming the vector
    """
    if rank is not None and rank < 1:
        raise UsageError(f"tsv-m wants a rank from 1 on, got {rank}")
    tasks, shape = len(block.deltas), block.layout.matrix_shape
    k = min(shape) // max(tasks, 1)
    if not is_matrix(block, matrices, conv) or (k == 0 and 0 not in shape):
        return rest(block, others, scale)
    if tasks == 1 and rank is None:
        return rest(block, "sum", scale)
    found = cores(block)
    if found is None:
        return nothing(block)
    parts = [found.triples(C, k if rank is None else min(k, rank)) for C in found.each()]
    S = torch.cat([p.S for p in parts])
    if S.numel() == 0:
        return nothing(block)
    U, V = found.orthonormal([p.U for p in parts]), found.orthonormal([p.V for p in parts])
    return found.product(U * (scale * S), V.T)
