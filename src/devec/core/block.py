"""One tensor name, its base and its T deltas: the unit that every method sees and the engine streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from devec.core.delta import Delta
from devec.core.layout import Layout
from devec.core.lazy import LazyDelta


@dataclass(frozen=True)
class Block:
    """``deltas[i]`` belongs to ``vectors[i]`` and is ``None`` where that vector does not touch the tensor.

    ``base``      the base weight as the matrix ``out x in``, or ``None`` when the method needs none
    ``stats``     per-tensor statistics that a method asked for with ``needs=``: activation second moments
                  ("moments"), diagonal Fisher ("fisher") and its norm over the model ("fisher_norm"), one value per
                  vector, ``None`` for what a vector lacks; "measured" is what its ``measure`` found
    ``first_row`` where in the whole the rows of a part begin
    ``flipped``   True where rows of the block are columns of the matrix (see :meth:`in_file`)
    """

    name: str
    layout: Layout
    vectors: tuple[str, ...]
    deltas: tuple[Delta | None, ...]
    base: Tensor | None = None
    stats: Mapping[str, object] = field(default_factory=dict)
    first_row: int = 0
    flipped: bool = False

    @property
    def present(self) -> list[int]:
        """Indices of the vectors that have this tensor."""
        return [i for i, d in enumerate(self.deltas) if d is not None]

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of any delta."""
        return reduce(torch.promote_types, (d.dtype for d in self.deltas if d is not None))

    def whole(self) -> Block:
        """The same block with every matrix in memory, so that what reads them several times reads no file again."""
        return replace(self, deltas=tuple(d.whole() if isinstance(d, LazyDelta) else d for d in self.deltas))

    def rows(self, start: int, stop: int) -> Block:
        """The same block cut to some rows of the matrix."""
        return replace(
            self,
            layout=Layout((stop - start, self.layout.matrix_shape[1])),
            deltas=tuple(None if d is None else d.rows(start, stop) for d in self.deltas),
            base=None if self.base is None else self.base[start:stop],
            first_row=self.first_row + start,
        )

    def in_file(self) -> Block:
        """The same block with every matrix as its file holds it, so that rows are the file's rows."""
        if not self.layout.transposed:
            return self
        return replace(
            self,
            layout=Layout(self.layout.shape),
            deltas=tuple(None if d is None else d.transpose() for d in self.deltas),
            base=None if self.base is None else self.base.T,
            flipped=not self.flipped,
        )

    def on(self, device: torch.device) -> Block:
        """The same block with its deltas and base on a device."""
        return replace(
            self,
            deltas=tuple(None if d is None else d.on(device) for d in self.deltas),
            base=None if self.base is None else self.base.to(device),
        )
