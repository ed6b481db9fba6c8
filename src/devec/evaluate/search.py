"""Coefficients without gradients: CMA-ES on the loss itself (Hansen, arXiv:1604.00772), by the package ``cma``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from devec.core.coefficients import CoefficientGrain
from devec.core.contracts import Objective
from devec.core.errors import InputError, UsageError
from devec.evaluate.learning import Learned, Report, Schedule, Space, Workers, check_finite
from devec.evaluate.linear_model import LinearModel
from devec.linalg.numerics import one_blas_thread

SIGMA = 0.1
"""Standard deviation of the first generation, where none is given: a third of AdaMerging's start."""


def search(
    objective: Objective,
    model: LinearModel,
    schedule: Schedule,
    *,
    grain: CoefficientGrain = "vector",
    sigma: float = SIGMA,
    seed: int = 0,
    workers: int = 1,
    report: Report = lambda done, total, loss: None,
) -> Learned:
    """``schedule.steps`` generations of CMA-ES from ``schedule.init``; the mean of the last distribution comes back.

    All candidates of a generation are scored on that generation's rows, so that they can be compared. Needs no backward
    pass, hence also losses that have none. ``schedule.clamp`` bounds the search to [0, 1]; rate, decay and clipping are
    Adam's and not used. ``history`` is the best loss of each generation.

    Guarantees the same bytes for the same seed, inputs and version of ``cma``, on any number of ``workers``. Raises
    InputError where ``cma`` is not installed, UsageError for fewer than two coefficients or a loss that is not finite.
    """
    try:
        import cma
    except ImportError:
        raise InputError("the search needs the package cma", remedy="Install it: pip install 'devec[cma]'.") from None
    if sigma <= 0.0:
        raise UsageError("a search begins with a deviation above 0", values={"lr": sigma})
    space = Space(objective, model, grain, schedule.clamp)
    start = space.start(schedule.init)
    if start.numel() < 2:
        raise UsageError("CMA-ES searches at least two coefficients", remedy="Use a finer --grain, or --search adam.")
    # To cma the seed 0 means the clock.
    choices: dict[str, Any] = {"seed": seed + 1, "verbose": -9, "maxiter": max(schedule.steps, 1)}
    if schedule.clamp:
        choices["bounds"] = [0.0, 1.0]
    strategy = cma.CMAEvolutionStrategy(start.reshape(-1).tolist(), sigma, choices)
    history: list[float] = []

    def as_c(x: object) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64).reshape(start.shape)

    with one_blas_thread(), Workers(workers) as work:
        for step in range(schedule.steps):
            candidates, losses = strategy.ask(), []
            for x in candidates:
                space.write(as_c(x), work)
                losses.append(check_finite(objective.loss(step), step, schedule))
            strategy.tell(candidates, losses)
            history.append(min(losses))
            report(step + 1, schedule.steps, f"loss {history[-1]:.4g}")
        c = as_c(strategy.result.xfavorite) if schedule.steps else start
        return space.learned(c, history, work)
