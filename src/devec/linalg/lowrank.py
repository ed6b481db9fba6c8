"""Thin factorisations: exact for products of factors, adaptive or exact for dense matrices.

* ``B A``: two QR factorisations and an SVD of the ``r x r`` core. Nothing of size ``n x m`` is formed.
* dense, float32: subspace iteration with a block that grows until the rank rule fits, as long as the rank stays
  below ``min(n, m) / 16``; past that, an eigendecomposition of the short side's Gram matrix in float64 (faster than
  a float32 SVD, and accurate to 1e-4 degrees where a float32 Gram matrix loses small directions).
* dense, float64: a plain SVD, because who asks for float64 wants its digits.
* dense, float32, more than ``rows.LARGE`` entries: the same two ways with products summed over blocks of rows
  (:class:`~devec.linalg.rows.ByRows`), so that the matrix may stay in its file.

Never larger than ``max(min(n, m), sum of ranks)`` squared, never an ``n x n`` projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from devec.linalg import iteration
from devec.linalg.numerics import CORE, RANK_RTOL, binary_scale, compute_dtype, peak
from devec.linalg.rank import RankRule, select_rank
from devec.linalg.rows import ByRows, is_large

CANCELLED = 8
"""Units of rounding, times ``sum_i |b_i||a_i|``, below which a singular value of ``B A`` is what cancellation left
(seen: up to 2)."""

SAFE = 2.0**-30
"""Entries between this and its inverse need no scaling: squares stay in float32's range, and a copy is saved."""


@dataclass(frozen=True)
class ThinSVD:
    """``W ~ U diag(S) V^T`` with r columns, ``U (n, r)``, ``S (r,)`` float64 descending, ``V (m, r)``.

    ``total`` is ``|W|_F^2`` of the whole matrix (float64), so ``energy_kept`` is exact whatever was cut.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    total: float

    @property
    def rank(self) -> int:
        return int(self.S.numel())

    @property
    def energy_kept(self) -> float:
        """``sum s^2 / |W|_F^2`` of the directions kept; 1 for a zero matrix (nothing was lost)."""
        if self.total == 0.0:
            return 1.0
        top = float(self.S[0]) if self.rank else 1.0
        relative = float(((self.S / top) ** 2).sum())
        return min(relative * (top * top / self.total), 1.0)

    def truncated(self, rank: int) -> ThinSVD:
        return ThinSVD(self.U[:, :rank], self.S[:rank], self.V[:, :rank], self.total)

    def transpose(self) -> ThinSVD:
        return ThinSVD(self.V, self.S, self.U, self.total)

    def row_major(self) -> ThinSVD:
        """The same factors as a file holds them, strides and all, and nothing else in memory behind them."""
        return ThinSVD(_row_major(self.U), self.S, _row_major(self.V), self.total)


def _row_major(x: Tensor) -> Tensor:
    if x.stride() == (x.shape[1], 1) and x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves one column its odd strides


class TooManyDirections(Exception):
    """The rank rule keeps ``rank`` directions, more than there is memory for (``most``)."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        super().__init__(f"{rank} directions are kept")


def frobenius(x: Tensor) -> float:
    """``|x|_F`` accumulated in float64."""
    if x.ndim == 2 and not x.is_contiguous():
        x = x.T
    return sqrt(inner_of_dense(x, x))


def inner_of_dense(a: Tensor, b: Tensor, block: int = 1 << 18) -> float:
    """``sum a * b`` in float64, block by block: no float64 copy of a matrix is made, and one that stays in the cache
    makes this ten times as fast as torch's widening norm."""
    x, y = a.reshape(-1), b.reshape(-1)
    parts = [torch.dot(x[i : i + block].double(), y[i : i + block].double()) for i in range(0, x.numel(), block)]
    return float(torch.stack(parts).sum()) if parts else 0.0


def inner_of_products(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> float:
    """``<B1 A1, B2 A2> = sum (B1^T B2) * (A1 A2^T)``, in float64, without either product."""
    return float(((B1.double().T @ B2.double()) * (A1.double() @ A2.double().T)).sum())


def inner_of_many_dense(matrices: Sequence[Tensor], block: int = 1 << 15) -> Tensor:
    """:func:`inner_of_dense` of all pairs, ``(k, k)`` on the CPU: each matrix is widened once and not k times, in
    blocks that stay in the cache (16 matrices of 2048 x 2048: 3.5 times as fast as pair by pair)."""
    flat = [x.reshape(-1) for x in matrices]
    if not flat:
        return torch.zeros(0, 0, dtype=CORE)
    G = torch.zeros(len(flat), len(flat), dtype=CORE, device=flat[0].device)
    for i in range(0, flat[0].numel(), block):
        part = torch.stack([x[i : i + block].to(CORE) for x in flat])
        G.addmm_(part, part.T)
    return G.cpu()


GROUP = 64
"""Columns of several B at a time in :func:`inner_of_many_products`: they fill the processor where one adapter's few
do not, and no more than two such groups are held in float64."""


def inner_of_many_products(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """:func:`inner_of_products` of all pairs of ``(B, A)``, ``(k, k)`` on the CPU, in products of groups (24 adapters
    on 2048 x 2048 of rank 8: 2.5 times as fast as pair by pair, of rank 16: 1.6). From 33 columns on pair by pair."""
    k = len(terms)
    G = torch.zeros(k, k, dtype=CORE)
    step = GROUP // max((max(B.shape[1], 1) for B, _ in terms), default=1)
    if step < 2:
        for i, (B, A) in enumerate(terms):
            for j in range(i, k):
                G[i, j] = G[j, i] = inner_of_products(B, A, *terms[j])
        return G
    for a in range(0, k, step):
        Ba, Aa, of_a = _stacked(terms[a : a + step])
        for b in range(a, k, step):
            Bb, Ab, of_b = (Ba, Aa, of_a) if b == a else _stacked(terms[b : b + step])
            part = (of_a.T @ ((Ba.T @ Bb) * (Aa @ Ab.T)) @ of_b).cpu()
            G[a : a + step, b : b + step] = part
            G[b : b + step, a : a + step] = part.T
    return G


def _stacked(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """``[B_1 ..]``, ``[A_1; ..]`` and which column belongs to which, in float64."""
    ranks = torch.tensor([B.shape[1] for B, _ in terms])
    owner = torch.repeat_interleave(torch.eye(len(terms), dtype=CORE), ranks, dim=0).to(terms[0][0].device)
    return torch.cat([B.to(CORE) for B, _ in terms], 1), torch.cat([A.to(CORE) for _, A in terms], 0), owner


def frobenius_of_product(B: Tensor, A: Tensor) -> float:
    """``|B A|_F`` from the r x r core: ``|R_B R_A^T|_F``. Unlike sqrt(<W, W>) it does not lose half the digits."""
    if B.shape[1] == 0:
        return 0.0
    RB = torch.linalg.qr(B.double(), mode="r").R
    RA = torch.linalg.qr(A.double().T, mode="r").R
    return frobenius(RB @ RA.T)


def empty(n: int, m: int, like: Tensor, total: float = 0.0) -> ThinSVD:
    dtype = compute_dtype(like.dtype)
    return ThinSVD(
        torch.zeros(n, 0, dtype=dtype, device=like.device),
        torch.zeros(0, dtype=CORE, device=like.device),
        torch.zeros(m, 0, dtype=dtype, device=like.device),
        total,
    )


def working_scale(top: float) -> float:
    """What a dense matrix with largest entry ``top`` is divided by before it is factored: mostly 1, and 0 for 0."""
    scale = binary_scale(top)
    return 1.0 if SAFE < scale < 1 / SAFE else scale


def svd_of_product(
    B: Tensor,
    A: Tensor,
    rule: RankRule | str | int = "none",
    side_length: int | None = None,
    rtol: float | None = None,
) -> ThinSVD:
    """Thin SVD of ``B A`` by QR-core SVD: ``Q_B R_B = B``, ``Q_A R_A = A^T``, SVD of ``R_B R_A^T`` in float64.

    B ``(n, r)``, A ``(r, m)``. Right also for rank-deficient factors, where a QR of B alone returns spurious columns.
    ``auto`` means the numerical rank here: a LoRA's rank is known, only rounding has to go. ``rtol`` is the limit of
    that rank against the largest singular value; 0 leaves out what cancellation left and nothing else.
    """
    rule = RankRule.parse(rule)
    n, m = B.shape[0], A.shape[1]
    scale_b, scale_a = binary_scale(peak(B)), binary_scale(peak(A))
    if scale_b == 0.0 or scale_a == 0.0:
        return empty(n, m, B)
    dtype = compute_dtype(B.dtype)
    QB, RB = torch.linalg.qr(B.to(dtype) / scale_b)
    QA, RA = torch.linalg.qr(A.to(dtype).T / scale_a)
    u, s, vh, total = core_of_product(
        RB.to(CORE), RA.to(CORE), rule, n, m, dtype, RANK_RTOL[dtype] if rtol is None else rtol, side_length or n
    )
    if total == 0.0:
        return empty(n, m, B)
    scale = scale_b * scale_a
    return ThinSVD(QB @ u.to(dtype), s * scale, QA @ vh.T.to(dtype), total * scale * scale)


def core_of_product(
    RB: Tensor, RA: Tensor, rule: RankRule, n: int, m: int, dtype: torch.dtype, rtol: float, side: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """``u, s, vh`` of ``R_B R_A^T`` cut by the rule, and the sum of all squares; R_B and R_A in float64, from factors
    of an ``n x m`` product that were given in ``dtype``."""
    u, s, vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    # Columns of each factor carry their own rounding, so what cancels leaves this much (factors of [X, X] [Y; -Y]).
    s = s[s > CANCELLED * torch.finfo(dtype).eps * float((RB.norm(dim=0) * RA.norm(dim=0)).sum())]
    total = float((s * s).sum())
    if total == 0.0:
        return u[:, :0], s[:0], vh[:0], 0.0
    effective = RankRule("none") if rule.kind == "auto" else rule
    # The core holds every singular value that there is, so every rule can be decided; white-noise rules still
    # refer to the n x m matrix, whose remaining singular values are exactly zero.
    r = _decide(effective, s, total, n, m, rtol, side)
    return u[:, :r], s[:r], vh[:r], total


def _decide(rule: RankRule, s: Tensor, total: float, n: int, m: int, rtol: float, side: int) -> int:
    """``select_rank`` for a complete spectrum: zeros that were not computed are zeros."""
    full = torch.cat([s, s.new_zeros(min(n, m) - s.numel())]) if s.numel() < min(n, m) else s
    return min(select_rank(rule, full, total, n, m, rtol, side), int(s.numel()))


def svd_of_sum(terms: Sequence[tuple[Tensor, Tensor]], rule: RankRule | str | int = "none") -> ThinSVD:
    """Thin SVD of ``sum_i B_i A_i``: exact, by stacking factors. Cost O((n + m) R^2), R = sum of ranks."""
    return svd_of_product(
        torch.cat([B for B, _ in terms], dim=1), torch.cat([A for _, A in terms], dim=0), rule
    )


def svd_of_dense(
    W: Tensor | ByRows,
    rule: RankRule | str | int = "none",
    *,
    side_length: int | None = None,
    exact: bool = False,
    key: object = 0,
    most: int | None = None,
) -> ThinSVD:
    """Thin SVD of a dense ``n x m`` matrix, cut by a rank rule.

    ``key`` names the matrix (its tensor and vector): the start of the iteration is drawn from it, so the result
    does not depend on the order of work. ``exact`` forces the Gram (float32) or SVD (float64) path. A matrix with
    more than ``rows.LARGE`` entries gives the same bytes as a tensor and as the ``ByRows`` of its file.

    Raises NonFiniteError for NaN or infinity; TooManyDirections, before any basis of them is made, when the rule keeps
    more than ``most``.
    """
    rule = RankRule.parse(rule)
    n, m = W.shape
    dtype = compute_dtype(W.dtype)
    if isinstance(W, Tensor) and is_large(n, m) and dtype == torch.float32 and W.device.type == "cpu":
        W = ByRows.of(W)
    if isinstance(W, ByRows):
        top, norm = W.measure()
        scale = working_scale(top)
        if scale == 0.0:
            return empty(n, m, torch.empty(0))
        X, total = W.divided(scale), (norm / scale) ** 2
        return _svd_of_scaled(X, total, rule, side_length or n, exact, key, most, scale)
    scale = working_scale(peak(W))
    if scale == 0.0:
        return empty(n, m, W)
    whole = W.to(dtype)
    if scale != 1.0:
        whole = whole / scale
    return _svd_of_scaled(whole, frobenius(whole) ** 2, rule, side_length or n, exact, key, most, scale)


def _svd_of_scaled(
    X: Tensor | ByRows, total: float, rule: RankRule, side: int, exact: bool, key: object, most: int | None,
    scale: float,
) -> ThinSVD:  # fmt: skip
    """The thin SVD of ``scale X``, where ``|X|_F^2 = total``."""
    (n, m), dtype = X.shape, X.dtype
    out: tuple[Tensor, Tensor, Tensor] | None = None
    if iteration.iterates(rule, n, m, dtype, exact):
        out = _adaptive(X, total, rule, side, key)
    if out is None:
        found = _by_svd(X) if isinstance(X, Tensor) and dtype == torch.float64 else _by_gram(X)
        r = select_rank(rule, found[1], total, n, m, RANK_RTOL[dtype], side)
        if most is not None and r > most:
            raise TooManyDirections(r)
        out = (found[0][:, :r], found[1][:r], found[2][:, :r])
        del found
        if dtype == torch.float32:
            out = _orthonormal_long_side(X, *out)
    U, s, V = out
    return ThinSVD(U.to(dtype), s.to(CORE) * scale, V.to(dtype), total * scale * scale)


def _by_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    return U, s, Vh.T


def _by_gram(X: Tensor | ByRows) -> tuple[Tensor, Tensor, Tensor]:
    """All singular values and the short side's vectors (in both places) from ``eigh`` of its Gram in float64.

    The long side costs a product per direction, so ``_orthonormal_long_side`` fills it in for the kept ones only.
    """
    tall = X.shape[0] >= X.shape[1]
    values, vectors = torch.linalg.eigh(X.gram() if isinstance(X, ByRows) else gram(X.T if tall else X))
    s = values.flip(0).clamp_min(0.0).sqrt()
    short = vectors.flip(1)
    return short, s, short


def _orthonormal_long_side(
    X: Tensor | ByRows, U: Tensor, s: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the long side: ``X V / s``, made orthonormal by one QR whose signs are set back."""
    tall = X.shape[0] >= X.shape[1]
    short = (V if tall else U).to(X.dtype)
    image = (X @ short if tall else X.T @ short).div_(s.to(X.dtype))
    Q, R = torch.linalg.qr(image)
    Q.mul_(torch.sign(torch.diagonal(R)))
    return (Q, s, short) if tall else (short, s, Q)


def gram(X: Tensor, block: int = 1024) -> Tensor:
    """``X X^T`` in float64, accumulated over column blocks: the float64 copy never exceeds ``n x block``."""
    n, m = X.shape
    G = torch.zeros(n, n, dtype=CORE, device=X.device)
    for i in range(0, m, block):
        part = X[:, i : i + block].to(CORE)
        G.addmm_(part, part.T)
    return G


def _adaptive(
    X: Tensor | ByRows, total: float, rule: RankRule, side: int, key: object
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Subspace iteration with a growing block; ``None`` when the rank rule wants more than min(n, m)/16.

    Two products with X a step. A panel goes as soon as the next product is made: no more than two of each side exist.
    """
    n, m = X.shape
    block = iteration.first_block(rule, n, m)
    if block is None:
        return None
    gen = iteration.seeded(key, n, m)

    def image_of_noise(columns: int) -> Tensor:
        return X @ iteration.noise(m, columns, gen).to(X.device)

    image = image_of_noise(iteration.width(block, n, m))
    last: Tensor | None = None
    for _ in range(iteration.MAX_STEPS):
        Q = torch.linalg.qr(image).Q
        del image
        P, R = torch.linalg.qr(X.T @ Q)
        values = torch.linalg.svdvals(R.to(CORE)).cpu()
        more = 0
        if last is not None:
            rank, grow, settled = iteration.judge(rule, values, last, total, n, m, side, block)
            if settled:
                # R^T is the core of Q^T X = (P R)^T: the Rayleigh-Ritz step needs no further product with X.
                u, s, vh = torch.linalg.svd(R.to(CORE).T)
                return Q @ u[:, :rank].to(X.dtype), s[:rank], P @ vh[:rank].T.to(X.dtype)
            if grow:
                wider = iteration.next_block(block, n, m)
                if wider is None:
                    return None
                block, more = wider, iteration.width(wider, n, m) - Q.shape[1]
        last = None if more else values
        del Q
        image = torch.cat([X @ P, image_of_noise(more)], dim=1) if more else X @ P  # noqa: F841 -- the next step takes it
        del P
    return None
