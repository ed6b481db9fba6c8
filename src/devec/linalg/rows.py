"""Large matrices seen block of rows by block of rows: they are factored without being in memory.

A factorisation asks little of a matrix: products ``W X`` and ``W^T Y`` with thin panels, the Gram matrix of its short
side, its largest entry and its norm. :class:`ByRows` makes each of these in one pass over the rows (the Gram matrix of
a wide file in several), from a file or from memory, in the same blocks and so to the same byte.

Matrices with more than ``LARGE`` entries are always factored this way, wherever they lie. The size decides and not the
memory that is free, because sums over blocks round otherwise than one product does: the result of a run then depends on
no budget and on no number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from devec.linalg.numerics import CORE, NonFiniteError

LARGE = 1 << 24
"""Entries (64 MiB in float32, 4096 x 4096) up to which a matrix is factored whole: most matrices of a model, and small
beside what else a process holds."""

UNIT = 1 << 18
"""Entries that are read at once (see ``core.lazy``)."""

UNITS = 8
"""Reads that make one block of a product, 2^21 entries or 8 MiB: products with such blocks are as fast as with the
whole matrix (32768 x 2048 by 96 columns: 0.20 s either way)."""

HELD = 1 << 24
"""Entries of a wide matrix that are held while the rows after them are read for the Gram matrix."""

WIDENED = 1 << 20
"""Entries of a block that are in float64 at one time."""


def is_large(n: int, m: int) -> bool:
    """Whether an ``n x m`` matrix in float32 is factored by blocks of rows."""
    return n * m > LARGE


def block_of(columns: int) -> int:
    """Rows of a file with so many columns that make one block."""
    return UNITS * max(UNIT // max(columns, 1), 1)


def group_of(columns: int) -> int:
    """Rows that are held at once for the Gram matrix of a wide file: whole blocks, at least one."""
    step = block_of(columns)
    return step * max(HELD // (step * max(columns, 1)), 1)


def buffers(rows: int, columns: int) -> int:
    """Bytes of blocks in any pass over a matrix that lies as ``rows x columns``: the block and its scaled copy, what
    one read of it makes, its part in float64, and for a wide one the rows held for the Gram matrix."""
    block = min(block_of(columns), rows) * columns
    held = min(group_of(columns), rows) * columns if columns > rows else 0
    return 4 * (2 * block + 4 * max(UNIT, columns) + held) + 8 * max(WIDENED, columns)


@dataclass(frozen=True)
class ByRows:
    """An ``n x m`` float32 matrix ``F / scale``, or with ``transposed`` ``F^T / scale``; F is read by rows.

    ``read(start, stop)`` gives rows of F in any float dtype. It must be pure, and is called with multiples of
    :func:`block_of` rows. Stands where a factorisation expects a tensor: ``shape``, ``T`` and ``@`` with a thin panel.
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]
    transposed: bool = False
    scale: float = 1.0
    dtype = torch.float32
    device = torch.device("cpu")

    @classmethod
    def of(cls, W: Tensor) -> ByRows:
        """A matrix in memory, by the rows of its storage."""
        transposed = not W.is_contiguous() and W.T.is_contiguous()
        F = W.T if transposed else W
        return cls((W.shape[0], W.shape[1]), lambda start, stop: F[start:stop], transposed)

    @property
    def T(self) -> ByRows:
        return replace(self, shape=(self.shape[1], self.shape[0]), transposed=not self.transposed)

    @property
    def filed(self) -> tuple[int, int]:
        """The shape of F."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def divided(self, scale: float) -> ByRows:
        """The matrix over a further ``scale``, a power of two."""
        return replace(self, scale=self.scale * scale)

    def blocks(self, first: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, those rows of ``F / scale``) from row ``first`` on, in order. Not to be written into."""
        rows, columns = self.filed
        step = block_of(columns)
        for start in range(first, rows, step):
            stop = min(start + step, rows)
            part = self.read(start, stop).to(self.dtype)
            yield start, stop, part if self.scale == 1.0 else part / self.scale

    def __matmul__(self, X: Tensor) -> Tensor:
        """``W X``, one pass."""
        rows, columns = self.filed
        if self.transposed:
            out = torch.zeros(columns, X.shape[1], dtype=self.dtype)
            for start, stop, part in self.blocks():
                out.addmm_(part.T, X[start:stop])
            return out
        out = torch.empty(rows, X.shape[1], dtype=self.dtype)
        for start, stop, part in self.blocks():
            torch.mm(part, X, out=out[start:stop])
        return out

    def measure(self) -> tuple[float, float]:
        """``max |w|`` and ``|W|_F`` (summed in float64), one pass. NonFiniteError counts what is NaN or infinite."""
        top, square, bad = 0.0, torch.zeros((), dtype=CORE), 0
        for _, _, part in self.blocks():
            low, high = torch.aminmax(part)
            here = max(abs(float(low)), abs(float(high)))
            if not here < float("inf"):
                bad += int((~torch.isfinite(part)).sum())
                continue
            top = max(top, here)
            flat, step = part.reshape(-1), WIDENED // 4
            for at in range(0, flat.numel(), step):
                wide = flat[at : at + step].to(CORE)
                square += torch.dot(wide, wide)
        if bad:
            raise NonFiniteError(f"{bad} of {self.shape[0] * self.shape[1]} entries are NaN or infinite")
        return top, sqrt(float(square))

    def gram(self) -> Tensor:
        """The Gram matrix of the short side in float64.

        ``F^T F`` of a tall file is one pass. ``F F^T`` of a wide one holds ``HELD`` entries of it and reads the rows
        after them: ``(g + 1)/2`` passes for ``g = n m / HELD`` (rounded up).
        """
        rows, columns = self.filed
        short = min(rows, columns)
        G = torch.zeros(short, short, dtype=CORE)
        if columns <= rows:
            for _, _, part in self.blocks():
                step = max(WIDENED // max(columns, 1), 1)
                for at in range(0, part.shape[0], step):
                    wide = part[at : at + step].to(CORE)
                    G.addmm_(wide.T, wide)
            return G
        for first in range(0, rows, group_of(columns)):
            last = min(first + group_of(columns), rows)
            held = torch.empty(last - first, columns, dtype=self.dtype)
            for start, stop, part in self.blocks(first):
                if start < last:
                    held[start - first : stop - first] = part
                here = held[: min(stop, last) - first]
                found = G[first : first + here.shape[0], start:stop]
                _add_products(found, here, part)
                G[start:stop, first : first + here.shape[0]] = found.T.clone()  # the two may overlap
        return G


def _add_products(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left right^T`` in float64, a few columns at a time."""
    step = max(WIDENED // max(left.shape[0] + right.shape[0], 1), 1)
    for at in range(0, left.shape[1], step):
        out.addmm_(left[:, at : at + step].to(CORE), right[:, at : at + step].to(CORE).T)
