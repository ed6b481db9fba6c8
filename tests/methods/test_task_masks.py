"""Consensus, TALL masks and EMR against their definitions, and each of their guarantees."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from devec.core.errors import InputError, UsageError
from devec.methods import registry
from devec.methods.merge.consensus import consensus
from devec.methods.merge.emr import emr
from devec.methods.merge.tall_masks import tall_masks
from merges import NAMES, arrays, close, merged, models
from pools import block
from reference import elementwise

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["f32", "f64"]
)


@pytest.fixture(params=[1 << 17, 20], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


# --- consensus -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@DTYPES
@pytest.mark.parametrize("agree", [0, 1, 2, 3, 4])
def test_consensus_is_its_definition(agree: int, dtype: torch.dtype, tolerance: float) -> None:
    given, cuts = models(3, dtype), [0.2, 0.4, 0.6]
    found = merged("consensus", given, agree=agree, scale=0.5, threshold=cuts)
    close(found, elementwise.consensus(arrays(given), 0.5, agree, cuts), tolerance)


def test_agree_zero_is_task_arithmetic_and_too_many_is_the_base() -> None:
    given = models(3)
    plain = merged("task-arithmetic", given, scale=0.3)
    assert all(torch.allclose(t, plain[n], atol=1e-7) for n, t in merged("consensus", given, agree=0).items())
    assert not any(bool(t.any()) for t in merged("consensus", given, agree=4).values())
    assert any(not torch.allclose(t, plain[n], atol=1e-3) for n, t in merged("consensus", given, agree=2).items())


def test_consensus_is_linear_in_scale_and_permutes() -> None:
    given = models(3)
    one, half = merged("consensus", given, scale=1.0), merged("consensus", given, scale=0.5)
    assert all(torch.allclose(half[n], t / 2) for n, t in one.items())
    for order in itertools.permutations(range(3)):
        found = merged("consensus", [given[i] for i in order], scale=1.0)
        assert all(torch.allclose(found[n], one[n], rtol=1e-5, atol=1e-7) for n in one)


def test_an_entry_of_one_task_alone_is_selfish_and_goes() -> None:
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert consensus(block([a, b]), scale=1.0).dense().tolist() == [[0.0, 2.0]]


# --- TALL masks ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@DTYPES
@pytest.mark.parametrize("task", [0, 2])
def test_tall_masks_is_its_definition(task: int, dtype: torch.dtype, tolerance: float) -> None:
    given = models(3, dtype)
    found = merged("tall-masks", given, task=NAMES[task], threshold=0.5)
    close(found, elementwise.tall_masks(arrays(given), task, 0.5), tolerance)
    by_number = merged("tall-masks", given, task=str(task + 1), threshold=[0.5, 0.5, 0.5])
    assert all(torch.equal(by_number[n], t) for n, t in found.items())


def test_tall_masks_give_a_task_back_where_others_are_silent() -> None:
    a, b = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 3.0, 4.0]])
    assert tall_masks(block([a, b]), task="A").dense().tolist() == [[1.0, 5.0, 0.0]]
    assert tall_masks(block([a, b]), task="B").dense().tolist() == [[0.0, 5.0, 4.0]]
    assert torch.equal(tall_masks(block([a]), task="A").dense(), a)


def test_every_entry_of_tall_masks_is_the_sum_s_or_zero() -> None:
    given = models(4)
    for n, t in merged("tall-masks", given, task="C").items():
        total = given[0][n] + given[1][n] + given[2][n] + given[3][n]
        assert bool(((t == 0) | torch.isclose(t, total, rtol=1e-5, atol=1e-8)).all())
        assert n == "temperature" or bool((t == 0).any()), "nothing was masked: the test would see nothing"


# --- EMR -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@DTYPES
@pytest.mark.parametrize("task", [0, 2])
def test_emr_is_its_definition(task: int, dtype: torch.dtype, tolerance: float) -> None:
    """The rescaler is of the whole model, also through the library, which merges tensor by tensor."""
    given = models(3, dtype)
    close(merged("emr", given, task=NAMES[task]), elementwise.emr(arrays(given), task), tolerance)


def test_emr_of_one_vector_is_that_vector() -> None:
    (given,) = models(1)
    assert all(torch.allclose(t, given[n], rtol=1e-6) for n, t in merged("emr", [given], task="A").items())


def test_emr_keeps_the_task_s_signs_and_size() -> None:
    given = models(3, torch.float64)
    for i, name in enumerate(NAMES[:3]):
        found = merged("emr", given, task=name)
        assert all(bool((t * given[i][n] >= 0).all()) for n, t in found.items())
        size, own = (sum(float(t.abs().mean()) for t in m.values()) for m in (found, given[i]))
        assert size == pytest.approx(own, rel=1e-12)


def test_emr_shrinks_where_all_agree_and_may_grow_where_not() -> None:
    """The last is where ``s_t <= 1`` must fail: a task that loses most elections has little left to be rescaled."""
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert emr(block([a, b]), task="A").dense()[0].tolist() == pytest.approx([3.0 * 0.6, 2.0 * 0.6])
    c = torch.tensor([[0.1, -0.9]])
    assert torch.allclose(emr(block([c, b]), task="A").dense(), torch.tensor([[1.0, 0.0]]))
    d = torch.tensor([[1.0, -9.0]])
    assert torch.allclose(emr(block([d, torch.tensor([[0.0, 10.0]])]), task="A").dense(), torch.tensor([[10.0, 0.0]]))


def test_signs_that_cancel_exactly_elect_nothing() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 2.0]])
    assert emr(block([a, b]), task="A").dense()[0, 0] == 0.0


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tall-masks", "emr"])
def test_permuting_the_vectors_keeps_a_named_task(method: str) -> None:
    x = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    call = registry.get("merge", method).call
    b = block(x)
    wanted = call(b, task="B").dense()
    for order in itertools.permutations(range(3)):
        moved = type(b)(b.name, b.layout, tuple(b.vectors[i] for i in order), tuple(b.deltas[i] for i in order))
        assert torch.allclose(call(moved, task="B").dense(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["tall-masks", "emr"])
def test_a_model_per_task_says_so(method: str) -> None:
    found = registry.get("merge", method)
    assert found.per_task and "not comparable" in (found.call.__doc__ or "")
    assert not any(m.per_task for m in registry.all_methods() if m.name not in ("tall-masks", "emr", "tsv-c"))


@pytest.mark.parametrize(("call", "words", "said"), [
    (consensus, {"agree": -1}, "agree=-1"), (consensus, {"threshold": -0.1}, "threshold=-0.1"),
    (consensus, {"threshold": [0.1]}, "got 1 thresholds for 2 vectors"),
    (tall_masks, {"task": "C"}, "task='C' is no vector: vectors = A, B"), (tall_masks, {"task": "3"}, "no vector"),
    (tall_masks, {"task": "0"}, "no vector"), (tall_masks, {"task": "A", "threshold": -1.0}, "threshold=-1"),
    (emr, {"task": "x"}, "no vector"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call: Any, words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(block([torch.ones(2, 2), torch.ones(2, 2)]), **words)


@pytest.mark.parametrize(("call", "words"), [(consensus, {}), (tall_masks, {"task": "A"}), (emr, {"task": "A"})])
def test_bad_entries_are_named(call: Any, words: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="NaN or infinity in B"):
        call(block([torch.ones(2, 2), torch.full((2, 2), float("nan"))]), **words)
