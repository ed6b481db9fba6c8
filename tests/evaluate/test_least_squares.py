"""Least squares on outputs: exact in one step where outputs are linear in the coefficients."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from devec.core.delta import DenseDelta
from devec.core.errors import UsageError
from devec.evaluate.data import Rows, TaskData
from devec.evaluate.learning import Learned, Schedule
from devec.evaluate.least_squares import fit_outputs
from devec.evaluate.linear_model import LinearModel
from devec.evaluate.network import Network
from devec.evaluate.objectives import Sampling, SuiteObjective
from devec.evaluate.scoring import Task
from devec.io.checkpoint import checkpoint_from_state_dict

VECTORS = 3


class Linear(nn.Module):
    def __init__(self, bend: float) -> None:
        super().__init__()
        self.weight, self.bend = nn.Parameter(torch.zeros(5, 9, dtype=torch.float64)), bend

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) @ self.weight.T
        return y + self.bend * torch.tanh(y)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def world(bend: float) -> tuple[SuiteObjective, LinearModel, list[Tensor]]:
    net, base = Linear(bend), normal(0, 5, 9)
    deltas = [normal(10 + t, 5, 9) for t in range(VECTORS)]
    tasks = []
    for t, name in enumerate("ab"):
        x = torch.randint(0, 256, (20, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(t))
        rows = Rows(x, torch.zeros(20, dtype=torch.int64), "rows")
        tasks.append(Task(TaskData(name, Path("none"), rows, rows), batch=6))
    objective = SuiteObjective(Network(net, {"weight": net.weight}), tasks, "entropy", Sampling(batch=20), ["weight"])
    changes = {"weight": [(t, DenseDelta(d)) for t, d in enumerate(deltas)]}
    model = LinearModel.of(checkpoint_from_state_dict({"weight": base}), changes, VECTORS, torch.float64)
    return objective, model, deltas


def fit(bend: float, **choices: float) -> Learned:
    objective, model, _ = world(bend)
    schedule = Schedule(**{"steps": 1, "clamp": False, **choices})  # type: ignore[arg-type]
    return fit_outputs(objective, model, {"a": 0, "b": 1, "c": 2}, schedule)


def test_linear_outputs_are_fitted_in_one_step() -> None:
    """Against the normal equations written out on the rows themselves."""
    objective, _, deltas = world(0.0)
    A, b = torch.zeros(VECTORS, VECTORS, dtype=torch.float64), torch.zeros(VECTORS, dtype=torch.float64)
    for i, rows in enumerate(objective.rows):
        x = rows.x.flatten(1).double() / 255
        each = torch.stack([x @ d.T for d in deltas])
        A += torch.einsum("sno,tno->st", each, each)
        b += torch.einsum("sno,no->s", each, each[i])
    torch.testing.assert_close(fit(0.0).values.reshape(-1), torch.linalg.solve(A, b), rtol=0, atol=1e-5)


def test_more_steps_lower_the_loss_where_outputs_bend() -> None:
    history = fit(1.5, steps=8).history
    assert all(later <= earlier for earlier, later in pairwise(history))
    assert history[-1] < history[1] < history[0]
    assert history[-2] - history[-1] < 1e-3 * history[-1], "it has not come to rest"


def test_a_clamp_is_kept() -> None:
    found = fit(1.5, steps=4, clamp=True).values
    assert bool(((found >= 0) & (found <= 1)).all())


def test_a_task_without_its_fine_tune_is_named() -> None:
    objective, model, _ = world(0.0)
    with pytest.raises(UsageError, match="fine-tune of task b"):
        fit_outputs(objective, model, {"a": 0}, Schedule())
