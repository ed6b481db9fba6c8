"""A merge method outside devec: loading this module registers it, and the entry point in pyproject.toml loads it."""

from __future__ import annotations

import torch

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta
from devec.core.errors import UsageError
from devec.methods.registry import register


@register("merge", grain="elements", source="Tukey (1962)")
def trimmed_mean(block: Block, trim: int = 1, scale: float = 1.0) -> Delta:
    """The mean of each entry without its largest and smallest values.

    Math        W = W_0 + scale * mean of Delta_(trim+1) .. Delta_(T-trim), each entry's values in order of size
    Symbols     T vectors; Delta_(i) = the i-th smallest value of that entry
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  robust: one wild vector moves no entry beyond the others' values; permutation: order does not matter;
                trim 0 = the mean
    Numerics    in the deltas' dtype, entry by entry, so the engine may hand over any rows
    Differs     a module that an adapter lacks counts as a change of zero
    Raises      UsageError: fewer than 2 trim + 1 vectors
    """
    if trim < 0 or len(block.deltas) < 2 * trim + 1:
        raise UsageError(f"trimmed-mean with trim={trim} needs {2 * trim + 1} vectors, got {len(block.deltas)}")
    zero = torch.zeros(block.layout.matrix_shape, dtype=block.dtype)
    values = torch.stack([zero if d is None else d.dense().to(block.dtype) for d in block.deltas])
    kept = values.sort(dim=0).values[trim : len(values) - trim]
    return DenseDelta(kept.mean(dim=0) * scale)
