"""Inputs with known answers: subspaces at prescribed angles, task vectors with planted shared directions."""

from __future__ import annotations

from math import cos, radians, sin

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(n: int, r: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q


def pair_at_angles(n: int, degrees: list[float], extra: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two orthonormal bases whose principal angles are exactly ``degrees``, then 90 for ``extra`` more columns."""
    d, g = len(degrees), generator(seed)
    Q = orthonormal(n, 2 * d + 2 * extra, g)
    c = torch.tensor([cos(radians(x)) for x in degrees], dtype=torch.float64)
    s = torch.tensor([sin(radians(x)) for x in degrees], dtype=torch.float64)
    U = torch.cat([Q[:, :d], Q[:, 2 * d : 2 * d + extra]], dim=1)
    V = torch.cat([Q[:, :d] * c + Q[:, d : 2 * d] * s, Q[:, 2 * d + extra :]], dim=1)
    return U, V


def bases_at_common_angle(n: int, k: int, degrees: list[float], extra: int, seed: int) -> list[Tensor]:
    """k bases: direction j of any two of them stands at ``degrees[j]``; ``extra`` own columns each, all orthogonal."""
    d, g = len(degrees), generator(seed)
    Q = orthonormal(n, d + k * d + k * extra, g)
    out = []
    for i in range(k):
        own = Q[:, d + i * d : d + (i + 1) * d]
        # z cos a + own_i sin a has pairwise inner product cos^2 a.
        c = torch.tensor([cos(radians(x)) for x in degrees], dtype=torch.float64)
        common, tilt = c.sqrt(), (1 - c).sqrt()
        at = d + k * d + i * extra
        out.append(torch.cat([Q[:, :d] * common + own * tilt, Q[:, at : at + extra]], dim=1))
    return out


def matrix_on(U: Tensor, m: int, seed: int, spread: float = 10.0) -> Tensor:
    """A random ``n x m`` matrix with column space span(U) and condition number ``spread``."""
    g, r = generator(seed), U.shape[1]
    left = orthonormal(r, r, g)
    s = torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), r, dtype=torch.float64)
    return U.double() @ (left * s) @ orthonormal(m, r, g).T


def factors_on(U: Tensor, m: int, seed: int, spread: float = 10.0) -> tuple[Tensor, Tensor]:
    """LoRA factors B ``(n, r)``, A ``(r, m)`` with column space span(U)."""
    g, r = generator(seed), U.shape[1]
    s = torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), r, dtype=torch.float64)
    B = U.double() @ (orthonormal(r, r, g) * s)
    return B, torch.randn(r, m, generator=g, dtype=torch.float64) / m**0.5


def projector_distance(X: Tensor, Y: Tensor) -> float:
    """``|X X^T - Y Y^T|_2`` for orthonormal X, Y; inf when the dimensions differ."""
    if X.shape[1] != Y.shape[1]:
        return float("inf")
    if X.shape[1] == 0:
        return 0.0
    X, Y = X.double(), Y.double()
    return float(torch.linalg.matrix_norm(X @ X.T - Y @ Y.T, ord=2))
