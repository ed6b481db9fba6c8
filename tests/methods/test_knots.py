"""KnOTS: against its transcription, and every guarantee."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.knots import knots, ties
from devec.methods.merge.task_arithmetic import task_arithmetic
from methods.spectral_cases import SHAPES, error, full, low, multiplied, rotation
from pools import block
from reference import spectral_merges as plain

PRECISION = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_it_is_the_published_algorithm(
    shape: tuple[int, int], density: float, dtype: torch.dtype, tolerance: float
) -> None:
    values = full(*shape, dtype=dtype)
    wanted = plain.knots(values, density, 0.6, 1e-7)
    assert error(knots(block(values), density=density), wanted) < tolerance
    wanted = plain.knots([W.T for W in values], density, 0.6, 1e-7).T
    assert error(knots(block(values), density=density, side="input"), wanted) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("side", ["output", "input"])
def test_adapters_and_their_products_give_the_same(side: str, dtype: torch.dtype, tolerance: float) -> None:
    factors = low(30, 20, 4, dtype=dtype)
    exact = [B.double() @ A.double() for B, A in factors]
    wanted = plain.knots(exact if side == "output" else [W.T for W in exact], 0.3, 0.6, 1e-9)
    wanted = wanted if side == "output" else wanted.T
    merged = knots(block(factors), density=0.3, side=side)  # type: ignore[arg-type]
    assert isinstance(merged, LowRankDelta) and merged.rank_bound <= 12
    assert error(merged, wanted) < tolerance
    assert error(knots(block(multiplied(factors)), density=0.3, side=side), wanted) < tolerance  # type: ignore[arg-type]


def test_with_a_linear_inner_method_the_basis_drops_out() -> None:
    for values in (full(24, 16), low(24, 16, 4)):
        b = block(values)  # type: ignore[arg-type]
        exact = task_arithmetic(b, scale=0.6).dense()
        assert torch.equal(knots(b, "task-arithmetic").dense(), exact)
        assert error(knots(b, "mean"), exact / 3) < 1e-15
        assert error(knots(b, "ties", density=1.0), exact) > 0.1


def test_one_task_with_all_of_its_entries_comes_back() -> None:
    W = full(24, 16)[0]
    assert error(knots(block([W]), density=1.0, scale=1.0), W) < 1e-12
    assert error(knots(block([W]), density=0.9, scale=1.0), W) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_turning_the_outputs_turns_the_merge_and_turning_the_inputs_does_not(shape: tuple[int, int]) -> None:
    L, R = rotation(shape[0], 8), rotation(shape[1], 9)
    values = full(*shape)
    merged = knots(block(values)).dense()
    assert error(knots(block([L @ W for W in values])), L @ merged) < 1e-9
    assert error(knots(block([W @ R for W in values])), merged @ R) > 0.05


def test_signs_of_the_basis_do_not_matter() -> None:
    """A turn by -1 of everything, and of some coordinates of the tasks, is a change of signs of singular vectors."""
    values = full(24, 16)
    merged = knots(block(values)).dense()
    assert error(knots(block([-W for W in values])), -merged) < 1e-12
    flip = torch.diag(torch.tensor([1.0, -1.0] * 12, dtype=torch.float64))
    assert error(knots(block([flip @ W for W in values])), flip @ merged) < 1e-9


def test_homogeneous_in_the_deltas() -> None:
    values = full(24, 16)
    assert error(knots(block([1e-6 * W for W in values])), 1e-6 * knots(block(values)).dense()) < 1e-9


def test_ties_by_hand() -> None:
    a = torch.tensor([5.0, 4.0, 0.1, 3.0, -2.0, 1.0])
    b = torch.tensor([1.0, -6.0, 0.2, 3.0, 0.1, -1.0])
    # a keeps 5 4 3 -2 1, b keeps 1 -6 3 -1 and 0.2; sums 6 -2 0.2 6 -2 0: the last has no sign, and becomes 0
    assert torch.allclose(ties([a.clone(), b.clone()], 5 / 6), torch.tensor([3.0, -6.0, 0.2, 3.0, -2.0, 0.0]))
    assert torch.allclose(ties([a.clone(), b.clone()], 0.01), torch.tensor([5.0, -6.0, 0.0, 0.0, 0.0, 0.0]))


def test_density_is_a_fraction() -> None:
    for wrong in (0.0, 20.0, float("nan")):
        with pytest.raises(UsageError, match="density as a fraction"):
            knots(block(full(6, 5)), density=wrong)
