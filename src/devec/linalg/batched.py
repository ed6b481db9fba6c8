"""Thin factorisations of many matrices of one shape at once, for GPUs.

One matrix at a time a GPU mostly waits for the next small kernel. Here a step is one batched product, one batched
orthonormalisation and one transfer for all matrices together. Each matrix is still decided by itself, from the same
starting vectors and by the functions that decide in :mod:`devec.linalg.lowrank`: ``iteration.judge``, ``select_rank``,
``core_of_product``.

Products and panels stay on the tensors' device (:func:`~devec.linalg.panels.orthonormal`); cores (rank x rank, float64)
are solved by LAPACK on the CPU, on ``workers`` threads, as they are one at a time.

Against the functions for one matrix, with float32 products, on planted spectra of 512 and 1024 rows (a gap in white
noise, a heavy tail): same ranks, values to 3e-7 relative, projectors to 1e-6, and to 1e-5 where the rank kept ends
without a gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from devec.linalg import iteration
from devec.linalg.batched_iteration import Iteration, Products, Triple, product, some, team_of
from devec.linalg.lowrank import ThinSVD, core_of_product, empty, svd_of_dense, svd_of_product, working_scale
from devec.linalg.numerics import CORE, RANK_RTOL, NonFiniteError, bad_entries, binary_scale, compute_dtype
from devec.linalg.panels import orthonormal
from devec.linalg.rank import RankRule, select_rank

EXACT_BYTES = 2**31
"""Working memory of one batch on the exact path: a Gram matrix, its eigenvectors and workspace are six squares."""

def _peaks(X: Tensor) -> list[float]:
    """``max |x|`` of every matrix of a batch. NonFiniteError names the first one with a bad entry."""
    if X.numel() == 0:
        return [0.0] * X.shape[0]
    low, high = torch.aminmax(X.flatten(1), dim=1)
    tops: list[float] = torch.maximum(low.abs(), high.abs()).tolist()
    for i, top in enumerate(tops):
        if not top < float("inf"):
            raise NonFiniteError(bad_entries(X[i]), index=i)
    return tops


def _divided(X: Tensor, scales: Sequence[float]) -> Tensor:
    if all(scale == 1.0 for scale in scales):
        return X
    # A tensor of divisors: a CPU scalar would be turned into its reciprocal, infinite for the smallest scales.
    return X / torch.tensor(scales, dtype=X.dtype, device=X.device)[:, None, None]


# --- products B A ----------------------------------------------------------------------------------------------------


def svd_of_product_batch(
    B: Tensor,
    A: Tensor,
    rule: RankRule | str | int = "none",
    *,
    side_length: int | None = None,
    rtol: float | None = None,
    workers: int = 1,
) -> list[ThinSVD]:
    """:func:`~devec.linalg.lowrank.svd_of_product` of ``B_i A_i`` for B ``(b, n, r)`` and A ``(b, r, m)``.

    Values agree to 1e-6 of the largest, projectors as well as rounding of the factors lets them (1e-5 where the
    smallest value kept is 1 % of the largest). float64 factors are treated one after the other.

    Raises NonFiniteError whose ``index`` says which product holds a bad entry.
    """
    rule = RankRule.parse(rule)
    (b, n, _), m = B.shape, A.shape[2]
    dtype = compute_dtype(B.dtype)
    scales_b, scales_a = ([binary_scale(top) for top in _peaks(X)] for X in (B, A))
    if dtype == torch.float64:
        return [svd_of_product(B[i], A[i], rule, side_length, rtol) for i in range(b)]
    out = [empty(n, m, B) for _ in range(b)]
    live = [i for i in range(b) if scales_b[i] and scales_a[i]]
    if not live:
        return out
    QB, RB = orthonormal(_divided(some(B, live).to(dtype), [scales_b[i] for i in live]))
    QA, RA = orthonormal(_divided(some(A, live).to(dtype), [scales_a[i] for i in live]).mT)
    limit, side = RANK_RTOL[dtype] if rtol is None else rtol, side_length or n

    def solve(core: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
        return core_of_product(*core, rule, n, m, dtype, limit, side)

    with team_of(workers) as team:
        cores = team.map(solve, list(zip(RB.cpu(), RA.cpu(), strict=True)))
    U = QB @ _padded([u for u, _, _, _ in cores], QB)
    V = QA @ _padded([vh.T for _, _, vh, _ in cores], QA)
    for at, (i, (_, s, _, total)) in enumerate(zip(live, cores, strict=True)):
        if total:
            scale, r = scales_b[i] * scales_a[i], s.numel()
            out[i] = ThinSVD(U[at, :, :r], (s * scale).to(B.device), V[at, :, :r], total * scale * scale)
    return out


def _padded(columns: Sequence[Tensor], like: Tensor) -> Tensor:
    """Matrices of one height side by side in a batch, zeros after the last column, where ``like`` is."""
    out = torch.zeros(len(columns), columns[0].shape[0], max(c.shape[1] for c in columns), dtype=like.dtype)
    for row, c in zip(out, columns, strict=True):
        row[:, : c.shape[1]] = c
    return out.to(like.device)


# --- dense matrices --------------------------------------------------------------------------------------------------


def svd_of_dense_batch(
    W: Tensor,
    rule: RankRule | str | int = "none",
    *,
    side_length: int | None = None,
    exact: bool = False,
    keys: Sequence[object],
    products: Products = "float32",
    workers: int = 1,
) -> list[ThinSVD]:
    """:func:`~devec.linalg.lowrank.svd_of_dense` of every matrix of W ``(b, n, m)``; ``keys`` name them.

    ``products="bfloat16"`` makes the products of the power steps in bfloat16 until the values stand; then float32 takes
    over and ends the iteration by the same test, on values of its own. Products are all that is rounded: panels and
    values stay float32, cores float64. It costs no accuracy, because rounding of a power step tilts the subspace by
    about 2^-10 (0.06 degrees) at most, which the values feel squared: benchmarks/RESULTS.md has the figures.

    float64 matrices are treated one after the other. Raises NonFiniteError whose ``index`` says which matrix holds a
    bad entry.
    """
    rule = RankRule.parse(rule)
    b, n, m = W.shape
    if len(keys) != b:
        raise ValueError(f"{b} matrices need as many keys, got {len(keys)}")
    dtype, side = compute_dtype(W.dtype), side_length or n
    scales = [working_scale(top) for top in _peaks(W)]
    if dtype == torch.float64:
        return [svd_of_dense(W[i], rule, side_length=side, exact=exact, key=keys[i]) for i in range(b)]
    out = [empty(n, m, W) for _ in range(b)]
    live = [i for i in range(b) if scales[i]]
    if not live:
        return out
    X = _divided(some(W, live).to(dtype), [scales[i] for i in live])
    totals = (torch.stack([torch.linalg.vector_norm(x, dtype=CORE) for x in X]) ** 2).tolist()
    found: dict[int, Triple] = {}
    with team_of(workers) as team:
        if iteration.iterates(rule, n, m, dtype, exact):
            found = Iteration(X, totals, rule, side, team).run([keys[i] for i in live], products)
    rest = [at for at in range(len(live)) if at not in found]
    most = max(EXACT_BYTES // (6 * 8 * min(n, m) ** 2), 1)
    for start in range(0, len(rest), most):
        part = rest[start : start + most]
        results = _exact(some(X, part), [totals[at] for at in part], rule, side)
        found.update(zip(part, results, strict=True))
    for at, i in enumerate(live):
        U, s, V = found[at]
        out[i] = ThinSVD(U, s.to(W.device) * scales[i], V, totals[at] * scales[i] * scales[i])
    return out


def _exact(X: Tensor, totals: Sequence[float], rule: RankRule, side: int) -> list[Triple]:
    """Eigendecompositions of the short sides' Gram matrices in float64."""
    b, n, m = X.shape
    tall = n >= m
    values, vectors = torch.linalg.eigh(_grams(X.mT if tall else X))
    s, short = values.flip(1).clamp_min(0.0).sqrt(), vectors.flip(2)
    ranks = [
        select_rank(rule, row, total, n, m, RANK_RTOL[torch.float32], side)
        for row, total in zip(s.cpu(), totals, strict=True)
    ]
    out: list[Triple | None] = [None] * b
    for r in set(ranks):
        alike = [i for i in range(b) if ranks[i] == r]
        near = short[alike, :, :r].to(X.dtype)
        far = product((X if tall else X.mT)[alike], near) / s[alike, None, :r].to(X.dtype)
        Q, R = orthonormal(far)
        Q = Q * torch.sign(torch.diagonal(R, dim1=1, dim2=2))[:, None].to(Q.dtype)
        for at, i in enumerate(alike):
            out[i] = (Q[at], s[i, :r], near[at]) if tall else (near[at], s[i, :r], Q[at])
    return [triple for triple in out if triple is not None]


def _grams(X: Tensor, block: int = 1024) -> Tensor:
    """``X_i X_i^T`` in float64, accumulated over column blocks."""
    b, n, m = X.shape
    G = torch.zeros(b, n, n, dtype=CORE, device=X.device)
    for i in range(0, m, block):
        part = X[:, :, i : i + block].to(CORE)
        G.baddbmm_(part, part.mT)
    return G
