"""Deltas that are made when they are asked for: the same arithmetic as on the matrix, and nothing read before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.layout import Layout
from devec.core.lazy import BLOCK, LazyDelta, block_rows, in_file, is_dense, row_blocks
from reference.planted import generator, orthonormal

LAYOUTS = {
    "matrix": Layout((7, 5)),
    "transposed": Layout((5, 7), transposed=True),
    "convolution": Layout((4, 3, 2, 2)),
    "vector": Layout((6,)),
    "scalar": Layout(()),
    "no rows": Layout((0, 5)),
    "no columns": Layout((5, 0)),
    "no rows, transposed": Layout((0, 5), transposed=True),
    "nothing": Layout((0,)),
    "several blocks": Layout((BLOCK // 16 * 3 + 5, 8)),
    "several blocks, transposed": Layout((24, BLOCK // 8 + 1), transposed=True),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Stored:
    """A tensor as a file holds it; counts what is read."""

    def __init__(self, layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.value = torch.randn(layout.shape, generator=generator(seed)).to(dtype)
        self.layout, self.read = layout, list[tuple[int, int]]()

    def rows(self, start: int, stop: int) -> Tensor:
        self.read.append((start, stop))
        rows = self.value[start:stop] if self.layout.shape else self.value.reshape(1)
        return rows.reshape(stop - start, rows[0].numel() if len(rows) else self.lazy.shape[self.lazy.transposed ^ 1])

    @property
    def lazy(self) -> LazyDelta:
        return LazyDelta(
            self.layout.matrix_shape, self.value.dtype, self.rows, transposed=self.layout.transposed
        )

    @property
    def plain(self) -> DenseDelta:
        return DenseDelta(self.layout.to_matrix(self.value))


def equal(a: Delta, b: Delta) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.dense(), b.dense())


# --- blocks of rows --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**7), max_size=4).map(tuple))
def test_blocks_cover_every_row_once_and_hold_a_fixed_number_of_elements(shape: tuple[int, ...]) -> None:
    step = block_rows(shape)
    width = torch.Size(shape[1:]).numel()
    assert step >= 1 and (step == 1 or step * width <= BLOCK)
    if shape and shape[0] // step > 1000:
        return
    blocks = list(row_blocks(shape))
    rows = shape[0] if shape else 1
    assert [a for a, _ in blocks] == list(range(0, rows, step))
    assert all(b == min(a + step, rows) for a, b in blocks)


# --- one delta -------------------------------------------------------------------------------------------------------


@each_layout
def test_a_lazy_delta_is_its_matrix(layout: Layout) -> None:
    stored = Stored(layout)
    lazy, plain = stored.lazy, stored.plain
    assert lazy.shape == plain.shape and lazy.dtype == plain.dtype and lazy.rank_bound == plain.rank_bound
    assert stored.read == []
    assert equal(lazy, plain) and equal(lazy.whole(), plain)
    assert equal(lazy.transpose(), plain.transpose()) and equal(lazy.transpose().transpose(), plain)
    assert equal(lazy.scale(-2.5), plain.scale(-2.5)) and equal(lazy.to(torch.float64), plain.to(torch.float64))
    assert equal(lazy.on(torch.device("cpu")), plain) and lazy.to(torch.float32) is lazy
    assert lazy.norm() == pytest.approx(plain.norm(), rel=1e-12)
    assert is_dense(lazy) and is_dense(plain) and not is_dense(None)


@each_layout
def test_making_it_whole_reads_every_row_once_in_order(layout: Layout) -> None:
    stored = Stored(layout)
    whole = stored.lazy.whole()
    assert stored.read == list(row_blocks(layout.shape if len(layout.shape) <= 2 else (layout.shape[0], 12)))
    before = len(stored.read)
    whole.norm(), whole.scale(2.0).dense()
    assert len(stored.read) == before


@each_layout
def test_projections(layout: Layout) -> None:
    stored = Stored(layout)
    lazy, plain = stored.lazy, stored.plain
    n = lazy.shape[0]
    for d in {0, min(n, 3)}:
        Z = orthonormal(n, d, generator(1)).float() if n else torch.zeros(0, d)
        for name in ("project", "residual"):
            a, b = getattr(lazy, name)(Z), getattr(plain, name)(Z)
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.allclose(a.dense(), b.dense(), atol=1e-4), name  # sums of thousands of float32 products
        assert lazy.project(Z).rank_bound <= d


@given(st.sampled_from(["matrix", "transposed", "convolution", "vector"]), st.data())
def test_rows_are_slices(kind: str, data: st.DataObject) -> None:
    stored = Stored(LAYOUTS[kind])
    start = data.draw(st.integers(0, stored.lazy.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, stored.lazy.shape[0]))
    assert equal(stored.lazy.rows(start, stop), stored.plain.rows(start, stop))
    filed = in_file(stored.lazy, stored.layout.transposed)
    assert isinstance(filed, LazyDelta) and not filed.transposed
    last = filed.shape[0]
    stored.read.clear()
    assert torch.equal(filed.rows(last - 1, last).dense(), stored.value[-1:].reshape(1, -1))
    assert stored.read == [(last - 1, last)]  # rows of the file are read alone


# --- two and more ----------------------------------------------------------------------------------------------------


def others(layout: Layout) -> list[tuple[Delta, Delta]]:
    """(to be added, the same as a plain matrix), in every kind and orientation."""
    n, m = layout.matrix_shape
    g = generator(5)
    factors = LowRankDelta(torch.randn(n, 2, generator=g), torch.randn(2, m, generator=g))
    second, wide = Stored(layout, 6), Stored(layout, 7, torch.float64)
    turned = Stored(Layout((m, n), transposed=True) if not layout.transposed else Layout((n, m)), 8)
    return [
        (factors, DenseDelta(factors.dense())), (second.lazy, second.plain), (second.plain, second.plain),
        (wide.lazy, wide.plain), (turned.lazy, turned.plain),
    ]  # fmt: skip


@each_layout
def test_sums_and_inner_products(layout: Layout) -> None:
    stored = Stored(layout)
    for other, plain in others(layout):
        pairs = (stored.lazy.add(other), stored.plain.add(plain)), (other.add(stored.lazy), plain.add(stored.plain))
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype
            # a product of factors may round otherwise in blocks; everything else is the same to the last bit
            atol = 1e-5 if isinstance(other, LowRankDelta) else 0.0
            assert torch.allclose(a.dense(), b.dense(), atol=atol, rtol=0.0)
        exact = float((stored.plain.dense().double() * plain.dense().double()).sum())
        assert stored.lazy.inner(other) == pytest.approx(exact, rel=1e-4, abs=1e-4)
        assert other.inner(stored.lazy) == pytest.approx(exact, rel=1e-4, abs=1e-4)


def test_unlike_shapes_are_refused() -> None:
    a, b = Stored(LAYOUTS["matrix"]).lazy, Stored(Layout((5, 7))).lazy
    for call in (a.add, a.inner):
        with pytest.raises(ValueError, match="unlike shape"):
            call(b)


Step = Callable[[Delta], Delta]
STEPS: list[Step] = [
    lambda d: d.scale(-0.5),
    lambda d: d.scale(3.0),
    lambda d: d.to(torch.float64),
    lambda d: d.to(torch.bfloat16),
    lambda d: d.transpose(),
]


@given(
    st.sampled_from(["matrix", "transposed", "vector", "scalar", "no rows", "no columns"]),
    st.lists(st.integers(0, len(STEPS)), max_size=8),
)
def test_any_chain_of_operations_is_lazy_and_exact(kind: str, chain: list[int]) -> None:
    first, second = Stored(LAYOUTS[kind], 1), Stored(LAYOUTS[kind], 2)
    lazy: Delta = first.lazy
    plain: Delta = first.plain
    turned = False
    for step in chain:
        if step == len(STEPS):
            lazy = lazy.add(second.lazy.transpose() if turned else second.lazy)
            plain = plain.add(second.plain.transpose() if turned else second.plain)
        else:
            turned ^= step == len(STEPS) - 1
            lazy, plain = STEPS[step](lazy), STEPS[step](plain)
    assert isinstance(lazy, LazyDelta) and first.read == second.read == []
    assert equal(lazy, plain)


# --- blocks of several vectors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["matrix", "transposed", "convolution", "vector"])
def test_a_block_whole_and_as_its_file_lies(kind: str) -> None:
    layout = LAYOUTS[kind]
    a, b = Stored(layout, 1), Stored(layout, 2)
    base = layout.to_matrix(torch.ones(layout.shape))
    block = Block("w", layout, ("A", "B", "C"), (a.lazy, None, b.plain), base)
    whole = block.whole()
    assert [type(d) for d in whole.deltas] == [DenseDelta, type(None), DenseDelta] and whole.present == [0, 2]
    filed = block.in_file()
    assert not filed.layout.transposed
    for x, stored in ((filed.deltas[0], a), (filed.deltas[2], b)):
        assert x is not None
        assert torch.equal(x.dense(), stored.value.reshape(x.shape)) and x.shape == filed.layout.matrix_shape
    assert filed.base is not None and filed.base.shape == filed.layout.matrix_shape
    part = filed.rows(1, 3)
    assert part.layout.matrix_shape == (2, filed.layout.matrix_shape[1]) and part.deltas[1] is None
    assert part.deltas[0] is not None and torch.equal(part.deltas[0].dense(), a.value[1:3].reshape(2, -1))
