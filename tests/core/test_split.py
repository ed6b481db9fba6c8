"""Fused rows: split, decomposed apart, joined again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from devec.core.decomposition import Decomposition
from devec.core.delta import DenseDelta, LowRankDelta
from devec.core.errors import IncompatibleError
from devec.core.layout import Layout
from devec.core.options import View
from devec.core.split import RowSplit, join_rows, split_rows
from devec.core.vectors import Pool, TaskVector
from pools import decomposed, dense, pool, vector
from reference.planted import bases_at_common_angle, generator, orthonormal

QKV = {"w": RowSplit(Layout((30, 8)), (("q", 0, 12), ("k", 12, 18), ("v", 18, 30)))}


def fused(seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(30, 3, generator=g), torch.randn(3, 8, generator=g)


@pytest.mark.parametrize(
    "parts",
    [
        (("q", 0, 12), ("k", 13, 30)), (("q", 0, 12), ("k", 11, 30)), (("q", 0, 12),), (("q", 0, 31),),
        (("q", 0, 0), ("k", 0, 30)), (),
    ],
)
def test_parts_must_cover_the_rows_in_order(parts: tuple[tuple[str, int, int], ...]) -> None:
    with pytest.raises(ValueError):
        RowSplit(Layout((30, 8)), parts)


@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_split_and_join_are_inverse(kind: str) -> None:
    B, A = fused(0)
    v = vector("a", {"w": (B, A) if kind == "factors" else B @ A, "plain": torch.ones(2, 2)})
    apart = split_rows(v, QKV)
    assert apart.names() == ["w::q", "w::k", "w::v", "plain"]
    assert torch.equal(dense(apart, "w::k"), dense(v)[12:18])
    assert apart.layouts["w::q"].matrix_shape == (12, 8)
    back = join_rows(apart, QKV)
    assert back.names() == ["w", "plain"] and back.layouts["w"] == Layout((30, 8))
    assert torch.equal(dense(back), dense(v)) and torch.equal(dense(back, "plain"), dense(v, "plain"))
    if kind == "factors":
        delta = back.deltas["w"]
        assert isinstance(delta, LowRankDelta) and delta.rank_bound == 3, "one common A: no rank added"


def test_parts_with_their_own_factors_join_exactly() -> None:
    g = generator(1)
    parts = {
        f"w::{s}": (torch.randn(stop - start, r, generator=g), torch.randn(r, 8, generator=g))
        for (s, start, stop), r in zip(QKV["w"].parts, (2, 0, 3), strict=True)
    }
    joined = join_rows(vector("a", parts), QKV)
    assert torch.allclose(dense(joined), torch.cat([(B @ A).double() for B, A in parts.values()]), atol=1e-6)
    mixed = {**parts, "w::k": torch.ones(6, 8)}
    assert isinstance(join_rows(vector("a", mixed), QKV).deltas["w"], DenseDelta)


def test_a_fused_tensor_with_a_missing_part_is_refused() -> None:
    v = split_rows(vector("a", {"w": fused(2)}), QKV)
    with pytest.raises(IncompatibleError, match="lacks some of its rows"):
        join_rows(v.where("q|k"), QKV)


def test_a_name_that_merely_contains_the_separator_is_left_alone() -> None:
    v = vector("a", {"my::odd::name": torch.ones(2, 2), "w": fused(3)})
    back = join_rows(split_rows(v, QKV), QKV)
    assert back.names() == ["my::odd::name", "w"]
    assert torch.equal(dense(back, "my::odd::name"), torch.ones(2, 2).double())


def split_decomposition(*vectors: TaskVector, view: View | None = None, **factoring: object) -> Decomposition:
    d = decomposed(Pool(tuple(split_rows(v, QKV) for v in vectors)), view, **factoring)
    return replace(d, splits=QKV)


def test_parts_of_a_split_decomposition_have_the_names_and_shapes_of_the_file() -> None:
    left = bases_at_common_angle(12, 2, [0.0], 1, 4)
    values = []
    for i in range(2):
        B = torch.randn(30, 2, generator=generator(10 + i))
        B[:12] = (left[i] @ orthonormal(2, 2, generator(20 + i))).float()
        values.append({"w": (B, torch.randn(2, 8, generator=generator(30 + i)))})
    plain = pool(*values)
    d = split_decomposition(*plain)
    counts = {n: d.spectra[n, "left", (0, 1)].count for n in d.tensors}
    assert counts["w::q"] == 1, "sharing in the query rows is seen"
    for v in plain:
        whole = dense(v)
        unique, shared = d.unique(v.name), d.shared(v.name)
        assert unique.names() == shared.names() == ["w"]
        assert unique.layouts["w"] == v.layouts["w"]
        assert torch.allclose(dense(unique) + dense(shared), whole, atol=1e-6)
        assert isinstance(unique.deltas["w"], LowRankDelta)
        assert unique.deltas["w"].rank_bound == 2
        if counts["w::v"] == 0:
            assert torch.equal(dense(unique)[18:], whole[18:])
    assert torch.equal(dense(d.original("A")), dense(plain["A"]))
    common = d.shared("A", "B")
    assert common.names() == ["w"] and common.deltas["w"].shape == (30, 8)


def test_a_vector_that_is_zero_in_some_rows_can_still_be_shared_in_others() -> None:
    """Adapters often leave the key rows alone: those rows have no pair, the others do."""
    B, A = fused(5)
    silent = B.clone()
    silent[12:18] = 0
    pair = pool({"w": (B, A)}, {"w": (silent, A)})
    for mode in ("pairwise", "joint"):
        d = split_decomposition(*pair, mode=mode)
        common = d.shared("A", "B") if mode == "pairwise" else d.shared()
        assert common.names() == ["w"]
        assert float(dense(common)[12:18].abs().max()) == 0.0
        assert torch.allclose(dense(common)[:12], (B @ A)[:12].double(), atol=1e-5)
        assert float(dense(d.unique("B"))[12:18].abs().max()) == 0.0
        assert torch.allclose(dense(d.unique("A"))[12:18], (B @ A)[12:18].double(), atol=1e-6)
    lonely = split_decomposition(*pool({"w": (B, A)}, {"x": torch.ones(3, 3)}))
    assert lonely.shared("A", "B").names() == []
