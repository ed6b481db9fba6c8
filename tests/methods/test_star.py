"""STAR: against its transcription, and every guarantee."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.star import star
from methods.spectral_cases import SHAPES, error, full, low, multiplied, rotation, turned, values_of
from pools import block
from reference import spectral_merges as plain


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eta", [0.1, 0.4, 0.85])
def test_it_is_the_published_algorithm(
    shape: tuple[int, int], eta: float, dtype: torch.dtype, tolerance: float
) -> None:
    values = full(*shape, dtype=dtype)
    assert error(star(block(values), eta=eta), plain.star(values, eta)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_adapters_and_their_products_give_the_same(dtype: torch.dtype, tolerance: float) -> None:
    factors = low(30, 20, 6, dtype=dtype)
    wanted = plain.star([B.double() @ A.double() for B, A in factors], 0.5, rtol=1e-9)
    merged = star(block(factors), eta=0.5)
    assert isinstance(merged, LowRankDelta) and merged.B.shape[1] <= 3 * 3
    assert error(merged, wanted) < tolerance
    assert error(star(block(multiplied(factors)), eta=0.5), wanted) < tolerance


def test_every_task_keeps_its_nuclear_norm() -> None:
    for W in full(24, 16):
        cut = star(block([W]))
        assert float(values_of(cut).sum()) == pytest.approx(float(torch.linalg.svdvals(W).sum()))
        assert int((values_of(cut) > 1e-9).sum()) < 16


def test_eta_one_is_the_mean() -> None:
    values = full(24, 16)
    assert error(star(block(values), eta=1.0, scale=3.0), sum(values)) < 1e-10
    assert error(star(block(values), eta=0.9, scale=3.0), sum(values)) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_turning_the_deltas_turns_the_merge(shape: tuple[int, int]) -> None:
    L, R = rotation(shape[0], 8), rotation(shape[1], 9)
    values = full(*shape)
    assert error(star(block(turned(values, L, R))), L @ star(block(values)).dense() @ R) < 1e-10


def test_homogeneous_in_the_deltas_and_not_additive() -> None:
    values = full(24, 16)
    merged = star(block(values)).dense()
    assert error(star(block([1e-6 * W for W in values])), 1e-6 * merged) < 1e-9
    assert error(star(block([values[0] + values[1]])), star(block(values[:2]), scale=2.0).dense()) > 0.01


def test_eta_is_a_fraction() -> None:
    for wrong in (0.0, 40.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match=r"40 percent is eta=0.4"):
            star(block(full(6, 5)), eta=wrong)
