"""Metrics of an evaluation, by name. Others are added with :func:`metric`, also from a suite's own Python file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor
from torch.nn import functional as F

from devec.core.errors import UsageError

PerRow = Callable[[Tensor, Tensor], Tensor]
"""(logits ``(rows, classes)``, labels ``(rows,)``) -> one number a row."""


@dataclass(frozen=True)
class Metric:
    """``per_row`` is averaged over the rows in float64, and ``finish`` makes the score of the mean.

    ``percent`` says that a score is shown in %, ``higher`` that more is better.
    """

    name: str
    per_row: PerRow
    higher: bool = True
    percent: bool = False
    finish: Callable[[float], float] = float


_metrics: dict[str, Metric] = {}


def metric(
    name: str, *, higher: bool = True, percent: bool = False, finish: Callable[[float], float] = float
) -> Callable[[PerRow], PerRow]:
    """Decorator: enter a function of (logits, labels) under ``name``; a later one of that name replaces it."""

    def enter(function: PerRow) -> PerRow:
        _metrics[name] = Metric(name, function, higher, percent, finish)
        return function

    return enter


def get_metric(name: str) -> Metric:
    """Raises UsageError (exit 2) for an unknown name, with what there is."""
    if name in _metrics:
        return _metrics[name]
    near = get_close_matches(name, _metrics, n=1)
    raise UsageError(
        f"no metric is called {name!r}",
        remedy=f"Did you mean {near[0]}?" if near else f"There is: {', '.join(sorted(_metrics))}.",
    )


@metric("accuracy", percent=True)
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit is the label's (the first of equal ones)."""
    return (logits.argmax(dim=1) == labels).double()


@metric("loss", higher=False)
def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


@metric("entropy", higher=False)
def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy of the softmax in nats; labels are not looked at."""
    return softmax_entropy(logits)


def softmax_entropy(logits: Tensor) -> Tensor:
    """``-sum_k p_k log p_k`` with ``p = softmax(logits)``, per row."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)
