"""Losses that coefficients are learned on: softmax entropy of unlabelled rows, cross-entropy of labelled ones.

A step's rows are drawn by a seeded generator. The backward pass runs in pieces of a task's rows, so that activations of
one piece are held at a time; in the last one a hook hands each gradient over as soon as it is whole, and it is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from devec.core.errors import IncompatibleError, UsageError
from devec.evaluate.data import Rows, Split
from devec.evaluate.metrics import softmax_entropy
from devec.evaluate.network import Network, only
from devec.evaluate.scoring import Task
from devec.linalg.numerics import generator

Kind = Literal["entropy", "ce"]
Take = Callable[[str, Tensor], None]

PIECE = 8
"""Rows of one backward pass. A constant, because sums in other pieces round otherwise."""


@dataclass(frozen=True)
class Sampling:
    """``batch`` rows a task and step, without repeats inside a step, from ``split``; with ``shots``, from that many
    labelled rows a class (the same in every step)."""

    split: Split = "select"
    batch: int = 32
    shots: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.shots is not None and self.shots < 1):
            raise UsageError("a batch and shots are at least 1", values={"batch": self.batch, "shots": self.shots})

    def pool(self, task: Task) -> Rows:
        """The rows that steps draw from."""
        rows = task.data.split(self.split)
        if self.shots is None:
            return rows
        order = torch.randperm(len(rows), generator=generator("shots", self.seed, task.name))
        taken = [order[rows.y[order] == label][: self.shots] for label in sorted(set(rows.y.tolist()))]
        index = torch.cat(taken).sort().values
        return Rows(rows.x[index], rows.y[index], f"{len(index)} of {rows.words} ({self.shots} a class)")

    def draw(self, rows: Rows, task: str, step: int) -> tuple[Tensor, Tensor]:
        index = torch.randperm(len(rows), generator=generator("batch", self.seed, task, step))[: self.batch]
        return rows.x[index], rows.y[index]


class SuiteObjective:
    """The mean over tasks of the mean loss of a step's rows; a ``core.contracts.Objective``.

    ``entropy`` is AdaMerging's (arXiv:2310.02575): it sums over tasks and batches, which Adam does not see. ``ce`` is
    supervised. ``learned`` names the tensors that coefficients change; no others get gradients.
    """

    def __init__(
        self, network: Network, tasks: Sequence[Task], kind: Kind, sampling: Sampling, learned: Iterable[str]
    ) -> None:
        self.network, self.tasks, self.kind, self.sampling = network, list(tasks), kind, sampling
        self.rows = [sampling.pool(t) for t in self.tasks]
        only(network, learned)
        self._taker = _Taker(network.tensors)

    def weights(self) -> Mapping[str, Tensor]:
        return self.network.tensors

    def loss(self, step: int) -> float:
        with torch.no_grad():
            return sum(float(self._of_piece(i, x, y, share)) for i, x, y, share in self._pieces(step))

    def gradients(self, step: int, take: Take) -> float:
        total, pieces = 0.0, list(self._pieces(step))
        with self._taker.giving(take) as taker:
            for k, (i, x, y, share) in enumerate(pieces):
                taker.last = k + 1 == len(pieces)
                part = self._of_piece(i, x, y, share)
                total += float(part.detach())
                _backward(part, f"the loss of task {self.tasks[i].name}")
        return total

    def _pieces(self, step: int) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """(task, inputs, labels, the weight of one row in the loss)."""
        for i, (task, rows) in enumerate(zip(self.tasks, self.rows, strict=True)):
            x, y = self.sampling.draw(rows, task.name, step)
            for start in range(0, len(y), PIECE):
                yield i, x[start : start + PIECE], y[start : start + PIECE], 1.0 / (len(y) * len(self.tasks))

    def _of_piece(self, i: int, x: Tensor, y: Tensor, share: float) -> Tensor:
        task = self.tasks[i]
        logits = task.logits(self.network, x)
        if self.kind == "entropy":
            return softmax_entropy(logits).sum() * share
        task.check_labels(self.rows[i].y, logits.shape[1])
        return F.cross_entropy(logits, y, reduction="sum") * share


class FunctionObjective:
    """Any differentiable function of named tensors as an objective: ``function({name: tensor}, step) -> scalar``.

    ``like`` gives the tensors' names and shapes; they are written over.
    """

    def __init__(self, like: Mapping[str, Tensor], function: Callable[[Mapping[str, Tensor], int], Tensor]) -> None:
        self._weights = {n: torch.nn.Parameter(w.detach().clone()) for n, w in like.items()}
        self.function = function
        self._taker = _Taker(self._weights)

    def weights(self) -> Mapping[str, Tensor]:
        return self._weights

    def loss(self, step: int) -> float:
        with torch.no_grad():
            return float(self.function(self._weights, step))

    def gradients(self, step: int, take: Take) -> float:
        with self._taker.giving(take) as taker:
            taker.last = True
            loss = self.function(self._weights, step)
            _backward(loss, "the loss")
        return float(loss.detach())


def _backward(loss: Tensor, what: str) -> None:
    if not loss.requires_grad:
        raise IncompatibleError(
            f"{what} depends on no tensor that the vectors change", remedy="Do include and exclude leave the encoder?"
        )
    torch.autograd.backward(loss)


class _Taker:
    """Hands a parameter's gradient over when the last backward pass has completed it, and lets go of it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {n: t for n, t in tensors.items() if t.requires_grad}
        self.last = False
        self._take: Take | None = None
        self._hooks: list[RemovableHandle] = [
            t.register_post_accumulate_grad_hook(self._hook(n))  # type: ignore[no-untyped-call]
            for n, t in self.tensors.items()
        ]

    def giving(self, take: Take) -> _Taker:
        self._take, self.last = take, False
        return self

    def __enter__(self) -> _Taker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # what earlier tasks reached and the last did not
            for name, tensor in self.tensors.items():
                self._give(name, tensor)
        self._take, self.last = None, False  # another objective of the same network may come after this one
        for tensor in self.tensors.values():
            tensor.grad = None

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def done(tensor: Tensor) -> None:
            if self.last:
                self._give(name, tensor)

        return done

    def _give(self, name: str, tensor: Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None and self._take is not None:
            self._take(name, gradient)
