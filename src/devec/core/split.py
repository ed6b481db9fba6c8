"""Fused tensors split by rows (query, key, value) and joined again.

A fused qkv matrix stacks three maps; its column space mixes what three different places write. On request each block
of rows is decomposed as a tensor of its own, named ``NAME::q`` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import IncompatibleError
from devec.core.layout import Layout
from devec.core.vectors import LazyMap, TaskVector

SEPARATOR = "::"


@dataclass(frozen=True)
class RowSplit:
    """Rows of the ``out x in`` matrix of one tensor: ``(suffix, start, stop)``, covering it in order."""

    layout: Layout
    parts: tuple[tuple[str, int, int], ...]

    def __post_init__(self) -> None:
        at = 0
        for suffix, start, stop in self.parts:
            if start != at or stop <= start:
                raise ValueError(f"rows of {suffix!r} ({start}:{stop}) leave a gap or overlap")
            at = stop
        if at != self.layout.matrix_shape[0]:
            raise ValueError(f"parts cover {at} of {self.layout.matrix_shape[0]} rows")


def split_rows(vector: TaskVector, splits: Mapping[str, RowSplit]) -> TaskVector:
    """The same vector with each tensor named in ``splits`` replaced by its parts."""
    plan: dict[str, tuple[str, int, int] | None] = {}
    layouts: dict[str, Layout] = {}
    for n in vector.deltas:
        if n not in splits:
            plan[n], layouts[n] = None, vector.layouts[n]
            continue
        cols = vector.layouts[n].matrix_shape[1]
        for suffix, start, stop in splits[n].parts:
            plan[f"{n}{SEPARATOR}{suffix}"] = (n, start, stop)
            layouts[f"{n}{SEPARATOR}{suffix}"] = Layout((stop - start, cols))

    def make(name: str) -> Delta:
        where = plan[name]
        return vector.deltas[name] if where is None else vector.deltas[where[0]].rows(where[1], where[2])

    return replace(vector, deltas=LazyMap(list(plan), make), layouts=layouts)


def fused_name(part: str) -> str:
    """The tensor that a part belongs to, if it is one."""
    return part.rpartition(SEPARATOR)[0]


def join_rows(vector: TaskVector, splits: Mapping[str, RowSplit]) -> TaskVector:
    """The inverse of :func:`split_rows`. Every part of a fused tensor must be there, or none."""
    names: dict[str, None] = {}
    for n in vector.deltas:
        names[fused_name(n) if fused_name(n) in splits else n] = None
    fused = [n for n in names if n in splits]
    for n in fused:
        missing = [s for s, _, _ in splits[n].parts if f"{n}{SEPARATOR}{s}" not in vector.deltas]
        if missing:
            raise IncompatibleError("a fused tensor lacks some of its rows", tensor=n, values={"missing": missing})

    def make(name: str) -> Delta:
        if name not in splits:
            return vector.deltas[name]
        return _stack([vector.deltas[f"{name}{SEPARATOR}{s}"] for s, _, _ in splits[name].parts])

    layouts = {n: splits[n].layout if n in splits else vector.layouts[n] for n in names}
    return replace(vector, deltas=LazyMap(list(names), make), layouts=layouts)


def _stack(parts: list[Delta]) -> Delta:
    """Rows on top of one another. Factors that share A keep their rank; others become block-diagonal, exactly."""
    factored = [p for p in parts if isinstance(p, LowRankDelta)]
    if len(factored) < len(parts):
        return DenseDelta(torch.cat([p.dense() for p in parts], dim=0))
    first = factored[0]
    if all(p.A.shape == first.A.shape and torch.equal(p.A, first.A) for p in factored):
        return LowRankDelta(torch.cat([p.B for p in factored], dim=0), first.A)
    rows, rank = sum(p.B.shape[0] for p in factored), sum(p.B.shape[1] for p in factored)
    B = first.B.new_zeros(rows, rank)
    row = column = 0
    for p in factored:
        B[row : row + p.B.shape[0], column : column + p.B.shape[1]] = p.B
        row, column = row + p.B.shape[0], column + p.B.shape[1]
    return LowRankDelta(B, torch.cat([p.A for p in factored], dim=0))
