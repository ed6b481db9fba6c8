"""Supervised coefficients over state dicts in memory: one number per vector, or per vector and tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.delta import DenseDelta
from devec.core.errors import IncompatibleError
from devec.evaluate.learning import Schedule, check_finite, learn
from devec.evaluate.linear_model import LinearModel
from devec.evaluate.objectives import FunctionObjective
from devec.linalg.numerics import one_blas_thread

State = Mapping[str, Tensor]


def merge(base: State, deltas: Sequence[State], coefficients: Tensor) -> dict[str, Tensor]:
    """``W_0 + sum_t c_t Delta_t`` for every tensor that some delta has; computed in float32 or wider.

    ``coefficients`` has shape ``(T,)``, or ``(T, tensors)`` with tensors in the order of :func:`tensor_names`.
    """
    names = tensor_names(base, deltas)
    merged = {}
    for j, name in enumerate(names):
        total = base[name].detach().to(_wide(base[name].dtype), copy=True)
        for t, delta in enumerate(deltas):
            if name in delta:
                c = coefficients[t] if coefficients.ndim == 1 else coefficients[t, j]
                total.add_(delta[name].to(total.dtype), alpha=float(c))
        merged[name] = total
    return merged


def tensor_names(base: State, deltas: Sequence[State]) -> list[str]:
    """Every tensor that some delta has, in the order of the base; shapes are checked."""
    for t, delta in enumerate(deltas):
        for name, value in delta.items():
            if name not in base:
                raise IncompatibleError("a delta has a tensor that the base lacks", tensor=name, values={"delta": t})
            if value.shape != base[name].shape:
                raise IncompatibleError(
                    "a delta does not fit the base",
                    tensor=name,
                    values={"base": tuple(base[name].shape), f"delta {t}": tuple(value.shape)},
                )
    return [name for name in base if any(name in delta for delta in deltas)]


def learn_coefficients(
    base: State,
    deltas: Sequence[State],
    loss_fn: Callable[[State], Tensor],
    steps: int = 40,
    lr: float = 0.05,
    init: float | Sequence[float] = 0.3,
    per_tensor: bool = False,
) -> tuple[Tensor, list[float]]:
    """Minimise ``loss_fn(W(c))`` over signed ``c`` by ``steps`` steps of Adam (:func:`~devec.evaluate.learning.learn`).

    ``loss_fn`` takes the merged tensors (those that some delta has) and returns a scalar. ``init`` is one number, or
    one per vector. Returns the coefficients in float64, shape ``(T,)`` or ``(T, tensors)`` in the order of
    :func:`tensor_names`, and the ``steps + 1`` losses, the first at ``init`` and the last at what is returned.

    Raises :class:`UsageError` if the loss is not finite on the way.
    """
    names = tensor_names(base, deltas)
    dtype = torch.float64 if any(base[n].dtype == torch.float64 for n in names) else torch.float32
    changes = {n: [(t, DenseDelta(_rows(d[n]))) for t, d in enumerate(deltas) if n in d] for n in names}
    model = LinearModel.of(_InMemory(base), changes, len(deltas), dtype)
    objective = FunctionObjective({n: base[n].to(dtype) for n in names}, lambda weights, step: loss_fn(weights))
    start = tuple(map(float, init)) if isinstance(init, Sequence) else float(init)
    schedule = Schedule(steps=steps, lr=lr, init=start, clamp=False)
    found = learn(objective, model, schedule, grain="tensor" if per_tensor else "vector")
    with one_blas_thread():
        last = check_finite(objective.loss(steps), steps, schedule)
    return (found.values if per_tensor else found.values[:, 0]), [*found.history, last]


@dataclass(frozen=True)
class _InMemory:
    """A state dict as the ``core.contracts.TensorSource`` that it is."""

    tensors: State
    reference: str = "memory"
    ties: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def get(self, name: str) -> Tensor:
        return self.tensors[name].detach()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return _rows(self.get(name))[start:stop].reshape(stop - start, *self.info(name).shape[1:])

    def file_of(self, name: str) -> str:
        return self.reference


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(tensor.shape[0] if tensor.ndim else 1, -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
