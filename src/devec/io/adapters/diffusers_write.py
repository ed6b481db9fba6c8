"""A task vector as a LoRA file that diffusers' ``load_lora_weights`` reads as it is.

Keys are ``<component>.<module>.lora_A.weight`` and ``.lora_B.weight``, the spelling that current diffusers uses inside.
The scale of a delta is folded into its factors and no alpha is written, which readers take as scale 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.delta import LowRankDelta
from devec.core.errors import RefusedError
from devec.core.layout import Layout
from devec.core.provenance import Provenance
from devec.core.vectors import TaskVector
from devec.io.adapters.adapter_folder import ROOM, AdapterFiles, FolderOptions, write_adapter_folder
from devec.io.folder import output_file
from devec.io.model_folder import WrittenModel
from devec.io.records import LOCK_KEY, RECIPE_KEY, dump_yaml, lock_hash
from devec.io.rounding import cast
from devec.io.writer import SafetensorsWriter

WEIGHTS = "pytorch_lora_weights.safetensors"
_REMEDY = "Give a rank (--rank R or --energy E), or --base to write a checkpoint."


def to_diffusers(vector: TaskVector, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors whose loading at scale 1 adds exactly ``vector``, and notes for the user.

    Math        delta(module) = lora_B lora_A
    Shapes      lora_A (r, in), lora_B (out, r); convolutions (r, in, k, k), (out, r, 1, 1)
    Ranks       one rank a component (unet, text encoder): many releases of diffusers take the first module's rank as
                the alpha of all, so factors of lower rank are filled with zeros, which changes no product
    Left out    modules of rank 0; if that is all of them they are kept as zeros of rank 1, so that it still loads

    Raises :class:`RefusedError` for a nonzero delta that a LoRA cannot hold (dense, or of a 1-D parameter).
    """
    factors: dict[str, LowRankDelta] = {}
    for name, delta in vector.deltas.items():
        layout = vector.layouts[name]
        if layout.is_vector or not name.endswith(".weight"):
            if delta.norm() > 0:
                raise _refused("a LoRA cannot hold a change of this tensor", name, vector, layout)
            continue
        if not isinstance(delta, LowRankDelta):
            if delta.norm() > 0:
                raise _refused("the change is not low-rank, and a LoRA must be", name, vector, layout)
            rows, cols = delta.shape
            delta = LowRankDelta(torch.zeros(rows, 0), torch.zeros(0, cols))
        factors[name] = delta
    if not factors:
        raise RefusedError(
        "there is nothing to write: no tensor is shared, or none is left", values={"vector": vector.name}
    )
    notes: list[str] = []
    empty = [n for n, d in factors.items() if d.B.shape[1] == 0]
    if len(empty) < len(factors):
        factors = {n: d for n, d in factors.items() if d.B.shape[1]}
        if empty:
            notes.append(f"{len(empty)} modules of rank 0 are left out: {', '.join(empty[:4])}")
    ranks: dict[str, set[int]] = {}
    for name, delta in factors.items():
        ranks.setdefault(name.partition(".")[0], set()).add(max(delta.B.shape[1], 1))
    for component, found in ranks.items():
        if len(found) > 1:
            notes.append(f"{component}: ranks {min(found)} to {max(found)} are filled with zeros to {max(found)}")
    tensors: dict[str, Tensor] = {}
    for name, delta in factors.items():
        B, A = _filled(delta, max(ranks[name.partition(".")[0]]))
        shape, r = vector.layouts[name].shape, A.shape[0]
        if len(shape) > 2:
            A, B = A.reshape(r, *shape[1:]), B.reshape(B.shape[0], r, *[1] * (len(shape) - 2))
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = cast(name, A.contiguous(), dtype)
        tensors[f"{module}.lora_B.weight"] = cast(name, B.contiguous(), dtype)
    return tensors, tuple(notes)


def _filled(delta: LowRankDelta, rank: int) -> tuple[Tensor, Tensor]:
    """B and A with zero columns and rows up to ``rank``."""
    more = rank - delta.B.shape[1]
    if more == 0:
        return delta.B, delta.A
    (rows, cols), like = delta.shape, delta.B
    return (
        torch.cat([delta.B, like.new_zeros(rows, more)], dim=1),
        torch.cat([delta.A, delta.A.new_zeros(more, cols)], dim=0),
    )


def _refused(what: str, name: str, vector: TaskVector, layout: Layout) -> RefusedError:
    values: dict[str, object] = {"vector": vector.name, "shape": layout.shape}
    return RefusedError(what, tensor=name, values=values, file=vector.origin.file, remedy=_REMEDY)


def write_diffusers(
    out: Path,
    vector: TaskVector,
    *,
    provenance: Provenance,
    dtype: torch.dtype = torch.float32,
    **options: Unpack[FolderOptions],
) -> WrittenModel:
    """Write ``vector`` as a folder (weights, card, ``.devec/``), or as one file if ``out`` ends in ``.safetensors``.

    One file carries recipe, tensor hashes and the lock's hash in its metadata. See :func:`to_diffusers` for what is
    refused.
    """
    out = Path(out)
    tensors, notes = to_diffusers(vector, dtype)
    files = AdapterFiles(WEIGHTS, tensors, "diffusers", base_model=vector.origin.base_name, notes=notes)
    if out.suffix != ".safetensors":
        return write_adapter_folder(out, files, provenance, **options)
    header = {RECIPE_KEY: dump_yaml(provenance.to_recipe()).decode(), LOCK_KEY: lock_hash(provenance)}
    overwrite, inputs = options.get("overwrite", False), options.get("inputs", ())
    with output_file(out, overwrite=overwrite, inputs=inputs, expected_bytes=files.bytes + ROOM) as partial:
        entries = [(n, TensorInfo(tuple(t.shape), t.dtype)) for n, t in tensors.items()]
        with SafetensorsWriter(partial, entries, header, hashes_in_header=True) as file:
            for name, value in tensors.items():
                file.put(name, value, finite=True)
    return WrittenModel(out, (out.name,), len(tensors), files.bytes, notes)
