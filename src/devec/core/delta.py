"""One tensor's change, dense, factored or sparse. Immutable: every operation returns a new delta.

A delta is always the two-dimensional ``out x in`` matrix (see ``Layout``). Scales (alpha/r and its variants) are
folded into the factors when an adapter is read, so the delta *is* the change and nothing multiplies it later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.linalg import lowrank


class Delta(ABC):
    """A matrix in delta space. Subclasses: :class:`DenseDelta`, :class:`LowRankDelta`, :class:`SparseDelta`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def rank_bound(self) -> int:
        """An upper bound on the rank that needs no arithmetic."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself."""

    @abstractmethod
    def scale(self, factor: float) -> Delta:
        """``factor * delta``."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm, accumulated in float64 (safe for entries from 1e-25 to 1e25)."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Delta: ...

    @abstractmethod
    def on(self, device: torch.device) -> Delta:
        """The same delta on a device."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Delta:
        """Rows ``start:stop``, for methods whose grain is a block of rows."""

    @abstractmethod
    def transpose(self) -> Delta: ...

    @abstractmethod
    def project(self, basis: Tensor) -> Delta:
        """``Z Z^T W`` as thin products, for orthonormal ``basis`` Z of shape ``(rows, d)``. Rank <= d."""

    def residual(self, basis: Tensor) -> Delta:
        """``W - Z Z^T W``. For factors this changes B alone, so it adds no rank."""
        return self.add(self.project(basis).scale(-1.0))

    def add(self, other: Delta) -> Delta:
        """``self + other``; two factored deltas stay factored (ranks add), anything else becomes dense."""
        same_shape(self, other)
        return DenseDelta(self.dense() + other.dense())

    def inner(self, other: Delta) -> float:
        """``<self, other>`` = sum of elementwise products, in float64; factors never become dense."""
        same_shape(self, other)
        if isinstance(self, LowRankDelta) and isinstance(other, LowRankDelta):
            return lowrank.inner_of_products(self.B, self.A, other.B, other.A)
        return lowrank.inner_of_dense(self.dense(), other.dense())


def _in_one_dtype(basis: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype: a basis rounded to bf16 would be no projector."""
    dtype = torch.promote_types(basis.dtype, value.dtype)
    return basis.to(dtype), value.to(dtype)


def same_shape(a: Delta, b: Delta) -> None:
    """Raises ValueError for deltas of unlike shape."""
    if a.shape != b.shape:
        raise ValueError(f"deltas of unlike shape: {a.shape} and {b.shape}")


@dataclass(frozen=True, eq=False)
class DenseDelta(Delta):
    """A plain matrix."""

    value: Tensor

    def __post_init__(self) -> None:
        if self.value.ndim != 2:
            raise ValueError(f"a delta is a matrix, got shape {tuple(self.value.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.value.shape[0], self.value.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def rank_bound(self) -> int:
        return min(self.shape)

    def dense(self) -> Tensor:
        return self.value

    def scale(self, factor: float) -> DenseDelta:
        return DenseDelta(self.value * factor)

    def norm(self) -> float:
        return lowrank.frobenius(self.value)

    def to(self, dtype: torch.dtype) -> DenseDelta:
        return DenseDelta(self.value.to(dtype))

    def on(self, device: torch.device) -> DenseDelta:
        return DenseDelta(self.value.to(device))

    def rows(self, start: int, stop: int) -> DenseDelta:
        return DenseDelta(self.value[start:stop])

    def transpose(self) -> DenseDelta:
        return DenseDelta(self.value.T)

    def project(self, basis: Tensor) -> Delta:
        Z, W = _in_one_dtype(basis, self.value)
        return LowRankDelta(Z, Z.T @ W)

    def residual(self, basis: Tensor) -> DenseDelta:
        Z, W = _in_one_dtype(basis, self.value)
        return DenseDelta(torch.addmm(W, Z, Z.T @ W, alpha=-1.0))


@dataclass(frozen=True, eq=False)
class LowRankDelta(Delta):
    """``B A`` with B ``(rows, r)`` and A ``(r, cols)``; the adapter's scale is folded into B."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not fit: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.B.shape[0], self.A.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def rank_bound(self) -> int:
        return min(self.B.shape[1], *self.shape)

    def dense(self) -> Tensor:
        return self.B @ self.A

    def scale(self, factor: float) -> LowRankDelta:
        return LowRankDelta(self.B * factor, self.A)

    def norm(self) -> float:
        return lowrank.frobenius_of_product(self.B, self.A)

    def to(self, dtype: torch.dtype) -> LowRankDelta:
        return LowRankDelta(self.B.to(dtype), self.A.to(dtype))

    def on(self, device: torch.device) -> LowRankDelta:
        return LowRankDelta(self.B.to(device), self.A.to(device))

    def rows(self, start: int, stop: int) -> LowRankDelta:
        return LowRankDelta(self.B[start:stop], self.A)

    def transpose(self) -> LowRankDelta:
        return LowRankDelta(self.A.T, self.B.T)

    def project(self, basis: Tensor) -> LowRankDelta:
        Z, B = _in_one_dtype(basis, self.B)
        return LowRankDelta(Z @ (Z.T @ B), self.A.to(B.dtype))

    def residual(self, basis: Tensor) -> LowRankDelta:
        Z, B = _in_one_dtype(basis, self.B)
        return LowRankDelta(torch.addmm(B, Z, Z.T @ B, alpha=-1.0), self.A.to(B.dtype))

    def add(self, other: Delta) -> Delta:
        same_shape(self, other)
        if isinstance(other, LowRankDelta):
            dtype = torch.promote_types(self.dtype, other.dtype)
            return LowRankDelta(
                torch.cat([self.B.to(dtype), other.B.to(dtype)], dim=1),
                torch.cat([self.A.to(dtype), other.A.to(dtype)], dim=0),
            )
        return super().add(other)

    def recompress(self, rank: int | None = None) -> LowRankDelta:
        """The same matrix to rounding, with no more columns than that takes (or the best rank-``rank`` one)."""
        svd = lowrank.svd_of_product(self.B, self.A, rtol=0.0)
        r = svd.rank if rank is None else min(rank, svd.rank)
        root = svd.S[:r].sqrt()
        return LowRankDelta((svd.U[:, :r] * root.to(svd.U.dtype)), (root.to(svd.V.dtype)[:, None] * svd.V[:, :r].T))


@dataclass(frozen=True, eq=False)
class SparseDelta(Delta):
    """A few entries of a large matrix: flat row-major ``indices`` (int64, strictly increasing) and ``values``."""

    indices: Tensor
    values: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.indices.ndim != 1 or self.indices.shape != self.values.shape:
            raise ValueError("sparse delta needs one value per index")
        if self.indices.dtype != torch.int64:
            raise ValueError(f"sparse delta indices must be int64, got {self.indices.dtype}")
        if self.indices.numel() and bool((self.indices[1:] <= self.indices[:-1]).any()):
            raise ValueError("sparse delta indices must be strictly increasing")
        end = self.size[0] * self.size[1]
        if self.indices.numel() and not 0 <= int(self.indices[0]) <= int(self.indices[-1]) < end:
            raise ValueError(f"sparse delta index outside a matrix {self.size}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def rank_bound(self) -> int:
        return min(*self.size, int(self.indices.numel()))

    def dense(self) -> Tensor:
        out = torch.zeros(self.size[0] * self.size[1], dtype=self.dtype, device=self.values.device)
        out[self.indices] = self.values
        return out.reshape(self.size)

    def scale(self, factor: float) -> SparseDelta:
        return SparseDelta(self.indices, self.values * factor, self.size)

    def norm(self) -> float:
        return lowrank.frobenius(self.values[:, None])

    def to(self, dtype: torch.dtype) -> SparseDelta:
        return SparseDelta(self.indices, self.values.to(dtype), self.size)

    def on(self, device: torch.device) -> SparseDelta:
        return SparseDelta(self.indices.to(device), self.values.to(device), self.size)

    def rows(self, start: int, stop: int) -> SparseDelta:
        start, stop, _ = slice(start, stop).indices(self.size[0])
        low, high = start * self.size[1], stop * self.size[1]
        keep = (self.indices >= low) & (self.indices < high)
        return SparseDelta(self.indices[keep] - low, self.values[keep], (max(stop - start, 0), self.size[1]))

    def transpose(self) -> SparseDelta:
        rows, cols = self.size
        flat = (self.indices % cols) * rows + self.indices // cols
        order = torch.argsort(flat)
        return SparseDelta(flat[order], self.values[order], (cols, rows))

    def project(self, basis: Tensor) -> Delta:
        return DenseDelta(self.dense()).project(basis)
