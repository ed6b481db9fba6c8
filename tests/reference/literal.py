"""A word-for-word float64 transcription of arXiv:2512.22511, Eq. (6)-(14), as slow as it is plain.

Imports nothing of devec. Every projector is an n x n matrix and every product is formed. Where the paper's recipe is
not well defined (eigenvectors of a product of projectors are neither real nor orthogonal), the literal function says
so and a second one does what the text means, still with n x n matrices.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor


def column_basis(W: Tensor, rank: int | None = None, rtol: float = 1e-10) -> Tensor:
    """Eq. (6): left singular vectors; the numerical rank decides how many unless ``rank`` does."""
    U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
    if rank is None:
        rank = int((rtol * S[0] < S).sum()) if S.numel() and S[0] > 0 else 0
    return U[:, :rank]


def projector(U: Tensor) -> Tensor:
    """Eq. (7)."""
    return U @ U.T


def projector_by_definition(W: Tensor) -> Tensor:
    """Eq. (1): W (W^T W)^-1 W^T, for full column rank."""
    W = W.double()
    return W @ torch.linalg.inv(W.T @ W) @ W.T


def chain(projectors: list[Tensor]) -> Tensor:
    """Eq. (8)."""
    out = projectors[0]
    for P in projectors[1:]:
        out = out @ P
    return out


def eigen(P: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (9): eigenvalues and unit eigenvectors of the n x n product, complex as eig returns them, sorted."""
    values, vectors = torch.linalg.eig(P)
    order = torch.argsort(values.real, descending=True)
    return values[order], vectors[:, order]


def shared_literal(P: Tensor, tau: float) -> Tensor:
    """Eq. (10) with what eig returns, real parts of the vectors and nothing repaired."""
    values, vectors = eigen(P)
    return vectors[:, values.real > tau].real


def shared_repaired(P: Tensor, tau: float) -> Tensor:
    """Eq. (10), an orthonormal basis of the invariant subspace (real and imaginary parts together)."""
    values, vectors = eigen(P)
    Y = vectors[:, values.real > tau]
    U, _, _ = torch.linalg.svd(torch.cat([Y.real, Y.imag], dim=1), full_matrices=False)
    return U[:, : Y.shape[1]]


def mean_projector_basis(projectors: list[Tensor], tau: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the mean projector above (1 + (k-1) sqrt tau)/k that every subspace holds (|U_i^T z|^2 > tau).

    Also returns all eigenvalues, descending.
    """
    k = len(projectors)
    values, vectors = torch.linalg.eigh(sum(projectors) / k)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > (1 + (k - 1) * sqrt(tau)) / k
    for P in projectors:
        keep &= torch.einsum("ij,ij->j", vectors, P @ vectors) > tau
    return vectors[:, keep], values


def shared_part(Z: Tensor, W: Tensor) -> Tensor:
    """Eq. (11), (12)."""
    return (Z @ Z.T) @ W.double()


def unique_part(Z: Tensor, W: Tensor) -> Tensor:
    """Eq. (13)."""
    return W.double() - shared_part(Z, W)


def weighted_average(parts: list[Tensor]) -> Tensor:
    """Eq. (14)."""
    norms = [float(torch.linalg.norm(p)) for p in parts]
    if sum(norms) == 0.0:
        return torch.zeros_like(parts[0])
    return sum(x * p for x, p in zip(norms, parts, strict=True)) / sum(norms)


def sequence(target: Tensor, pool: list[Tensor], tau: float) -> Tensor:
    """Section 4.3: take what is shared with each vector of the pool out of the target, one after the other."""
    W = target.double()
    scale = torch.linalg.norm(W)
    for other in pool:
        if torch.linalg.norm(W) < 1e-9 * scale:
            break
        # A removed direction leaves rounding behind, which must not count as a direction again.
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        P = chain([projector(U[:, 1e-9 * scale < S]), projector(column_basis(other))])
        W = unique_part(shared_repaired(P, tau), W)
    return W


def sequence_on_subspace(basis: Tensor, target: Tensor, pool: list[Tensor], tau: float) -> Tensor:
    """:func:`sequence` for a target whose column space is given by a basis (rank already decided)."""
    left, W = basis.double(), target.double()
    for other in pool:
        Z = shared_repaired(projector(left) @ projector(other.double()), tau)
        W = unique_part(Z, W)
        left = column_basis(left - Z @ (Z.T @ left), rtol=1e-8)
    return W


def principal_cosines(U1: Tensor, U2: Tensor) -> Tensor:
    """Theorem 6.1, Eq. (16), by the recursion itself: maximise, deflate, repeat."""
    F, G = U1.double(), U2.double()
    out = []
    for _ in range(min(F.shape[1], G.shape[1])):
        u, s, vh = torch.linalg.svd(F.T @ G)
        out.append(s[0])
        F, G = F @ u[:, 1:], G @ vh[1:].T
    return torch.stack(out)
