"""Adapters written in the dialect that they came in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from devec.core.provenance import Provenance
from devec.core.vectors import TaskVector
from devec.io.adapters.adapter_folder import FolderOptions
from devec.io.adapters.diffusers_write import write_diffusers
from devec.io.adapters.peft_write import write_peft
from devec.io.model_folder import WrittenModel


def write_adapter(
    out: Path,
    vector: TaskVector,
    *,
    provenance: Provenance,
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Unpack[FolderOptions],
) -> WrittenModel:
    """A factored vector as diffusers keys if it came in them (they know no heads), as a PEFT folder otherwise."""
    if vector.origin.dialect == "diffusers":
        return write_diffusers(out, vector, provenance=provenance, dtype=dtype, **options)
    return write_peft(out, vector, provenance=provenance, heads=heads, dtype=dtype, **options)
