"""Every spectral merge method at the edges: zeros, missing vectors, one row, other tensors, sizes, bad numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import InputError, UsageError
from devec.core.layout import Layout
from devec.methods.merge.iso_c import iso_c
from devec.methods.merge.iso_cts import iso_cts
from devec.methods.merge.knots import knots
from devec.methods.merge.star import star
from devec.methods.merge.tsv_c import tsv_c
from devec.methods.merge.tsv_m import tsv_m
from devec.methods.merge.wudi import wudi
from methods.spectral_cases import error, full, low
from pools import block, delta
from reference.planted import generator

Call = Callable[..., Delta]
METHODS: dict[str, Call] = {
    "tsv-m": tsv_m,
    "tsv-c": partial(tsv_c, task="A"),
    "iso-c": iso_c,
    "iso-cts": iso_cts,
    "star": star,
    "wudi-adam": partial(wudi, steps=5),
    "wudi-ridge": partial(wudi, solver="ridge"),
    "knots": knots,
    "knots-input": partial(knots, side="input"),
}
MERGES = {name: call for name, call in METHODS.items() if name != "tsv-c"}
SCALE = {"iso-c": 1.5, "iso-cts": 1.5, "knots": 0.6, "knots-input": 0.6}
EACH = pytest.mark.parametrize("call", METHODS.values(), ids=METHODS)
EACH_MERGE = pytest.mark.parametrize("name", MERGES)


def tensor(values: list[Tensor | None], layout: Layout, name: str = "w") -> Block:
    deltas = tuple(None if v is None else DenseDelta(v) for v in values)
    return Block(name, layout, tuple("ABCDEFGH"[: len(deltas)]), deltas)


def finite(merged: Delta, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    value = merged.dense()
    assert merged.shape == value.shape == shape and value.dtype == dtype
    assert bool(torch.isfinite(value).all())
    return value


@EACH
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 9), (9, 2), (5, 5)])
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_any_shape_and_more_tasks_than_rows(call: Call, shape: tuple[int, int], tasks: int) -> None:
    g = generator(0)
    for dtype in (torch.float32, torch.float64):
        values = [torch.randn(*shape, generator=g).to(dtype) for _ in range(tasks)]
        assert float(finite(call(block(values)), shape, dtype).norm()) > 0
        factors = [(torch.randn(shape[0], 2, generator=g), torch.randn(2, shape[1], generator=g)) for _ in values]
        finite(call(block([(B.to(dtype), A.to(dtype)) for B, A in factors])), shape, dtype)


@EACH
def test_nothing_in_nothing_out(call: Call) -> None:
    zero, none = torch.zeros(6, 5), torch.zeros(6, 0)
    for values in ([zero, zero], [(none, none.T[:, :5].reshape(0, 5))] * 2, [(zero, torch.zeros(5, 5)), zero]):
        assert float(finite(call(block(values)), (6, 5)).norm()) == 0.0
    empty = tensor([torch.zeros(0, 5)] * 2, Layout((0, 5)))
    finite(call(empty), (0, 5))
    finite(call(tensor([torch.zeros(5, 0)] * 2, Layout((5, 0)))), (5, 0))
    finite(call(Block("w", Layout((6, 5)), ("A", "B"), (None, None))), (6, 5))


@EACH_MERGE
def test_a_vector_that_lacks_the_tensor_counts_as_a_task_that_changed_nothing(name: str) -> None:
    for values in (full(9, 7), low(9, 7, 2)):
        whole: list[object] = list(values)
        zero = torch.zeros(9, 7, dtype=torch.float64) if isinstance(values[0], Tensor) else (
            torch.zeros(9, 1, dtype=torch.float64), torch.zeros(1, 7, dtype=torch.float64)
        )
        lacking, present = block([*whole, None]), block([*whole, zero])  # type: ignore[list-item]
        assert error(MERGES[name](lacking), MERGES[name](present).dense()) < 1e-12


@EACH_MERGE
def test_biases_are_averaged_summed_or_left(name: str) -> None:
    values = [torch.randn(6, 1, generator=generator(i)) for i in range(3)]
    b, scale = tensor([*values, None], Layout((6,))), SCALE.get(name, 1.0)
    total = sum(values)
    assert isinstance(total, Tensor)
    assert torch.allclose(MERGES[name](b).dense(), scale * total / 4, atol=1e-6)
    assert torch.allclose(MERGES[name](b, others="sum").dense(), scale * total, atol=1e-6)
    assert float(MERGES[name](b, others="base").norm()) == 0.0


@EACH_MERGE
def test_a_kernel_is_a_matrix_unless_it_is_not_to_be_one(name: str) -> None:
    values = [torch.randn(6, 18, generator=generator(i)) for i in range(3)]
    kernel, matrix = tensor(values, Layout((6, 2, 3, 3))), tensor(values, Layout((6, 18)))
    assert torch.equal(MERGES[name](kernel).dense(), MERGES[name](matrix).dense())
    mean = SCALE.get(name, 1.0) * sum(values) / 3
    assert torch.allclose(MERGES[name](kernel, conv="other").dense(), mean, atol=1e-6)
    assert error(MERGES[name](matrix, conv="other"), mean) > 0.01


@EACH_MERGE
def test_names_say_which_tensors_are_matrices(name: str) -> None:
    values = full(8, 7)
    chosen, left = "^(?!.*text_projection)", "visual.text_projection"
    mean = SCALE.get(name, 1.0) * sum(values) / 3
    assert error(MERGES[name](block(values, left), matrices=chosen), mean) < 1e-12
    treated = MERGES[name](block(values, "visual.proj"), matrices=chosen)
    assert torch.equal(treated.dense(), MERGES[name](block(values)).dense())
    with pytest.raises(UsageError, match="no regular expression"):
        MERGES[name](block(values), matrices="(")


@pytest.mark.parametrize("name", [n for n in METHODS if n != "wudi-adam"])
def test_adapters_are_merged_without_their_product(name: str) -> None:
    """30,000 x 20,000: the product would be 2.4 GB, and one float64 Gram matrix 3.2 GB."""
    g = generator(1)
    factors = [(torch.randn(30_000, 2, generator=g), torch.randn(2, 20_000, generator=g)) for _ in range(3)]
    merged = METHODS[name](block(factors))
    assert isinstance(merged, LowRankDelta)
    assert merged.shape == (30_000, 20_000) and merged.rank_bound <= 6


@EACH
def test_one_dense_delta_makes_the_block_dense(call: Call) -> None:
    (B, A), W = low(9, 7, 2, dtype=torch.float32)[0], full(9, 7, dtype=torch.float32)[1]
    assert error(call(block([(B, A), W])), call(block([B @ A, W])).dense()) < 1e-6


@EACH
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_numbers_of_any_size(call: Call, scale: float) -> None:
    values = [(scale * W).float() for W in full(9, 7)]
    assert float(finite(call(block(values)), (9, 7)).norm()) > 0


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_names_vector_and_tensor(call: Call, bad: float) -> None:
    W = full(9, 7, dtype=torch.float32)
    W[0][2, 3] = bad
    B, A = torch.ones(9, 2), torch.ones(2, 7)
    B[1, 1] = bad
    for first, second in ((W[0], W[1]), ((B, A), (torch.ones(9, 2), torch.ones(2, 7)))):
        with pytest.raises(InputError, match=r"vector A cannot be merged: .*NaN or infinite \[tensor layer\.3\.q\]"):
            call(block([first, second], "layer.3.q"))


@EACH
def test_half_precision_is_computed_in_float32(call: Call) -> None:
    values = [W.bfloat16() for W in full(9, 7)]
    assert torch.equal(call(block(values)).dense(), call(block([W.float() for W in values])).dense())


@EACH
def test_the_transpose_of_a_matrix_in_its_file_is_of_no_account(call: Call) -> None:
    values = full(9, 7)
    filed = Block("w", Layout((7, 9), transposed=True), ("A", "B", "C"), tuple(delta(W) for W in values))
    assert torch.equal(call(filed).dense(), call(block(values)).dense())
