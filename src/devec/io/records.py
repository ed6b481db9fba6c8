"""The ``.devec`` folder of an output: recipe, lock, journal, summary and manifest.

Every file is a function of the inputs alone (no clock, no host), so that two runs write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from devec.core.provenance import SCHEMA, Provenance, plain
from devec.io.disk import refusing, sha256_of, write_file

RECORDS = ".devec"
MANIFEST = f"{RECORDS}/manifest.json"

RECIPE_KEY, LOCK_KEY = "devec.recipe", "devec.lock"
"""Metadata of an output that is one file: the recipe as YAML, and the SHA-256 of what ``lock.json`` would hold."""

RESERVED = "0" * 64
"""What stands for a hash until it is known."""


@dataclass(frozen=True)
class TensorRecord:
    """One journal line: a tensor as it was written."""

    name: str
    file: str
    blake3: str
    bytes: int


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in ("devec", "torch", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def dump_json(value: object) -> bytes:
    """Readable JSON, the same bytes for the same value; NaN and infinity are refused (they are not JSON)."""
    return (json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def dump_yaml(value: object) -> bytes:
    """Readable YAML in the order given."""
    text: str = yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=100)
    return text.encode()


def lock_hash(provenance: Provenance) -> str:
    """SHA-256 of the lock file: of all input hashes, versions and the seed."""
    return hashlib.sha256(dump_json(provenance.to_lock())).hexdigest()


def write_records(
    folder: Path,
    provenance: Provenance,
    *,
    journal: Iterable[TensorRecord] = (),
    summary: Mapping[str, object] | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Write ``.devec/`` into a finished output folder; the manifest comes last and covers every other file.

    ``known`` maps a file's path inside the folder to a SHA-256 that the writer has already computed.
    """
    records = folder / RECORDS
    with refusing(records):
        records.mkdir()
    write_file(records / "recipe.yaml", dump_yaml(provenance.to_recipe()))
    write_file(records / "lock.json", dump_json(provenance.to_lock()))
    lines = (json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in journal)
    write_file(records / "journal.jsonl", "".join(lines).encode())
    write_file(records / "summary.json", dump_json(summary or {}))
    write_file(folder / MANIFEST, dump_json(build_manifest(folder, known)))


def build_manifest(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, object]:
    """``{"schema", "files": {path: {"sha256", "bytes"}}}`` of every file of ``folder`` except the manifest itself."""
    known = known or {}
    files = {
        name: {"sha256": known.get(name) or sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in list_files(folder)
        if name != MANIFEST
    }
    return {"schema": SCHEMA, "files": files}


def list_files(folder: Path) -> list[str]:
    """Every file below ``folder``, as sorted POSIX paths relative to it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
