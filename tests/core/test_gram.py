"""Inner products of many deltas at once, against entry-by-entry float64 sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devec.core.delta import Delta, LowRankDelta
from devec.core.gram import inner_products
from pools import Value, delta
from reference.planted import generator


def deltas(kinds: str, ranks: list[int], n: int = 30, m: int = 22) -> dict[int, Delta]:
    """``d``: a matrix; ``f``: factors, of the next rank."""
    left, found = iter(ranks), {}
    for i, kind in enumerate(kinds):
        g = generator(i)
        r = next(left) if kind == "f" else 0
        value: Value = torch.randn(n, m, generator=g)
        if kind == "f":
            value = (torch.randn(n, r, generator=g), torch.randn(r, m, generator=g))
        found[2 * i + 1] = delta(value)  # indices of vectors that have the tensor, with gaps
    return found


def exact(delta: Delta) -> Tensor:
    return delta.B.double() @ delta.A.double() if isinstance(delta, LowRankDelta) else delta.dense().double()


@pytest.mark.parametrize(
    ("kinds", "ranks"),
    [
        ("f" * 11, [3, 17, 1, 8, 8, 8, 2, 0, 5, 8, 8]),  # several groups, ragged, one empty
        ("fff", [40, 50, 3]),  # pair by pair
        ("ddddd", []),
        ("dfdfd", [4, 9]),
        ("f", [3]),
        ("", []),
    ],
)
@pytest.mark.parametrize("target", [None, 3, 99])
def test_inner_products_are_those_of_the_matrices(kinds: str, ranks: list[int], target: int | None) -> None:
    have = deltas(kinds, ranks)
    found = inner_products(have, target)
    wanted = {(i, j) for i in have for j in have if i <= j and (target is None or (target in (i, j) and i != j))}
    assert list(found) == sorted(wanted)
    for (i, j), value in found.items():
        A, B = exact(have[i]), exact(have[j])
        mixed = isinstance(have[i], LowRankDelta) != isinstance(have[j], LowRankDelta)  # a float32 product is made
        scale = float(A.norm() * B.norm())
        assert value == pytest.approx(float((A * B).sum()), abs=(1e-6 if mixed else 1e-12) * scale)


def test_a_matrix_longer_than_one_block_is_summed_whole() -> None:
    have = {i: delta(torch.randn(300, 260, generator=generator(i))) for i in range(3)}
    for (i, j), value in inner_products(have).items():
        assert value == pytest.approx(float((exact(have[i]) * exact(have[j])).sum()), abs=1e-9)
