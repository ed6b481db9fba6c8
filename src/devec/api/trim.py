"""Vectors trimmed to their largest entries and to the elected sign: what AdaMerging++ learns coefficients of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.core.lazy import LazyDelta, in_file, row_blocks
from devec.core.vectors import LazyMap, Pool, TaskVector
from devec.linalg.numerics import one_blas_thread

Bits = NDArray[np.uint8]


def agreeing(pool: Pool, density: float) -> Pool:
    """Each vector's own entries where they are large and have the elected sign, zero elsewhere.

    Math        t_i = k-th largest |Delta_i| over the whole vector, k = max(floor(density n), 1)
                D_i = Delta_i [|Delta_i| >= t_i];  g = sign(sum_i D_i);  result_i = D_i [D_i g > 0]
                (TIES, arXiv:2306.01708, without its last mean; AdaMerging++, arXiv:2310.02575)
    Guarantees  entries equal to the threshold are all kept; order does not matter up to rounding of the sums
    Differs     an entry whose sum is exactly zero elects no sign and is dropped; the published code gives it the
                majority's
    Memory      one bit an entry and vector; while thresholds are found, one vector in float32

    What was factored is read as a dense matrix, in blocks of rows. Raises UsageError for a density outside (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise UsageError("--trim is the fraction of entries to keep, above 0 and at most 1", values={"trim": density})
    with one_blas_thread():
        cuts = [_threshold(v, density) for v in pool]
        kept = {name: _Kept.of(pool, name, cuts) for name in pool.tensors()}
    return replace(pool, vectors=tuple(_of_one(v, t, kept) for t, v in enumerate(pool)))


def _of_one(vector: TaskVector, t: int, kept: dict[str, _Kept]) -> TaskVector:
    def make(name: str) -> Delta:
        filed, layout = _by_rows(vector.deltas[name]), vector.layouts[name]
        there = in_file(filed, layout.transposed)

        def read(start: int, stop: int) -> Tensor:
            return there.rows(start, stop).dense() * kept[name].mask(t, start, stop)

        return LazyDelta(filed.shape, filed.dtype, read, transposed=layout.transposed)

    return replace(vector, deltas=LazyMap(vector.names(), make))


def _threshold(vector: TaskVector, density: float) -> float:
    parts = [_by_rows(vector.deltas[n]) for n in vector.deltas]
    sizes = [d.shape[0] * d.shape[1] for d in parts]
    magnitudes = np.empty(sum(sizes), dtype=np.float32)
    at = 0
    for delta, size in zip(parts, sizes, strict=True):
        magnitudes[at : at + size] = delta.dense().float().abs().reshape(-1).numpy()
        at += size
    if not at:
        return 0.0
    k = max(int(density * at), 1)
    magnitudes.partition(at - k)
    return float(magnitudes[at - k])


def _by_rows(delta: Delta) -> Delta:
    return delta if isinstance(delta, (DenseDelta, LazyDelta, LowRankDelta)) else DenseDelta(delta.dense())


@dataclass(frozen=True)
class _Kept:
    """Which entries of one tensor each vector keeps: bits, row by row of the file (``None``: it lacks the tensor)."""

    columns: int
    bits: tuple[Bits | None, ...]

    def mask(self, t: int, start: int, stop: int) -> Tensor:
        packed = self.bits[t]
        assert packed is not None
        return torch.from_numpy(np.unpackbits(packed[start:stop], axis=1, count=self.columns))

    @classmethod
    def of(cls, pool: Pool, name: str, cuts: Sequence[float]) -> _Kept:
        have = [t for t, v in enumerate(pool) if name in v.deltas]
        filed = {t: in_file(_by_rows(pool[t].deltas[name]), pool.layout(name).transposed) for t in have}
        rows, columns = filed[have[0]].shape
        bits: dict[int, Bits] = {t: np.empty((rows, -(-columns // 8)), dtype=np.uint8) for t in have}
        for start, stop in row_blocks((rows, columns)):
            large = {}
            for t in have:
                block = filed[t].rows(start, stop).dense().float()
                large[t] = block * (block.abs() >= cuts[t])
            sign = torch.stack(list(large.values())).sum(dim=0).sign()
            for t in have:
                bits[t][start:stop] = np.packbits((large[t] * sign > 0.0).numpy(), axis=1)
        return cls(columns, tuple(bits.get(t) for t in range(len(pool))))
