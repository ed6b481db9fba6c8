"""Many blocks at once against one block at a time: what a decomposition holds is the same to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from devec.core.block import Block
from devec.core.delta import LowRankDelta, SparseDelta
from devec.core.errors import InputError
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.methods.decompose.shared_unique import shared_unique
from devec.methods.decompose.shared_unique_batch import shared_unique_batch
from pools import Value, block
from reference.planted import generator, projector_distance


def matrix(seed: int, n: int = 30, m: int = 20) -> torch.Tensor:
    return torch.randn(n, m, generator=generator(seed))


def factors(seed: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    return matrix(seed, 30, r), matrix(seed + 100, r, 20)


def mixed() -> list[Block]:
    """Dense, sparse, factors of several ranks, a zero, an absent one, both ends of the range."""
    sparse = SparseDelta(torch.tensor([3, 41, 77]), torch.tensor([1.0, -2.0, 0.5]), (30, 20))
    values: list[list[Value | None]] = [
        [matrix(0), matrix(1), matrix(0) + 0.1 * matrix(2)],
        [factors(3, 4), factors(4, 2), factors(5, 4)],
        [matrix(6), None, factors(7, 3)],
        [sparse, torch.zeros(30, 20), matrix(8) * 1e-25],
        [None, factors(9, 4), None],
        [matrix(10).bfloat16(), sparse.scale(2.0), matrix(11) * 1e25],
    ]
    return [block(row, name=f"layer{i}") for i, row in enumerate(values)]


def assert_alike(ours: TensorFactors, one: TensorFactors) -> None:
    assert (ours.name, ours.layout, ours.low_rank, ours.members) == (one.name, one.layout, one.low_rank, one.members)
    assert ours.norms == pytest.approx(one.norms, rel=1e-6)
    assert set(ours.gram) == set(one.gram)
    for pair, value in one.gram.items():
        assert ours.gram[pair] == pytest.approx(value, rel=1e-6, abs=1e-5 * one.norms[pair[0]] * one.norms[pair[1]])
    for i in one.members:
        x, y = ours.svd[i], one.svd[i]
        assert torch.allclose(x.S, y.S, rtol=1e-5)
        assert projector_distance(x.U, y.U) < 1e-4
        assert x.V.shape == y.V.shape
        if y.V.shape[1]:
            assert projector_distance(x.V, y.V) < 1e-4


@pytest.mark.parametrize(
    "factoring",
    [
        Factoring(), Factoring(side="right", rank="none"), Factoring(side="both", rank="3"),
        Factoring(rank="energy=0.9"), Factoring(exact=True), Factoring(dtype="float64", side="both"),
    ],
    ids=str,
)
def test_blocks_together_are_the_blocks_one_by_one(factoring: Factoring) -> None:
    blocks = mixed()
    for ours, b in zip(shared_unique_batch(blocks, factoring, workers=2), blocks, strict=True):
        assert_alike(ours, shared_unique(b, factoring))
        for svd in ours.svd.values():
            assert svd.U.dtype == getattr(torch, factoring.dtype)


def test_one_d_parameters_and_iterated_matrices() -> None:
    columns = [block([matrix(i, 50, 1), matrix(i + 1, 50, 1)], name=f"bias{i}") for i in range(3)]
    wide = [block([matrix(i, 300, 20) @ matrix(i, 20, 280), matrix(i + 7, 300, 280)], name=f"w{i}") for i in range(2)]
    for blocks in (columns, wide):
        for products in ("float32", "bfloat16"):
            found = shared_unique_batch(blocks, Factoring(rank="4"), products=products)  # type: ignore[arg-type]
            for ours, b in zip(found, blocks, strict=True):
                one = shared_unique(b, Factoring(rank="4"))
                assert ours.members == one.members == (0, 1)
                assert torch.allclose(ours.svd[0].S, one.svd[0].S, rtol=2e-3)


@pytest.mark.parametrize("kind", ["dense", "B", "A", "sparse"])
def test_a_bad_entry_names_vector_and_tensor(kind: str) -> None:
    blocks = mixed()
    B, A = factors(12, 4)
    bad = {"dense": matrix(13), "B": (B, A), "A": (B, A), "sparse": matrix(13)}[kind]
    if kind == "dense":
        bad[3, 3] = float("nan")
    elif kind == "sparse":
        bad = SparseDelta(torch.tensor([5]), torch.tensor([float("inf")]), (30, 20))
    else:
        (B if kind == "B" else A)[1, 1] = float("nan")
    spoiled = block([bad], name="layer9").deltas[0]
    blocks[2] = replace(blocks[2], deltas=(blocks[2].deltas[0], spoiled, blocks[2].deltas[2]))
    with pytest.raises(InputError, match=r"vector B .*1 of \d+ entries are NaN or infinite .*layer2") as batched:
        shared_unique_batch(blocks)
    with pytest.raises(InputError) as single:
        shared_unique(blocks[2])
    assert str(batched.value) == str(single.value)


def test_shapes_must_agree_and_inputs_stay() -> None:
    with pytest.raises(ValueError, match="one matrix shape"):
        shared_unique_batch([block([matrix(0)]), block([matrix(0).T])])
    assert shared_unique_batch([]) == []
    W, (B, A) = matrix(0), factors(1, 3)
    kept = W.clone(), B.clone(), A.clone()
    shared_unique_batch([block([W, LowRankDelta(B, A)])])
    assert all(torch.equal(x, y) for x, y in zip((W, B, A), kept, strict=True))
