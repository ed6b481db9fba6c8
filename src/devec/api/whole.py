"""The first pass of a merge: a method looks at all of a tensor, or of a model, before any part of it is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.lazy import row_blocks
from devec.core.vectors import Pool
from devec.engine.threads import default_workers, in_order
from devec.linalg.numerics import one_blas_thread
from devec.methods.registry import Method

L = TypeVar("L")


@dataclass(frozen=True)
class WholeTensor:
    """One tensor, as it lies in its file, in the blocks of rows in which it will be merged."""

    block: Block

    @property
    def dtype(self) -> torch.dtype:
        return self.block.dtype

    def parts(self) -> Iterator[Block]:
        for start, stop in row_blocks(self.block.layout.matrix_shape):
            yield self.block.rows(start, stop)

    def __call__(self, look: Callable[[Iterable[Block]], L]) -> Iterator[L]:
        yield look(self.parts())


@dataclass(frozen=True)
class WholeModel:
    """Every tensor of a pool, several at once on threads; what was found comes in the order of the names."""

    pool: Pool
    method: Method
    parameters: Mapping[str, Any]
    workers: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (self.pool.block(n).dtype for n in self.pool.tensors()))

    def __call__(self, look: Callable[[Iterable[Block]], L]) -> Iterator[L]:
        def one(name: str) -> L:
            return look(parts_of(self.method, self.pool.block(name), self.parameters))

        return in_order(one, self.pool.tensors(), self.workers or default_workers())


def by_blocks(method: Method, block: Block, parameters: Mapping[str, Any]) -> bool:
    """Whether the method is given blocks of rows: its grain allows it, and the result is a full matrix.

    A method of elements does not care which way a matrix lies, so blocks follow the file; one of rows does. To it a
    1-D parameter is one row.
    """
    grain = method.grain_with(parameters)
    rows = grain == "rows" and not block.layout.transposed and not block.layout.is_vector
    return grain == "elements" or rows


def parts_of(method: Method, block: Block, parameters: Mapping[str, Any]) -> Iterable[Block]:
    """What the method is given of a tensor, in order."""
    return WholeTensor(block.in_file()).parts() if by_blocks(method, block, parameters) else [block]


def find(method: Method, whole: Whole, parameters: Mapping[str, Any]) -> Any:
    """What the first pass finds; the same bytes from any number of threads."""
    assert method.measure is not None
    with one_blas_thread():
        return method.measure(whole, **method.filled(parameters))
