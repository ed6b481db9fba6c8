"""KnOTS: the tasks in one basis, so that entries that stand for the same thing are merged with one another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.linalg.lowrank import frobenius
from devec.linalg.numerics import CORE
from devec.linalg.spectral import triples
from devec.methods.merge.matrices import Conv, Cores, Others, cores, is_matrix, nothing, rest
from devec.methods.registry import register


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """The deltas side by side with their coordinates and what is made of these, their basis; one Gram matrix with its
    eigenvectors, on the side with fewer rows."""
    n, m = shape if parameters.get("side") != "input" else shape[::-1]
    if parameters.get("inner", "ties") != "ties":
        return 0
    short = min(n, tasks * m)
    return 8 * (4 * tasks * n * m + 2 * n * short + 5 * short * short)


@register("merge", grain="matrix", source="arXiv:2410.19735", keeps_rank=True, memory=memory)
def knots(
    block: Block, inner: Literal["ties", "mean", "task-arithmetic"] = "ties", scale: float = 0.6, density: float = 0.2,
    side: Literal["output", "input"] = "output",
    others: Others = "mean", matrices: str = "", conv: Conv = "matrix",
) -> Delta:  # fmt: skip
    """KnOTS: deltas in the singular basis that they have together, merged entry by entry there.

    Math        side output: [Delta_1 .. Delta_T] = U diag(s) [V_1 .. V_T]^T; C_i = diag(s) V_i^T = U^T Delta_i
                W = W_0 + scale * U inner(C_1 .. C_T); side input: the same for Delta_i^T, transposed back
                inner ties: per task keep the density largest entries by size; elect for each entry the sign of the sum
                    over tasks; mean over the entries that have it
                inner mean, task-arithmetic: mean or sum of the C_i
    Symbols     density = topK of the authors' code, as a fraction; side=output: its concat_across_output;
                T vectors of the pool
    Shapes      T deltas (n, m) -> one (n, m) of rank at most that of [Delta_1 .. Delta_T]; factors in, factors out
    Guarantees  linear: with inner mean or task-arithmetic the basis drops out: exactly that mean or sum;
                lossless: U C_i = Delta_i, so one task with density 1 and scale 1 comes back to rounding;
                permutation: order does not matter up to rounding; homogeneous: degree 1 in the deltas;
                equivariant: (side output) Delta_i -> L Delta_i with orthogonal L turns the result alike;
                signs: the result does not depend on the signs of U's columns;
                rank: adapters give an adapter of rank at most the sum of their ranks
    Numerics    U, s and V in float64 (linalg.spectral; of factors, from the core between two QRs), C_i and what is
                done to them in the compute dtype. Directions that are rounding of the deltas are left out. TIES cuts
                and elects: an entry at the edge of either may fall otherwise after rounding
    Differs     scale 0.6, density 0.2 and the disjoint mean are the authors' configuration for eight CLIP ViT-B/32
                LoRAs of rank 16. They keep the density over all layers together, here it is per tensor; they drop
                s <= 1e-5, here the limit follows the deltas; they give an entry whose sum is exactly 0 the sign of all
                entries together, which depends on signs of singular vectors, here it becomes 0. Equal singular values
                leave the basis, and with ties the result, to the factorisation
    Raises      UsageError: density outside (0, 1], or matrices that is no regular expression;
                InputError: NaN or infinity
    """
    if not 0.0 < density <= 1.0:
        raise UsageError(f"knots wants density as a fraction in (0, 1], got {density:g}")
    if not is_matrix(block, matrices, conv):
        return rest(block, others, scale)
    if inner != "ties":
        return rest(block, "mean" if inner == "mean" else "sum", scale)
    found = cores(block)
    if found is None:
        return nothing(block)
    if side == "input":
        return _tied(_transposed(found), density, scale).transpose()
    return _tied(found, density, scale)


def _transposed(found: Cores) -> Cores:
    return Cores(
        (found.shape[1], found.shape[0]), lambda: (C.T for C in found.each()), found.dtype, found.right, found.left
    )


def _tied(found: Cores, density: float, scale: float) -> Delta:
    held = list(found.each())
    size = sqrt(sum(frobenius(C) ** 2 for C in held))
    widths, limit = [C.shape[1] for C in held], found.limit(size, len(held))
    beside = torch.cat(held, dim=1)
    del held
    svd = triples(beside, limit=limit, exact=found.exact)
    del beside
    U, tasks = svd.U, list[Tensor]()
    ends = list(accumulate(widths))
    for start, end in zip([0, *ends], ends, strict=False):
        C = (svd.V[start:end] * svd.S).T
        # What is merged are entries, so on the side that keeps its coordinates they must be the tensor's own.
        tasks.append((C if found.right is None else C @ found.right.T).to(found.dtype))
    del svd, C
    merged = ties(tasks, density).mul_(scale)
    if found.left is not None:
        return LowRankDelta((found.left @ U).to(found.dtype), merged)
    return DenseDelta((U @ merged.to(CORE)).to(found.dtype))


def ties(tasks: list[Tensor], density: float) -> Tensor:
    """Trim, elect, disjoint mean (TIES, arXiv:2306.01708) of tensors of one shape; they are changed. A zero stays out
    of the mean, and an entry whose trimmed sum is exactly 0 becomes 0."""
    for C in tasks:
        keep = max(int(density * C.numel()), 1)
        if keep < C.numel():
            size = C.abs()
            limit = size.flatten().kthvalue(C.numel() - keep + 1).values
            C.masked_fill_(size < limit, 0.0)
    sign = sum(tasks[1:], tasks[0].clone()).sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for C in tasks:
        agrees = C.sign() == sign
        total += C.where(agrees, 0.0)
        count += agrees & (C != 0)
    return total.div_(count.clamp_min_(1.0))
