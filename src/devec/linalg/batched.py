"""Thin factorisations of many matrices of one shape at once, for GPUs.

One matrix at a time a GPU mostly waits for the next small kernel. Here a step of the iteration is one batched product,
one batched orthonormalisation and one transfer for all matrices together. Each matrix is still decided by itself, by the
functions that decide in :mod:`devec.linalg.lowrank` (``iteration.judge``, ``select_rank``, ``core_of_product``) and
from the same starting vectors, and leaves the batch when it has converged.

Products and panels stay on the device of the tensors; panels are made orthonormal by :func:`panels.orthonormal`. Cores
(rank x rank, float64) are solved by LAPACK on the CPU, on ``workers`` threads, as they are one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from devec.linalg import iteration
from devec.linalg.lowrank import ThinSVD, core_of_product, empty, svd_of_dense, svd_of_product, working_scale
from devec.linalg.numerics import CORE, RANK_RTOL, NonFiniteError, bad_entries, binary_scale, compute_dtype
from devec.linalg.panels import orthonormal
from devec.linalg.rank import RankRule, select_rank

T = TypeVar("T")
R = TypeVar("R")
Products = Literal["float32", "bfloat16"]
Triple = tuple[Tensor, Tensor, Tensor]

EXACT_BYTES = 2**31
"""Working memory of one batch on the exact path: a Gram matrix, its eigenvectors and workspace are six squares."""

LOW_STEPS = iteration.MAX_STEPS // 2
"""Steps with bfloat16 products before float32 takes over in any case. Seen: at most 15."""


class _Team:
    """Small problems on the CPU, side by side; results in order."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return list(map(function, items) if self._pool is None else self._pool.map(function, items))


@contextmanager
def _team(workers: int) -> Iterator[_Team]:
    if workers <= 1:
        yield _Team(None)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="devec-cores") as pool:
        yield _Team(pool)


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


def _some(X: Tensor, wanted: Sequence[int]) -> Tensor:
    """Those matrices of a batch; no copy when all are wanted."""
    return X if list(wanted) == list(range(X.shape[0])) else X[list(wanted)]


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
    QB, RB = orthonormal(_divided(_some(B, live).to(dtype), [scales_b[i] for i in live]))
    QA, RA = orthonormal(_divided(_some(A, live).to(dtype), [scales_a[i] for i in live]).mT)
    limit, side = RANK_RTOL[dtype] if rtol is None else rtol, side_length or n

    def solve(core: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
        return core_of_product(*core, rule, n, m, dtype, limit, side)

    with _team(workers) as team:
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

    ``products="bfloat16"`` makes the products of the power steps in bfloat16 until the values stand. The last step, and
    as many more as it takes until the values stand in float32 too, is made in float32, and ranks are decided on it.

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
    X = _divided(_some(W, live).to(dtype), [scales[i] for i in live])
    totals = (torch.stack([torch.linalg.vector_norm(x, dtype=CORE) for x in X]) ** 2).tolist()
    found: dict[int, Triple] = {}
    with _team(workers) as team:
        if iteration.iterates(rule, n, m, dtype, exact):
            found = _Iteration(X, totals, rule, side, team).run([keys[i] for i in live], products)
    rest = [at for at in range(len(live)) if at not in found]
    most = max(EXACT_BYTES // (6 * 8 * min(n, m) ** 2), 1)
    for start in range(0, len(rest), most):
        part = rest[start : start + most]
        results = _exact(_some(X, part), [totals[at] for at in part], rule, side)
        found.update(zip(part, results, strict=True))
    for at, i in enumerate(live):
        U, s, V = found[at]
        out[i] = ThinSVD(U, s.to(W.device) * scales[i], V, totals[at] * scales[i] * scales[i])
    return out


@dataclass
class _Member:
    """One matrix on its way: the next step is made from ``start`` (m, width)."""

    index: int
    gen: torch.Generator
    start: Tensor
    last: Tensor | None = None
    steps: int = 0


class _Iteration:
    """Subspace iteration of a batch: all that share a block size go together."""

    def __init__(self, X: Tensor, totals: Sequence[float], rule: RankRule, side: int, team: _Team) -> None:
        self.X, self.totals, self.rule, self.side, self.team = X, totals, rule, side, team
        self.n, self.m = int(X.shape[1]), int(X.shape[2])

    def run(self, keys: Sequence[object], products: Products) -> dict[int, Triple]:
        """Results by position in the batch; those that iteration does not serve are missing."""
        n, m = self.n, self.m
        block = iteration.first_block(self.rule, n, m)
        if block is None:
            return {}
        low = self.X.to(torch.bfloat16) if products == "bfloat16" else None
        gens = [iteration.seeded(key, n, m) for key in keys]
        starts = self._noise(gens, iteration.width(block, n, m))
        members = [_Member(i, gen, start) for i, (gen, start) in enumerate(zip(gens, starts, strict=True))]
        found: dict[int, Triple] = {}
        while members and block is not None:
            grown: list[_Member] = []
            if low is not None:
                members = self._until_settled(low, members, block, grown, None)
            self._until_settled(self.X, members, block, grown, found)
            wider = iteration.next_block(block, n, m)
            if wider is not None:
                more = iteration.width(wider, n, m) - iteration.width(block, n, m)
                for member, fresh in zip(grown, self._noise([g.gen for g in grown], more), strict=True):
                    member.start, member.last = torch.cat([member.start, fresh], dim=1), None
            members, block = grown, wider
        return found

    def _noise(self, gens: Sequence[torch.Generator], columns: int) -> list[Tensor]:
        return [t.to(self.X.device) for t in self.team.map(lambda g: iteration.noise(self.m, columns, g), gens)]

    def _until_settled(
        self,
        Y: Tensor,
        members: list[_Member],
        block: int,
        grown: list[_Member],
        found: dict[int, Triple] | None,
    ) -> list[_Member]:
        """Steps with the products of Y (X itself, or X in bfloat16) until no member is left.

        Members that need a larger block go to ``grown``. The others, once settled, go to ``found`` as results; without
        ``found`` they are returned, to be taken up from where they are. Members out of steps are dropped.
        """
        handed: list[_Member] = []
        if not members:
            return handed
        Y = _some(Y, [member.index for member in members])
        P = torch.stack([member.start for member in members])
        while members:
            Q, _ = orthonormal(_product(Y, P))
            P, R = orthonormal(_product(Y.mT, Q))
            cores = list(R.cpu())
            stay: list[int] = []
            done: list[tuple[int, int]] = []
            for at, values in enumerate(self.team.map(torch.linalg.svdvals, cores)):
                member = members[at]
                verdict = self._judged(member, values, block)
                if verdict.grow:
                    member.start = P[at]
                    grown.append(member)
                elif found is None and (verdict.settled or member.steps >= LOW_STEPS):
                    member.start = P[at]
                    handed.append(member)
                elif found is not None and verdict.settled:
                    done.append((at, verdict.rank))
                elif member.steps < iteration.MAX_STEPS:
                    stay.append(at)
            if done and found is not None:
                places = [at for at, _ in done]
                results = self._rotated(_some(Q, places), [cores[at] for at in places], _some(P, places))
                for (at, r), (U, s, V) in zip(done, results, strict=True):
                    found[members[at].index] = U[:, :r], s[:r], V[:, :r]
            if len(stay) < len(members):
                Y, P, members = _some(Y, stay), _some(P, stay), [members[at] for at in stay]
        return handed

    def _judged(self, member: _Member, values: Tensor, block: int) -> iteration.Judgement:
        member.steps += 1
        last, member.last = member.last, values
        if last is None:
            return iteration.Judgement(0, False, False)
        total = self.totals[member.index]
        return iteration.judge(self.rule, values, last, total, self.n, self.m, self.side, block)

    def _rotated(self, Q: Tensor, cores: Sequence[Tensor], P: Tensor) -> list[Triple]:
        """Rayleigh-Ritz: R^T is the core of ``Q^T X = (P R)^T``, so no further product with X is needed."""
        solved = self.team.map(lambda R: torch.linalg.svd(R.T), cores)
        U = Q @ torch.stack([u for u, _, _ in solved]).to(Q)
        V = P @ torch.stack([vh.T for _, _, vh in solved]).to(P)
        return [(U[i], s, V[i]) for i, (_, s, _) in enumerate(solved)]


def _product(Y: Tensor, P: Tensor) -> Tensor:
    return (Y @ P.to(Y.dtype)).to(torch.float32)


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
        far = _product((X if tall else X.mT)[alike], near) / s[alike, None, :r].to(X.dtype)
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
