"""A merged checkpoint as a Hugging Face folder (or one safetensors file) that other programs load unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo, TensorSource
from devec.core.errors import DevecError, InputError, RefusedError, SideStepError
from devec.core.provenance import Provenance
from devec.io.card import Relation, model_card
from devec.io.disk import write_file
from devec.io.folder import OutputFolder, output_file
from devec.io.records import dump_yaml, write_records
from devec.io.shards import DEFAULT_SHARD_SIZE, Shard, ShardWriter, plan_shards
from devec.io.writer import nbytes

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*preprocessor_config.json",
    "processor_config.json",
)
"""What a model needs beside its weights and its config: never weights, never code."""

_COMPANION_SUFFIXES = {".json", ".jsonl", ".txt", ".model", ".tiktoken", ".jinja", ".bpe"}
_RECIPE_KEY = "devec.recipe"
_ROOM = 1 << 24
"""Bytes allowed for everything but the tensors when free space is checked."""


class ModelSource(TensorSource, Protocol):
    """The base of an output: its tensors, and where it has them, its config and the folder it lies in."""

    @property
    def config(self) -> Mapping[str, object] | None: ...

    @property
    def folder(self) -> Path | None: ...


@dataclass(frozen=True)
class WrittenModel:
    """What was written: ``path``, weight ``files``, ``tensors`` and their ``bytes``, and ``notes`` for the user."""

    path: Path
    files: tuple[str, ...]
    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()


Tensors = Callable[[str], Tensor] | Iterable[tuple[str, Tensor]]


def write_model_folder(
    out: Path,
    source: ModelSource,
    tensors: Tensors,
    *,
    provenance: Provenance,
    out_dtype: torch.dtype | None = None,
    infos: Mapping[str, TensorInfo] | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    strict: bool = False,
    base_models: Sequence[str] = (),
    relation: Relation = "merge",
    tags: Sequence[str] = (),
    summary: Mapping[str, object] | None = None,
    card_text: str | None = None,
    metadata: Mapping[str, str] | None = None,
    inputs: Sequence[Path] = (),
    on_tensor: Callable[[str, int], None] | None = None,
) -> WrittenModel:
    """Write every tensor of ``source`` with the values that ``tensors`` gives, in ``source``'s own layout.

    ``tensors`` is a function of the name, called in writing order, or (name, value) pairs in any order; each value
    has the stored shape and any float dtype, and is rounded to nearest last. ``out_dtype`` holds for float tensors
    (default: the dtype that ``source`` stores each one in); integers are written bit for bit. ``infos`` replaces
    shape and dtype of single tensors (e.g. a resized vocabulary). Tied tensors are written once. ``out`` ending in
    ``.safetensors`` gives that one file, with recipe and tensor hashes in its metadata; any other name gives a folder.

    Memory: one tensor. Nothing stands under ``out`` before all is written.

    Raises :class:`RefusedError` (the output exists, is an input, the disk is full, a value overflows ``out_dtype``),
    :class:`IncompatibleError` (a value is NaN or of another shape), and :class:`SideStepError` when the weights are
    in place but card or tokenizer are not; with ``strict`` that is a refusal and nothing is written.
    """
    out = Path(out)
    entries = plan_entries(source, out_dtype, infos)
    expected = sum(nbytes(info) for _, info in entries) + _ROOM
    kept = [*inputs, *([source.folder] if source.folder is not None else _files(source))]
    if out.suffix == ".safetensors":
        header = {_RECIPE_KEY: dump_yaml(provenance.to_recipe()).decode(), **_tie_metadata(source), **(metadata or {})}
        with output_file(out, overwrite=overwrite, inputs=kept, expected_bytes=expected) as partial:
            shard = Shard(partial.name, tuple(entries))
            writer = _write_weights(partial.parent, [shard], tensors, header, on_tensor, hashes_in_header=True)
        return WrittenModel(out, (out.name,), len(entries), writer.total_size)

    notes: list[str] = []
    failed: list[str] = []
    with OutputFolder(out, overwrite=overwrite, inputs=kept, expected_bytes=expected) as folder:
        header = {**_tie_metadata(source), **(metadata or {})}
        writer = _write_weights(folder.path, plan_shards(entries, shard_size), tensors, header, on_tensor)
        _write_config(folder.path, source, entries, out_dtype)
        if source.config is not None and "auto_map" in source.config:
            notes.append("the base's config names custom code (auto_map), which is not copied")
        failed += _copy_companions(folder.path, source.folder)

        def card() -> str:
            return model_card(
                provenance, title=out.name, base_models=base_models, relation=relation, library="transformers",
                tags=tags, text=card_text,
            )

        failed += _side_step("README.md", lambda: write_file(folder.path / "README.md", card().encode()))
        if failed and strict:
            raise RefusedError(
                "a side step failed and --strict was given, so nothing is written",
                values={"failed": "; ".join(failed)}, file=out, remedy="Mend it, or leave --strict out.",
            )
        write_records(
            folder.path, provenance, journal=writer.journal(), summary=summary, known=writer.hashes()
        )
    if failed:
        raise SideStepError(
            "the weights are written, but a side step failed",
            values={"failed": "; ".join(failed)}, file=out, remedy="Copy the file by hand, or run again.",
        )
    return WrittenModel(out, tuple(s.filename for s in writer.shards), len(entries), writer.total_size, tuple(notes))


def plan_entries(
    source: TensorSource, out_dtype: torch.dtype | None = None, infos: Mapping[str, TensorInfo] | None = None
) -> list[tuple[str, TensorInfo]]:
    """Name, shape and output dtype of every tensor that will be written, in ``source`` order, aliases left out."""
    entries = []
    stored = set(source.names())
    for name in source.names():
        if source.ties.get(name) in stored:
            continue
        info = (infos or {}).get(name) or source.info(name)
        if out_dtype is not None and info.dtype.is_floating_point:
            info = TensorInfo(info.shape, out_dtype)
        entries.append((name, info))
    return entries


def _write_weights(
    folder: Path,
    shards: Sequence[Shard],
    tensors: Tensors,
    metadata: Mapping[str, str],
    on_tensor: Callable[[str, int], None] | None,
    *,
    hashes_in_header: bool = False,
) -> ShardWriter:
    writer = ShardWriter(folder, shards, metadata, hashes_in_header=hashes_in_header)
    pairs = ((n, tensors(n)) for n in writer.names) if callable(tensors) else tensors
    try:
        for name, value in pairs:
            size = writer.put(name, value)
            if on_tensor is not None:
                on_tensor(name, size)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return writer


def _tie_metadata(source: TensorSource) -> dict[str, str]:
    """alias -> stored name, which is how safetensors' own model loader finds a tensor stored under another name."""
    return dict(sorted(source.ties.items()))


def _files(source: TensorSource) -> list[Path]:
    return [Path(f) for f in dict.fromkeys(source.file_of(n) for n in source.names()) if Path(f).exists()]


def _write_config(
    folder: Path, source: ModelSource, entries: Sequence[tuple[str, TensorInfo]], out_dtype: torch.dtype | None
) -> None:
    """config.json as the base has it; its dtype fields follow ``out_dtype`` if every float tensor does."""
    if source.config is None:
        return
    floats = {info.dtype for _, info in entries if info.dtype.is_floating_point}
    config = dict(source.config)
    if out_dtype is not None and floats == {out_dtype}:
        config = _with_dtype(config, str(out_dtype).removeprefix("torch."))
    original = source.folder / "config.json" if source.folder is not None else None
    if config == source.config and original is not None and original.is_file():
        try:
            data = original.read_bytes()
        except OSError as error:
            raise InputError("the base's config cannot be read", file=original) from error
    else:
        data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    write_file(folder / "config.json", data)


def _with_dtype(config: Mapping[str, object], name: str) -> dict[str, object]:
    edited: dict[str, object] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            edited[key] = name
        elif isinstance(value, Mapping) and key != "quantization_config":
            edited[key] = _with_dtype(value, name)
        else:
            edited[key] = value
    return edited


def is_companion(name: str) -> bool:
    """Whether the file ``name`` of a model's folder or repository (with ``/`` between folders) is one of COMPANIONS."""
    path = PurePosixPath(name)
    if path.suffix not in _COMPANION_SUFFIXES or name.endswith(".index.json"):
        return False
    patterns = (PurePosixPath(pattern).parts for pattern in COMPANIONS)
    return any(
        len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts)) for parts in patterns
    )


def _copy_companions(folder: Path, base: Path | None) -> list[str]:
    """Copy tokenizer, chat template and the like; returns what failed."""
    if base is None:
        return []
    found = {p for pattern in COMPANIONS for p in base.glob(pattern) if is_companion(p.relative_to(base).as_posix())}
    failed: list[str] = []
    for path in sorted(found):
        target = folder / path.relative_to(base)
        if path.is_dir():
            continue

        def copy(path: Path = path, target: Path = target) -> None:
            data = path.read_bytes()
            target.parent.mkdir(exist_ok=True)
            write_file(target, data)

        failed += _side_step(target.name, copy)
    return failed


def _side_step(what: str, step: Callable[[], object]) -> list[str]:
    try:
        step()
    except (OSError, ValueError, TypeError, DevecError) as error:
        return [f"{what}: {error}"]
    return []
