"""Norms and inner products of the vectors over a whole tensor, for merges that need angles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole


def measure_gram(whole: Whole, **_: Any) -> list[list[float]]:
    """``<Delta_i, Delta_j>`` in float64; factors are never multiplied out. Zeros for a vector that lacks the tensor."""

    def look(blocks: Iterable[Block]) -> Tensor | None:
        total: Tensor | None = None
        for block in blocks:
            part = torch.zeros(len(block.deltas), len(block.deltas), dtype=torch.float64)
            for i, a in enumerate(block.deltas):
                for j, b in enumerate(block.deltas[: i + 1]):
                    if a is not None and b is not None:
                        part[i, j] = part[j, i] = a.inner(b)
            total = part if total is None else total + part
        return total

    found = [part for part in whole(look) if part is not None]
    return sum(found[1:], found[0]).tolist() if found else []


def cosine(gram: list[list[float]], i: int, j: int) -> float | None:
    """The cosine of two vectors, ``None`` where one of them is zero."""
    size = (gram[i][i] * gram[j][j]) ** 0.5 if gram else 0.0
    return max(-1.0, min(1.0, gram[i][j] / size)) if size > 0.0 else None
