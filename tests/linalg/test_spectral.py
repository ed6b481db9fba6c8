"""Triples and polar factors: against plain SVDs, where a Gram matrix alone would be wrong; nothing arbitrary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devec.linalg.numerics import NonFiniteError
from devec.linalg.spectral import polar, rounding_limit, triples
from reference.planted import generator, orthonormal

SHAPES = [(30, 12), (12, 30), (16, 16), (9, 1), (1, 9), (1, 1)]


def planted(n: int, m: int, s: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    U, V = orthonormal(n, len(s), g), orthonormal(m, len(s), g)
    return (U * torch.tensor(s, dtype=torch.float64)) @ V.T, U, V


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triples_rebuild_the_matrix(shape: tuple[int, int], exact: bool) -> None:
    W = torch.randn(*shape, generator=generator(1), dtype=torch.float64)
    svd = triples(W, limit=1e-12, exact=exact)
    assert svd.rank == min(shape)
    assert torch.allclose((svd.U * svd.S) @ svd.V.T, W, atol=1e-12)
    assert svd.nuclear == pytest.approx(float(torch.linalg.svdvals(W).sum()), rel=1e-12)
    for basis in (svd.U, svd.V):
        assert torch.allclose(basis.T @ basis, torch.eye(svd.rank, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_directions_that_squaring_loses_are_found_on_what_is_left(shape: tuple[int, int]) -> None:
    """1e-9 of s_1 is 1e-18 of the Gram matrix: below its rounding. The limit of float32 is passed where data allow."""
    W, U, V = planted(*shape, [1.0, 0.3, 1e-4, 3e-6, 1e-7, 1e-9])
    svd = triples(W, limit=1e-10)
    assert svd.rank == 6
    assert torch.allclose(svd.S, torch.tensor([1.0, 0.3, 1e-4, 3e-6, 1e-7, 1e-9], dtype=torch.float64), rtol=1e-5)
    for found, true in ((svd.U, U), (svd.V, V)):
        assert float((found.T @ true).diagonal().abs().min()) > 1 - 1e-6
    plain = torch.linalg.eigvalsh(W.T @ W if shape[0] >= shape[1] else W @ W.T).flip(0).clamp_min(0.0).sqrt()
    assert abs(float(plain[5]) / 1e-9 - 1) > 0.5, "a Gram matrix alone would have done"


def test_a_cut_by_number_or_by_the_values() -> None:
    W, *_ = planted(20, 15, [4.0, 2.0, 1.0, 0.5])
    assert triples(W, 2, limit=1e-9).rank == 2
    assert triples(W, 9, limit=1e-9).rank == 4
    assert triples(W, lambda s: int((s > 0.7).sum()), limit=1e-9).rank == 3
    assert triples(W, 2, limit=1e-9).nuclear == pytest.approx(7.5)


@pytest.mark.parametrize("rank", [1, 7, 40])
@pytest.mark.parametrize("shape", [(90, 60), (64, 200)])
def test_what_multiplying_factors_leaves_is_below_the_limit(shape: tuple[int, int], rank: int) -> None:
    g = generator(rank)
    W = torch.randn(shape[0], rank, generator=g) @ torch.randn(rank, shape[1], generator=g)
    limit = rounding_limit(float(W.double().norm()), shape, torch.float32)
    assert triples(W, limit=limit).rank == rank
    assert triples(W, limit=limit / 100).rank > rank  # and not far below


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_is_the_nearest_orthonormal_matrix(shape: tuple[int, int], exact: bool) -> None:
    W = torch.randn(*shape, generator=generator(2), dtype=torch.float64)
    Q, s = polar(W, limit=1e-12, exact=exact)
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(Q, U @ Vh, atol=1e-9)
    assert torch.allclose(s, values, rtol=1e-9)
    nearest = float((W - Q).norm())
    g = generator(3)
    for _ in range(20):
        other = orthonormal(max(shape), min(shape), g)
        assert nearest <= float((W - (other if shape[0] >= shape[1] else other.T)).norm()) + 1e-12


def test_a_polar_factor_has_no_direction_that_the_matrix_lacks() -> None:
    W, U, V = planted(20, 15, [3.0, 1.0])
    Q, s = polar(W, limit=1e-9)
    assert s.numel() == 2 and torch.allclose(Q, U @ V.T, atol=1e-12)
    full_u, _, full_v = torch.linalg.svd(W, full_matrices=False)
    assert float((full_u @ full_v - Q).norm()) > 1.0, "what a plain SVD returns there is not zero"


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_float32_numbers_of_any_size(scale: float) -> None:
    W = torch.randn(12, 8, generator=generator(4)) * scale
    Q, s = polar(W, limit=rounding_limit(float(W.double().norm()), (12, 8), torch.float32))
    assert s.numel() == 8 and torch.allclose(Q.T @ Q, torch.eye(8, dtype=torch.float64), atol=1e-9)


def test_zero_empty_and_unusable() -> None:
    assert triples(torch.zeros(4, 3), limit=0.0).rank == 0
    assert polar(torch.zeros(4, 3), limit=0.0)[1].numel() == 0
    assert triples(torch.zeros(0, 3), limit=0.0).V.shape == (3, 0)
    bad = torch.ones(4, 3)
    bad[1, 1] = float("nan")
    for function in (triples, polar):
        with pytest.raises(NonFiniteError, match="1 of 12"):
            function(bad, limit=0.0)
