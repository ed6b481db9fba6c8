"""Compute types, tolerances and the checks that every factorisation makes first.

Each constant says what was observed, because a tolerance without a reason is a bug that waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import frexp

import torch
from torch import Tensor

CORE = torch.float64
"""Small (rank x rank) problems are always solved in float64: they cost nothing, and at a planted eigenvalue equal
to the threshold float32 keeps 126 of 320 directions against 196 for float64 (the rest is a coin toss)."""

RANK_RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Numerical rank: singular values below this fraction of the largest are rounding. float32 factors leave spurious
values near 1e-7 relative; adapters trained in bf16 have true ones down to about 1e-4."""

TIE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Eigenvalues within this distance of the threshold count as above it, and are reported as ties. Overlaps of
float32 bases carry noise of 9e-7, of float64 bases 2e-15."""


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinity. torch's ``qr`` would return NaN in silence, ``svd`` a misleading message.

    ``reason`` says how many entries are bad, ``index`` which matrix of a batch holds them (``None`` for a single one).
    """

    def __init__(self, reason: str, index: int | None = None) -> None:
        self.reason, self.index = reason, index
        super().__init__(reason if index is None else f"matrix {index} of the batch: {reason}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is factored in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def peak(x: Tensor) -> float:
    """``max |x|``, after checking that every entry is finite. 0 for an empty tensor."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x)
    top = max(abs(float(low)), abs(float(high)))
    # A NaN anywhere makes aminmax NaN, an infinity makes it infinite: one reduction checks and measures.
    if not top < float("inf"):
        raise NonFiniteError(bad_entries(x))
    return top


def bad_entries(x: Tensor) -> str:
    return f"{int((~torch.isfinite(x)).sum())} of {x.numel()} entries are NaN or infinite"


def binary_scale(top: float) -> float:
    """The power of two that brings ``top`` into [1, 2): dividing by it rounds nothing. 0 for 0.

    Into [1/2, 1) the largest float32 numbers would need 2^128, which is infinite there, and every entry would become 0.
    """
    return 2.0 ** (frexp(top)[1] - 1) if top > 0.0 else 0.0


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the hash of ``key``, so that a result depends on its name and not on the order of
    work. The same key gives the same numbers on every machine and for every number of workers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread inside; the caller's setting comes back afterwards.

    Two threads round differently from one, so results would depend on the machine; and for cores of a few hundred
    columns a team of threads is slower than one (a 96 x 96 SVD: 3 ms alone, 160 ms in a team on two busy cores).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
