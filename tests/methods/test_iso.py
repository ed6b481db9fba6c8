"""Iso-C and Iso-CTS: against the published algorithms, and every guarantee."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.iso_c import iso_c
from devec.methods.merge.iso_cts import iso_cts
from methods.spectral_cases import SHAPES, error, full, low, multiplied, rotation, turned, values_of
from pools import block
from reference import spectral_merges as plain

PRECISION = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
BOTH = pytest.mark.parametrize("method", [iso_c, iso_cts])


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_is_the_published_algorithm(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    values = full(*shape, dtype=dtype)
    assert error(iso_c(block(values), scale=1.3), plain.isotropic(values, 1.3)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_the_published_algorithm(
    shape: tuple[int, int], common: float, dtype: torch.dtype, tolerance: float
) -> None:
    values = full(*shape, dtype=dtype)
    wanted = plain.isotropic_common_and_task(values, 1.3, common, rtol=1e-7)
    assert error(iso_cts(block(values), scale=1.3, common=common), wanted) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("size", [(30, 20, 4), (20, 30, 5), (14, 40, 6)], ids=str)
def test_adapters_and_their_products_give_the_same(
    size: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    factors = low(*size, dtype=dtype)
    exact = [B.double() @ A.double() for B, A in factors]
    for method, wanted in (
        (iso_c, plain.isotropic(exact, 1.5, rtol=1e-9)),
        (iso_cts, plain.isotropic_common_and_task(exact, 1.5, rtol=1e-9)),
    ):
        merged = method(block(factors))
        assert isinstance(merged, LowRankDelta) and merged.B.shape[1] <= min(3 * size[2], *size[:2])
        assert error(merged, wanted) < tolerance
        assert error(method(block(multiplied(factors))), wanted) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_are_equal_and_their_sum_is_that_of_the_sum(shape: tuple[int, int]) -> None:
    values = full(*shape)
    s = values_of(iso_c(block(values), scale=1.0))
    assert float(s.max() - s.min()) < 1e-12
    assert float(s.sum()) == pytest.approx(float(torch.linalg.svdvals(sum(values)).sum()))  # type: ignore[arg-type]
    assert float(torch.linalg.svdvals(sum(values)).diff().abs().max()) > 1e-3  # type: ignore[arg-type]
    for common in (0.8, 1.0):
        s = values_of(iso_cts(block(values), common=common))
        assert float(s.max() - s.min()) < 1e-8 * float(s.max())


def test_all_common_is_iso_c_and_less_is_not() -> None:
    values = full(24, 16)
    assert error(iso_cts(block(values), common=1.0), iso_c(block(values)).dense()) < 1e-10
    assert error(iso_cts(block(values), common=0.5), iso_c(block(values)).dense()) > 0.01


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_turning_the_deltas_turns_the_merge(method: object, shape: tuple[int, int]) -> None:
    L, R = rotation(shape[0], 8), rotation(shape[1], 9)
    values = full(*shape)
    merged = method(block(values)).dense()  # type: ignore[operator]
    assert error(method(block(turned(values, L, R))), L @ merged @ R) < 1e-9  # type: ignore[operator]


@BOTH
def test_linear_in_scale_but_not_in_the_deltas(method: object) -> None:
    values = full(24, 16)
    one = method(block(values), scale=1.0).dense()  # type: ignore[operator]
    assert error(method(block(values), scale=2.5), 2.5 * one) < 1e-12  # type: ignore[operator]
    assert error(method(block([3 * W for W in values]), scale=1.0), 3 * one) < 1e-9  # type: ignore[operator]
    assert error(method(block([values[0], 3 * values[1], values[2]]), scale=1.0), one) > 0.1  # type: ignore[operator]


@BOTH
def test_a_small_direction_of_a_square_matrix_counts_like_every_other(method: object) -> None:
    """3e-6 of s_1 is above the rounding of float32 numbers: leaving it out would cost 1/sqrt(n) of the result."""
    U, V = rotation(30, 1), rotation(30, 2)
    s = torch.cat([torch.logspace(1, -2, 29), torch.tensor([3e-5])]).double()
    W = [((U * s) @ V.T).float(), torch.zeros(30, 30)]
    exact = [w.double() for w in W]
    wanted = plain.isotropic(exact, 1.5) if method is iso_c else plain.isotropic_common_and_task(exact, 1.5)
    assert error(method(block(W)), wanted) < 1e-5  # type: ignore[operator]


@BOTH
def test_tasks_that_cancel_leave_nothing(method: object) -> None:
    W = full(12, 9)[0].float()
    B, A = low(12, 9, 2, dtype=torch.float32)[0]
    assert float(method(block([W, -W])).norm()) == 0.0  # type: ignore[operator]
    assert float(method(block([(B, A), (-B, A)])).norm()) == 0.0  # type: ignore[operator]


def test_task_directions_never_outnumber_the_rank() -> None:
    """6 tasks and 10 directions, none common: round(10 / 6) = 2 each would be 12."""
    for tasks in (6, 7, 30):
        merged = iso_cts(block(full(10, 12, tasks)), common=0.0)
        assert int((values_of(merged) > 1e-8).sum()) <= 10


def test_common_is_a_fraction() -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="common between 0 and 1"):
            iso_cts(block(full(6, 5)), common=wrong)
