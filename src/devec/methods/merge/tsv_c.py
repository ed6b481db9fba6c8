"""TSV-Compress: one task's leading singular vectors."""

from __future__ import annotations

from collections.abc import Mapping

from devec.core.block import Block
from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.entries import index_of
from devec.methods.merge.matrices import Conv, cores, is_matrix, nothing
from devec.methods.registry import register


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """One delta and its singular vectors, one Gram matrix with its eigenvectors, and the factors that are kept."""
    (n, m), short = shape, min(shape)
    return 8 * (4 * n * m + (n + m) * short // max(tasks, 1) + 5 * short * short)


@register(
    "merge", name="tsv-c", grain="matrix", source="arXiv:2412.00081", keeps_rank=True, memory=memory, per_task=True
)
def tsv_c(
    block: Block, task: str, rank: int | None = None, scale: float = 1.0, matrices: str = "", conv: Conv = "matrix"
) -> Delta:
    """TSV-Compress: one task of the pool, each matrix cut to its share of singular triples. One model a task: no merge.

    Math        Delta_t = U S V^T, cut to its k leading triples, k = floor(min(n, m) / T); W = W_0 + scale * U S V^T
    Symbols     t = task, a vector's name or number; k = rank, if given; T vectors of the pool
    Shapes      T deltas (n, m) -> one (n, m) of rank at most k, factored
    Guarantees  best: no matrix of rank k is nearer to the task's delta (Frobenius norm);
                identity: with k at the matrix's rank the task comes back to rounding; linear in scale;
                alone: the other vectors decide T and nothing else
    Numerics    triples in float64 (linalg.spectral); the factors in the compute dtype
    Differs     numbers of compressed models are not comparable with those of merged ones: T models are kept, and which
                task an input belongs to must be known. Published at k = floor(min(n, m) / T), where the T factored
                models take about as many numbers as one full one. A matrix with fewer rows or columns than tasks keeps
                one triple (k = 0 would lose it). Vectors, and what matrices and conv leave out, stay as they are. Equal
                singular values at the cut are told apart by the factorisation, and the result then depends on it
    Raises      UsageError: a task that is not in the pool, rank below 1; InputError: NaN or infinity
    """
    if rank is not None and rank < 1:
        raise UsageError(f"tsv-c wants a rank from 1 on, got {rank}")
    t = index_of(block, task, "tsv-c")
    own = block.deltas[t]
    if own is None:
        return nothing(block)
    if not is_matrix(block, matrices, conv):
        return own if scale == 1.0 else own.scale(scale)
    alone = Block(block.name, block.layout, (block.vectors[t],), (own,))
    found = cores(alone)
    if found is None:
        return nothing(block)
    k = rank or max(min(block.layout.matrix_shape) // len(block.deltas), 1)
    svd = found.triples(next(found.each()), k)
    root = svd.S.sqrt()
    B, A = svd.U * root, (svd.V * root).T
    if found.left is not None and found.right is not None:
        B, A = found.left @ B, A @ found.right.T
    return LowRankDelta((B * scale).to(found.dtype), A.to(found.dtype))
