"""What the parts promise one another. The engine, the methods and io meet only through these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta

Grain = Literal["elements", "rows", "matrix", "tensor"]
"""The smallest piece a method may be given: single elements, blocks of rows, a whole matrix, or a whole tensor
together with facts about the rest of the model."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor, before anything is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors, read one at a time. Reading is pure: the same name gives the same bytes."""

    @property
    def reference(self) -> str: ...

    def names(self) -> Sequence[str]:
        """Tensor names in file-offset order."""
        ...

    def info(self, name: str) -> TensorInfo: ...

    def get(self, name: str) -> Tensor:
        """The tensor as stored (its own dtype and shape)."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` along the first dimension, as stored; a tensor without dimensions is one row."""
        ...

    def file_of(self, name: str) -> str:
        """The file that holds it, for error messages."""
        ...

    @property
    def ties(self) -> Mapping[str, str]:
        """alias -> the stored name whose storage it shares (tied weights are stored once)."""
        ...


class TensorSink(Protocol):
    """Where finished tensors go. Nothing appears under the final name before :meth:`commit`."""

    def put(self, name: str, value: Tensor) -> None: ...

    def commit(self) -> None: ...

    def abort(self) -> None: ...


class BlockMethod(Protocol):
    """A plain function of one block: ``method(block, **parameters) -> Delta`` (the merged delta)."""

    def __call__(self, block: Block, **parameters: Any) -> Delta: ...


S = TypeVar("S")
R = TypeVar("R")
L = TypeVar("L")


class Whole(Protocol):
    """Every row of one tensor, or of every tensor of a model, for a method that must see all before it changes any.

    ``whole(look)`` gives ``look(blocks)`` of each tensor, in the order of the names; ``blocks`` are its blocks of rows
    in order, as the second pass will be given them. It may be called as often as the method wants to look.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of any delta."""
        ...

    def __call__(self, look: Callable[[Iterable[Block]], L]) -> Iterator[L]: ...


Measure = Callable[..., Any]
"""The first pass of a merge method: ``measure(whole, **parameters)``, small statistics of the whole, found before any
part is merged. It is called with a :class:`Whole` and every parameter of the method. What it returns is handed to the
method as ``block.stats["measured"]``, and to other processes as an argument: numbers, lists and mappings of numbers."""


class TwoPassMethod(Protocol[S, R]):
    """A method that needs a small statistic of the whole block before it can finish any part of it.

    ``combine`` is associative, so that any split of the rows over any number of workers gives the same answer up
    to the order of float64 additions, which the engine fixes.
    """

    def start(self, block: Block) -> S: ...

    def update(self, state: S, part: Block) -> S: ...

    def combine(self, left: S, right: S) -> S: ...

    def solve(self, state: S) -> R: ...

    def apply(self, solution: R, part: Block) -> Mapping[str, Delta]: ...


class SequentialMethod(Protocol):
    """A method whose layer l needs the merged layers before it (RegMean++); driven in depth order by api."""

    def order(self, names: Sequence[str]) -> Sequence[str]: ...

    def step(self, block: Block, state: Any) -> tuple[Delta, Any]: ...


class Objective(Protocol):
    """A loss of a network, differentiated with respect to its weights.

    Gradients are handed over one tensor at a time, so that the gradient with respect to a coefficient is an inner
    product ``<dL/dW, Delta_t>`` and no sum of T copies of a model is ever built.
    """

    def weights(self) -> Mapping[str, Tensor]:
        """The network's own tensors by their names in the checkpoint. Whoever learns writes ``W(c)`` into them."""
        ...

    def loss(self, step: int) -> float:
        """The loss at the present weights, on the rows of ``step``."""
        ...

    def gradients(self, step: int, take: Callable[[str, Tensor], None]) -> float:
        """:meth:`loss`, and ``take(name, gradient)`` once for every tensor that it depends on, during the backward
        pass. The objective keeps no reference to a gradient that it has handed over."""
        ...
