"""Cholesky QR of panels: orthonormal whatever the panel, and Q R is the panel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devec.linalg.panels import orthonormal
from reference.planted import generator
from reference.planted import orthonormal as basis


def conditioned(n: int, w: int, condition: float, seed: int) -> Tensor:
    g = generator(seed)
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), w, dtype=torch.float64)
    return ((basis(n, w, g) * s) @ basis(w, w, g).T).float()


def check(Z: Tensor) -> None:
    Q, R = orthonormal(Z)
    b, n, w = Z.shape
    k = min(n, w)
    assert (Q.dtype, R.dtype) == (torch.float32, torch.float64)
    assert Q.shape == (b, n, k) and R.shape == (b, k, w)
    eye = torch.eye(k, dtype=torch.float64)
    assert float((Q.double().mT @ Q.double() - eye).abs().max()) < 2e-6
    lengths = torch.linalg.vector_norm(Z.double(), dim=1, keepdim=True)
    assert bool(((Q.double() @ R - Z.double()).abs() <= 3e-6 * lengths).all())
    assert float((R.tril(-1)).abs().max()) == 0.0


def test_condition_and_rank_of_each_panel_matter_to_itself_alone() -> None:
    """Conditions up to what float32 can hold, then dependent, repeated and zero columns: Householder takes those."""
    panels = [conditioned(200, 24, 10.0**e, e) for e in (0, 2, 4, 6, 7)]
    repeated, zeros, ones = panels[0].clone(), panels[0].clone(), torch.ones(200, 24)
    repeated[:, 5] = repeated[:, 4]
    zeros[:, 3] = 0.0
    check(torch.stack([*panels, repeated, zeros, ones, torch.zeros(200, 24)]))


def test_columns_of_every_length_stay_apart() -> None:
    """Lengths from 1e-30 to 1e30 (their squares leave float32) and no loss: the scaling comes first."""
    Z = torch.randn(2, 100, 7, generator=generator(1)) * torch.logspace(-30, 30, 7)
    check(Z)
    R = orthonormal(Z)[1]
    truth = torch.linalg.qr(Z.double())
    assert torch.allclose(torch.diagonal(R, dim1=1, dim2=2), torch.diagonal(truth.R, dim1=1, dim2=2).abs(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 9), (1, 4, 1), (2, 1, 1)])
def test_panels_that_are_not_tall(shape: tuple[int, int, int]) -> None:
    check(torch.randn(*shape, generator=generator(2)))


def test_empty_panels() -> None:
    Q, R = orthonormal(torch.zeros(2, 5, 0))
    assert Q.shape == (2, 5, 0) and R.shape == (2, 0, 0) and R.dtype == torch.float64
    assert orthonormal(torch.zeros(0, 5, 3))[0].shape == (0, 5, 3)
