"""Shared subspaces from overlaps: everything happens in coordinates of orthonormal bases.

Let ``U_i (n, r_i)`` be orthonormal bases and ``M_ij = U_i^T U_j`` their overlaps. Every subspace that the method
asks for lies in the span of the bases, ``Z = sum_i U_i C_i``, and its coefficients ``C_i`` follow from the overlaps
alone. So this module never sees an n: the same code serves whole matrices and matrices that are streamed in blocks
of rows, and nothing larger than ``(sum of r_i)^2`` is formed.

Equation numbers are those of arXiv:2512.22511.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from devec.linalg.numerics import CORE

PairBasis = Literal["bisector", "first", "own"]
Coefficients = dict[int, Tensor]
"""Vector index -> ``(r_i, d)``, all with the same d: ``Z = sum_i U_i C_i``."""
KeepRule = Callable[[int, Tensor], int]
"""``keep(j, eigenvalues) -> q``: how many leading eigenvalues of the pair (target, j) count as shared."""


@dataclass(frozen=True)
class Overlaps:
    """``M_ij = U_i^T U_j`` for i < j in float64, of bases with ``ranks`` columns in R^n."""

    n: int
    ranks: tuple[int, ...]
    blocks: Mapping[tuple[int, int], Tensor]

    @property
    def k(self) -> int:
        return len(self.ranks)

    def block(self, i: int, j: int) -> Tensor:
        if i == j:
            return torch.eye(self.ranks[i], dtype=CORE)
        return self.blocks[i, j] if i < j else self.blocks[j, i].T

    def gram(self) -> Tensor:
        """``[U_1 .. U_k]^T [U_1 .. U_k]``, a matrix of size sum of ranks."""
        return torch.cat(
            [torch.cat([self.block(i, j) for j in range(self.k)], dim=1) for i in range(self.k)], dim=0
        )


def overlaps(bases: Sequence[Tensor], pairs: Iterable[tuple[int, int]] | None = None) -> Overlaps:
    """Overlaps of orthonormal bases (columns), of all pairs i < j or of those named. Products in the bases' dtype,
    everything after in float64."""
    n = bases[0].shape[0]
    if bases[0].device.type != "cpu":
        return overlaps_at_once(bases, pairs)
    wanted = ((i, j) for i in range(len(bases)) for j in range(i + 1, len(bases))) if pairs is None else pairs
    blocks = {(i, j): (bases[i].T @ bases[j]).to(CORE).cpu() for i, j in wanted}
    return Overlaps(n, tuple(int(U.shape[1]) for U in bases), blocks)


def overlaps_at_once(bases: Sequence[Tensor], pairs: Iterable[tuple[int, int]] | None = None) -> Overlaps:
    """:func:`overlaps` from one product ``[U_1 .. U_k]^T [U_1 .. U_k]`` and one transfer, for GPUs: twice the
    arithmetic, and one kernel instead of k^2/2."""
    joined = torch.cat(list(bases), dim=1)
    ranks = tuple(int(U.shape[1]) for U in bases)
    rows = torch.split((joined.T @ joined).cpu().to(CORE), list(ranks))
    wanted = ((i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks))) if pairs is None else pairs
    cells = [torch.split(row, list(ranks), dim=1) for row in rows]
    return Overlaps(int(joined.shape[0]), ranks, {(i, j): cells[i][j].clone() for i, j in wanted})


def assemble(bases: Sequence[Tensor] | Mapping[int, Tensor], coefficients: Coefficients) -> Tensor:
    """``Z = sum_i U_i C_i``, in the bases' dtype."""
    out: Tensor | None = None
    for i, C in coefficients.items():
        part = bases[i] @ C.to(device=bases[i].device, dtype=bases[i].dtype)
        out = part if out is None else out + part
    if out is None:
        raise ValueError("a subspace needs at least one basis")
    return out


# --- two vectors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSpectrum:
    """SVD of ``M = U_1^T U_2 = A diag(c) B^T``: ``c`` are cosines of principal angles, descending."""

    A: Tensor
    c: Tensor
    B: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """Nonzero eigenvalues of ``P_1 P_2`` (Eq. 8-9 for k = 2): ``cos^2``, clamped to at most 1."""
        return (self.c * self.c).clamp(0.0, 1.0)


def pair_spectrum(M: Tensor) -> PairSpectrum:
    """Prop. 3.1, Eq. (8), (9) for two vectors, reduced exactly: eigenpairs of ``P_1 P_2 = U_1 U_1^T U_2 U_2^T`` with
    nonzero eigenvalue are ``(cos^2 theta_j, U_1 a_j)`` with ``M = A diag(cos theta) B^T``. min(r_1, r_2) values.

    The literal ``eig`` of the n x n product returns non-orthogonal vectors when eigenvalues coincide (100 directions
    shared exactly: shared component wrong by 71 %); the SVD does not.
    """
    u, s, vh = torch.linalg.svd(M.to(CORE), full_matrices=False)
    return PairSpectrum(u, s, vh.T)


def pair_coefficients(spectrum: PairSpectrum, keep: int, basis: PairBasis, owner: int = 0) -> Coefficients:
    """Eq. (10): coordinates of the ``keep`` leading shared directions of a pair, orthonormal.

    * ``first``: ``Z = U_1 A`` (the paper; depends on the order: the second vector keeps only cos^2 of each);
    * ``bisector``: ``(f + g) / |f + g|`` for principal vectors f, g (order-free; both keep (1 + c)/2);
    * ``own``: U_1 A or U_2 B, the principal vectors in the basis of vector ``owner`` (0 or 1).
    """
    A, B, c = spectrum.A[:, :keep], spectrum.B[:, :keep], spectrum.c[:keep].clamp(0.0, 1.0)
    if basis == "first" or (basis == "own" and owner == 0):
        return {0: A}
    if basis == "own":
        return {1: B}
    scale = 1.0 / torch.sqrt(2.0 * (1.0 + c))
    return {0: A * scale, 1: B * scale}


def principal_angles(U1: Tensor, U2: Tensor) -> Tensor:
    """Principal angles between two orthonormal bases in radians, ascending; accurate near 0 and near pi/2.

    ``acos`` of a float64 cosine cannot resolve angles below 2.7e-6 degrees (0.08 degrees in float32); below 45
    degrees the sine ``|(I - U_1 U_1^T) g|`` is used instead (Bjorck and Golub).
    """
    X, Y = U1.to(CORE), U2.to(CORE)
    spectrum = pair_spectrum(X.T @ Y)
    f, g = X @ spectrum.A, Y @ spectrum.B
    sine = torch.linalg.vector_norm(g - f * spectrum.c, dim=0).clamp(0.0, 1.0)
    cosine = spectrum.c.clamp(0.0, 1.0)
    return torch.where(cosine * cosine > 0.5, torch.asin(sine), torch.acos(cosine)).sort().values


def angle_spectrum(U1: Tensor, U2: Tensor) -> tuple[PairSpectrum, Tensor]:
    """Theorem 6.1: principal vectors by QR bases and their angles (Eq. 16), for ``--angles``.

    Bases are re-orthonormalised by QR in float64 before the overlap is taken, and angles come from sines where
    they are small. Decides as the projection form does: the subspaces agree to 2e-4 degrees in float32.
    """
    Q1, R1 = torch.linalg.qr(U1.to(CORE))
    Q2, R2 = torch.linalg.qr(U2.to(CORE))
    s = pair_spectrum(Q1.T @ Q2)
    f, g = Q1 @ s.A, Q2 @ s.B
    sine = torch.linalg.vector_norm(g - f * s.c, dim=0).clamp(0.0, 1.0)
    cosine = s.c.clamp(0.0, 1.0)
    angles = torch.where(cosine * cosine > 0.5, torch.asin(sine), torch.acos(cosine))
    # Coordinates refer to U, not to Q: U = Q R, and R is a rotation up to rounding.
    return PairSpectrum(torch.linalg.solve_triangular(R1, s.A, upper=True), torch.cos(angles),
                        torch.linalg.solve_triangular(R2, s.B, upper=True)), angles


# --- all vectors jointly -----------------------------------------------------------------------------------------


def chain_threshold(tau: float, k: int) -> float:
    """The chain eigenvalue of k subspaces whose pairs all stand at ``cos^2 = tau``: ``tau^(k/2)``."""
    return float(tau ** (k / 2))


def consensus_threshold(tau: float, k: int) -> float:
    """The mean-projector eigenvalue of k subspaces whose pairs all stand at ``cos^2 = tau``."""
    return (1.0 + (k - 1) * sqrt(tau)) / k


@dataclass(frozen=True)
class ChainSpectrum:
    """Eigenpairs of ``P_1 P_2 ... P_k`` in the coordinates of U_1, by descending real part."""

    real: Tensor
    imag: Tensor
    vectors: Tensor


def chain_spectrum(M: Overlaps) -> ChainSpectrum:
    """Eq. (8), (9) for any k, reduced exactly: nonzero eigenpairs of ``P_1 ... P_k`` are ``(lambda, U_1 y)`` with
    ``N y = lambda y``, ``N = M_12 M_23 ... M_k1`` of size ``r_1 x r_1``. Order-dependent for k >= 4, and its
    vectors always lie in the range of the first factor."""
    N = M.block(0, 1)
    for i in range(1, M.k):
        N = N @ M.block(i, (i + 1) % M.k)
    values, vectors = torch.linalg.eig(N)
    order = torch.argsort(values.real, descending=True, stable=True)
    return ChainSpectrum(values.real[order].clamp(max=1.0), values.imag[order], vectors[:, order])


def chain_coefficients(spectrum: ChainSpectrum, keep: Tensor) -> Coefficients:
    """Eq. (10), (11): an orthonormal basis of the invariant subspace of the eigenvalues in the mask ``keep``.

    Unit eigenvectors of the product are far from orthogonal (eigenvalues of Z Z^T up to 4.9 where they should be 1),
    so the basis is taken from the SVD of ``[Re Y, Im Y]``; conjugate pairs stay whole because they share their real
    part. The real part alone is not enough: rounding can split an eigenvalue 1 into a pair.
    """
    Y = spectrum.vectors[:, keep]
    count = int(keep.sum())
    if count == 0:
        return {0: torch.zeros(spectrum.vectors.shape[0], 0, dtype=CORE)}
    u, _, _ = torch.linalg.svd(torch.cat([Y.real, Y.imag], dim=1), full_matrices=False)
    return {0: u[:, :count]}


@dataclass(frozen=True)
class ConsensusSpectrum:
    """Eigenpairs of the mean of the projectors, ``(1/k) sum P_i``, descending.

    ``mean`` eigenvalues in [0, 1]; ``coverage[i, j] = |U_i^T z_j|^2`` per vector; ``coefficients`` C_i with
    ``z = sum_i U_i C_i`` orthonormal.
    """

    mean: Tensor
    coverage: Tensor
    coefficients: Coefficients


def consensus_spectrum(M: Overlaps, floor: float = 1e-9) -> ConsensusSpectrum:
    """Directions that all vectors share, free of order: eigenvectors of ``(1/k) sum_i U_i U_i^T``.

    With ``S = [U_1 .. U_k]/sqrt k`` and ``S^T S v = lambda v``: ``z = S v / sqrt(lambda)``. For k = 2 this is the
    bisector, eigenvalue (1 + cos theta)/2. Not in the paper, whose chain depends on the order of its factors.
    Directions with eigenvalue under ``floor`` are rounding and left out.
    """
    values, vectors = torch.linalg.eigh(M.gram() / M.k)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > floor
    values, vectors = values[keep], vectors[:, keep]
    scaled = vectors / (torch.sqrt(values) * sqrt(M.k))
    parts = dict(enumerate(torch.split(scaled, list(M.ranks), dim=0)))
    # U_i^T z_j = (Gram scaled)_i: the eigenvector equation gives it without another product.
    inside = torch.split(vectors * torch.sqrt(values) * sqrt(M.k), list(M.ranks), dim=0)
    coverage = torch.stack([(part * part).sum(0) for part in inside])
    return ConsensusSpectrum(values.clamp(max=1.0), coverage.clamp(max=1.0), parts)


# --- one vector against a pool -----------------------------------------------------------------------------------


def union_coefficients(shared: Sequence[Tensor], leak: Sequence[float], rank: int) -> Tensor:
    """One subspace that covers what a target shares with each vector of a pool: greedy and order-free.

    ``shared[j]`` holds orthonormal coordinates ``A_j (rank, q_j)`` (in the target's own basis) of what the target
    shares with vector j. Returns Q ``(rank, d)`` such that every unit vector x of every span(A_j) leaves at most
    ``leak[j]`` of its energy outside: ``|(I - Q Q^T) A_j|_2^2 <= leak[j]``. For a threshold tau, leak = 1 - tau.

    The union of all columns would be far too large (near-copies of one direction fill the whole space), and a fixed
    cut on its singular values leaks for three or more vectors. So: while some A_j leaks, take the left singular
    vectors of the residuals that leak; add each one without which some A_j could not be covered (it holds more than
    leak[j] of a direction of A_j), or the leading one if there is none. Adding them together instead of one at a
    time needs few rounds, and unlike a bound on given columns the bound on spans does not depend on which principal
    vectors a tie returned.
    """
    Q = torch.zeros(rank, 0, dtype=CORE)
    columns = [(A.to(CORE), bound) for A, bound in zip(shared, leak, strict=True) if A.shape[1]]
    while Q.shape[1] < rank:
        leaking: list[tuple[Tensor, float]] = []
        for A, bound in columns:
            if Q.shape[1] == 0 and bound < 1.0:  # nothing is covered: A is its own residual, and orthonormal
                leaking.append((A, bound))
                continue
            rest = A - Q @ (Q.T @ A)
            if float((rest * rest).sum()) <= bound:  # the sum of all s^2
                continue
            u, s, _ = torch.linalg.svd(rest, full_matrices=False)
            # A hair above the bound: a direction that was just added leaves rounding, never more.
            out = s * s > bound + 1e-9
            if bool(out.any()):
                leaking.append((u[:, out] * s[out], bound))
        if not leaking:
            break
        u, s, _ = torch.linalg.svd(torch.cat([r for r, _ in leaking], dim=1), full_matrices=False)
        needed = torch.zeros(s.shape[0], dtype=torch.bool)
        for rest, bound in leaking:
            needed |= ((rest.T @ u) ** 2).sum(0) > bound + 1e-9
        if not bool(needed.any()):
            needed[0] = True
        fresh = u[:, needed]
        fresh = fresh - Q @ (Q.T @ fresh)
        Q = torch.linalg.qr(torch.cat([Q, fresh], dim=1)).Q[:, :rank]
    return Q


def sequence_coefficients(M: Overlaps, target: int, order: Sequence[int], keep: KeepRule) -> Tensor:
    """The paper's iteration (section 4.3): remove what the target shares with the first vector, then what is left of
    it with the second, and so on. Exact on the small cores: after a removal the target's column space is
    ``U A_perp``. Depends on ``order``. Returns the removed coordinates Q ``(r_t, d)``, orthonormal.
    """
    left = torch.eye(M.ranks[target], dtype=CORE)
    removed: list[Tensor] = []
    for j in order:
        if left.shape[1] == 0:
            break
        u, s, _ = torch.linalg.svd(left.T @ M.block(target, j), full_matrices=True)
        q = keep(j, (s * s).clamp(0.0, 1.0))
        removed.append(left @ u[:, :q])
        left = left @ u[:, q:]
    return torch.cat(removed, dim=1) if removed else torch.zeros(M.ranks[target], 0, dtype=CORE)
