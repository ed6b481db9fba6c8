"""Seeded noise that can be entered anywhere, and low-rank signals whose product is exact: what generated models are
made of.

Noise is the product of two windows, drawn per block of 2^15 elements, into one pool of 2^20 normal numbers and one of
2^20 signs. 2^40 pairs of windows stand for as many different blocks, and the signs take away what two windows into one
pool would have in common: singular values follow the Marchenko-Pastur law of true white noise.

A signal's factors are whole numbers, small enough that every partial sum of their product is below 2^24 and therefore
exact in float32. The product is then the same for any split of the rows and any number of BLAS threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from devec.linalg.numerics import generator

POOL = 1 << 20
"""Numbers in each pool: 8 MB for both, which stay in the last-level cache while blocks are made from them."""

BLOCK = 1 << 15
"""Elements made from one pair of windows: so many that what Python does per block does not show."""

LIMIT = 5.0
"""Noise beyond so many standard deviations is cut (one number in two million), which bounds the signal."""

RIGHT_SCALE = 64.0
"""Standard deviation of the right factors' whole numbers; the left factors take what 2^24 leaves."""

Key = tuple[Any, ...]
"""What a stream of noise depends on; the first entry is the seed of the pools."""


@lru_cache(maxsize=4)
def _pools(seed: int) -> tuple[Tensor, Tensor]:
    """Normal numbers, none of them zero or beyond the limit, and signs."""
    gen = generator("generated model", "pools", seed)
    numbers = torch.randn(POOL, generator=gen).clamp_(-LIMIT, LIMIT)
    numbers[numbers == 0.0] = 2.0**-20  # the Box-Muller transform gives a zero once in 2^24 draws
    signs = torch.randint(2, (POOL,), generator=gen, dtype=torch.float32).mul_(2.0).sub_(1.0)
    return numbers, signs


class Noise:
    """Elements [start, stop) of the endless stream of standard normal numbers that belongs to ``key``."""

    def __init__(self, key: Key, start: int, stop: int) -> None:
        self._numbers, self._signs = _pools(key[0])
        self._first = start // BLOCK
        # Drawn from block 0 on, so that a block's windows depend on nothing but its place.
        windows = torch.randint(POOL - BLOCK, (-(-stop // BLOCK), 2), generator=generator("generated model", *key))
        self._windows = windows[self._first :].tolist()

    def fill(self, out: Tensor, start: int) -> None:
        """Write elements [start, start + len(out)) into a 1-D float32 tensor."""
        stop = start + out.numel()
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            a, b = self._windows[block - self._first]
            low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
            here, there = low - block * BLOCK, high - block * BLOCK
            numbers, signs = self._numbers[a + here : a + there], self._signs[b + here : b + there]
            torch.mul(numbers, signs, out=out[low - start : high - start])


def normal(key: Key, start: int, stop: int, width: int) -> Tensor:
    """Rows [start, stop) of a tall matrix of standard normal numbers."""
    out = torch.empty(stop - start, width)
    Noise(key, start * width, stop * width).fill(out.view(-1), start * width)
    return out


def left_scale(rank: int, decay: float) -> float:
    """Standard deviation of the first of ``rank`` left columns that fall off as ``j^-decay``: the largest one with
    ``max |right| sum_j max |left_j| < 2^24``."""
    room = 2**24 / (LIMIT * RIGHT_SCALE + 1) - rank  # 1 and ``rank``: what rounding may add to the factors
    total = sum(j**-decay for j in range(1, rank + 1))
    return float(room / (LIMIT * total))


@dataclass(frozen=True)
class Factor:
    """One side of a signal, by rows: columns of whole numbers, those at ``common`` drawn for the group."""

    own: Key
    group: Key
    scales: list[float]
    common: list[int]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): ``(stop - start, rank)``."""
        columns = normal(self.own, start, stop, len(self.scales))
        if self.common:
            columns[:, self.common] = normal(self.group, start, stop, len(self.common))
        return columns.mul_(torch.tensor(self.scales)).round_()


@dataclass(frozen=True)
class Signal:
    """``unit * left @ right``, by rows."""

    left: Factor
    right: Tensor
    unit: float

    def rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows [start, stop), written into ``out``."""
        return torch.mm(self.left.rows(start, stop), self.right, out=out).mul_(self.unit)
