"""AdaMerging++'s vectors against TIES written out on flat vectors in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devec.api.trim import agreeing
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.core.layout import Layout
from devec.core.vectors import Pool, TaskVector

SHAPES = {"w": (5, 11), "t": (9, 4), "b": (6,)}


def vectors() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{n: torch.randn(s, generator=g) for n, s in SHAPES.items()} for _ in range(3)]


def pool_of(states: list[dict[str, Tensor]]) -> Pool:
    layouts = {"w": Layout((5, 11)), "t": Layout((9, 4), transposed=True), "b": Layout((6,))}

    def delta(state: dict[str, Tensor], name: str, i: int) -> Delta:
        matrix = layouts[name].to_matrix(state[name])
        return LowRankDelta(matrix, torch.eye(matrix.shape[1])) if (i, name) == (1, "w") else DenseDelta(matrix)

    return Pool(tuple(
        TaskVector(f"v{i}", {n: delta(s, n, i) for n in s}, {n: layouts[n] for n in s}) for i, s in enumerate(states)
    ))


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_entries_are_those_that_are_large_and_agree(density: float) -> None:
    states = vectors()
    flat = torch.stack([torch.cat([x.reshape(-1) for x in s.values()]).double() for s in states])
    k = int(density * flat.shape[1])
    cuts = flat.abs().topk(k, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= cuts, flat, 0.0)
    sign = trimmed.sum(dim=0).sign()
    wanted = torch.where(trimmed * sign > 0, flat, 0.0)
    found = agreeing(pool_of(states), density)
    for i, v in enumerate(found):
        got = torch.cat([v.layouts[n].to_stored(v.deltas[n].dense()).reshape(-1) for n in SHAPES])
        assert torch.equal(got.double(), wanted[i])
        rows = v.deltas["t"].rows(1, 3).dense()
        assert torch.equal(rows, v.deltas["t"].dense()[1:3])


def test_one_vector_at_density_1_is_itself_and_a_missing_tensor_stays_missing() -> None:
    states = vectors()
    alone = agreeing(pool_of(states[:1]), 1.0)[0]
    assert torch.equal(alone.deltas["w"].dense(), states[0]["w"])
    del states[1]["b"]
    assert "b" not in agreeing(pool_of(states), 0.5)[1].deltas


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1])
def test_a_density_out_of_range_is_an_error(density: float) -> None:
    with pytest.raises(UsageError, match="trim"):
        agreeing(pool_of(vectors()), density)
