"""What outputs say of their inputs: references, files, hashes of what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from devec.api.references import named_paths
from devec.core.contracts import TensorSource
from devec.core.provenance import InputRecord
from devec.core.vectors import TaskVector
from devec.io import artifact
from devec.io.checkpoint import Checkpoint, open_checkpoint
from devec.io.disk import sha256_of
from devec.io.records import RECIPE_KEY, RECORDS
from devec.io.safetensors_file import SafetensorsFile


def input_record(v: TaskVector, hashes: bool = True) -> InputRecord:
    """A vector as an input in recipe, lock and card; with ``hashes``, that of what was read (of a checkpoint, its
    fingerprint)."""
    reference = v.origin.reference if v.origin.reference != "memory" else v.name
    named = source_paths(v)
    if named and named[0].is_dir() and artifact.artifact_kind(named[0]):
        files = [n for n in artifact.FILES if hashes and (named[0] / n).is_file()]
        hashes_of = {n: sha256_of(named[0] / n) for n in files} or None
        return InputRecord(reference, str(named[0]), hashes_of, "artifact", v.origin.revision)
    path = Path(v.origin.file) if v.origin.file else None
    digest: str | None = None
    if hashes and path is not None and v.origin.dialect == "checkpoint" and path.exists():
        model = v.origin.model if isinstance(v.origin.model, Checkpoint) else open_checkpoint(path)
        digest = model.fingerprint()
    elif hashes and path is not None and path.is_file():
        digest = sha256_of(path)
    if path is not None and v.origin.revision is not None and v.origin.revision.endswith(path.name):
        path = None  # the Hub's cache names a folder by its commit, which the record has already
    return InputRecord(reference, None if path is None else str(path), digest, v.origin.dialect, v.origin.revision)


def source_paths(v: TaskVector) -> list[Path]:
    """The files and folders that a vector was read from, as the user named them; an output may not change them."""
    found = [Path(v.origin.file)] if v.origin.file else []
    if v.origin.reference != "memory":
        found = [*named_paths(v.origin.reference), *found]
    if v.origin.dialect == "checkpoint" and v.origin.base_name:
        found.append(Path(v.origin.base_name))
    return [path for path in found if path.exists()]


def recipe_of(source: TensorSource) -> dict[str, Any]:
    """What devec recorded when it wrote a model; empty for a model that it did not write."""
    folder: Path | None = getattr(source, "folder", None)
    text = ""
    if folder is not None:
        file = folder / RECORDS / "recipe.yaml"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    elif (path := Path(source.reference)).is_file() and path.suffix == ".safetensors":
        with SafetensorsFile(path) as one:
            text = one.metadata.get(RECIPE_KEY, "")
    found = yaml.safe_load(text)
    return found if isinstance(found, dict) else {}
