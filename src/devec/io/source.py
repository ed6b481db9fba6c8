"""Open whatever a path holds: an adapter or a checkpoint, decided by its content."""

from __future__ import annotations

from pathlib import Path

import torch

from devec.core.vectors import TaskVector
from devec.io.adapters import read_adapter
from devec.io.checkpoint import Checkpoint, open_checkpoint
from devec.io.dialect import is_adapter


def open_source(
    path: str | Path, *, name: str | None = None, base: Checkpoint | None = None, dtype: torch.dtype = torch.float32
) -> TaskVector | Checkpoint:
    """An adapter as its own delta, anything else as a checkpoint. Errors are those of the two readers."""
    if is_adapter(path):
        return read_adapter(path, name=name, base=base, dtype=dtype)
    return open_checkpoint(path)
