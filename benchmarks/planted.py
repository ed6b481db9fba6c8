"""Pairs of matrices with a known number of shared directions, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from devec.linalg.numerics import generator

RANK = 64
SHARED = 16


@dataclass(frozen=True)
class PlantedPair:
    """``directions[:, j]`` is the j-th shared direction as the first vector has it. ``factors`` for low-rank pairs."""

    matrices: tuple[Tensor, Tensor]
    directions: Tensor
    factors: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def _orthonormal(n: int, k: int, gen: torch.Generator) -> Tensor:
    Q: Tensor = torch.linalg.qr(torch.randn(n, k, generator=gen, dtype=torch.float64)).Q
    return Q


def _column_spaces(n: int, r: int, degrees: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two orthonormal bases whose first columns stand at the given angles, and whose others are orthogonal."""
    d = degrees.numel()
    F = _orthonormal(n, 2 * r, gen)
    angle = torch.deg2rad(degrees)
    tilted = F[:, :d] * torch.cos(angle) + F[:, d : 2 * d] * torch.sin(angle)
    own = F[:, 2 * d :]
    return torch.cat([F[:, :d], own[:, : r - d]], dim=1), torch.cat([tilted, own[:, r - d :]], dim=1)


def low_rank_pair(n: int, r: int) -> PlantedPair:
    """Two products ``B A`` of rank r that share r/4 directions, at angles from 5 to 15 degrees.

    Angles differ, because ``eig`` returns vectors far from orthogonal where eigenvalues coincide and the literal
    recipe would be wrong. B is mixed by a rotation, so that no column is a shared direction by itself.
    """
    gen = generator("benchmark", "low-rank", n, r)
    U = _column_spaces(n, r, torch.linspace(5, 15, r // 4, dtype=torch.float64), gen)
    factors = []
    for basis in U:
        B = basis @ _orthonormal(r, r, gen)
        A = torch.randn(r, n, generator=gen, dtype=torch.float64) / n**0.5
        factors.append((B.float(), A.float()))
    first, second = factors
    return PlantedPair((first[0] @ first[1], second[0] @ second[1]), U[0][:, : r // 4].float(), (first, second))


def dense_pair(
    n: int, rank: int = RANK, shared: int = SHARED, level: float = 0.5, seed: int | None = None
) -> PlantedPair:
    """Two full-rank matrices: ``rank`` directions with singular values j^-1/2, of which ``shared`` are common at
    10 degrees, in white noise whose norm is ``level`` times the smallest of them."""
    gen = generator("benchmark", "dense", n, rank, shared, *([] if seed is None else [seed]))
    U = _column_spaces(n, rank, torch.full((shared,), 10.0, dtype=torch.float64), gen)
    values = _spread(rank, shared)
    matrices = []
    for basis in U:
        noise = torch.randn(n, n, generator=gen, dtype=torch.float64) * (level * float(values.min()) / (2 * n**0.5))
        matrices.append(((basis * values) @ _orthonormal(n, rank, gen).T + noise).float())
    return PlantedPair((matrices[0], matrices[1]), U[0][:, :shared].float())


def heavy_pair(n: int, rank: int = RANK, shared: int = SHARED, seed: int = 0) -> PlantedPair:
    """The same directions without a gap after them: the power law j^-1/2 goes on at 0.7 of its height through all n
    singular values, in directions of each matrix's own."""
    gen = generator("benchmark", "heavy", n, rank, shared, seed)
    U = _column_spaces(n, rank, torch.full((shared,), 10.0, dtype=torch.float64), gen)
    values = torch.cat([_spread(rank, shared), 0.7 * torch.arange(rank + 1, n + 1, dtype=torch.float64) ** -0.5])
    matrices = []
    for basis in U:
        rest = torch.randn(n, n - rank, generator=gen, dtype=torch.float64)
        own = torch.linalg.qr(rest - basis @ (basis.T @ rest)).Q
        left = torch.cat([basis, own], dim=1)
        matrices.append(((left * values) @ _orthonormal(n, n, gen).T).float())
    return PlantedPair((matrices[0], matrices[1]), U[0][:, :shared].float())


def _spread(rank: int, shared: int) -> Tensor:
    """Values j^-1/2, those of the shared directions first: from the strongest to near the noise."""
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5
    first = torch.arange(rank) % (rank // shared) == 0
    return torch.cat([values[first], values[~first]])
