"""Coefficients by least squares: the merged network's outputs fitted to each fine-tuned network's, on unlabelled rows.

Outputs are not linear in the coefficients, so the fit is Gauss-Newton: outputs are linearised at the present
coefficients by one forward pass a coefficient, and the normal equations of that are solved in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from devec.core.coefficients import CoefficientGrain
from devec.core.errors import UsageError
from devec.evaluate.learning import Learned, Report, Schedule, Space, Workers, check_finite
from devec.evaluate.linear_model import LinearModel
from devec.evaluate.objectives import SuiteObjective
from devec.linalg.numerics import one_blas_thread

STEP = {torch.float32: 1e-2, torch.float64: 1e-5}
"""Step of the forward differences: where their truncation and the rounding of outputs are about alike."""

RIDGE = 1e-6
"""Of the mean diagonal: decides between vectors that change the outputs alike, and moves nothing else."""

HALVINGS = 6


def fit_outputs(
    objective: SuiteObjective,
    model: LinearModel,
    teachers: Mapping[str, int],
    schedule: Schedule,
    *,
    grain: CoefficientGrain = "vector",
    workers: int = 1,
    report: Report = lambda done, total, loss: None,
) -> Learned:
    """``min_c sum_i mean_x |f(x; W(c)) - f(x; W_0 + Delta_i)|^2`` over the rows x of each task i.

    ``teachers`` says which vector is a task's own fine-tune. ``schedule.steps`` Gauss-Newton steps at most from
    ``schedule.init``, on the rows of step 0, each halved until the loss falls; ``clamp`` cuts to [0, 1] after each.
    Rate, decay and clipping are Adam's and not used. ``history`` is the loss before each step and, last, at the result.

    Costs T x groups + 1 merges and forward passes a step, and no backward pass. Raises UsageError for a task without a
    teacher or a loss that is not finite.
    """
    lacking = [t.name for t in objective.tasks if t.name not in teachers]
    if lacking:
        raise UsageError(
            f"no vector is the fine-tune of task {lacking[0]}", values={"tasks without one": len(lacking)},
            remedy="Name the vectors as the tasks: TASK=PATH.",
        )
    space = Space(objective, model, grain, clamp=False)
    c = space.start(schedule.init)
    h = STEP[model.dtype]
    history: list[float] = []
    with one_blas_thread(), Workers(workers) as work, torch.no_grad():
        wanted = []
        for i, task in enumerate(objective.tasks):
            alone = torch.zeros_like(c)
            alone[teachers[task.name]] = 1.0
            space.write(alone, work)
            wanted.append(torch.cat(list(_outputs(objective, i))))

        def residual(at: Tensor) -> Tensor:
            """Each row's outputs less what they should be, weighted so that squares add up to the loss."""
            space.write(at, work)
            found = [torch.cat(list(_outputs(objective, i))) for i in range(len(wanted))]
            return torch.cat([
                ((f - y) / (len(y) * len(wanted)) ** 0.5).reshape(-1).double()
                for f, y in zip(found, wanted, strict=True)
            ])  # fmt: skip

        r = residual(c)
        for step in range(schedule.steps):
            loss = check_finite(float(r @ r), step, schedule)
            history.append(loss)
            columns = []
            for k in range(c.numel()):
                moved = c.clone()
                moved.view(-1)[k] += h
                columns.append((residual(moved) - r) / h)
            change = _solve(torch.stack(columns, dim=1), r).reshape(c.shape)
            c, r, better = _halved(c, change, r, residual, schedule.clamp)
            report(step + 1, schedule.steps, f"loss {loss:.4g}")
            if not better:
                break
        history.append(check_finite(float(r @ r), schedule.steps, schedule))
        return space.learned(c, history, work)


def _outputs(objective: SuiteObjective, i: int) -> Iterator[Tensor]:
    task, rows = objective.tasks[i], objective.rows[i]
    x, _ = objective.sampling.draw(rows, task.name, 0)
    for start in range(0, len(x), task.batch):
        yield task.logits(objective.network, x[start : start + task.batch])


def _solve(J: Tensor, r: Tensor) -> Tensor:
    """``argmin |J d + r|^2`` with a little ridge, by the normal equations in float64."""
    A = J.T @ J
    A.diagonal().add_(RIDGE * float(A.diagonal().mean()) + torch.finfo(A.dtype).tiny)
    solved: Tensor = torch.linalg.solve(A, -(J.T @ r))
    return solved


def _halved(
    c: Tensor, change: Tensor, r: Tensor, residual: Callable[[Tensor], Tensor], clamp: bool
) -> tuple[Tensor, Tensor, bool]:
    """The longest of the steps 1, 1/2, ... that lowers the loss; where none does, nothing moves."""
    for k in range(HALVINGS):
        there = c + change * 0.5**k
        there = there.clamp(0.0, 1.0) if clamp else there
        found = residual(there)
        if float(found @ found) < float(r @ r):
            return there, found, True
    return c, r, False
