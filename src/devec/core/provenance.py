"""What an output was made from, as plain data. Nothing here reads a file, a clock or a host name.

Two runs of the same command on the same inputs must write the same bytes, so a record holds no time, no process,
no user and no path that the user did not type himself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import PurePath

import torch

SCHEMA = 1


@dataclass(frozen=True)
class InputRecord:
    """One input as it was found.

    ``reference`` what the user typed; ``path`` the file or folder that was read (only its last component is ever
    written out); ``sha256`` one hash, or file name -> hash for a folder; ``kind`` e.g. "checkpoint", "peft",
    "artifact"; ``revision`` the resolved commit of a hub reference.
    """

    reference: str
    path: str | None = None
    sha256: str | Mapping[str, str] | None = None
    kind: str = "checkpoint"
    revision: str | None = None

    def to_dict(self) -> dict[str, object]:
        record: dict[str, object] = {"reference": self.reference, "kind": self.kind}
        if self.path is not None:
            record["file"] = PurePath(self.path).name
        if self.revision is not None:
            record["revision"] = self.revision
        if self.sha256 is not None:
            record["sha256"] = plain(self.sha256)
        return record


@dataclass(frozen=True)
class Provenance:
    """How an output came to be: enough to run it again (:meth:`to_recipe`) and to see whether anything it was
    made from has changed since (:meth:`to_lock`).

    ``recipe`` is the user's own resolved recipe, where the command has one; it then stands for ``to_recipe()``.
    """

    command: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    inputs: tuple[InputRecord, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    out_dtype: str | None = None
    recipe: Mapping[str, object] | None = None

    def to_recipe(self) -> dict[str, object]:
        """The recipe as plain data (strings, numbers, lists, dicts)."""
        if self.recipe is not None:
            return _plain_mapping(self.recipe)
        recipe: dict[str, object] = {
            "schema": SCHEMA,
            "command": self.command,
            "inputs": [record.reference for record in self.inputs],
            "parameters": plain(self.parameters),
            "seed": self.seed,
            "dtype": self.dtype,
        }
        if self.out_dtype is not None:
            recipe["out_dtype"] = self.out_dtype
        return recipe

    def to_lock(self) -> dict[str, object]:
        """Inputs with their hashes, library versions and seed, as plain data."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "inputs": [record.to_dict() for record in self.inputs],
            "versions": dict(sorted(self.versions.items())),
            "seed": self.seed,
            "dtype": self.dtype,
        }


def plain(value: object) -> object:
    """``value`` as data that JSON and YAML write the same way every time (sets are sorted, paths and dtypes named).

    Raises ``TypeError`` for anything else, rather than writing a memory address into a record.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, AbstractSet):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def _plain_mapping(value: Mapping[str, object]) -> dict[str, object]:
    return {str(key): plain(item) for key, item in value.items()}
