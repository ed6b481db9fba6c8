"""Small models in memory and their merges, for tests of merge methods against tests/reference/elementwise.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devec.api.merge import merge
from devec.core.delta import DenseDelta
from devec.core.layout import Layout
from devec.core.vectors import TaskVector

Tensors = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "up.weight": (14, 9), "conv.weight": (6, 3, 2, 2), "norm.bias": (11,), "temperature": (), "down.weight": (7, 20),
}  # fmt: skip
NAMES = "ABCDEFGH"


def models(count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensors]:
    """Changes whose sizes differ between models and tensors, as those of fine-tuning do."""
    g = torch.Generator().manual_seed(seed)
    return [
        {n: (0.01 * (1 + i) * (1 + j) * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype)
         for j, (n, s) in enumerate(SHAPES.items())}
        for i in range(count)
    ]  # fmt: skip


def vector(name: str, tensors: Tensors, transposed: bool = False) -> TaskVector:
    """``transposed``: two-dimensional tensors lie in their file as ``in x out``."""
    layouts = {
        n: Layout(tuple(reversed(t.shape)), transposed=True) if transposed and t.ndim == 2 else Layout(tuple(t.shape))
        for n, t in tensors.items()
    }
    deltas = {n: DenseDelta(Layout(tuple(t.shape)).to_matrix(t)) for n, t in tensors.items()}
    return TaskVector(name, deltas, layouts)


def merged(method: str, given: Sequence[Tensors], transposed: bool = False, **parameters: Any) -> Tensors:
    """The method through the library, tensor by tensor in blocks of rows."""
    vectors = [vector(NAMES[i], tensors, transposed) for i, tensors in enumerate(given)]
    out = merge(method, vectors, parameters=parameters).vector
    return {n: Layout(tuple(t.shape)).to_stored(out.deltas[n].dense()) for n, t in given[0].items()}


def arrays(given: Sequence[Tensors]) -> list[dict[str, np.ndarray]]:
    return [{n: t.double().numpy() for n, t in tensors.items()} for tensors in given]


def close(found: Tensors, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Every entry, relative to the largest of its tensor."""
    assert list(found) == list(wanted)
    for n, w in wanted.items():
        assert found[n].shape == w.shape, n
        error = np.abs(found[n].double().numpy() - w).max()
        assert error <= tolerance * max(np.abs(w).max(), 1e-30), f"{n}: {error:.2e}"
