"""Radix selection: any order statistic of any floats, as sorting would give it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devec.linalg.select import descend, digits, float_of, histogram, ordered_bits

DTYPES = [torch.float32, torch.float64]


def kth(parts: list[torch.Tensor], rank: int) -> float:
    """By histograms of parts that never meet."""
    prefix: int | None = None
    for step in range(digits(parts[0].dtype)):
        counts = torch.stack([histogram(x, [prefix], step)[0] for x in parts]).sum(0)
        prefix, rank = descend(counts, rank, prefix)
    assert prefix is not None
    return float_of(prefix, parts[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_in_the_order_of_the_numbers(dtype: torch.dtype) -> None:
    inf, tiny = float("inf"), torch.finfo(dtype).smallest_normal / 8
    x = torch.tensor([-inf, -1e30, -1.0, -tiny, -0.0, 0.0, tiny, 1e-20, 1.0, 1.0 + 1e-6, 3e30, inf], dtype=dtype)
    bits = ordered_bits(x)
    assert bits.tolist() == sorted(set(bits.tolist()))
    assert [float_of(int(b), dtype) for b in bits] == x.tolist()
    assert int(ordered_bits(torch.tensor([float("nan")], dtype=dtype))) > int(bits[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_every_rank_is_that_of_sorting(dtype: torch.dtype, data: st.DataObject) -> None:
    width = 32 if dtype == torch.float32 else 64
    numbers = st.floats(allow_nan=False, width=width)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=40)), dtype=dtype)
    cut, rank = data.draw(st.integers(0, len(x))), data.draw(st.integers(0, len(x) - 1))
    assert kth([x[:cut], x[cut:]], rank) == float(x.sort().values[rank])


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch_finds_it_among_many(dtype: torch.dtype) -> None:
    x = torch.randn(20_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    x[5000:9000] = x[4999]  # ties
    for rank in (0, 1, 4_000, 12_345, 20_000):
        assert kth(list(x.split(7_000)), rank) == float(x.kthvalue(rank + 1).values)
