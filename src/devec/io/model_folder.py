"""A merged checkpoint as a Hugging Face folder (or one safetensors file) that other programs load unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch

from devec.core.contracts import TensorInfo, TensorSource
from devec.core.errors import DevecError, InputError, RefusedError, SideStepError
from devec.core.provenance import Provenance
from devec.io.card import Relation, model_card
from devec.io.disk import write_file
from devec.io.folder import OutputFolder, Run
from devec.io.records import dump_yaml, write_records
from devec.io.shards import DEFAULT_SHARD_SIZE, Fill, Shard, ShardWriter, plan_shards
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
RECIPE_KEY = "devec.recipe"
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


@dataclass(frozen=True)
class ModelPlan:
    """What will be written, known before any tensor is computed: files, their tensors, and what their headers say."""

    out: Path
    shards: tuple[Shard, ...]
    metadata: Mapping[str, str]

    @property
    def single(self) -> bool:
        """One ``.safetensors`` file, which carries recipe and tensor hashes itself."""
        return self.out.suffix == ".safetensors"

    @property
    def bytes(self) -> int:
        return sum(nbytes(info) for shard in self.shards for _, info in shard.entries)

    @property
    def tensors(self) -> int:
        return sum(len(shard.entries) for shard in self.shards)

    def digest(self) -> str:
        """SHA-256 over files, names, shapes, dtypes and metadata: equal plans give files that can be gone on with."""
        rows = [[s.filename, [[n, list(i.shape), str(i.dtype)] for n, i in s.entries]] for s in self.shards]
        return hashlib.sha256(json.dumps([rows, dict(self.metadata)]).encode()).hexdigest()

    def writer(self, folder: Path, *, reopen: bool = True) -> ShardWriter:
        """The files of the plan in ``folder``; several processes may open them."""
        return ShardWriter(folder, self.shards, self.metadata, hashes_in_header=self.single, reopen=reopen)


def plan_model(
    out: Path,
    source: TensorSource,
    provenance: Provenance,
    *,
    out_dtype: torch.dtype | None = None,
    infos: Mapping[str, TensorInfo] | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> ModelPlan:
    """Every tensor of ``source`` in ``source``'s own layout (see :func:`write_model_folder`)."""
    out = Path(out)
    entries = plan_entries(source, out_dtype, infos)
    header = {**_tie_metadata(source), **(metadata or {})}
    if out.suffix == ".safetensors":
        header[RECIPE_KEY] = dump_yaml(provenance.to_recipe()).decode()
        return ModelPlan(out, (Shard(out.name, tuple(entries)),), header)
    return ModelPlan(out, tuple(plan_shards(entries, shard_size)), header)


def write_model_folder(
    plan: ModelPlan,
    source: ModelSource,
    fill: Fill,
    *,
    provenance: Callable[[], Provenance],
    run: Run | None = None,
    out_dtype: torch.dtype | None = None,
    overwrite: bool = False,
    strict: bool = False,
    base_models: Sequence[str] = (),
    relation: Relation = "merge",
    tags: Sequence[str] = (),
    summary: Mapping[str, object] | None = None,
    card_text: str | None = None,
    inputs: Sequence[Path] = (),
) -> WrittenModel:
    """Write every tensor of ``source`` as ``plan`` says, with the values that ``fill`` puts into the writer.

    Each value has the stored shape and any float dtype, and is rounded to nearest last; integers are written bit for
    bit. The plan's ``out_dtype`` holds for float tensors (default: the dtype that ``source`` stores each one in), and
    its ``infos`` replace shape and dtype of single tensors (e.g. a resized vocabulary). Tied tensors are written once.
    A plan for a name that ends in ``.safetensors`` gives that one file, with recipe and tensor hashes in its metadata;
    any other name gives a folder. ``provenance`` is asked for once the weights are written, when every input was read.

    Nothing stands under ``out`` before all is written. With ``run`` the finished tensors outlive an interrupt.

    Raises :class:`RefusedError` (the output exists, is an input, the disk is full, a value overflows ``out_dtype``),
    :class:`IncompatibleError` (a value is NaN or of another shape), and :class:`SideStepError` when the weights are
    in place but card or tokenizer are not; with ``strict`` that is a refusal and nothing is written.
    """
    kept = [*inputs, *([source.folder] if source.folder is not None else _files(source))]
    place = OutputFolder(
        plan.out, overwrite=overwrite, inputs=kept, expected_bytes=plan.bytes + _ROOM, run=run, single=plan.single
    )
    notes: list[str] = []
    failed: list[str] = []
    with place as folder:
        writer = _filled(plan, folder, fill)
        if run is not None and run.shard is not None:
            return WrittenModel(folder.path, tuple(s.filename for s in plan.shards), 0, 0, (_shard_note(writer, run),))
        if not plan.single:
            _write_config(folder.path, source, plan, out_dtype)
            if source.config is not None and "auto_map" in source.config:
                notes.append("the base's config names custom code (auto_map), which is not copied")
            failed += _copy_companions(folder.path, source.folder)
            found = provenance()

            def card() -> str:
                return model_card(
                    found, title=plan.out.name, base_models=base_models, relation=relation, library="transformers",
                    tags=tags, text=card_text,
                )

            failed += _side_step("README.md", lambda: write_file(folder.path / "README.md", card().encode()))
            if failed and strict:
                raise RefusedError(
                    "a side step failed and --strict was given, so nothing is written",
                    values={"failed": "; ".join(failed)}, file=plan.out, remedy="Mend it, or leave --strict out.",
                )
            write_records(folder.path, found, journal=writer.journal(), summary=summary, known=writer.hashes())
    if failed:
        raise SideStepError(
            "the weights are written, but a side step failed",
            values={"failed": "; ".join(failed)}, file=plan.out, remedy="Copy the file by hand, or run again.",
        )
    files = tuple(s.filename for s in writer.shards)
    return WrittenModel(plan.out, files, plan.tensors, writer.total_size, tuple(notes))


def _filled(plan: ModelPlan, folder: OutputFolder, fill: Fill) -> ShardWriter:
    """The writer of a plan with every tensor in it; closed, or with shards left open for the others."""
    whole = folder.run is None or folder.run.shard is None
    writer = plan.writer(folder.path, reopen=folder.run is not None)
    try:
        if whole and not plan.single:
            with writer.following():
                fill(writer, folder.journal)
        else:
            fill(writer, folder.journal)
        if whole:
            writer.close()
    finally:
        writer.release()
    return writer


def _shard_note(writer: ShardWriter, run: Run) -> str:
    assert run.shard is not None
    done = len(writer.names) - len(writer.missing())
    return f"shard {run.shard[0]} of {run.shard[1]} has written {done} tensors; devec join finishes when all have"


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


def _tie_metadata(source: TensorSource) -> dict[str, str]:
    """alias -> stored name, which is how safetensors' own model loader finds a tensor stored under another name."""
    return dict(sorted(source.ties.items()))


def _files(source: TensorSource) -> list[Path]:
    return [Path(f) for f in dict.fromkeys(source.file_of(n) for n in source.names()) if Path(f).exists()]


def _write_config(
    folder: Path, source: ModelSource, plan: ModelPlan, out_dtype: torch.dtype | None
) -> None:
    """config.json as the base has it; its dtype fields follow ``out_dtype`` if every float tensor does."""
    if source.config is None:
        return
    floats = {info.dtype for shard in plan.shards for _, info in shard.entries if info.dtype.is_floating_point}
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
