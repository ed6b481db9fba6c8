"""Random numbers that are a function of where they are used: the same for any split, order and number of workers.

A counter-based generator: entry (i, j) of a matrix gets the SplitMix64 finaliser of its position and a key. No state
is drawn from, so any rows can be made alone.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_of(*parts: object) -> int:
    """64 bits of the SHA-256 of ``parts``; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def uniform(key: int, rows: int, columns: int, first_row: int = 0, *, flipped: bool = False) -> Tensor:
    """``(rows, columns)`` float64 in [0, 1), multiples of 2^-53: entry (i, j) depends on the key and its place alone.

    Its place is ``(first_row + i, j)``; with ``flipped`` the rows are columns of the matrix, and it is
    ``(j, first_row + i)``, so that a transposed read gives the transposed numbers.
    """
    i = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    j = np.arange(columns, dtype=np.uint64)[None, :]
    row, column = (j, i) if flipped else (i, j)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = (row << np.uint64(32)) + column
        z *= _STEP
        z += np.uint64(key)
        for shift, factor in ((30, _FIRST), (27, _SECOND)):
            z ^= z >> np.uint64(shift)
            z *= factor
        z ^= z >> np.uint64(31)
    z >>= np.uint64(11)
    return torch.from_numpy(z.astype(np.float64) * 2.0**-53)
