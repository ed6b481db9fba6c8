"""Is what stands in the place of an output what this very command writes? As far as its own records tell.

A run that was killed after its last step has nothing left to do, and ``--resume`` says so. An output is this command's
when the recipe, the versions and the inputs with their hashes are those that it records, its weight files are those
that would be written, and every file is still what its manifest (or, of one file, its header) says. A record that is
missing proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from devec.core.errors import InputError
from devec.core.provenance import Provenance
from devec.io.folder import exists
from devec.io.model_folder import ModelPlan, WrittenModel, companions
from devec.io.records import LOCK_KEY, MANIFEST, RECIPE_KEY, RECORDS, RESERVED, dump_json, dump_yaml, lock_hash
from devec.io.safetensors_file import SafetensorsFile
from devec.io.verify import verify_output
from devec.io.writer import nbytes

Asked = Callable[[bool], Provenance]
"""``provenance(hashes)`` of the command that was given; with hashes it reads every input."""


def written_model(plan: ModelPlan, provenance: Asked, base: Path | None) -> WrittenModel:
    """The checkpoint that a run of ``plan`` has written. Raises RefusedError, which says in what it differs."""
    if plan.single:
        return written_file(plan.out, provenance, plan)
    files = {n: (shard.filename, nbytes(info)) for shard in plan.shards for n, info in shard.entries}
    return written_folder(plan.out, provenance, files, ["README.md", *companions(base)])


def written_folder(
    out: Path,
    provenance: Asked,
    tensors: Mapping[str, tuple[str, int]] | None = None,
    beside: Iterable[str] = (),
) -> WrittenModel:
    """The folder that a run has written: ``tensors`` name -> (file, bytes), where known, and files ``beside`` them."""
    if not out.is_dir() or not (out / MANIFEST).is_file():
        raise exists(out, "it has no records of devec")
    _check_same(out, _content(out, "recipe.yaml"), dump_yaml(provenance(False).to_recipe()), "another command")
    _check_same(
        out, _content(out, "lock.json"), dump_json(_hashed(out, provenance).to_lock()), "other inputs or versions"
    )
    try:
        lines = [json.loads(line) for line in _content(out, "journal.jsonl").splitlines()]
        found = {line["name"]: (line["file"], int(line["bytes"])) for line in lines}
    except (ValueError, KeyError, TypeError):
        raise exists(out, "its journal cannot be read") from None
    if tensors is not None and found != tensors:
        raise exists(out, "its tensors or files differ")
    _check_sound(out)
    lacking = [name for name in beside if not (out / name).is_file()]
    if lacking:
        raise exists(out, f"{lacking[0]} is missing")
    files = tuple(dict.fromkeys(file for file, _ in found.values()))
    return WrittenModel(out, files, len(found), sum(size for _, size in found.values()))


def written_file(out: Path, provenance: Asked, plan: ModelPlan | None = None) -> WrittenModel:
    """The one file that a run has written, by what its header records."""
    try:
        with SafetensorsFile(out) as file:
            metadata = dict(file.metadata)
            infos = {n: file.info(n) for n in file.names()}
    except InputError:
        raise exists(out, "it is no weight file of devec") from None
    recipe = dump_yaml(provenance(False).to_recipe()).decode()
    _check_same(out, metadata.get(RECIPE_KEY), recipe, "another command")
    lock = metadata.get(LOCK_KEY)
    if lock is None or lock == RESERVED:
        raise exists(out, "it does not record its inputs' hashes")
    _check_same(out, lock, lock_hash(_hashed(out, provenance)), "other inputs or versions")
    if plan is not None and infos != {n: info for shard in plan.shards for n, info in shard.entries}:
        raise exists(out, "its tensors differ")
    _check_sound(out)
    return WrittenModel(out, (out.name,), len(infos), sum(map(nbytes, infos.values())))


def _hashed(out: Path, provenance: Asked) -> Provenance:
    found = provenance(True)
    if any(record.sha256 is None for record in found.inputs):
        raise exists(out, "an input has no hash")
    return found


def _content(out: Path, name: str) -> bytes:
    try:
        return (out / RECORDS / name).read_bytes()
    except OSError:
        raise exists(out, f"it has no {name}") from None


def _check_same(out: Path, recorded: object, wanted: object, unlike: str) -> None:
    if recorded != wanted:
        raise exists(out, unlike)


def _check_sound(out: Path) -> None:
    try:
        sound = verify_output(out, check=False).ok
    except InputError:
        sound = False
    if not sound:
        raise exists(out, "it was changed since (see devec verify)")
