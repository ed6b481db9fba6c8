"""TIES against its definition, and each of its guarantees."""

from __future__ import annotations

import itertools

import pytest
import torch

from devec.core.delta import DenseDelta
from devec.core.errors import InputError, UsageError
from devec.methods.merge.ties import ties
from merges import Tensors, arrays, close, merged, models
from pools import block
from reference import elementwise


@pytest.fixture(params=[1 << 17, 16], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in one block of rows, and in many."""
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(("elect", "zero"), [("sum", "majority"), ("count", "majority"), ("count", "plus"),
                                             ("count", "none")])  # fmt: skip
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["f32", "f64"])
def test_is_its_definition(
    scope: str, reduce: str, elect: str, zero: str, dtype: torch.dtype, tolerance: float
) -> None:
    given = models(4, dtype)
    choices = {"density": 0.3, "scale": 0.7, "weights": [1.0, 0.5, 2.0, 0.25], "scope": scope, "reduce": reduce,
               "elect": elect, "zero": zero}  # fmt: skip
    wanted = elementwise.ties(arrays(given), **choices)  # type: ignore[arg-type]
    close(merged("ties", given, **choices), wanted, tolerance)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_threshold_is_the_kth_largest_of_the_scope(density: float) -> None:
    """One vector: what is not zero is exactly what torch.topk keeps, of each tensor and of the model."""
    (given,) = models(1)
    for n, found in merged("ties", [given], density=density).items():
        k = max(int(density * found.numel()), 1)
        cut = given[n].abs().flatten().topk(k).values[-1]
        assert torch.equal(found != 0, given[n].abs() >= cut) and int((found != 0).sum()) == k, n
    found = merged("ties", [given], density=density, scope="model")
    whole = torch.cat([t.flatten().abs() for t in given.values()])
    cut = whole.topk(int(density * len(whole))).values[-1]
    for n, t in found.items():
        assert torch.equal(t != 0, given[n].abs() >= cut), n
    lost = [n for n, t in found.items() if not bool((t != 0).any())]
    assert density > 0.2 or lost, "the tensors with small changes lose everything"


def test_float32_and_float64_tensors_share_a_threshold() -> None:
    given = models(2, torch.float64)
    mixed = [{n: t if n == "up.weight" else t.float() for n, t in tensors.items()} for tensors in given]
    close(merged("ties", mixed, scope="model"), elementwise.ties(arrays(mixed), scope="model"), 1e-6)


def test_equal_entries_at_the_threshold_are_all_kept() -> None:
    x = torch.tensor([[3.0, 1.0, -1.0, 1.0, 0.5]])
    found = ties(block([x]), density=0.4).dense()  # k = 2, and three entries have the size of the second
    assert found.tolist() == [[3.0, 1.0, -1.0, 1.0, 0.0]]
    for order in itertools.permutations(range(5)):
        moved = x[:, list(order)]
        assert torch.equal(ties(block([moved]), density=0.4).dense(), found[:, list(order)])


def test_one_vector_whole_is_itself() -> None:
    (given,) = models(1)
    for n, t in merged("ties", [given], density=1.0, scale=1.0).items():
        assert torch.equal(t, given[n])


def test_no_merged_entry_has_a_sign_that_lost() -> None:
    given = models(5)
    found = merged("ties", given, density=1.0)
    for n, t in found.items():
        signs = sum(tensors[n].double() for tensors in given).sign()  # type: ignore[union-attr]
        assert bool((t.double() * signs >= 0).all())
        agreeing = torch.stack([tensors[n] * (tensors[n] * signs > 0) for tensors in given]).abs()
        assert bool((t.abs() <= agreeing.amax(0) * (1 + 1e-6)).all())


def negated(given: list[Tensors]) -> list[Tensors]:
    return [{n: -t for n, t in tensors.items()} for tensors in given]


@pytest.mark.parametrize("zero", ["majority", "none"])
def test_is_odd(zero: str) -> None:
    """Also where sums cancel exactly: quarters do so often."""
    given = [{n: (t / 0.02).round() / 4 for n, t in tensors.items()} for tensors in models(2)]
    for n, t in merged("ties", given, density=1.0, zero=zero).items():
        assert torch.equal(merged("ties", negated(given), density=1.0, zero=zero)[n], -t), n


def test_plus_is_not_odd() -> None:
    """Where the property must fail: what cancels exactly goes to the positive side whoever is negated."""
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 2.0]])
    assert ties(block([a, b]), density=1.0, zero="plus").dense().tolist() == [[1.0, 2.0]]
    assert ties(block([-a, -b]), density=1.0, zero="plus").dense().tolist() == [[1.0, -2.0]]


def test_a_sum_of_zero_goes_with_the_majority_of_the_scope() -> None:
    a, b = torch.tensor([[1.0, -2.0, -3.0]]), torch.tensor([[-1.0, -2.0, 1.0]])
    for zero, first in (("majority", -1.0), ("plus", 1.0), ("none", 0.0)):
        found = ties(block([a, b]), density=1.0, zero=zero).dense()  # type: ignore[arg-type]
        assert found.tolist() == [[first, -2.0, -3.0]]
    given = [{"x": a, "y": torch.ones(1, 9)}, {"x": b, "y": torch.ones(1, 9)}]
    assert merged("ties", given, density=1.0)["x"][0, 0] == -1.0
    assert merged("ties", given, density=1.0, scope="model")["x"][0, 0] == 1.0, "the model's majority is positive"


def test_permuting_the_vectors_changes_nothing() -> None:
    given = models(3)
    wanted = merged("ties", given)
    for order in itertools.permutations(range(3)):
        found = merged("ties", [given[i] for i in order])
        assert all(torch.allclose(found[n], wanted[n], rtol=1e-6, atol=1e-9) for n in wanted)


@pytest.mark.parametrize(("words", "said"), [
    ({"density": 0.0}, r"density=0 is not in \(0, 1\]"), ({"density": 1.5}, "density=1.5"),
    ({"weights": [1.0]}, "got 1 weights for 2 vectors"), ({"scope": "layer"}, "scope='layer'"),
    ({"reduce": "max"}, "reduce='max'"), ({"elect": "vote"}, "elect='vote'"), ({"zero": "minus"}, "zero='minus'"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ties(block([torch.ones(2, 2), torch.ones(2, 2)]), **words)  # type: ignore[arg-type]
    with pytest.raises(UsageError):  # and through the library before anything is read
        merged("ties", models(2), **words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_entries_are_named(bad: float) -> None:
    x = torch.ones(3, 3)
    x[1, 1] = bad
    with pytest.raises(InputError, match=r"NaN or infinity in B .*\[?.*layer\.q"):
        ties(block([torch.ones(3, 3), DenseDelta(x)], name="layer.q"))


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_agrees_with_peft(elect: str, density: float) -> None:
    """With weights of 1 PEFT's function of tensors is the same method, where exact ties go to the positive side."""
    from peft.utils.merge_utils import ties as theirs

    given = models(4)
    method = {"sum": "total", "count": "frequency"}[elect]
    found = merged("ties", given, density=density, elect=elect, zero="plus")
    for n, t in found.items():
        if t.numel() < 5:
            continue  # PEFT keeps nothing of a tensor that small
        wanted = theirs([m[n] for m in given], torch.ones(4), density, majority_sign_method=method)
        assert torch.allclose(t, wanted, rtol=1e-5, atol=1e-8), n
