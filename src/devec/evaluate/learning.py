"""Learned coefficients: ``W(c) = W_0 + sum_t c_t Delta_t``, and ``c`` minimises a loss of ``W(c)``.

With ``G = dL/dW`` the gradient is ``dL/dc_t = <G, Delta_t>``: each step needs one merged copy, written in place, and T
inner products, tensor by tensor as the backward pass brings them (:mod:`devec.evaluate.linear_model`). No graph over T
models is built, and no part is made.

Published schedules: AdaMerging (arXiv:2310.02575) and aTLAS (arXiv:2407.02880); see :data:`SCHEDULES`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from devec.core.coefficients import CoefficientGrain, group_of
from devec.core.contracts import Objective
from devec.core.errors import IncompatibleError, UsageError
from devec.evaluate.linear_model import LinearModel
from devec.linalg.numerics import one_blas_thread


@dataclass(frozen=True)
class Schedule:
    """How coefficients are learned: Adam, with decoupled weight decay where it is not zero.

    ``init``   where every coefficient starts, or one number a vector
    ``clamp``  ``W(c)`` uses ``c`` cut to [0, 1], whose gradient outside is zero; otherwise ``c`` is signed and free
    ``clip``   largest norm of the gradient (0: none)
    """

    steps: int = 500
    lr: float = 1e-3
    init: float | tuple[float, ...] = 0.3
    clamp: bool = True
    weight_decay: float = 0.0
    clip: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        sound = self.steps >= 0 and self.lr > 0.0 and self.weight_decay >= 0.0 and self.clip >= 0.0
        starts = self.init if isinstance(self.init, tuple) else (self.init,)
        if not sound or not all(map(isfinite, (self.lr, *starts, self.weight_decay, self.clip))):
            raise UsageError(
                "steps and weight decay are at least 0, a learning rate is above 0, and all are finite",
                values={"steps": self.steps, "lr": self.lr, "init": self.init, "weight decay": self.weight_decay},
            )


ADAMERGING = Schedule()
"""AdaMerging's own values: Adam 1e-3, 500 steps, start 0.3, clamped to [0, 1] in the forward pass."""

ATLAS = Schedule(init=0.0, clamp=False, weight_decay=0.1, clip=1.0)
"""aTLAS's own values: AdamW 1e-3 (few-shot 1e-1), decay 0.1, gradient norm at most 1, start 0, signed. It trains 20
epochs of the smallest data set; here the number of steps is a number."""

OUTPUTS = Schedule(steps=5, clamp=False)
"""Of least squares on outputs: a few Gauss-Newton steps, of which the first does most."""

SCHEDULES = {"entropy": ADAMERGING, "ce": ATLAS, "outputs": OUTPUTS}
FEW_SHOT_RATE = 1e-1


@dataclass(frozen=True)
class Learned:
    """``values`` float64 ``(T, groups)`` as ``W(c)`` uses them (cut to [0, 1] if clamped), ``groups`` what their
    columns are of, ``column`` each tensor's; ``history`` the loss before each step on that step's rows."""

    values: Tensor
    groups: tuple[str, ...]
    column: Mapping[str, int]
    history: tuple[float, ...]


Report = Callable[[int, int, str], None]


def learn(
    objective: Objective,
    model: LinearModel,
    schedule: Schedule = ADAMERGING,
    *,
    grain: CoefficientGrain = "vector",
    workers: int = 1,
    report: Report = lambda done, total, loss: None,
) -> Learned:
    """Minimise ``objective`` over the coefficients of ``model``, and leave the objective's weights at the result.

    Math        dL/dc_{t,g} = sum over tensors of group g of <dL/dW, Delta_t>; Adam on c in float64
    Shapes      T vectors, G groups (1, layers or tensors) -> c of shape (T, G)
    Guarantees  the same bytes for the same inputs and any number of ``workers``; clamped coefficients have zero
                gradient outside [0, 1]; memory is W(c), the factors, and gradients in flight: no T copies
    Numerics    W(c) and inner products in the model's dtype, sums over blocks and tensors in float64
    Raises      IncompatibleError: a changed tensor that the network lacks or holds in another shape; UsageError: a
                loss that is not finite
    """
    space = Space(objective, model, grain, schedule.clamp)
    c = space.start(schedule.init)
    optimiser = _Adam(c, schedule)
    history: list[float] = []
    with one_blas_thread(), Workers(workers) as work:
        for step in range(schedule.steps):
            space.write(c, work)
            found: dict[str, Future[Tensor]] = {}

            def take(name: str, gradient: Tensor, found: dict[str, Future[Tensor]] = found) -> None:
                if name in space.column:
                    found[name] = work.submit(model.inner, name, gradient)

            loss = check_finite(objective.gradients(step, take), step, schedule)
            history.append(loss)
            gradient = torch.zeros_like(c)
            for name in model.names:  # in the order of the names: sums do not depend on who finished first
                if name in found:
                    gradient[:, space.column[name]] += found[name].result()
            if schedule.clamp:
                gradient *= (c >= 0.0) & (c <= 1.0)
            optimiser.step(gradient)
            report(step + 1, schedule.steps, f"loss {loss:.4g}")
        return space.learned(c, history, work)


class Space:
    """Which coefficient each tensor takes, and the way from coefficients to the objective's weights.

    Raises IncompatibleError where the network lacks a changed tensor, or holds it in another shape or dtype.
    """

    def __init__(self, objective: Objective, model: LinearModel, grain: CoefficientGrain, clamp: bool) -> None:
        self.model, self.clamp = model, clamp
        self.weights = _checked(objective.weights(), model)
        of = group_of(grain)
        self.groups = tuple(dict.fromkeys(of(n) for n in model.names))
        self.column = {n: self.groups.index(of(n)) for n in model.names}

    def start(self, value: float | tuple[float, ...]) -> Tensor:
        """The first coefficients: one number for all, or one a vector (UsageError for any other count)."""
        given, count = torch.as_tensor(value, dtype=torch.float64).reshape(-1), self.model.vectors
        if len(given) not in (1, count):
            raise UsageError(
                "as many starting coefficients as vectors are needed, or one for all",
                values={"vectors": count, "given": len(given)},
            )
        return given.expand(count)[:, None].repeat(1, len(self.groups))

    def used(self, c: Tensor) -> Tensor:
        return c.clamp(0.0, 1.0) if self.clamp else c

    def write(self, c: Tensor, work: Workers) -> None:
        """``W(c)`` into the objective's weights."""
        used = self.used(c)
        work.all(lambda n: self.model.write(n, used[:, self.column[n]], self.weights[n]), self.model.names)

    def learned(self, c: Tensor, history: Sequence[float], work: Workers) -> Learned:
        self.write(c, work)
        return Learned(self.used(c), self.groups, self.column, tuple(history))


def _checked(weights: Mapping[str, Tensor], model: LinearModel) -> Mapping[str, Tensor]:
    for name in model.names:
        if name not in weights:
            raise IncompatibleError(
                "the vectors change a tensor that the network does not have", tensor=name,
                values={"network's first": next(iter(weights), "none")},
                remedy="Leave it out with exclude in the recipe, or give the network that the weights belong to.",
            )
        there, here = tuple(weights[name].shape), tuple(model.base.info(name).shape)
        if there != here:
            raise IncompatibleError(
                "a tensor has another shape in the network", tensor=name, values={"network": there, "base": here}
            )
        if weights[name].dtype != model.dtype:
            raise IncompatibleError(
                "the network computes in another dtype than the merge", tensor=name,
                values={"network": weights[name].dtype, "merge": model.dtype},
            )
    return weights


def check_finite(loss: float, step: int, schedule: Schedule) -> float:
    """The loss. Raises UsageError if it is not finite."""
    if not isfinite(loss):
        raise UsageError(
            "the loss is not finite while learning coefficients",
            values={"loss": loss, "step": step, "learning rate": schedule.lr},
            remedy="Use a smaller learning rate or a start nearer to zero.",
        )
    return loss


class _Adam:
    """Adam on a float64 tensor, in place (arXiv:1412.6980), with decoupled decay (arXiv:1711.05101)."""

    def __init__(self, c: Tensor, schedule: Schedule) -> None:
        self.c, self.schedule, self.count = c, schedule, 0
        self.mean, self.square = torch.zeros_like(c), torch.zeros_like(c)

    def step(self, gradient: Tensor) -> None:
        s, self.count = self.schedule, self.count + 1
        norm = float(torch.linalg.vector_norm(gradient))
        if s.clip and norm > s.clip:
            gradient = gradient * (s.clip / norm)
        self.c.mul_(1.0 - s.lr * s.weight_decay)
        self.mean.lerp_(gradient, 1.0 - s.betas[0])
        self.square.lerp_(gradient * gradient, 1.0 - s.betas[1])
        size = self.square.sqrt() / sqrt(1.0 - s.betas[1] ** self.count) + s.epsilon
        self.c.sub_(s.lr / (1.0 - s.betas[0] ** self.count) * self.mean / size)


class Workers:
    """Work on tensors: at once with one worker, on threads with more, of which a bounded number waits."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="devec-learn") if count > 1 else None
        self._waiting: deque[Future[Tensor]] = deque()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def all(self, function: Callable[[str], None], names: Sequence[str]) -> None:
        for _ in map(function, names) if self._pool is None else self._pool.map(function, names):
            pass

    def submit(self, function: Callable[[str, Tensor], Tensor], name: str, gradient: Tensor) -> Future[Tensor]:
        """Waits while more than two gradients a worker are held: a backward pass may be faster than the products."""
        if self._pool is None:
            done: Future[Tensor] = Future()
            done.set_result(function(name, gradient))
            return done
        while len(self._waiting) >= 2 * self.count:
            self._waiting.popleft().result()
        future = self._pool.submit(function, name, gradient)
        self._waiting.append(future)
        return future
