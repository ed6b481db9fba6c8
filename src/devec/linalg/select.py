"""Exact order statistics of numbers that are never in memory together, by histograms over the digits of their bits.

The bits of a float, its sign taken into account, are an integer in the same order. A radix selection reads that integer
in digits of 16 bits: a histogram of the first digit says in which bin the k-th smallest lies, a second pass counts the
next digit of what is in that bin, and so on. Two passes find any order statistic of float32, four of float64, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DIGIT = 16
BINS = 1 << DIGIT


def digits(dtype: torch.dtype) -> int:
    """Passes that a selection takes."""
    return 4 if dtype == torch.float64 else 2


def ordered_bits(x: Tensor) -> Tensor:
    """int64 in the order of ``x`` (float32 or float64; -0 just below 0; NaN beyond the infinities)."""
    if x.dtype == torch.float64:
        bits = x.contiguous().view(torch.int64)
        return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)
    short = x.float().contiguous().view(torch.int32)
    return (short ^ ((short >> 31) & 0x7FFF_FFFF)).to(torch.int64)


def float_of(ordered: int, dtype: torch.dtype) -> float:
    """The number whose :func:`ordered_bits` these are."""
    if dtype == torch.float64:
        bits = ordered if ordered >= 0 else ordered ^ 0x7FFF_FFFF_FFFF_FFFF
        return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
    bits = ordered if ordered >= 0 else ordered ^ 0x7FFF_FFFF
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def histogram(x: Tensor, prefixes: Sequence[int | None], step: int) -> Tensor:
    """``(len(prefixes), 65536)`` counts of digit ``step`` (0 is the first) among the entries whose digits before it
    are ``prefix`` (``None`` at step 0, where every entry counts)."""
    bits = ordered_bits(x).reshape(-1)
    shift = DIGIT * (digits(x.dtype) - 1 - step)
    counts = torch.zeros(len(prefixes), BINS, dtype=torch.int64)
    for row, prefix in enumerate(prefixes):
        inside = bits if prefix is None else bits[(bits >> (shift + DIGIT)) == prefix]
        found = (inside >> shift) + (BINS >> 1) if step == 0 else (inside >> shift) & (BINS - 1)
        counts[row] = torch.bincount(found, minlength=BINS)
    return counts


def descend(counts: Tensor, rank: int, prefix: int | None) -> tuple[int, int]:
    """(prefix with one more digit, rank within it) of the entry of this rank, 0 the smallest, from one histogram."""
    ends = counts.cumsum(0)
    digit = int(torch.searchsorted(ends, rank, right=True))
    rest = rank - (int(ends[digit - 1]) if digit else 0)
    return (digit - (BINS >> 1) if prefix is None else (prefix << DIGIT) | digit), rest
