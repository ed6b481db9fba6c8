"""CMA-ES against the minimum that a convex loss is known to have."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from devec.core.delta import DenseDelta
from devec.core.errors import InputError, UsageError
from devec.evaluate.learning import Schedule
from devec.evaluate.linear_model import LinearModel
from devec.evaluate.objectives import FunctionObjective
from devec.evaluate.search import search
from devec.io.checkpoint import checkpoint_from_state_dict

BASE = {"w": torch.zeros(3, 2, dtype=torch.float64)}
DELTAS = [torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
BEST = torch.tensor([0.4, 0.9, 0.2], dtype=torch.float64)


def loss(w: Mapping[str, Tensor], step: int) -> Tensor:
    wanted = sum(b * d for b, d in zip(BEST, DELTAS, strict=True))
    return (w["w"] - wanted).square().sum()


def run(**choices: object) -> Tensor:
    count = int(choices.pop("vectors", 3))  # type: ignore[call-overload]
    changes = {"w": [(t, DenseDelta(d)) for t, d in enumerate(DELTAS[:count])]}
    model = LinearModel.of(checkpoint_from_state_dict(BASE), changes, count, torch.float64)
    schedule = Schedule(steps=60, clamp=bool(choices.pop("clamp", False)))
    return search(FunctionObjective(BASE, loss), model, schedule, **choices).values.reshape(-1)  # type: ignore[arg-type]


def test_the_minimum_is_found_and_the_seed_decides() -> None:
    pytest.importorskip("cma")
    found = run(seed=0)
    torch.testing.assert_close(found, BEST, rtol=0, atol=1e-3)
    assert torch.equal(run(seed=0, workers=2), found) and not torch.equal(run(seed=1), found)


def test_a_clamped_search_stays_inside() -> None:
    pytest.importorskip("cma")
    found = run(clamp=True, vectors=2)
    assert bool(((found >= 0) & (found <= 1)).all())


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(InputError, match=r"devec\[cma\]"):
        run()
    monkeypatch.undo()
    pytest.importorskip("cma")
    with pytest.raises(UsageError, match="at least two"):
        run(vectors=1)
