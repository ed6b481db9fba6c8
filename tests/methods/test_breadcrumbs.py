"""Breadcrumbs against its definition, and each of its guarantees."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from devec.core.errors import InputError, UsageError
from devec.methods.merge.breadcrumbs import borders, breadcrumbs
from merges import arrays, close, merged, models
from pools import block
from reference import elementwise


@pytest.fixture(params=[1 << 17, 20], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize(("beta", "gamma"), [(0.2, 0.1), (0.5, 0.0), (0.05, 0.9), (1.0, 0.0), (0.01, 0.01)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["f32", "f64"])
def test_is_its_definition(scope: str, beta: float, gamma: float, dtype: torch.dtype, tolerance: float) -> None:
    given = models(3, dtype)
    choices: dict[str, Any] = {"beta": beta, "gamma": gamma, "scale": 0.4, "weights": [1.0, -0.5, 2.0], "scope": scope}
    close(merged("breadcrumbs", given, **choices), elementwise.breadcrumbs(arrays(given), **choices), tolerance)


def test_rows_are_the_matrix_s_whichever_way_its_file_lies() -> None:
    given = models(2)
    straight, turned = merged("breadcrumbs", given), merged("breadcrumbs", given, transposed=True)
    assert all(torch.equal(straight[n], turned[n]) for n in straight)


@pytest.mark.parametrize("n", [1, 2, 9, 20, 1000])
@pytest.mark.parametrize(("beta", "gamma"), [(0.2, 0.1), (0.001, 0.0), (0.0005, 0.999), (0.3, 0.7), (1.0, 0.0)])
def test_borders_keep_something_and_stay_inside(n: int, beta: float, gamma: float) -> None:
    low, high = borders(n, beta, gamma)
    assert 0 <= low <= high <= n - 1
    assert high == n - 1 - int(gamma * n) and high - low + 1 == max(int(beta * n), 1)


def test_the_middle_is_kept_and_both_ends_go() -> None:
    x = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]])
    found = breadcrumbs(block([x]), beta=0.3, gamma=0.2, scale=1.0).dense()
    assert found.tolist() == [[0.0, 0.0, 3.0, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_equals_of_what_is_kept_are_kept_in_any_order(scope: str) -> None:
    x = torch.tensor([[3.0, 2.0, 2.0, 1.0, -1.0]])  # g = 1, k = 2: the second and the third
    wanted = torch.tensor([[0.0, 2.0, 2.0, 0.0, 0.0]])
    y = torch.tensor([[3.0, 3.0, 2.0, 2.0, 1.0]])  # g = 1 would cut through the equals at the top: both stay
    for order in map(list, itertools.permutations(range(5))):
        found = breadcrumbs(block([x[:, order]]), beta=0.4, gamma=0.2, scale=1.0, scope=scope).dense()  # type: ignore[arg-type]
        assert torch.equal(found, wanted[:, order])
        found = breadcrumbs(block([y[:, order]]), beta=0.4, gamma=0.2, scale=1.0, scope=scope).dense()  # type: ignore[arg-type]
        assert torch.equal(found, torch.where(y > 1, y, 0.0)[:, order])


def test_all_kept_is_task_arithmetic() -> None:
    given, w = models(3), [1.0, 0.5, -2.0]
    plain = merged("task-arithmetic", given, scale=0.4, weights=w)
    for scope in ("row", "tensor"):
        found = merged("breadcrumbs", given, beta=1.0, gamma=0.0, scale=0.4, weights=w, scope=scope)
        assert all(torch.allclose(found[n], plain[n], rtol=1e-6, atol=1e-7) for n in plain)


def test_linear_in_scale_and_weights_and_not_in_the_deltas() -> None:
    """The last is where the property must fail: what is dropped depends on the entries."""
    given = models(2)
    one, both = merged("breadcrumbs", given[:1], scale=1.0), merged("breadcrumbs", given, scale=1.0)
    doubled = merged("breadcrumbs", given, scale=1.0, weights=[2.0, 1.0])
    halved = merged("breadcrumbs", given, scale=0.5)
    for n, t in both.items():
        assert torch.allclose(halved[n], 0.5 * t, atol=1e-7)
        assert torch.allclose(doubled[n] - t, one[n], atol=1e-7)
    total = {n: given[0][n] + given[1][n] for n in given[0]}
    assert not torch.allclose(merged("breadcrumbs", [total], scale=1.0)["up.weight"], both["up.weight"], atol=1e-3)


def test_permuting_the_vectors_changes_nothing() -> None:
    given = models(3)
    wanted = merged("breadcrumbs", given)
    for order in itertools.permutations(range(3)):
        found = merged("breadcrumbs", [given[i] for i in order])
        assert all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-8) for n in wanted)


@pytest.mark.parametrize(("words", "said"), [
    ({"beta": 0.0}, r"beta=0 is not in \(0, 1\]"), ({"gamma": -0.1}, "gamma=-0.1"),
    ({"beta": [0.5, 0.5, 0.5]}, "3 betas for 2"), ({"scope": "model"}, "scope='model'"),
    ({"weights": [1.0]}, "1 weights for 2"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        breadcrumbs(block([torch.ones(2, 2), torch.ones(2, 2)]), **words)


def test_bad_entries_are_named() -> None:
    x = torch.full((3, 3), float("nan"))
    with pytest.raises(InputError, match="NaN or infinity in A"):
        breadcrumbs(block([x]))
