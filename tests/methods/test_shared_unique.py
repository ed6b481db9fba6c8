"""Factoring one block: bad entries are named, every scale works, nothing is changed in place."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import DenseDelta, LowRankDelta, SparseDelta
from devec.core.errors import InputError, UsageError
from devec.core.options import Factoring
from devec.methods.decompose.shared_unique import shared_unique
from pools import Value, block, decomposed, dense, pool
from reference.planted import generator


def matrix(seed: int, n: int = 12, m: int = 9) -> torch.Tensor:
    return torch.randn(n, m, generator=generator(seed))


def spoiled(kind: str, bad: float) -> Value:
    B, A = torch.ones(12, 2), torch.ones(2, 9)
    if kind == "dense":
        W = matrix(0)
        W[3, 4] = bad
        return DenseDelta(W)
    if kind == "sparse":
        return SparseDelta(torch.tensor([3, 7]), torch.tensor([1.0, bad]), (12, 9))
    (B if kind == "B" else A)[1, 1] = bad
    return LowRankDelta(B, A)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["dense", "sparse", "B", "A"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", ["auto", "3", "none"])
def test_a_bad_entry_is_an_error_that_names_vector_and_tensor(kind: str, bad: float, dtype: str, rank: str) -> None:
    b = block([matrix(1), spoiled(kind, bad)], name="layer.3.q")
    with pytest.raises(InputError, match=r"vector B .*NaN or infinite .*layer\.3\.q") as error:
        shared_unique(b, Factoring(dtype=dtype, rank=rank))  # type: ignore[arg-type]
    assert error.value.exit_code == 3 and "--exclude" in str(error.value)


def test_an_overflow_of_float16_is_found_too() -> None:
    W = torch.full((12, 9), 6e4, dtype=torch.float16) * 2  # infinite in float16
    with pytest.raises(InputError, match="vector A"):
        shared_unique(block([W, matrix(0)]))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_one_vector_of_another_size_leaves_every_part_finite(scale: float) -> None:
    B, A = matrix(0, 12, 3), matrix(1, 3, 9)
    for value in ((B * scale, A), B @ A * scale):
        for side in ("left", "right", "both"):
            d = decomposed(pool(value, (B, A), matrix(2)), side=side, rank="none")
            assert d.spectra["w", side if side != "both" else "left", (0, 1)].count == 3
            for part in (d.unique("A"), d.shared("A"), d.shared("A", "B"), d.unique("B")):
                assert bool(torch.isfinite(dense(part)).all())
            whole = dense(d.original("A"))
            assert torch.allclose(dense(d.unique("A")) + dense(d.shared("A")), whole, atol=1e-5 * scale)
            assert d.tensors["w"].norms[0] == pytest.approx(float(whole.norm()), rel=1e-5)
            assert 0.0 <= d.shared_energy("w", 0) <= 1.0


def test_norms_and_inner_products_are_of_the_whole_deltas() -> None:
    """Whatever the rank rule cuts, cosines and norms are those of the vectors themselves."""
    values = [matrix(i, 40, 30) for i in range(3)]
    factors = shared_unique(block(values), Factoring(rank="2"))
    for i, W in enumerate(values):
        assert factors.svd[i].rank == 2
        assert factors.norms[i] == pytest.approx(float(W.double().norm()), rel=1e-7)
        for j in range(i, 3):
            exact = float((W.double() * values[j].double()).sum())
            assert factors.gram[i, j] == pytest.approx(exact, rel=1e-9)


def test_a_target_is_held_against_every_other_vector_and_those_not_against_each_other() -> None:
    """So its cost is linear in the pool; a thousand adapters have 499,500 pairs and 999 with the target."""
    values = [matrix(i, 40, 30) for i in range(5)]
    everything = shared_unique(block(values), Factoring(rank="2")).gram
    own = shared_unique(block(values), Factoring(rank="2", mode="target", target="C")).gram
    assert set(own) == {(i, i) for i in range(5)} | {(0, 2), (1, 2), (2, 3), (2, 4)}
    assert own == pytest.approx({pair: everything[pair] for pair in own}, rel=1e-12, abs=1e-12)


def test_the_cap_of_auto_follows_the_side() -> None:
    g = generator(3)
    W = torch.randn(200, 30, generator=g) @ torch.randn(30, 60, generator=g)
    ranks = {side: shared_unique(block([W, W]), Factoring(side=side)).svd[0].rank for side in ("left", "right", "both")}  # type: ignore[arg-type]
    assert ranks == {"left": 30, "right": 15, "both": 15}


def test_one_d_parameters_are_columns_of_rank_one() -> None:
    a, b = matrix(0, 50, 1), matrix(1, 50, 1)
    d = decomposed(pool(a, b, 3 * a), one_d=True)
    assert d.tensors["w"].members == (0, 1, 2)
    cosine2 = float((a.T @ b) ** 2 / (a.T @ a) / (b.T @ b))
    assert float(d.spectra["w", "left", (0, 1)].eigenvalues[0]) == pytest.approx(cosine2, abs=1e-6)
    assert d.spectra["w", "left", (0, 2)].count == 1


@pytest.mark.parametrize("wrong", [{"mode": "all"}, {"side": "top"}, {"rank": "0"}, {"dtype": "float16"},
                                   {"mode": "target"}, {"target": "A"}])
def test_a_choice_that_means_nothing_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        Factoring(**wrong)  # type: ignore[arg-type]
