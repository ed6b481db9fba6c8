"""What the methods that need data are given in ``Block.stats``: one value per vector, ``None`` for what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.errors import InputError, UsageError
from devec.linalg.numerics import CORE


def given(block: Block, method: str, key: str) -> Sequence[Any]:
    """``block.stats[key]``. Raises UsageError where it is not there, or not one value per vector."""
    values = block.stats.get(key)
    if not isinstance(values, Sequence) or len(values) != len(block.deltas):
        raise UsageError(
            f"{method} needs statistics of data: {key} of every vector", values={"vectors": len(block.deltas)},
            remedy="In Python: devec.merge(..., statistics_of=devec.collect(...)).",
        )
    return values


def statistic(block: Block, values: Sequence[Any], i: int, shape: tuple[int, int]) -> Tensor | None:
    """The i-th value in float64. Raises InputError for another shape, NaN or infinity."""
    value = values[i]
    if value is None:
        return None
    if tuple(value.shape) != shape:
        raise InputError(
            f"the statistics of vector {block.vectors[i]} do not fit the tensor", tensor=block.name,
            values={"statistics": tuple(value.shape), "wanted": shape},
            remedy="Collect them for these models and this base.",
        )
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"the statistics of vector {block.vectors[i]} are not finite", tensor=block.name)
    wide: Tensor = value.to(CORE)
    return wide
