"""Scores of a network on the tasks of a suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from devec.core.errors import IncompatibleError
from devec.evaluate.data import Split, TaskData
from devec.evaluate.metrics import Metric
from devec.evaluate.network import Network
from devec.linalg.numerics import one_blas_thread


@dataclass(frozen=True)
class Head:
    """A frozen classifier: ``scale * f W^T + b``; with ``cosine`` on features of norm 1."""

    weight: Tensor
    bias: Tensor | None = None
    cosine: bool = False
    scale: float = 1.0

    def __call__(self, features: Tensor, task: str) -> Tensor:
        if self.weight.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise IncompatibleError(
                f"the head of task {task} does not fit the network's features",
                values={"head": tuple(self.weight.shape), "features": tuple(features.shape)},
            )
        f = F.normalize(features, dim=1) if self.cosine else features
        return F.linear(f * self.scale, self.weight.to(f.dtype), None if self.bias is None else self.bias.to(f.dtype))


@dataclass(frozen=True)
class Task:
    """A task's rows, its head (``None``: the network gives logits), and how many rows are scored at once."""

    data: TaskData
    head: Head | None = None
    batch: int = 128

    @property
    def name(self) -> str:
        return self.data.name

    def logits(self, network: Network, x: Tensor) -> Tensor:
        """Differentiable; ``x`` are stored rows."""
        inputs = self.data.inputs(x)
        if inputs.is_floating_point():
            inputs = inputs.to(next((t.dtype for t in network.tensors.values()), inputs.dtype))
        out = network(inputs, self.name)
        return out if self.head is None else self.head(out, self.name)

    def check_labels(self, labels: Tensor, classes: int) -> None:
        """Raises IncompatibleError (exit 4) for a label that the classifier does not have."""
        if len(labels) and int(labels.max()) >= classes:
            raise IncompatibleError(
                f"task {self.name} has a label that its classifier does not",
                values={"largest label": int(labels.max()), "classes": f"{classes} (labels 0 to {classes - 1})"},
                file=self.data.file, remedy="Give the head that belongs to the data.",
            )


@dataclass(frozen=True)
class Scores:
    """``per_task[task][metric]``; ``rows`` says which rows they are of."""

    split: Split
    per_task: dict[str, dict[str, float]]
    rows: dict[str, str]

    @property
    def mean(self) -> dict[str, float]:
        """Each metric's mean over the tasks."""
        names = next(iter(self.per_task.values()))
        return {m: sum(s[m] for s in self.per_task.values()) / len(self.per_task) for m in names}

    def as_dict(self) -> dict[str, Any]:
        return {"split": self.split, "tasks": self.per_task, "mean": self.mean, "rows": self.rows}


def score(
    network: Network, tasks: Sequence[Task], metrics: Sequence[Metric], split: Split = "test",
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Scores:
    """Every metric on every task, on one BLAS thread: the same numbers on every machine of one kind."""
    found: dict[str, dict[str, float]] = {}
    with one_blas_thread(), torch.no_grad():
        for i, task in enumerate(tasks):
            rows = task.data.split(split)
            totals = dict.fromkeys((m.name for m in metrics), 0.0)
            for x, y in _batches(rows.x, rows.y, task.batch):
                logits = task.logits(network, x)
                task.check_labels(rows.y, logits.shape[1])
                for m in metrics:
                    totals[m.name] += float(m.per_row(logits, y).double().sum())
            found[task.name] = {m.name: m.finish(totals[m.name] / len(rows)) for m in metrics}
            report(i + 1, len(tasks), task.name)
    return Scores(split, found, {t.name: t.data.split(split).words for t in tasks})


def _batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(y), size):
        yield x[start : start + size], y[start : start + size]
