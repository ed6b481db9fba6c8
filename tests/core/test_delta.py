"""Deltas: dense, factored and sparse hold one matrix and do the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from devec.core.delta import Delta, DenseDelta, LowRankDelta, SparseDelta
from devec.core.layout import Layout
from reference.planted import generator, orthonormal

N, M = 14, 9


def dense_delta(seed: int) -> Delta:
    return DenseDelta(torch.randn(N, M, generator=generator(seed)))


def low_rank_delta(seed: int) -> Delta:
    g = generator(seed)
    return LowRankDelta(torch.randn(N, 3, generator=g), torch.randn(3, M, generator=g))


def sparse_delta(seed: int) -> Delta:
    g = generator(seed)
    at = torch.randperm(N * M, generator=g)[:20].sort().values
    return SparseDelta(at, torch.randn(20, generator=g), (N, M))


KINDS: list[Callable[[int], Delta]] = [dense_delta, low_rank_delta, sparse_delta]


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("make", KINDS)
def test_one_delta_against_its_matrix(make: Callable[[int], Delta]) -> None:
    d = make(0)
    W = d.dense()
    Z = orthonormal(N, 4, generator(1)).float()
    assert d.shape == (N, M) and d.dtype == torch.float32
    assert d.rank_bound >= int(torch.linalg.matrix_rank(W))
    assert equal(d.scale(-2.5).dense(), -2.5 * W)
    assert d.norm() == pytest.approx(float(torch.linalg.norm(W.double())), rel=1e-6)
    assert equal(d.transpose().dense(), W.T) and d.transpose().shape == (M, N)
    assert equal(d.transpose().transpose().dense(), W)
    assert equal(d.project(Z).dense(), Z @ Z.T @ W)
    assert equal(d.residual(Z).dense(), W - Z @ Z.T @ W)
    assert equal(d.project(Z).dense() + d.residual(Z).dense(), W)
    assert d.project(Z).rank_bound <= 4
    assert d.to(torch.float64).dtype == torch.float64 and equal(d.to(torch.float64).dense().float(), W)
    nothing = Z[:, :0]
    assert equal(d.project(nothing).dense(), torch.zeros(N, M)) and equal(d.residual(nothing).dense(), W)


@pytest.mark.parametrize("make", KINDS)
@given(start=st.integers(0, N), stop=st.integers(0, N))
def test_rows_are_slices(make: Callable[[int], Delta], start: int, stop: int) -> None:
    d = make(2)
    part = d.rows(start, stop)
    assert part.shape == (max(stop - start, 0), M)
    assert equal(part.dense(), d.dense()[start:stop])


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_two_deltas(first: Callable[[int], Delta], second: Callable[[int], Delta]) -> None:
    a, b = first(3), second(4)
    assert equal(a.add(b).dense(), a.dense() + b.dense())
    exact = float((a.dense().double() * b.dense().double()).sum())
    assert a.inner(b) == pytest.approx(exact, rel=1e-5, abs=1e-5)
    assert a.inner(b) == pytest.approx(b.inner(a), rel=1e-6)
    if isinstance(a, LowRankDelta) and isinstance(b, LowRankDelta):
        total = a.add(b)
        assert isinstance(total, LowRankDelta) and total.rank_bound == 6


@pytest.mark.parametrize("make", KINDS)
def test_unlike_shapes_are_refused(make: Callable[[int], Delta]) -> None:
    with pytest.raises(ValueError, match="unlike shape"):
        make(0).add(DenseDelta(torch.ones(M, N)))
    with pytest.raises(ValueError, match="unlike shape"):
        make(0).inner(DenseDelta(torch.ones(M, N)))


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRankDelta(torch.ones(4, 2), torch.ones(3, 5))
    with pytest.raises(ValueError, match="is a matrix"):
        DenseDelta(torch.ones(3))
    for indices, values in (
        (torch.tensor([1, 1]), torch.ones(2)),
        (torch.tensor([3, 2]), torch.ones(2)),
        (torch.tensor([0, 12]), torch.ones(2)),
        (torch.tensor([-1, 2]), torch.ones(2)),
        (torch.tensor([1, 2]), torch.ones(3)),
        (torch.tensor([1, 2], dtype=torch.int32), torch.ones(2)),
    ):
        with pytest.raises(ValueError, match="sparse delta"):
            SparseDelta(indices, values, (3, 4))


@pytest.mark.parametrize("exponent", [-25, 25])
def test_norm_and_inner_survive_the_ends_of_float32(exponent: int) -> None:
    big = 10.0**exponent
    for make in KINDS:
        d = make(5)
        assert d.scale(big).norm() == pytest.approx(big * d.norm(), rel=1e-5)
        assert d.scale(big).inner(d.scale(big)) == pytest.approx(big * big * d.inner(d), rel=1e-5)
    both = LowRankDelta(torch.full((N, 1), big), torch.full((1, M), big))  # entries 1e50 or 1e-50
    assert both.norm() == pytest.approx(big * big * (N * M) ** 0.5, rel=1e-5)


def test_norm_of_cancelling_factors_keeps_its_digits() -> None:
    """sqrt(<W, W>) of factors whose product nearly cancels would lose half the digits."""
    B = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    A = torch.tensor([[1.0], [-1.0 + 1e-10]], dtype=torch.float64)
    assert LowRankDelta(B, A).norm() == pytest.approx(1e-10, rel=1e-4)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", KINDS)
def test_a_narrow_delta_is_projected_in_the_basis_precision(
    make: Callable[[int], Delta], narrow: torch.dtype
) -> None:
    d = make(6).to(narrow)
    Z = orthonormal(N, 4, generator(7)).float()
    wide = d.to(torch.float32)
    assert d.residual(Z).dtype == torch.float32
    assert torch.equal(d.residual(Z).dense(), wide.residual(Z).dense())
    assert torch.equal(d.project(Z).dense(), wide.project(Z).dense())
    gone = Z.T @ d.residual(Z).dense()
    assert float(gone.abs().max()) < 1e-5


def test_adding_factors_of_two_dtypes_keeps_the_wider() -> None:
    a, b = low_rank_delta(8), low_rank_delta(9)
    for total in (a.to(torch.bfloat16).add(b), b.add(a.to(torch.bfloat16))):
        assert total.dtype == torch.float32
        assert torch.allclose(total.dense(), a.to(torch.bfloat16).to(torch.float32).dense() + b.dense(), atol=1e-5)


def test_recompress_keeps_the_matrix_and_drops_the_empty_columns() -> None:
    a = low_rank_delta(10)
    assert isinstance(a, LowRankDelta)
    doubled = a.add(a.scale(0.5))
    assert isinstance(doubled, LowRankDelta) and doubled.rank_bound == 6
    assert doubled.recompress().rank_bound == 3
    assert equal(doubled.recompress().dense(), 1.5 * a.dense())
    gone = a.add(a.scale(-1.0))
    assert isinstance(gone, LowRankDelta) and gone.recompress().rank_bound == 0
    best = torch.linalg.svd(a.dense())
    assert equal(a.recompress(1).dense(), best.S[0] * best.U[:, :1] @ best.Vh[:1], 1e-4)


def test_recompress_is_exact_to_rounding_even_for_tiny_directions() -> None:
    g = generator(11)
    s = torch.tensor([1.0, 1e-3, 3e-6])  # the last is under the numerical-rank limit, but no rounding
    B = (orthonormal(40, 3, g) * s).float()
    d = LowRankDelta(B, orthonormal(30, 3, g).T.float())
    assert float((d.recompress().dense() - d.dense()).abs().max()) < 2e-7


@pytest.mark.parametrize(
    ("layout", "matrix"),
    [
        (Layout((4, 6)), (4, 6)), (Layout((4, 6), transposed=True), (6, 4)), (Layout((4, 3, 2, 2)), (4, 12)),
        (Layout((5,)), (5, 1)), (Layout(()), (1, 1)), (Layout((0, 3)), (0, 3)),
    ],
)
def test_layout_there_and_back(layout: Layout, matrix: tuple[int, int]) -> None:
    stored = torch.randn(layout.shape, generator=generator(12))
    W = layout.to_matrix(stored)
    assert layout.matrix_shape == matrix == tuple(W.shape)
    assert torch.equal(layout.to_stored(W), stored)
    assert layout.is_vector == (len(layout.shape) <= 1)
    with pytest.raises(ValueError):
        layout.to_matrix(torch.zeros(7, 7))
    with pytest.raises(ValueError):
        layout.to_stored(torch.zeros(7, 7))
