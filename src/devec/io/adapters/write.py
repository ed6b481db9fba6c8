"""Adapters written in the dialect that they came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from devec.core.provenance import Provenance
from devec.core.vectors import TaskVector
from devec.io.adapters.peft_write import write_peft
from devec.io.model_folder import WrittenModel


def write_adapter(
    out: Path,
    vector: TaskVector,
    *,
    provenance: Provenance,
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    strict: bool = False,
    summary: Mapping[str, object] | None = None,
    card_text: str | None = None,
    inputs: Sequence[Path] = (),
) -> WrittenModel:
    """A factored vector as diffusers keys if it came in them, as a PEFT folder otherwise."""
    if vector.origin.dialect == "diffusers":
        from devec.io.adapters.diffusers_write import write_diffusers

        return write_diffusers(
            out, vector, provenance=provenance, dtype=dtype, overwrite=overwrite, strict=strict, summary=summary,
            card_text=card_text, inputs=inputs,
        )
    return write_peft(
        out, vector, provenance=provenance, heads=heads, dtype=dtype, overwrite=overwrite, strict=strict,
        summary=summary, card_text=card_text, inputs=inputs,
    )
