"""Parameters that several elementwise merges take: a value per vector, sum or mean, rescaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from devec.core.errors import UsageError
from merges import NAMES, Tensors, arrays, close, merged, models, vector
from reference import elementwise as plain

KEPT: dict[str, tuple[str, list[float], dict[str, Any]]] = {
    "ties": ("density", [0.2, 0.6, 1.0], {"zero": "none"}),
    "dare": ("p", [0.9, 0.3, 0.0], {"seed": 5}),
    "della": ("density", [0.3, 0.6, 1.0], {"seed": 5, "epsilon": 0.1}),
    "breadcrumbs": ("beta", [0.2, 0.6, 1.0], {}),
    "breadcrumbs of tensors": ("beta", [0.2, 0.6, 1.0], {"scope": "tensor"}),
}
"""Method -> the parameter that says how much of a change is kept, one value per vector, and the rest."""


@pytest.fixture(params=[1 << 17, 20], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


def alone(case: str, i: int, value: float, given: list[Tensors], **more: Any) -> dict[str, np.ndarray]:
    """What is left of one vector, without the others: it keeps its place, since masks go by its name."""
    name, _, rest = KEPT[case]
    zeros = [{n: torch.zeros_like(t) for n, t in m.items()} for m in given]
    own = [m if j == i else zeros[j] for j, m in enumerate(given)]
    found = merged(case.split()[0], own, **{name: value}, scale=1.0, reduce="sum", **rest, **more)
    return {n: x.double().numpy() for n, x in found.items()}


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("then", ["task-arithmetic", "ties"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("case", KEPT)
def test_every_vector_is_thinned_by_its_own_value(case: str, reduce: str, then: str, rescale: str) -> None:
    """Against the parts of single vectors, rescaled, weighed and joined in float64."""
    name, values, rest = KEPT[case]
    method, weights = case.split()[0], [1.0, -0.5, 2.0]
    if method == "ties" and then != "ties":
        pytest.skip("ties always elects")
    given = models(3, torch.float64)
    more = {} if method == "ties" else {"then": then}
    found = merged(
        method, given, **{name: values}, weights=weights, reduce=reduce, rescale=rescale, scale=0.7, **more, **rest
    )
    wanted = {}
    parts = [alone(case, i, v, given, rescale="none", **more) for i, v in enumerate(values)]
    for n, like in given[0].items():
        stack = []
        for part, whole, w in zip(parts, arrays(given), weights, strict=True):
            left = np.abs(part[n]).sum()
            size = np.abs(whole[n]).sum() / left if rescale == "l1" and left > 0 else 1.0
            stack.append(w * size * part[n])
        if then == "ties":
            agree = [x * np.sign(sum(stack)) > 0 for x in stack]
            out = sum(np.where(m, x, 0.0) for m, x in zip(agree, stack, strict=True))
            shares = sum(m * abs(w) for m, w in zip(agree, weights, strict=True))
            out = out / np.where(shares > 0, shares, 1.0) if reduce == "mean" else out
        else:
            out = sum(stack) / (sum(weights) if reduce == "mean" else 1.0)
        wanted[n] = 0.7 * np.asarray(out).reshape(like.shape)
    close(found, wanted, 1e-12)


@pytest.mark.parametrize("case", KEPT)
def test_one_value_is_the_same_as_it_for_each(case: str) -> None:
    name, _, rest = KEPT[case]
    given = models(2)
    one, each = (merged(case.split()[0], given, **{name: v}, **rest) for v in (0.5, [0.5, 0.5]))
    assert all(torch.equal(one[n], each[n]) for n in one)
    with pytest.raises(UsageError, match=r"3 .* for 2 vectors"):
        merged(case.split()[0], given, **{name: [0.5] * 3}, **rest)


def test_a_whole_model_s_thresholds_are_each_vector_s_own() -> None:
    given = models(2, torch.float64)
    found = merged("ties", given, density=[0.1, 0.5], scope="model", zero="none")
    cuts = [plain.kth_largest(plain.flat(m), d) for m, d in zip(arrays(given), (0.1, 0.5), strict=True)]
    trimmed = [
        {n: torch.from_numpy(np.where(np.abs(x) >= cut, x, 0.0)) for n, x in m.items()}
        for m, cut in zip(arrays(given), cuts, strict=True)
    ]
    close(found, plain.ties(arrays(trimmed), 1.0, zero="none"), 1e-12)


def test_gamma_gives_way() -> None:
    given = models(1, torch.float64)
    for scope in ("row", "tensor"):
        found = merged("breadcrumbs", given, beta=0.9, gamma=0.5, scope=scope, scale=1.0)
        for n, x in arrays(given)[0].items():
            count, length = plain.rows(x).shape if scope == "row" else (1, x.size)
            assert int((found[n] != 0).sum()) == count * max(int(0.9 * length), 1)


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_sums_and_means(method: str) -> None:
    given = models(3, torch.float64)
    weights = [1.0, -0.5, 2.0]
    more = {} if method == "average" else {"scale": 0.7}
    for reduce in ("sum", "mean"):
        found = merged(method, given, weights=weights, reduce=reduce, **more)
        size = (1.0 if reduce == "sum" else sum(weights)) / more.get("scale", 1.0)
        wanted = {
            n: sum(w * m[n] for w, m in zip(weights, arrays(given), strict=True)) / size for n in given[0]
        }
        close(found, wanted, 1e-14)
        with pytest.raises(UsageError, match="sum to zero" if reduce == "mean" else "does not fit"):
            merged(method, given[:2], weights=[1.0, -1.0], reduce=reduce if reduce == "mean" else "product", **more)


@pytest.mark.parametrize("transposed", [False, True])
def test_model_stock_of_rows(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the matrix is merged as a tensor by itself; a 1-D parameter is one row."""
    monkeypatch.setattr("devec.core.lazy.BLOCK", 20)
    given = models(3, torch.float64)
    for m in given[1:]:  # alike enough for angles below a right one
        for n in m:
            m[n] = m[n] + 3 * given[0][n]
    found = merged("model-stock", given, transposed, scope="row")
    for n, first in given[0].items():
        each = [plain.rows(m[n]) for m in arrays(given)]
        rows = [plain.model_stock([x[i] for x in each]) for i in range(len(each[0]))]
        wanted = np.concatenate(rows).reshape(first.shape)
        assert np.abs(found[n].numpy() - wanted).max() < 1e-12
    assert len(NAMES) >= len(given) and vector("A", given[0]).names() == list(found)
