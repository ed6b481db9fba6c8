"""Dense deltas that are computed when they are asked for, whole or block of rows by block of rows.

A model is larger than memory and so may be one of its tensors. ``LazyDelta`` knows its shape and how to make any of
its rows; elementwise arithmetic and projections on it stay lazy, everything else makes the matrix first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from devec.core.delta import Delta, DenseDelta, LowRankDelta, same_shape

V = TypeVar("V")

BLOCK = 1 << 18
"""Elements in a block of rows. A constant, because a product of factors may round otherwise in blocks of another size.
In float32 half a megabyte: a sum of several models stays in the processor's cache, and the allocator hands out the same
memory again instead of asking the system for it (at 1 MB and more a sum of four bf16 models took 2.7 times as long)."""


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows (along the first dimension) of a tensor of this shape that make one block; at least one."""
    return max(BLOCK // max(prod(shape[1:]), 1), 1)


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block of a tensor, in order. A tensor without dimensions counts as one row."""
    rows = shape[0] if shape else 1
    step = block_rows(shape)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class LazyDelta(Delta):
    """``read(start, stop)`` gives those rows of the matrix as it lies in its file; nothing is kept.

    ``shape`` is that of the matrix ``out x in``; with ``transposed`` the file holds its transpose, and rows of the
    file are columns of the matrix. ``read`` must be pure: the same rows, the same bytes, from any thread.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, read: Callable[[int, int], Tensor], *,
        transposed: bool = False,
    ) -> None:
        self._shape, self._dtype, self._read, self.transposed = shape, dtype, read, transposed

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def rank_bound(self) -> int:
        return min(self._shape)

    @property
    def _filed(self) -> tuple[int, int]:
        return (self._shape[1], self._shape[0]) if self.transposed else self._shape

    def dense(self) -> Tensor:
        filed = self._filed
        out = torch.empty(filed, dtype=self._dtype)
        for start, stop in row_blocks(filed):
            out[start:stop] = self._read(start, stop)
        return out.T if self.transposed else out

    def whole(self) -> DenseDelta:
        """The matrix, made once, so that several looks at it read nothing again."""
        return DenseDelta(self.dense())

    def rows(self, start: int, stop: int) -> DenseDelta:
        if self.transposed:
            return DenseDelta(self.dense()[start:stop])
        return DenseDelta(self._read(start, stop))

    def transpose(self) -> LazyDelta:
        return LazyDelta((self._shape[1], self._shape[0]), self._dtype, self._read, transposed=not self.transposed)

    def scale(self, factor: float) -> LazyDelta:
        return self._map(lambda x: x * factor, self._dtype)

    def to(self, dtype: torch.dtype) -> LazyDelta:
        return self if dtype == self._dtype else self._map(lambda x: x.to(dtype), dtype)

    def _map(self, f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> LazyDelta:
        read = self._read
        return LazyDelta(self._shape, dtype, lambda a, b: f(read(a, b)), transposed=self.transposed)

    def add(self, other: Delta) -> LazyDelta:
        same_shape(self, other)
        read, there = self._read, in_file(other, self.transposed)
        dtype = torch.promote_types(self._dtype, other.dtype)
        return LazyDelta(
            self._shape, dtype, lambda a, b: read(a, b) + there.rows(a, b).dense(), transposed=self.transposed
        )

    def norm(self) -> float:
        return self.whole().norm()

    def on(self, device: torch.device) -> Delta:
        return self if device.type == "cpu" else DenseDelta(self.dense().to(device))

    def project(self, basis: Tensor) -> LowRankDelta:
        Z, core = self._onto(basis)
        return LowRankDelta(Z, core())

    def residual(self, basis: Tensor) -> LazyDelta:
        """``W - Z Z^T W`` by rows; where the file holds ``W``, ``Z^T W`` is summed first, over the same blocks."""
        Z, core = self._onto(basis)
        read, dtype = self._read, torch.promote_types(self._dtype, Z.dtype)
        if self.transposed:  # the file's rows are columns of W, each with a projection of its own
            return LazyDelta(
                self._shape, dtype, lambda a, b: _alone(read(a, b).to(dtype), Z), transposed=True
            )
        return LazyDelta(self._shape, dtype, lambda a, b: _without(read(a, b).to(dtype), Z[a:b], core()))

    def _onto(self, basis: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """The basis in the wider dtype, and ``Z^T W``, which is made once, when it is first asked for."""
        Z = basis.to(torch.promote_types(basis.dtype, self._dtype))
        return Z, once(lambda: self._core(Z))

    def _core(self, Z: Tensor) -> Tensor:
        if self.transposed:
            columns = [(self._read(a, b).to(Z.dtype) @ Z).T for a, b in row_blocks(self._filed)]
            return torch.cat([Z.new_zeros(Z.shape[1], 0), *columns], dim=1)
        out = torch.zeros(Z.shape[1], self._shape[1], dtype=Z.dtype)
        for a, b in row_blocks(self._filed):
            out.addmm_(Z[a:b].T, self._read(a, b).to(Z.dtype))
        return out


def _alone(rows: Tensor, Z: Tensor) -> Tensor:
    return _without(rows, rows @ Z, Z.T)


def _without(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.addmm(rows, left, right, alpha=-1.0)


def once(make: Callable[[], V]) -> Callable[[], V]:
    """``make``, run when it is first asked for and not again; other threads wait for it. An error is not kept."""
    lock, made = Lock(), list[V]()

    def get() -> V:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


def in_file(delta: Delta, transposed: bool) -> Delta:
    """The delta in the orientation of its file, whose rows are then the file's rows."""
    return delta.transpose() if transposed else delta


def is_dense(delta: Delta | None) -> bool:
    """Whether the delta is (or will be) a full matrix."""
    return isinstance(delta, (DenseDelta, LazyDelta))
