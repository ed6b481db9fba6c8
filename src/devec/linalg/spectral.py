"""Exact singular triples and polar factors in float64, for methods that use every direction of a matrix.

``lowrank`` finds the few directions that stand out of noise, in float32. Methods that rebuild a matrix from its
singular vectors use small directions as much as large ones, and divide by their singular values, so everything here is
float64:

* a matrix of float32 numbers: the Gram matrix of its shorter side is exact to float64 rounding, its eigenvectors are
  that side's singular vectors, and one product gives the other side. It holds directions down to 1e-5 of the largest
  singular value; for smaller ones the matrix is factored again on what is left (an SVD of that many columns);
* a matrix of float64 numbers: a plain SVD, because squaring would lose half of its digits.

A direction that is no more than rounding (:func:`rounding_limit`) is left out everywhere. What a factorisation returns
there is arbitrary, and a result that contained it would depend on the library that was linked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from devec.linalg.numerics import CORE, peak

ROUNDED = 8
"""Units of rounding below which a singular value counts as rounding. Products of float32 factors of rank 1 to 128, of
shapes from 60 x 44 to 1024 x 1024 and with condition 1 and 100, left values of 0.3 to 2.3 units."""

TRUSTED = 1e-5
"""Directions above this fraction of s_1 are taken from the Gram matrix: their squares, 1e-10 of the largest, stand six
digits above float64 rounding."""

POLAR_LIMIT = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Singular values of a stack of orthonormal bases below this count as zero: a direction is in two of the bases. Bases
of equal matrices agree to 1e-13, and of float32 matrices that differ by rounding to 1e-6; two independent sets of n/2
directions, the worst case, come as close as 1/n."""

Cut = int | Callable[[Tensor], int] | None
"""How many leading directions: a number, a function of the singular values, or all."""


@dataclass(frozen=True)
class Triples:
    """``W ~ U diag(S) V^T`` in float64 with r columns, and ``nuclear``: the sum of all singular values of W, also of
    those that were cut, as far as they are more than rounding (of a cut by a number: and were needed)."""

    U: Tensor
    S: Tensor
    V: Tensor
    nuclear: float

    @property
    def rank(self) -> int:
        return int(self.S.numel())

    def truncated(self, rank: int) -> Triples:
        return Triples(self.U[:, :rank], self.S[:rank], self.V[:, :rank], self.nuclear)


def rounding_limit(size: float, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """The largest singular value that rounding leaves in an ``n x m`` matrix of numbers in ``dtype``.

    ``size`` is the matrix's Frobenius norm; of a sum, the root of the terms' squares, because what cancels leaves its
    rounding. A matrix of independent errors of size ``eps size / sqrt(n m)`` has the largest singular value
    ``eps size (1/sqrt(n) + 1/sqrt(m))``. Never below 64 units of float64, where an SVD ends.
    """
    n, m = shape
    return ROUNDED * torch.finfo(dtype).eps * size * (1 / sqrt(n) + 1 / sqrt(m)) + 64 * torch.finfo(CORE).eps * size


def triples(W: Tensor, cut: Cut = None, *, limit: float, exact: bool = False) -> Triples:
    """The leading singular triples of ``W (n, m)``, all in float64: ``U (n, r)``, ``S (r,)`` descending, ``V (m, r)``.

    ``cut`` decides r among the directions above ``limit``. ``exact``: by a plain SVD, which W in float64 needs for its
    last digits. Raises NonFiniteError.
    """
    n, m = W.shape
    if peak(W) <= 0.0:
        return Triples(_empty(W, n), W.new_zeros(0, dtype=CORE), _empty(W, m), 0.0)
    X = W.to(CORE)
    if exact:
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        r, nuclear = _kept(s, cut, limit)
        return Triples(U[:, :r].clone(), s[:r], Vh[:r].T.clone(), nuclear)
    tall = n >= m
    X = X if tall else X.T
    s, E = _short_side(X, cut if isinstance(cut, int) else None)
    r, nuclear = _kept(s, cut, limit)
    short = E[:, :r].clone()  # or a few columns would keep all of them in memory
    long = X @ short / s[:r]
    return Triples(long, s[:r], short, nuclear) if tall else Triples(short, s[:r], long, nuclear)


def polar(W: Tensor, *, limit: float, exact: bool = False) -> tuple[Tensor, Tensor]:
    """``(P Q^T, s)`` of ``W = P diag(s) Q^T`` over the directions above ``limit``, in float64.

    ``P Q^T (n, m)`` is the nearest matrix with all these singular values 1 (the polar factor: orthonormal columns if W
    has full column rank). It is unique, whatever signs and rotations the factorisation chose. ``exact`` as above.
    """
    n, m = W.shape
    if peak(W) <= 0.0:
        return torch.zeros(n, m, dtype=CORE, device=W.device), W.new_zeros(0, dtype=CORE)
    if exact:
        svd = triples(W, limit=limit, exact=True)
        return svd.U @ svd.V.T, svd.S
    tall = n >= m
    X = W.to(CORE) if tall else W.to(CORE).T
    s, E = _short_side(X)
    r, _ = _kept(s, None, limit)
    s, E = s[:r], E[:, :r]
    root = (E / s) @ E.T  # (X^T X)^(-1/2) on its range
    return (X @ root if tall else (X @ root).T), s


def _short_side(X: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
    """All singular values of a tall float64 X, descending, and right vectors; the first ``depth`` are exact (all)."""
    values, E = torch.linalg.eigh(X.T @ X)
    s, E = values.flip(0).clamp_min(0.0).sqrt(), E.flip(1)
    trusted = int((s >= TRUSTED * s[0]).sum())
    if trusted < (s.numel() if depth is None else min(depth, s.numel())):
        # What a trusted direction leaks into the others is 1e-16 s_1^2 / s_i, at most 1e-11 s_1.
        _, small, turn = torch.linalg.svd(X @ E[:, trusted:], full_matrices=False)
        s = torch.cat([s[:trusted], small])
        E = torch.cat([E[:, :trusted], E[:, trusted:] @ turn.T], dim=1)
    return s, E


def _kept(s: Tensor, cut: Cut, limit: float) -> tuple[int, float]:
    """The rank after the cut, and the sum of all values that are more than rounding."""
    r = int((s > limit).sum())
    nuclear = float(s[:r].sum())
    if cut is None or r == 0:
        return r, nuclear
    return min(cut if isinstance(cut, int) else cut(s[:r]), r), nuclear


def _empty(like: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=CORE, device=like.device)
