"""Supervised coefficients on a model that fits in memory: one number per vector, or per vector and tensor.

``W(c) = W_0 + sum_t c_t Delta_t``, and ``c`` minimises a loss of ``W(c)`` (task arithmetic with learned coefficients;
AdaMerging, arXiv:2310.02575, with labels in place of entropy). With ``G = dL/dW`` the gradient is
``dL/dc_t = <G, Delta_t>``, so each step needs one merged copy and T inner products: no graph over T models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from devec.core.errors import IncompatibleError, UsageError
from devec.linalg.numerics import one_blas_thread

State = Mapping[str, Tensor]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


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
    init: float | Sequence[float] | Tensor = 0.3,
    per_tensor: bool = False,
) -> tuple[Tensor, list[float]]:
    """Minimise ``loss_fn(W(c))`` over ``c`` by ``steps`` steps of Adam; no randomness.

    ``loss_fn`` takes the merged tensors (those that some delta has) and returns a scalar. ``init`` is one number, or
    one per vector. Returns the coefficients in float64, shape ``(T,)`` or ``(T, tensors)`` in the order of
    :func:`tensor_names`, and the ``steps + 1`` losses, the first at ``init`` and the last at what is returned.

    Raises :class:`UsageError` if the loss is not finite on the way.
    """
    names = tensor_names(base, deltas)
    start = torch.as_tensor(init, dtype=torch.float64)
    if start.ndim > 1 or (start.ndim == 1 and len(start) != len(deltas)):
        raise UsageError(
            "as many starting coefficients as vectors are needed, or one for all",
            values={"vectors": len(deltas), "given": tuple(start.shape)},
        )
    c = start.expand(len(deltas)).clone()
    if per_tensor:
        c = c[:, None].repeat(1, len(names))
    mean, square = torch.zeros_like(c), torch.zeros_like(c)
    history: list[float] = []
    for step in range(1, steps + 1):
        with one_blas_thread():
            value, gradient = _loss_and_gradient(base, deltas, names, c, loss_fn)
        history.append(value)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient * gradient, 1 - BETAS[1])
        size = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        c -= lr * (mean / (1 - BETAS[0] ** step)) / size
    with torch.no_grad():
        history.append(_finite(float(loss_fn(merge(base, deltas, c)))))
    return c, history


def _loss_and_gradient(
    base: State, deltas: Sequence[State], names: list[str], c: Tensor, loss_fn: Callable[[State], Tensor]
) -> tuple[float, Tensor]:
    weights = {n: w.requires_grad_() for n, w in merge(base, deltas, c).items()}
    loss = loss_fn(weights)
    value = _finite(float(loss.detach()))
    slopes = torch.autograd.grad(loss, [weights[n] for n in names], allow_unused=True)
    inner = torch.zeros(len(deltas), len(names), dtype=torch.float64)
    for j, (name, slope) in enumerate(zip(names, slopes, strict=True)):
        if slope is None:  # the loss does not read this tensor
            continue
        flat = slope.flatten()
        for t, delta in enumerate(deltas):
            if name in delta:
                inner[t, j] = float(torch.dot(flat, delta[name].to(flat.dtype).flatten()))
    return value, inner if c.ndim == 2 else inner.sum(dim=1)


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise UsageError(
            "the loss is not finite while learning coefficients",
            values={"loss": value},
            remedy="Use a smaller learning rate or a start nearer to zero.",
        )
    return value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
