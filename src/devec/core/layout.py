"""How a tensor lies in its file, against the matrix that the mathematics sees.

The mathematics wants one orientation: a matrix ``out x in`` whose *columns* span the output side. Files differ:
GPT-2's Conv1D stores ``in x out``, a convolution stores ``out x in x k x k``, a bias is a vector. ``Layout`` is
the one place that turns one into the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch


@dataclass(frozen=True)
class Layout:
    """The stored shape of a tensor and whether the file holds the transpose of ``out x in``.

    Shapes: stored ``shape`` -> matrix ``(rows, cols)``.

    * 0-d and 1-d tensors become a column ``n x 1`` (as a row, a projector would be the identity);
    * 2-d tensors keep their shape, or are transposed when ``transposed`` (Conv1D, PEFT ``fan_in_fan_out``);
    * higher ranks (convolutions) become ``out x (in k k)``.

    ``embedding`` says whether the module is an embedding table, where the reader knows: PEFT spells its factors apart.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    embedding: bool | None = field(default=None, compare=False)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        if len(self.shape) <= 1:
            return (prod(self.shape), 1)
        rows, cols = self.shape[0], prod(self.shape[1:])
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def is_vector(self) -> bool:
        """True for what the method pages call 1-D parameters (biases, norms, scalars)."""
        return len(self.shape) <= 1

    def to_matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """The ``out x in`` matrix of a stored tensor (a view where that is possible)."""
        if tuple(stored.shape) != self.shape:
            raise ValueError(f"layout of shape {self.shape} given a tensor of shape {tuple(stored.shape)}")
        if len(self.shape) <= 1:
            return stored.reshape(-1, 1)
        matrix = stored.reshape(stored.shape[0], prod(stored.shape[1:]))
        return matrix.T if self.transposed else matrix

    def to_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_matrix`."""
        if tuple(matrix.shape) != self.matrix_shape:
            raise ValueError(f"layout wants a matrix {self.matrix_shape}, got {tuple(matrix.shape)}")
        return (matrix.T if self.transposed else matrix).reshape(self.shape)
