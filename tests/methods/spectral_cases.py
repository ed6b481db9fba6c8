"""Pools of deltas with known spectra, shared by the tests of the spectral merge methods."""

from __future__ import annotations

import torch
from torch import Tensor

from devec.core.delta import Delta
from reference.planted import generator, orthonormal

SHAPES = [(24, 16), (16, 24), (20, 20), (40, 6)]


def full(n: int, m: int, tasks: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Deltas of full rank whose singular values fall from 3 to 0.2, in random directions."""
    g = generator(seed)
    r = min(n, m)
    s = torch.linspace(3.0, 0.2, r, dtype=torch.float64)
    return [((orthonormal(n, r, g) * s) @ orthonormal(m, r, g).T).to(dtype) for _ in range(tasks)]


def low(
    n: int, m: int, rank: int, tasks: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    """Factors ``(B, A)`` of deltas of low rank."""
    g = generator(seed)
    s = torch.linspace(2.0, 0.5, rank, dtype=torch.float64)
    return [
        ((orthonormal(n, rank, g) * s).to(dtype), orthonormal(m, rank, g).T.contiguous().to(dtype))
        for _ in range(tasks)
    ]


def multiplied(factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [B @ A for B, A in factors]


def turned(values: list[Tensor], left: Tensor, right: Tensor) -> list[Tensor]:
    return [left @ W @ right for W in values]


def rotation(n: int, seed: int) -> Tensor:
    return orthonormal(n, n, generator(seed))


def error(found: Delta | Tensor, wanted: Tensor) -> float:
    """Relative in the Frobenius norm."""
    got = (found if isinstance(found, Tensor) else found.dense()).double()
    return float((got - wanted.double()).norm() / wanted.double().norm())


def values_of(delta: Delta) -> Tensor:
    return torch.linalg.svdvals(delta.dense().double())
