"""SLERP and Model Stock, whose weights come from norms and angles."""

from __future__ import annotations

import itertools
from math import cos, pi, sin
from typing import Any

import pytest
import torch
from torch import Tensor

from devec.core.delta import LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.model_stock import model_stock
from devec.methods.merge.slerp import slerp
from merges import arrays, close, merged, models
from pools import block
from reference import elementwise


@pytest.fixture(params=[1 << 17, 20], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


def at_angle(degrees: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two matrices of norm 1 at this angle."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(7, 5, generator=g, dtype=torch.float64)
    a /= a.norm()
    b = torch.randn(7, 5, generator=g, dtype=torch.float64)
    b -= (a * b).sum() * a
    b /= b.norm()
    angle = degrees * pi / 180
    return a, cos(angle) * a + sin(angle) * b


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["f32", "f64"])
def test_slerp_is_its_definition(t: float, dtype: torch.dtype, tolerance: float) -> None:
    given = models(2, dtype)
    a, b = arrays(given)
    close(merged("slerp", given, t=t), {n: elementwise.slerp(a[n], b[n], t) for n in a}, tolerance)


@pytest.mark.parametrize("degrees", [0.0, 1.0, 1.8, 1.82, 30.0, 90.0, 150.0, 179.0, 180.0])
def test_slerp_at_any_angle(degrees: float) -> None:
    """Within 1.8 degrees of parallel (cos 0.9995) it is a straight line, beyond an arc of constant norm."""
    a, b = at_angle(degrees)
    for t in (0.0, 0.25, 0.5, 1.0):
        found = slerp(block([a, b]), t=t).dense()
        assert torch.allclose(found, torch.from_numpy(elementwise.slerp(a.numpy(), b.numpy(), t)), atol=1e-12)
        if 1.82 <= degrees <= 178.0:
            assert float(found.norm()) == pytest.approx(1.0, abs=1e-12)
            ahead = float((found * a).sum())
            assert ahead == pytest.approx(cos(t * degrees * pi / 180), abs=1e-12), "the angle grows evenly"
    assert torch.allclose(slerp(block([a, b]), t=0.0).dense(), a, atol=1e-15)
    assert torch.allclose(slerp(block([a, b]), t=1.0).dense(), b, atol=1e-15)


def test_slerp_turned_round() -> None:
    a, b = at_angle(70.0)
    forth, back = slerp(block([a, b]), t=0.2).dense(), slerp(block([b, a]), t=0.8).dense()
    assert torch.allclose(forth, back, atol=1e-15)


def test_the_norm_is_not_kept_between_unlike_norms() -> None:
    """Where the property must fail: half way between norms 1 and 9 at a right angle lies norm sqrt(41)."""
    a, b = at_angle(90.0)
    assert float(slerp(block([a, 9 * b]), t=0.5).dense().norm()) == pytest.approx(41**0.5, rel=1e-12)


@pytest.mark.parametrize("other", [None, torch.zeros(7, 5, dtype=torch.float64)])
def test_slerp_with_nothing_on_one_side_is_a_straight_line(other: Tensor | None) -> None:
    a, _ = at_angle(90.0)
    assert torch.allclose(slerp(block([a, other]), t=0.25).dense(), 0.75 * a)


def test_factors_stay_factors_and_give_the_same() -> None:
    g = torch.Generator().manual_seed(1)
    factors = [(torch.rand(9, 2, generator=g), torch.rand(2, 6, generator=g)) for _ in range(2)]
    full = block([B @ A for B, A in factors])
    for found, wanted in (
        (slerp(block(factors), t=0.3), slerp(full, t=0.3)), (model_stock(block(factors)), model_stock(full))
    ):  # fmt: skip
        assert isinstance(found, LowRankDelta) and found.rank_bound == 4
        assert torch.allclose(found.dense(), wanted.dense(), atol=1e-5)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["f32", "f64"])
def test_model_stock_is_its_definition(count: int, dtype: torch.dtype, tolerance: float) -> None:
    common = models(1, dtype, seed=9)[0]
    given = [{n: t + 2 * common[n] for n, t in m.items()} for m in models(count, dtype)]
    plain = arrays(given)
    wanted = {n: elementwise.model_stock([m[n] for m in plain]) for n in plain[0]}
    close(merged("model-stock", given), wanted, tolerance)


@pytest.mark.parametrize(("degrees", "t"), [(0.0, 1.0), (60.0, 2 / 3), (90.0, 0.0), (120.0, 0.0), (180.0, 0.0)])
def test_model_stock_goes_as_far_as_the_models_agree(degrees: float, t: float) -> None:
    a, b = at_angle(degrees)
    assert torch.allclose(model_stock(block([a, b])).dense(), t * (a + b) / 2, atol=1e-12)


def test_equal_models_come_back_and_a_zero_counts_as_orthogonal() -> None:
    a, _ = at_angle(0.0)
    assert torch.allclose(model_stock(block([a, a, a])).dense(), a, atol=1e-12)
    assert torch.equal(model_stock(block([a, None])).dense(), torch.zeros_like(a))


def test_permuting_models_changes_nothing_for_model_stock() -> None:
    x = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) + 1 for i in range(3)]
    wanted = model_stock(block(x)).dense()
    for order in itertools.permutations(range(3)):
        assert torch.allclose(model_stock(block([x[i] for i in order])).dense(), wanted, atol=1e-6)


@pytest.mark.parametrize(("call", "count", "words", "said"), [
    (slerp, 3, {"t": 0.5}, "between 2 models, got 3"), (slerp, 1, {"t": 0.5}, "between 2 models, got 1"),
    (slerp, 2, {"t": 1.1}, r"t=1.1 is not in \[0, 1\]"), (model_stock, 1, {}, "at least 2 models, got 1"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call: Any, count: int, words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(block([torch.ones(2, 2)] * count), **words)
