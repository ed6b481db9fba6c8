"""Fisher averaging and RegMean against float64 references written from their equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import DenseDelta
from devec.core.errors import InputError, UsageError
from devec.core.layout import Layout
from devec.methods.merge.fisher import fisher
from devec.methods.merge.regmean import regmean

N, M, T = 7, 5, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_block(deltas: list[Tensor], **stats: Any) -> Block:
    names = tuple("ABCDEF"[: len(deltas)])
    return Block("w", Layout(tuple(deltas[0].shape)), names, tuple(map(DenseDelta, deltas)), stats=stats)


def squares(count: int = T) -> list[Tensor]:
    return [normal(N, M, seed=20 + i).square() for i in range(count)]


def deltas(count: int = T) -> list[Tensor]:
    return [normal(N, M, seed=i) for i in range(count)]


def inputs(count: int = T) -> list[Tensor]:
    return [normal(40, M, seed=50 + i) for i in range(count)]


def grams(X: list[Tensor]) -> list[Tensor]:
    return [x.T @ x / len(x) for x in X]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- Fisher -----------------------------------------------------------------------------------------------------------


def test_each_entry_is_the_weighted_mean_of_the_published_formula() -> None:
    F, D, shares = squares(), deltas(), [1.0, 2.0, 0.5]
    b = a_block(D, fisher=F, fisher_norm=[float(f.norm()) for f in F])
    w = [s * (f / f.norm()) for s, f in zip(shares, F, strict=True)]
    for i in range(N):
        for j in range(M):
            wanted = sum(float(w[t][i, j] * D[t][i, j]) for t in range(T)) / sum(float(w[t][i, j]) for t in range(T))
            assert float(fisher(b, weights=shares, floor=1e-30).dense()[i, j]) == pytest.approx(wanted, rel=1e-9)


def test_fisher_of_equal_models_and_of_equal_fisher() -> None:
    F, D = squares(), deltas()
    norms = [float(f.norm()) for f in F]
    close(fisher(a_block([D[0]] * T, fisher=F, fisher_norm=norms)).dense(), D[0])
    close(fisher(a_block(D, fisher=[F[0]] * T, fisher_norm=norms[:1] * T)).dense(), torch.stack(D).mean(0))


def test_no_factor_on_a_whole_fisher_matters_unless_it_is_not_normalised() -> None:
    F, D = squares(), deltas()
    one = fisher(a_block(D, fisher=F, fisher_norm=[1.0, 2.0, 3.0])).dense()
    more = fisher(a_block(D, fisher=[F[0] * 1e6, *F[1:]], fisher_norm=[1e6, 2.0, 3.0])).dense()
    close(one, more)
    raw = fisher(a_block(D, fisher=[F[0] * 1e9, *F[1:]]), normalise=False).dense()
    close(raw, D[0], 1e-2)


def test_entries_without_fisher_are_averaged_and_tensors_too() -> None:
    D = deltas()
    close(fisher(a_block(D, fisher=[torch.zeros(N, M)] * T, fisher_norm=[1.0] * T)).dense(), torch.stack(D).mean(0))
    close(fisher(a_block(D, fisher=[None] * T, fisher_norm=[1.0] * T)).dense(), torch.stack(D).mean(0))
    lone = fisher(a_block(D, fisher=[None, squares()[0] + 1.0, None], fisher_norm=[1.0] * T)).dense()
    close(lone, D[1], 1e-4)


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({}, {"weights": [1.0]}, UsageError), ({}, {"weights": [1.0, 1.0, -1.0]}, UsageError),
        ({}, {"floor": 0.0}, UsageError), ({"fisher": None}, {}, UsageError),
        ({"fisher_norm": [1.0, 0.0, 1.0]}, {}, InputError), ({"fisher": [-torch.ones(N, M)] * T}, {}, InputError),
        ({"fisher": [torch.ones(M, N)] * T}, {}, InputError),
        ({"fisher": [torch.full((N, M), float("nan"))] * T}, {}, InputError),
    ],
)  # fmt: skip
def test_fisher_refuses(change: dict[str, Any], options: dict[str, Any], error: type[Exception]) -> None:
    b = a_block(deltas(), **{"fisher": squares(), "fisher_norm": [1.0] * T, **change})
    with pytest.raises(error):
        fisher(b, **options)


# --- RegMean ----------------------------------------------------------------------------------------------------------


def test_regmean_minimises_the_distance_between_outputs() -> None:
    """Least squares over all rows of all tasks, solved by a general solver."""
    X, D = inputs(), deltas()
    got = regmean(a_block(D, moments=grams(X)), off_diagonal=1.0, ridge=1e-12).dense()
    outputs = torch.cat([x @ d.T for x, d in zip(X, D, strict=True)])  # equal numbers of rows: equal 1 / N
    close(got, torch.linalg.lstsq(torch.cat(X), outputs).solution.T, 1e-8)


def test_off_diagonals_are_shrunk_and_zero_is_a_mean_by_columns() -> None:
    G, D = grams(inputs()), deltas()
    H = [0.3 * g + 0.7 * torch.diag(g.diagonal()) for g in G]
    wanted = sum(d @ h for d, h in zip(D, H, strict=True)) @ torch.linalg.inv(sum(H))  # type: ignore[arg-type]
    close(regmean(a_block(D, moments=G), off_diagonal=0.3, ridge=1e-12).dense(), wanted, 1e-8)
    d = torch.stack([g.diagonal() for g in G])
    by_columns = (torch.stack(D) * d[:, None]).sum(0) / d.sum(0)
    close(regmean(a_block(D, moments=G), off_diagonal=0.0, ridge=1e-12).dense(), by_columns, 1e-8)


def test_equal_models_come_back_and_equal_identities_average() -> None:
    D, G = deltas(), grams(inputs())
    close(regmean(a_block([D[0]] * T, moments=G)).dense(), D[0])
    close(regmean(a_block(D, moments=[torch.eye(M)] * T)).dense(), torch.stack(D).mean(0))
    close(regmean(a_block(D, moments=[None] * T)).dense(), torch.stack(D).mean(0))
    close(regmean(a_block(D, moments=[torch.zeros(M, M)] * T)).dense(), torch.stack(D).mean(0))


def test_tasks_with_orthogonal_inputs_keep_their_outputs_and_the_rest_is_averaged() -> None:
    D = deltas(2)
    first, second = torch.zeros(2, 9, M, dtype=torch.float64)
    first[:, :2], second[:, 2:4] = normal(9, 2, seed=3), normal(9, 2, seed=4)
    W = regmean(a_block(D, moments=grams([first, second])), off_diagonal=1.0, ridge=1e-10).dense()
    close(first @ W.T, first @ D[0].T, 1e-6)
    close(second @ W.T, second @ D[1].T, 1e-6)
    close(W[:, 4], (D[0][:, 4] + D[1][:, 4]) / 2, 1e-6)


def test_permutation_scale_and_one_task() -> None:
    D, G = deltas(), grams(inputs())
    W = regmean(a_block(D, moments=G)).dense()
    close(regmean(a_block(D[::-1], moments=G[::-1])).dense(), W)
    close(regmean(a_block(D, moments=[1e4 * g for g in G])).dense(), W)
    close(regmean(a_block(D[:1], moments=G[:1])).dense(), D[0])


@pytest.mark.parametrize(
    ("moments", "options", "error"),
    [
        (None, {}, UsageError), ([torch.eye(M)], {}, UsageError), ([torch.eye(M)] * T, {"ridge": 0.0}, UsageError),
        ([torch.eye(M)] * T, {"off_diagonal": 1.5}, UsageError), ([torch.eye(N)] * T, {}, InputError),
        ([torch.eye(M) + 5.0 - 6.0 * torch.eye(M).flip(0)] * T, {}, InputError),
    ],
)  # fmt: skip
def test_regmean_refuses(moments: Any, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        regmean(replace(a_block(deltas()), stats={"moments": moments}), **options)
