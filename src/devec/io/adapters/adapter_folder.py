"""An adapter on disk: weights, configuration, card and records, in one folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from devec.core.errors import RefusedError, SideStepError
from devec.core.provenance import Provenance
from devec.io.card import model_card
from devec.io.disk import write_file
from devec.io.folder import OutputFolder
from devec.io.model_folder import WrittenModel
from devec.io.records import TensorRecord, write_records
from devec.io.writer import save_file

ROOM = 1 << 20
"""Bytes allowed for everything but the tensors when free space is checked."""


class FolderOptions(TypedDict, total=False):
    """How an adapter is written, whatever its dialect."""

    overwrite: bool
    strict: bool
    summary: Mapping[str, object] | None
    card_text: str | None
    inputs: Sequence[Path]


@dataclass(frozen=True)
class AdapterFiles:
    """What a dialect decides: the weight file's name and tensors, further files, and what the card says."""

    weights: str
    tensors: Mapping[str, Tensor]
    hub_library: str
    base_model: str | None = None
    tags: tuple[str, ...] = ("lora",)
    others: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def write_adapter_folder(
    out: Path,
    files: AdapterFiles,
    provenance: Provenance,
    *,
    overwrite: bool = False,
    strict: bool = False,
    summary: Mapping[str, object] | None = None,
    card_text: str | None = None,
    inputs: Sequence[Path] = (),
) -> WrittenModel:
    """Write the folder. Raises SideStepError when only the card failed (``strict``: RefusedError, nothing written)."""
    with OutputFolder(out, overwrite=overwrite, inputs=inputs, expected_bytes=files.bytes + ROOM) as folder:
        written, failed = fill_adapter_folder(
            folder.path, out, files, provenance, strict=strict, summary=summary, card_text=card_text
        )
    raise_side_step(failed, out)
    return written


def fill_adapter_folder(
    folder: Path,
    out: Path,
    files: AdapterFiles,
    provenance: Provenance,
    *,
    strict: bool = False,
    summary: Mapping[str, object] | None = None,
    card_text: str | None = None,
) -> tuple[WrittenModel, str | None]:
    """Everything of an adapter that will stand at ``out`` into ``folder``; also says which side step failed, if one
    did, for :func:`raise_side_step` once the folder is in place."""
    failed: str | None = None
    writer = save_file(folder / files.weights, files.tensors)
    for name, content in files.others.items():
        write_file(folder / name, content)
    try:
        card = model_card(
            provenance, title=out.name, base_models=[files.base_model] if files.base_model else [],
            relation="adapter", library=files.hub_library, tags=files.tags, text=card_text,
        )
        write_file(folder / "README.md", card.encode())
    except (OSError, ValueError, TypeError, RefusedError) as error:
        failed = f"README.md: {error}"
        if strict:
            raise RefusedError("the card failed and --strict was given", values={"reason": failed}) from error
    journal = [
        TensorRecord(
            n, files.weights, writer.tensor_hashes[n], files.tensors[n].numel() * files.tensors[n].element_size()
        )
        for n in writer.order
    ]
    write_records(folder, provenance, journal=journal, summary=summary, known={files.weights: writer.sha256})
    return WrittenModel(out, (files.weights,), len(journal), files.bytes, files.notes), failed


def raise_side_step(failed: str | None, out: Path) -> None:
    """Raises SideStepError (exit 6) where a side step failed and the output is in place."""
    if failed is not None:
        raise SideStepError("the weights are written, but a side step failed", values={"failed": failed}, file=out)
