"""What the spectral merge methods have in common: which tensors they treat, and in which coordinates.

A method that only multiplies deltas from the left and the right by orthogonal matrices (singular values, projections
onto singular vectors, polar factors, least squares over input directions) gives the same result in any orthonormal
coordinates. So when every delta of a block is factored, ``Delta_i = B_i A_i``, it is written as ``L C_i R^T`` with L
and R orthonormal bases of all columns of the B and rows of the A, and the method sees the cores ``C_i`` alone: no
matrix is larger than the sum of the ranks, and the result is again factored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import InputError, UsageError
from devec.linalg.lowrank import frobenius
from devec.linalg.numerics import CORE, NonFiniteError, compute_dtype, peak
from devec.linalg.spectral import POLAR_LIMIT, Cut, Triples, polar, rounding_limit, triples
from devec.methods.merge.task_arithmetic import weighted_sum

Others = Literal["mean", "sum", "base"]
"""What becomes of a tensor that is not treated as a matrix: the mean or the sum of its deltas, or no change."""

Conv = Literal["matrix", "other"]
"""A convolution: the matrix ``out x (in k k)``, or a tensor like the other ones."""


def is_matrix(block: Block, matrices: str, conv: Conv) -> bool:
    """Whether a spectral method treats the tensor: not a vector, its name matches ``matrices`` (``re.search``; all if
    empty), and for a kernel of more than two dimensions ``conv`` is "matrix"."""
    if block.layout.is_vector or (conv == "other" and len(block.layout.shape) > 2):
        return False
    try:
        return re.search(matrices, block.name) is not None
    except re.error as error:
        raise UsageError(f"matrices={matrices!r} is no regular expression: {error}") from None


def rest(block: Block, others: Others, scale: float) -> Delta:
    """``scale`` times the mean, the sum or nothing of the deltas. A vector without the tensor counts as no change."""
    weight = {"mean": scale / max(len(block.deltas), 1), "sum": scale, "base": 0.0}[others]
    return weighted_sum(block, [weight] * len(block.deltas))


def nothing(block: Block) -> LowRankDelta:
    """A change of rank zero."""
    return weighted_sum(block, [0.0] * len(block.deltas))  # type: ignore[return-value]


@dataclass(frozen=True)
class Cores:
    """The deltas of a block as matrices: themselves, or the cores of factored ones.

    ``source``       what makes the matrices ``(a, b)``: those in the dtype below, cores in float64
    ``left, right``  ``(n, a)`` and ``(m, b)``, orthonormal, float64: ``Delta_i = left C_i right^T``; None: coordinates
                     are the tensor's own
    ``dtype``        what the result is rounded to
    """

    shape: tuple[int, int]
    source: Callable[[], Iterator[Tensor]]
    dtype: torch.dtype
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether the deltas' dtype asks for factorisations that do not square (see ``linalg.spectral``)."""
        return self.dtype == CORE

    def limit(self, size: float, width: int = 1) -> float:
        """The largest singular value that is rounding, in a delta or a sum of them of Frobenius norm ``size``, or in
        ``width`` deltas side by side."""
        return rounding_limit(size, (self.shape[0], width * self.shape[1]), self.dtype)

    def triples(self, C: Tensor, cut: Cut = None) -> Triples:
        """Singular triples of one of the matrices."""
        return triples(C, cut, limit=self.limit(frobenius(C)), exact=self.exact)

    def orthonormal(self, parts: Sequence[Tensor]) -> Tensor:
        """Orthonormal bases side by side, replaced by the nearest matrix with orthonormal columns."""
        return polar(torch.cat(list(parts), dim=1), limit=POLAR_LIMIT[self.dtype], exact=self.exact)[0]

    def each(self) -> Iterator[Tensor]:
        """The matrices one after the other, made anew each time: a pool of files is in memory one matrix at a time."""
        return self.source()

    def total(self, matrices: Iterable[Tensor] | None = None) -> tuple[Tensor, float]:
        """``sum_i C_i`` in float64, and its size as ``limit`` wants it: ``sqrt(sum_i |C_i|_F^2)``."""
        out: Tensor | None = None
        squares = 0.0
        for C in self.each() if matrices is None else matrices:
            out = C.to(CORE, copy=True) if out is None else out.add_(C)
            squares += frobenius(C) ** 2
        assert out is not None
        return out, sqrt(squares)

    def product(self, B: Tensor, A: Tensor) -> Delta:
        """``B A``, given in the cores' coordinates, as a delta: factored if the deltas were."""
        if self.left is None or self.right is None:
            return DenseDelta((B @ A).to(self.dtype))
        return LowRankDelta((self.left @ B).to(self.dtype), (A @ self.right.T).to(self.dtype))

    def whole(self, M: Tensor) -> Delta:
        """A matrix in the cores' coordinates as a delta."""
        if self.left is None or self.right is None:
            return DenseDelta(M.to(self.dtype))
        if M.shape[0] <= M.shape[1]:
            return LowRankDelta(self.left.to(self.dtype), (M @ self.right.T).to(self.dtype))
        return LowRankDelta((self.left @ M).to(self.dtype), self.right.T.to(self.dtype))


def cores(block: Block, *, factored: bool = True) -> Cores | None:
    """The block's deltas as matrices; None where there is nothing to merge (no vector has the tensor, or it is empty).

    ``factored=False`` multiplies factors out. A delta with NaN or infinity is an InputError that names the vector, when
    it is read.
    """
    found = {i: d for i in block.present if (d := block.deltas[i]) is not None}
    if not found or 0 in block.layout.matrix_shape:
        return None
    dtype = compute_dtype(reduce(torch.promote_types, (d.dtype for d in found.values())))
    low = {i: d for i, d in found.items() if isinstance(d, LowRankDelta)}
    for i, d in low.items():
        _check(block, i, d.B, d.A)
    if len(low) == len(found) and factored:
        return _of_factors(block, low, dtype)

    def source() -> Iterator[Tensor]:
        for i, d in found.items():
            W = d.dense().to(dtype)
            _check(block, i, W)
            yield W
            del W  # or two would be in memory while the next one is made

    return Cores(block.layout.matrix_shape, source, dtype)


def _of_factors(block: Block, deltas: dict[int, LowRankDelta], dtype: torch.dtype) -> Cores:
    ranks = [d.B.shape[1] for d in deltas.values()]
    left, RB = torch.linalg.qr(torch.cat([d.B.to(CORE) for d in deltas.values()], dim=1))
    right, RA = torch.linalg.qr(torch.cat([d.A.to(CORE) for d in deltas.values()], dim=0).T)
    made = [b @ a.T for b, a in zip(RB.split(ranks, dim=1), RA.split(ranks, dim=1), strict=True)]
    return Cores(block.layout.matrix_shape, lambda: iter(made), dtype, left, right)


def _check(block: Block, i: int, *tensors: Tensor) -> None:
    for tensor in tensors:
        try:
            peak(tensor)
        except NonFiniteError as error:
            raise InputError(
                f"vector {block.vectors[i]} cannot be merged: {error.reason}",
                tensor=block.name,
                remedy="Repair the file, or leave the tensor out with --exclude.",
            ) from None


def positive(method: str, name: str, value: float) -> None:
    """Raises UsageError unless ``value`` is above zero."""
    if not value > 0:
        raise UsageError(f"{method} wants {name} above 0, got {value:g}")
