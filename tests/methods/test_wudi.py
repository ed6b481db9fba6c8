"""WUDI: the published optimiser and the closed form, against their transcriptions, and every guarantee."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.wudi import wudi
from methods.spectral_cases import SHAPES, error, full, low, multiplied, rotation, turned
from pools import block
from reference import spectral_merges as plain

PRECISION = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
FLAT = [*SHAPES, (2, 30), (1, 9)]
"""The last two have fewer rows in all tasks together than columns: the dual forms."""


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("shape", FLAT)
def test_adam_is_the_published_loop(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """With entries of 1e-3, as in a fine-tune, where 40 steps of 1e-5 go a good part of the way."""
    values = [(2e-3 * W).to(dtype) for W in full(*shape)]
    found = wudi(block(values), steps=40)
    wanted = plain.wudi_adam(values, 40)
    assert error(found, wanted) < tolerance
    assert error(sum(W.double() for W in values), wanted) > 1e-2, "the steps did nothing"  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("shape", FLAT)
@pytest.mark.parametrize("ridge", [1.0, 0.01, 1e-4])
def test_ridge_solves_its_normal_equations(
    shape: tuple[int, int], ridge: float, dtype: torch.dtype, tolerance: float
) -> None:
    values = full(*shape, dtype=dtype)
    found = wudi(block(values), "ridge", ridge=ridge, scale=0.5)
    assert error(found, 0.5 * plain.wudi_ridge(values, ridge)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("size", [(30, 20, 4), (8, 60, 5), (14, 40, 9)], ids=str)
def test_ridge_on_adapters_is_ridge_on_their_products(
    size: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    factors = low(*size, dtype=dtype)
    merged = wudi(block(factors), "ridge")
    assert isinstance(merged, LowRankDelta) and merged.rank_bound <= 3 * size[2]
    assert error(merged, plain.wudi_ridge([B.double() @ A.double() for B, A in factors], 0.01)) < tolerance
    assert error(wudi(block(multiplied(factors)), "ridge"), merged.dense()) < tolerance


def test_adam_on_adapters_is_dense_and_that_on_their_products() -> None:
    factors = low(20, 16, 4)
    merged = wudi(block(factors), steps=30)
    assert isinstance(merged, DenseDelta)
    assert error(merged, plain.wudi_adam(multiplied(factors), 30)) < 1e-9


@pytest.mark.parametrize("solver", ["adam", "ridge"])
def test_one_task_comes_back_exactly_also_beside_zeros(solver: str) -> None:
    W = full(12, 9)[0].float()
    for values in ([W], [W, torch.zeros(12, 9)], [None, W, None]):
        assert torch.equal(wudi(block(values), solver).dense(), W)  # type: ignore[arg-type]
    nearly = torch.full((12, 9), 1e-4)
    assert not torch.equal(wudi(block([W, nearly]), solver).dense(), W)  # type: ignore[arg-type]


def test_ridge_lowers_the_loss_and_goes_from_the_sum_to_a_minimiser() -> None:
    values = full(24, 16)
    start = sum(values)
    losses = [float(plain.wudi_loss(start, values))]  # type: ignore[arg-type]
    for ridge in (1e3, 1.0, 1e-2, 1e-5):
        losses.append(float(plain.wudi_loss(wudi(block(values), "ridge", ridge=ridge).dense(), values)))
    assert losses == sorted(losses, reverse=True)
    assert error(wudi(block(values), "ridge", ridge=1e9), start) < 1e-6  # type: ignore[arg-type]
    M = wudi(block(values), "ridge", ridge=1e-10).dense().requires_grad_()
    plain.wudi_loss(M, values).backward()
    assert M.grad is not None and float(M.grad.norm()) < 1e-6


def test_tasks_with_orthogonal_rows_are_summed_and_others_are_not() -> None:
    V = rotation(20, 2)
    a, b = full(10, 5, 2)
    apart = [a @ V[:, :5].T, b @ V[:, 5:10].T]
    assert error(wudi(block(apart), "ridge"), sum(apart)) < 1e-12  # type: ignore[arg-type]
    together = [a @ V[:, :5].T, b @ V[:, :5].T]
    assert error(wudi(block(together), "ridge"), sum(together)) > 0.1  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_turns_with_the_deltas_and_adam_does_not(shape: tuple[int, int]) -> None:
    L, R = rotation(shape[0], 8), rotation(shape[1], 9)
    values = [1e-3 * W for W in full(*shape)]
    for solver, turns in (("ridge", True), ("adam", False)):
        merged = wudi(block(values), solver, steps=40).dense()  # type: ignore[arg-type]
        off = error(wudi(block(turned(values, L, R)), solver, steps=40), L @ merged @ R)  # type: ignore[arg-type]
        assert (off < 1e-10) is turns, (solver, off)


def test_ridge_is_homogeneous_and_adam_is_not() -> None:
    values = full(24, 16)
    for solver, scales in (("ridge", True), ("adam", False)):
        merged = wudi(block(values), solver, steps=40).dense()  # type: ignore[arg-type]
        off = error(wudi(block([1e-3 * W for W in values]), solver, steps=40), 1e-3 * merged)  # type: ignore[arg-type]
        assert (off < 1e-10) is scales, (solver, off)


def test_no_steps_are_task_arithmetic() -> None:
    values = full(12, 9)
    assert error(wudi(block(values), steps=0), sum(values)) < 1e-14  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"rate": 0.0}, {"rate": float("nan")}, {"ridge": 0.0}, {"ridge": -1}])
def test_what_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"wudi wants {next(iter(wrong))}"):
        wudi(block(full(6, 5)), **wrong)  # type: ignore[arg-type]
