"""Task vectors and pools: lazy arithmetic, and what may not be combined."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import DenseDelta, LowRankDelta
from devec.core.errors import IncompatibleError, UsageError
from devec.core.layout import Layout
from devec.core.vectors import LazyMap, Origin, Pool, TaskVector, analogy
from pools import block, pool, vector
from reference.planted import generator


def random(seed: int, n: int = 6, m: int = 5) -> torch.Tensor:
    return torch.randn(n, m, generator=generator(seed))


def test_a_lazy_map_makes_values_when_asked_and_keeps_none() -> None:
    asked: list[str] = []
    lazy = LazyMap(["b", "a"], lambda n: asked.append(n) or DenseDelta(torch.ones(1, 1)))  # type: ignore[func-returns-value]
    assert list(lazy) == ["b", "a"] and len(lazy) == 2 and "a" in lazy and "c" not in lazy
    assert asked == []
    lazy["a"], lazy["a"]
    assert asked == ["a", "a"]
    with pytest.raises(KeyError):
        lazy["c"]


def test_arithmetic_is_that_of_the_matrices() -> None:
    a = vector("a", {"x": random(0), "only": random(1)})
    b = vector("b", {"x": random(2), "other": random(3)})
    total = 2.0 * a + b - 0.5 * b
    assert set(total.names()) == {"x", "only", "other"}
    assert torch.allclose(total.deltas["x"].dense(), 2 * random(0) + 0.5 * random(2), atol=1e-6)
    assert torch.allclose(total.deltas["only"].dense(), 2 * random(1))
    assert torch.allclose(total.deltas["other"].dense(), 0.5 * random(3))
    assert total.layouts.keys() == set(total.names())
    assert torch.allclose((-a).deltas["x"].dense(), -random(0))
    c = vector("c", {"x": random(4), "only": random(5), "other": random(6)})
    there = analogy(a, b, c)
    assert torch.allclose(there.deltas["x"].dense(), random(4) + random(2) - random(0), atol=1e-6)
    assert torch.allclose(there.deltas["only"].dense(), random(5) - random(1), atol=1e-6)


def test_arithmetic_computes_nothing_before_it_is_asked() -> None:
    def fail(name: str) -> DenseDelta:
        raise AssertionError(name)

    a = TaskVector("a", LazyMap(["x"], fail), {"x": Layout((2, 2))})
    b = vector("b", {"x": torch.ones(2, 2)})
    for v in (2 * a + b, a - b, a.map(lambda _n, d: d), a.where("x"), analogy(a, b, a), a.named("z")):
        assert v.names() == ["x"]
        with pytest.raises(AssertionError):
            v.deltas["x"]


def test_only_numbers_scale_a_vector() -> None:
    a = vector("a", {"x": random(0)})
    for wrong in ("2", True, torch.tensor(2.0), a):
        with pytest.raises(TypeError):
            a * wrong  # type: ignore[operator]
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]


def test_inner_norm_cosine() -> None:
    a = vector("a", {"x": random(0), "y": random(1)})
    b = vector("b", {"x": random(2), "z": random(3)})
    inner = float((random(0).double() * random(2).double()).sum())
    assert a.inner(b) == pytest.approx(inner, rel=1e-6)
    norm = (float(random(0).double().norm()) ** 2 + float(random(1).double().norm()) ** 2) ** 0.5
    assert a.norm() == pytest.approx(norm, rel=1e-6)
    assert a.cosine(a) == pytest.approx(1.0, rel=1e-6)
    assert a.cosine(-3 * a) == pytest.approx(-1.0, rel=1e-6)
    assert a.cosine(b) == pytest.approx(inner / a.norm() / b.norm(), rel=1e-6)
    assert a.cosine(vector("zero", {"x": torch.zeros(6, 5)})) == 0.0


def test_where_selects_by_name() -> None:
    a = vector("a", {"layers.0.q": random(0), "layers.1.q": random(1), "layers.1.k": random(2)})
    assert a.where(r"layers\.1\.").names() == ["layers.1.q", "layers.1.k"]
    assert a.where("q$").layouts.keys() == {"layers.0.q", "layers.1.q"}
    assert a.where("nothing").names() == []


def test_to_lowrank_is_the_best_approximation() -> None:
    a = vector("a", {"x": random(0), "y": (random(1, 6, 4), random(2, 4, 5))})
    cut = a.to_lowrank(2)
    assert cut.is_low_rank() and not a.is_low_rank()
    for n in ("x", "y"):
        W = a.deltas[n].dense().double()
        s = torch.linalg.svd(W)
        best = (s.U[:, :2] * s.S[:2]) @ s.Vh[:2]
        assert cut.deltas[n].rank_bound == 2
        assert torch.allclose(cut.deltas[n].dense().double(), best, atol=1e-5)


def test_vectors_that_do_not_belong_together_are_refused() -> None:
    a = vector("a", {"x": random(0)}, origin=Origin(base_fingerprint="f" * 64))
    other_base = vector("b", {"x": random(0)}, origin=Origin(base_fingerprint="e" * 64))
    unknown_base = vector("b", {"x": random(0)})
    other_space = vector("b", {"x": random(0)}, space="tangent")
    other_shape = vector("b", {"x": random(0, 5, 6)})
    for b, match in ((other_base, "bases"), (other_space, "spaces"), (other_shape, "shapes")):
        for refuse in (lambda b=b: a + b, lambda b=b: a - b, lambda b=b: a.inner(b), lambda b=b: Pool((a, b))):
            with pytest.raises(IncompatibleError, match=match):
                refuse()
    assert Pool((a, unknown_base)).names == ("a", "b")


@pytest.mark.parametrize("place", [1, 2, 3])
def test_one_odd_vector_anywhere_in_a_pool_is_found(place: int) -> None:
    """Also where neither the first vector nor any one vector knows everything that the odd one contradicts."""
    base = Origin(base_fingerprint="f" * 64)
    others = [
        vector("a", {"x": random(0)}),
        vector("b", {"y": random(1)}, origin=base),
        vector("c", {"x": random(2), "z": random(3)}),
    ]
    odd = {
        "bases": vector("odd", {"x": random(4)}, origin=Origin(base_fingerprint="e" * 64)),
        "spaces": vector("odd", {"x": random(4)}, space="tangent"),
        "shapes": vector("odd", {"z": random(4, 5, 6), "y": random(5)}),
    }
    Pool(tuple(others))
    for match, vector_ in odd.items():
        with pytest.raises(IncompatibleError, match=match):
            Pool((*others[:place], vector_, *others[place:]))


def test_names_of_a_pool_are_unique_and_can_be_written_in_references() -> None:
    with pytest.raises(UsageError, match="two vectors"):
        Pool((vector("a", {"x": random(0)}), vector("a", {"x": random(1)})))
    for bad in ("a+b", "a#b", "a,b", "a b", ""):
        with pytest.raises(UsageError, match="cannot name"):
            Pool((vector(bad, {"x": random(0)}),))
    p = pool({"x": random(0)}, {"x": random(1)})
    assert p["B"] is p[1] and len(p) == 2 and [v.name for v in p] == ["A", "B"]
    with pytest.raises(UsageError, match="no vector"):
        p["C"]


def test_blocks_hold_every_tensor_once_with_gaps() -> None:
    p = pool({"x": random(0), "y": random(1)}, {"z": random(2, 3, 3), "x": random(3)})
    assert p.tensors() == ["x", "y", "z"]
    blocks = list(p.blocks())
    assert [b.name for b in blocks] == ["x", "y", "z"]
    assert [b.present for b in blocks] == [[0, 1], [0], [1]]
    assert blocks[2].layout.matrix_shape == (3, 3) and blocks[2].deltas[0] is None
    with pytest.raises(KeyError):
        p.layout("nothing")
    assert block([None, random(0)]).present == [1]


def test_a_sum_of_adapters_is_an_adapter() -> None:
    a, b = (vector(n, {"x": (random(i, 6, 2), random(i + 5, 2, 5))}) for i, n in enumerate("ab"))
    total = (a + b).deltas["x"]
    assert isinstance(total, LowRankDelta) and total.rank_bound == 4
