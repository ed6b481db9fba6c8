"""``W(c) = W_0 + sum_t c_t Delta_t`` tensor by tensor, and inner products ``<G, Delta_t>``, with nothing made dense.

A dense delta is read by blocks of rows from where it lies, in its stored dtype; a factored one (an adapter, a shared
part ``Z (Z^T Delta)``) stays thin: ``<G, B A> = <B^T G, A>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devec.core.contracts import TensorSource
from devec.core.delta import Delta, LowRankDelta
from devec.core.lazy import row_blocks

Changes = Mapping[str, Sequence[tuple[int, Delta]]]
"""tensor name -> (vector index, delta as its file holds it: rows are the file's rows). Each delta is asked for once."""


class LinearModel:
    """``W(c)`` over everything that some vector changes, and the inner products of a gradient with every vector.

    ``held`` says of each tensor what its vectors are (:meth:`of` makes it). Computes in ``dtype``; a tensor's work
    depends on nothing but its own inputs.
    """

    def __init__(
        self, base: TensorSource, held: Mapping[str, Held], vectors: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.base, self.vectors, self.dtype, self._held = base, vectors, dtype, dict(held)

    @classmethod
    def of(cls, base: TensorSource, changes: Changes, vectors: int, dtype: torch.dtype = torch.float32) -> LinearModel:
        return cls(base, {name: Held.of(terms, dtype) for name, terms in changes.items()}, vectors, dtype)

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def owners(self, name: str) -> set[int]:
        """The vectors that change a tensor."""
        held = self._held[name]
        return {*(t for t, _ in held.dense), *held.owner.tolist()}

    @torch.no_grad()  # by method: other threads begin with gradients on
    def write(self, name: str, c: Tensor, out: Tensor) -> None:
        """``W_0 + sum_t c_t Delta_t`` of one tensor into ``out``, in blocks of rows; ``c`` has shape ``(T,)``."""
        held = self._held[name]
        flat = _rows_of(out)
        for start, stop in row_blocks(tuple(flat.shape)):
            block = self.base.rows(name, start, stop).to(self.dtype, copy=True).reshape(stop - start, -1)
            for t, delta in held.dense:
                if c[t] != 0.0:
                    block.add_(delta.rows(start, stop).dense().to(self.dtype), alpha=float(c[t]))
            flat[start:stop] = block
        if held.B.shape[1]:
            flat.addmm_(held.B * c[held.owner].to(self.dtype), held.A)
        if flat.data_ptr() != out.data_ptr():  # not contiguous: a copy was filled
            out.copy_(flat.reshape(out.shape))

    @torch.no_grad()
    def inner(self, name: str, gradient: Tensor) -> Tensor:
        """``<G, Delta_t>`` for every vector t, as float64 of shape ``(T,)``; factors stay factors."""
        held, total = self._held[name], torch.zeros(self.vectors, dtype=torch.float64)
        G = _rows_of(gradient).to(self.dtype)
        for start, stop in row_blocks(tuple(G.shape) if held.dense else (0,)):
            flat = G[start:stop].reshape(-1)
            for t, delta in held.dense:
                total[t] += float(torch.dot(flat, delta.rows(start, stop).dense().to(self.dtype).reshape(-1)))
        if held.B.shape[1]:
            # Through the shorter side, so that the product beside G is the smaller one.
            if G.shape[0] < G.shape[1]:
                each = ((G @ held.A.T) * held.B).sum(dim=0)
            else:
                each = ((held.B.T @ G) * held.A).sum(dim=1)
            total.index_add_(0, held.owner, each.double())
        return total


@dataclass(frozen=True)
class Held:
    """One tensor's deltas: dense ones, asked for their rows at every use, and factored ones stacked as ``B (n, D)`` and
    ``A (D, m)``; ``owner[k]`` is the vector of column k."""

    dense: list[tuple[int, Delta]]
    B: Tensor
    A: Tensor
    owner: Tensor

    @classmethod
    def of(cls, terms: Sequence[tuple[int, Delta]], dtype: torch.dtype) -> Held:
        dense = [(t, d) for t, d in terms if not isinstance(d, LowRankDelta)]
        thin = [(t, d) for t, d in terms if isinstance(d, LowRankDelta) and d.B.shape[1]]
        rows, cols = terms[0][1].shape
        B = torch.cat([torch.empty(rows, 0, dtype=dtype), *(d.B.to(dtype) for _, d in thin)], dim=1)
        A = torch.cat([torch.empty(0, cols, dtype=dtype), *(d.A.to(dtype) for _, d in thin)], dim=0)
        owner = [t for t, d in thin for _ in range(d.B.shape[1])]
        return cls(dense, B, A, torch.tensor(owner, dtype=torch.int64))


def _rows_of(tensor: Tensor) -> Tensor:
    """A stored tensor as the rows of its file (a view of a contiguous one)."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
