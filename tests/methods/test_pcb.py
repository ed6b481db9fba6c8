"""PCB against its definition, and each of its guarantees."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from devec.core.errors import InputError, UsageError
from devec.methods.merge.pcb import pcb, scored
from merges import arrays, close, merged, models
from pools import block
from reference import elementwise


@pytest.fixture(params=[1 << 17, 20], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_is_its_definition(scope: str, ratio: float, dtype: torch.dtype, tolerance: float) -> None:
    given = models(3, dtype)
    found = merged("pcb", given, ratio=ratio, scale=1.2, scope=scope)
    close(found, elementwise.pcb(arrays(given), ratio, 1.2, scope), tolerance)


def test_many_vectors_do_not_overflow() -> None:
    """exp(T b) alone would be infinite in float64 from T = 710 on."""
    x = torch.randn(720, 4, 5, generator=torch.Generator().manual_seed(0))
    found = scored(x, [(float(t.abs().min()), float(t.abs().max())) for t in x])
    assert bool(torch.isfinite(found).all()) and float(found.abs().amax()) > 0.1


def test_what_no_task_lifts_above_its_cut_is_the_base_s() -> None:
    given = models(3, torch.float64)
    dense, sparse = merged("pcb", given, ratio=1.0), merged("pcb", given, ratio=0.05)
    share = [sum(int((t != 0).sum()) for t in m.values()) / sum(t.numel() for t in m.values()) for m in (sparse, dense)]
    assert share[0] <= 3 * 0.05 and share[1] > 0.99


def test_a_merged_entry_lies_between_those_of_the_tasks() -> None:
    given = models(4)
    for n, t in merged("pcb", given, ratio=0.3, scope="tensor").items():
        if t.numel() == 1:
            continue
        # of fewer than 10,000 entries the quantiles are the smallest magnitude and the second largest
        second = [float(m[n].abs().flatten().topk(2).values[1]) for m in given]
        D = torch.stack([m[n].clamp(-s, s) for m, s in zip(given, second, strict=True)])
        assert bool(((t == 0) | ((t >= D.amin(0) - 1e-7) & (t <= D.amax(0) + 1e-7))).all()), n


def test_scores_are_compared_over_the_model_unless_told() -> None:
    """Where the two must differ: a tensor of small changes gets nothing beside one of large ones."""
    g = torch.Generator().manual_seed(0)
    given = [{"big": torch.randn(10, 10, generator=g), "small": 1e-3 * torch.randn(10, 10, generator=g)} for _ in "ab"]
    assert not bool(merged("pcb", given)["small"].any())
    assert bool(merged("pcb", given, scope="tensor")["small"].any())


def test_vectors_of_one_value_have_weight_zero() -> None:
    assert not bool(pcb(block([torch.ones(3, 3), torch.ones(3, 3)])).dense().any())
    assert not bool(pcb(block([torch.zeros(3, 3)])).dense().any())


def test_permuting_the_vectors_changes_nothing() -> None:
    given = models(3)
    wanted = merged("pcb", given)
    for order in itertools.permutations(range(3)):
        found = merged("pcb", [given[i] for i in order])
        assert all(torch.allclose(found[n], wanted[n], rtol=1e-3, atol=1e-6) for n in wanted)


@pytest.mark.parametrize(("words", "said"), [({"ratio": 0.0}, "ratio=0"), ({"ratio": 1.1}, "ratio=1.1"),
                                             ({"scope": "row"}, "scope='row'")])  # fmt: skip
def test_what_makes_no_sense_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pcb(block([torch.ones(2, 2), torch.ones(2, 2)]), **words)


def test_bad_entries_are_named() -> None:
    with pytest.raises(InputError, match="NaN or infinity in B"):
        pcb(block([torch.ones(2, 2), torch.full((2, 2), float("nan"))]))
