"""Exact singular triples and polar factors in float64, for methods that use every direction of a matrix.

``lowrank`` finds the few directions that stand out of noise, in float32. Methods that rebuild a matrix from its singular
vectors use small directions as much as large ones, and divide by their singular values, so everything here is float64:

* a float32 matrix: the Gram matrix of its shorter side is exact to float64 rounding; its eigenvectors are the short
  side's singular vectors, and one product gives the long side. Good down to ``s = 1e-5 s_1``, where float32 data ends;
* a float64 matrix whose small directions are asked for: a plain SVD, because squaring would lose half its digits.

A direction below the numerical rank is left out everywhere. What a factorisation returns there is arbitrary, and a
result that contained it would depend on the library that was linked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.linalg.lowrank import gram
from devec.linalg.numerics import CORE, peak
from devec.linalg.rank import numerical_rank

SQUARED = 1e-6
"""The smallest ``rtol`` for which a matrix is squared: float64 then holds ``s^2`` of a direction at the limit to
1e-16 / rtol^2 (1e-6 for the rank limit of float32 data, 1e-5)."""

POLAR_RTOL = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Directions of a stack of orthonormal bases below this, relative to its largest singular value, count as missing. Bases
of equal float32 matrices agree to 1e-13 (they come from one computation), and of matrices that differ by float32
rounding to 1e-6; two independent sets of n/2 directions, the worst case, come as close as 1/n."""

Cut = int | Callable[[Tensor], int] | None
"""How many leading directions: a number, a function of the singular values, or all."""


@dataclass(frozen=True)
class Triples:
    """``W ~ U diag(S) V^T`` in float64 with r columns, and ``nuclear``: the sum of all singular values of W, also of
    those that were cut, as far as they are more than rounding."""

    U: Tensor
    S: Tensor
    V: Tensor
    nuclear: float

    @property
    def rank(self) -> int:
        return int(self.S.numel())

    def truncated(self, rank: int) -> Triples:
        return Triples(self.U[:, :rank], self.S[:rank], self.V[:, :rank], self.nuclear)


def triples(W: Tensor, cut: Cut = None, *, rtol: float) -> Triples:
    """The leading singular triples of ``W (n, m)``, all in float64: ``U (n, r)``, ``S (r,)`` descending, ``V (m, r)``.

    ``cut`` decides r among the directions above ``rtol * s_1``. Raises NonFiniteError.
    """
    n, m = W.shape
    if peak(W) == 0.0:
        return Triples(_empty(W, n), W.new_zeros(0, dtype=CORE), _empty(W, m), 0.0)
    if rtol < SQUARED:
        U, s, Vh = torch.linalg.svd(W.to(CORE), full_matrices=False)
        r, nuclear = _kept(s, cut, rtol)
        return Triples(U[:, :r], s[:r], Vh[:r].T, nuclear)
    tall = n >= m
    values, vectors = torch.linalg.eigh(gram(W.T if tall else W))
    s = values.flip(0).clamp_min(0.0).sqrt()
    r, nuclear = _kept(s, cut, rtol)
    short = vectors.flip(1)[:, :r]
    long = (W if tall else W.T).to(CORE) @ short / s[:r]
    return Triples(long, s[:r], short, nuclear) if tall else Triples(short, s[:r], long, nuclear)


def polar(W: Tensor, *, rtol: float) -> tuple[Tensor, Tensor]:
    """``(P Q^T, s)`` of ``W = P diag(s) Q^T`` over the directions above ``rtol * s_1``, in float64.

    ``P Q^T (n, m)`` is the nearest matrix with all these singular values 1 (the polar factor: orthonormal columns if W
    has full column rank). It is unique, whatever signs and rotations the factorisation chose. Squared on the
    shorter side where ``rtol`` leaves room for it (see the module).
    """
    n, m = W.shape
    if peak(W) == 0.0:
        return torch.zeros(n, m, dtype=CORE, device=W.device), W.new_zeros(0, dtype=CORE)
    if rtol < SQUARED:
        svd = triples(W, rtol=rtol)
        return svd.U @ svd.V.T, svd.S
    tall = n >= m
    values, E = torch.linalg.eigh(gram(W.T if tall else W))
    s = values.flip(0).clamp_min(0.0).sqrt()
    r = numerical_rank(s, rtol)
    E = E.flip(1)[:, :r]
    root = (E / s[:r]) @ E.T  # (W^T W)^(-1/2) on its range
    X = W.to(CORE)
    return (X @ root if tall else root @ X), s[:r]


def _kept(s: Tensor, cut: Cut, rtol: float) -> tuple[int, float]:
    """The rank after the cut, and the sum of all values that are more than rounding."""
    r = numerical_rank(s, rtol)
    nuclear = float(s[:r].sum())
    if cut is None or r == 0:
        return r, nuclear
    return min(cut if isinstance(cut, int) else cut(s[:r]), r), nuclear


def _empty(like: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=CORE, device=like.device)
