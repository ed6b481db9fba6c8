"""References to weights: what a user may type where a model or a vector is wanted.

``PATH`` · ``org/name[@revision]`` (the Hugging Face Hub) · ``BASE+ADAPTER`` (adapter applied to a base) ·
``ARTIFACT#part`` · ``name=REFERENCE``. In Python a state dict or a module stands for a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from devec.api.edit import edit
from devec.api.extract import delta_of, label_of
from devec.api.sources import hub_of, is_source, locate, pinned, places
from devec.core.contracts import TensorSource
from devec.core.decomposition import Decomposition
from devec.core.errors import IncompatibleError, UsageError
from devec.core.options import View
from devec.core.results import Finding
from devec.core.vectors import LazyMap, Pool, TaskVector, cost_of
from devec.io import artifact
from devec.io.adapters import is_adapter, read_adapter
from devec.io.checkpoint import (
    Checkpoint,
    checkpoint_from_module,
    checkpoint_from_state_dict,
    open_checkpoint,
)
from devec.io.hub_id import HubFolder
from devec.io.names import Selection, resolve_names

ModelLike = Any
"""A path, a reference, a Checkpoint, a state dict or a torch module."""


ViewLike = View | Mapping[str, Any] | None
"""How an artifact is read: a whole view, changes to the view that it stores, or (``None``) as it is stored."""


@dataclass(frozen=True)
class Reading:
    """How vectors are read: against which base, in which dtype, which tensors, and how artifacts are viewed.

    A decomposition that several parts are read from is opened, and its inputs are checked, once (``opened``).
    """

    base: TensorSource | None = None
    dtype: torch.dtype = torch.float32
    selection: Selection = field(default_factory=Selection)
    view: ViewLike = None
    opened: dict[Path, Decomposition] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Reference:
    """A parsed reference: ``path`` is the model or adapter, ``base`` is left of ``+``, ``part`` follows ``#``."""

    text: str
    name: str | None
    path: str
    base: str | None = None
    part: str | None = None


def parse(text: str) -> Reference:
    """Split a reference. A path that exists as typed is that path, whatever signs it holds."""
    name, rest = None, text
    match = re.match(r"^([A-Za-z0-9_.-]+)=(.+)$", text)
    if match and not Path(text).exists():
        name, rest = match.group(1), match.group(2)
    if Path(rest).exists():
        return Reference(text, name, rest)
    path, _, part = rest.partition("#")
    if not path:
        raise UsageError(f"{text!r} names no file", remedy="Write PATH, name=PATH, BASE+ADAPTER or ARTIFACT#part.")
    if Path(path).exists() or "+" not in path:
        return Reference(text, name, path, part=part or None)
    for at in [m.start() for m in re.finditer(r"\+", path)]:
        left, right = path[:at], path[at + 1 :]
        if is_source(left) and is_source(right):
            return Reference(text, name, right, base=left, part=part or None)
    left, _, right = path.partition("+")
    return Reference(text, name, right, base=left, part=part or None)


def named_paths(text: str) -> list[Path]:
    """The files and folders of a reference that exist: what an output may not replace or lie in."""
    ref = parse(text)
    return [found for p in (ref.path, ref.base) if p is not None for found in places(p)]


def pin(text: str) -> str:
    """The same reference with each id of the Hub at the commit that this process read it at.

    For other processes that are to read the same, whatever happens to branches meanwhile.
    """
    ref = parse(text)
    name = "" if ref.name is None else f"{ref.name}="
    base = "" if ref.base is None else f"{pinned(ref.base)}+"
    part = "" if ref.part is None else f"#{ref.part}"
    return f"{name}{base}{pinned(ref.path)}{part}"


def existing(path: str, text: str) -> Path:
    """The path, or an error with the nearest names that do exist (see ``sources.locate``)."""
    return locate(path, text)[0]


def open_model(model: ModelLike) -> TensorSource:
    """A model in weight space: a path, ``BASE+ADAPTER``, a state dict or a module."""
    if isinstance(model, (str, Path)):
        ref = parse(str(model))
        if ref.part is not None:
            raise UsageError(f"{ref.text!r} is a part, not a model", remedy="Apply it to a base: BASE+ADAPTER.")
        if ref.base is not None:
            base = open_model(ref.base)
            adapter = load_vector(ref.path, base=base)
            return edit(base, [(1.0, adapter)])
        path, hub = locate(ref.path, ref.text, model=True)
        if path.is_dir() and artifact.artifact_kind(path):
            raise UsageError("an artifact is no model", file=path, remedy="Use devec apply with --base.")
        return open_checkpoint(path, hub)
    if isinstance(model, torch.nn.Module):
        return checkpoint_from_module(model)
    if isinstance(model, Mapping):
        return checkpoint_from_state_dict(model)
    if isinstance(model, TensorSource):
        return model
    raise UsageError(f"cannot read a model from {type(model).__name__}")


def load_vector(
    reference: str | Path,
    *,
    base: ModelLike | None = None,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    selection: Selection | None = None,
    view: ViewLike = None,
) -> TaskVector:
    """One task vector from a reference. Adapters need no base; a full checkpoint needs ``base``."""
    reading = Reading(
        None if base is None else open_model(base), dtype, selection or Selection(), view
    )
    return read_vector(str(reference), reading, name)[0]


def read_vector(text: str, reading: Reading, name: str | None = None) -> tuple[TaskVector, list[Finding]]:
    ref = parse(text)
    path, hub = locate(ref.path, ref.text)
    label = name or ref.name or (hub.id.name if hub is not None and ref.part is None else None)
    kind = artifact.artifact_kind(path) if path.is_dir() else None
    revision = None if hub is None else hub.commit
    notes: list[Finding] = []
    if ref.part is not None or kind is not None:
        vector = _from_artifact(ref, path, hub, kind, reading)
    elif ref.base is not None:
        under = open_model(ref.base)
        model = edit(under, [(1.0, read_adapter(path, base=_as_checkpoint(under), dtype=reading.dtype))])
        vector, notes = _checkpoint_vector(model, path, reading)
        # No file holds this model, so a decomposition embeds its deltas instead of referring to one.
        vector = replace(vector, origin=replace(vector.origin, dialect="edited", file=str(path)))
        revision = "+".join(f"{one.id.repo}@{one.commit}" for one in (hub_of(under), hub) if one is not None) or None
    elif is_adapter(path):
        vector = read_adapter(path, base=_as_checkpoint(reading.base), dtype=reading.dtype)
    else:
        vector, notes = _checkpoint_vector(open_checkpoint(path, hub), path, reading)
    every = len(vector.deltas)
    vector = select(vector, reading.selection)
    if every and not vector.deltas:
        raise UsageError(
            f"--include and --exclude leave nothing of {vector.name}",
            values={"tensors before": every}, file=path, remedy="devec inspect -v lists the names.",
        )
    if label is not None:
        vector = vector.named(label)
    return replace(vector, origin=replace(vector.origin, reference=ref.text, revision=revision)), notes


def _as_checkpoint(base: TensorSource | None) -> Checkpoint | None:
    """Readers ask a base for layouts, configuration and fingerprint, which an edited model has as well."""
    return base  # type: ignore[return-value]


def _checkpoint_vector(model: TensorSource, path: Path, reading: Reading) -> tuple[TaskVector, list[Finding]]:
    if reading.base is None:
        raise UsageError(
            "a full checkpoint is a task vector only against its base", file=path, remedy="Give --base BASE."
        )
    return delta_of(reading.base, model, name=label_of(path), selection=reading.selection, dtype=reading.dtype)


def _from_artifact(
    ref: Reference, path: Path, hub: HubFolder | None, kind: str | None, reading: Reading
) -> TaskVector:
    if kind is None:
        raise UsageError(
            f"{ref.text!r} asks for a part, but this is not a decomposition", file=path,
            remedy="Parts are read from what devec decompose -o writes.",
        )
    if kind == "task-vector":
        if ref.part is not None:
            raise UsageError("a task vector has no parts", file=path, remedy="Leave out #" + ref.part + ".")
        pinned = None if hub is None else hub.pinned
        return artifact.read_task_vector(path, reading.dtype, pinned).named(label_of(path))
    if ref.part is None:
        raise UsageError(
            "a decomposition holds several parts", file=path, remedy="Name one: #unique:A, #shared:A+B, #original:A."
        )
    if path not in reading.opened:
        reading.opened[path] = load_decomposition(ref.path, view=reading.view)
    part = reading.opened[path].part(ref.part)
    # A part is no longer what its input's file says.
    dialect = "artifact" if part.origin.dialect == "checkpoint" else part.origin.dialect
    return replace(part, origin=replace(part.origin, dialect=dialect))


def load_decomposition(path: str | Path, *, view: ViewLike = None) -> Decomposition:
    """A decomposition from the folder that ``devec decompose -o`` wrote.

    ``view`` replaces the stored read-time choices, or (a mapping) changes some of them. Dense vectors are read from
    where they were, and refused (exit 4) if their bytes or their base's have changed.
    """
    folder = existing(str(path), str(path))
    d = artifact.read_decomposition(folder, partial(_reopen, {}))
    if view is None:
        return d
    return d.with_view(view) if isinstance(view, View) else d.with_view(**view)


def _reopen(bases: dict[str, Checkpoint], name: str, source: artifact.Source, dtype: torch.dtype) -> TaskVector:
    """``bases`` keeps what was checked already: the vectors share a base, and a hash reads all of it."""
    if not source.base:
        folder = existing(source.model, source.model)
        _check_same(artifact.delta_hash(folder), source.model_sha256, f"vector {name}", folder)
        return artifact.read_task_vector(folder, dtype)
    if source.base not in bases:
        bases[source.base] = _unchanged(source.base, source.base_sha256, "base")
    base = bases[source.base]
    model = _unchanged(source.model, source.model_sha256, f"vector {name}")
    return delta_of(base, model, name=name, selection=Selection(), dtype=dtype, partial=True)[0]


def _unchanged(path: str, sha256: str, what: str) -> Checkpoint:
    model = open_checkpoint(*locate(path, path, model=True))
    _check_same(model.fingerprint(), sha256, what, path)
    return model


def _check_same(now: str, then: str, what: str, path: str | Path) -> None:
    if now != then:
        raise IncompatibleError(
            f"the {what} has changed since it was decomposed",
            values={"then": then[:16], "now": now[:16]}, file=path,
            remedy="Restore the file, or decompose again.",
        )


def select(vector: TaskVector, selection: Selection) -> TaskVector:
    """Only the tensors that ``--include`` and ``--exclude`` let through (heads too)."""
    keep = [n for n in vector.deltas if selection.keeps(n)]
    heads = {n: t for n, t in vector.heads.items() if selection.keeps(n)}
    if len(keep) == len(vector.deltas) and len(heads) == len(vector.heads):
        return vector
    deltas = vector.deltas
    if isinstance(deltas, artifact.SourcedMap):
        kept: LazyMap = deltas.only(keep)
    else:
        kept = LazyMap(keep, deltas.__getitem__, cost_of(deltas))
    return replace(vector, deltas=kept, layouts={n: vector.layouts[n] for n in keep}, heads=heads)


def load_pool(
    references: Sequence[str | Path | TaskVector],
    *,
    base: ModelLike | None = None,
    dtype: torch.dtype = torch.float32,
    selection: Selection | None = None,
    view: ViewLike = None,
) -> tuple[Pool, list[Finding]]:
    """Several vectors that share a base, in the order given, and what was noticed while reading them."""
    reading = Reading(
        None if base is None else open_model(base), dtype, selection or Selection(), view
    )
    vectors, notes = [], []
    for item in references:
        if isinstance(item, TaskVector):
            vectors.append(select(widened(item, dtype), reading.selection))
            continue
        vector, found = read_vector(str(item), reading)
        vectors.append(vector)
        notes += found
    if any(not v.partial for v in vectors) and any(v.partial for v in vectors):
        vectors = _one_spelling(vectors)
    pool = Pool(tuple(vectors))
    if len(pool) > 1 and not set.intersection(*(set(v.deltas) for v in pool)):
        _no_common_module(pool)
    return pool, notes


def widened(vector: TaskVector, dtype: torch.dtype) -> TaskVector:
    """A vector made in memory, computed in ``dtype`` (readers widen what comes from files)."""
    if vector.origin.dialect != "memory":
        return vector
    return vector.map(lambda _name, delta: delta if delta.dtype == torch.float64 else delta.to(dtype))


def _no_common_module(pool: Pool) -> None:
    """Adapters may lack modules, but vectors without any pair in common have nothing to say to each other."""
    for i, a in enumerate(pool):
        if not any(set(a.deltas) & set(b.deltas) for j, b in enumerate(pool) if i != j):
            other = next(b for b in pool if b is not a)
            raise IncompatibleError(
                f"{a.name} has no module in common with the others",
                values={a.name: next(iter(a.deltas), "nothing"), other.name: next(iter(other.deltas), "nothing")},
                file=a.origin.file,
                remedy="Use vectors of one architecture.",
            )


def _one_spelling(vectors: list[TaskVector]) -> list[TaskVector]:
    """Adapters beside checkpoints: adapter names are matched to the checkpoint's spelling."""
    names = next(list(v.deltas) for v in vectors if not v.partial)
    return [rename(v, resolve_names(v.deltas, names)) if v.partial else v for v in vectors]


def rename(vector: TaskVector, spelling: Mapping[str, str]) -> TaskVector:
    """The same vector under other tensor names; writers use ``origin.config`` to find the old ones again."""
    back = {new: old for old, new in spelling.items()}
    make: Callable[[str], Any] = lambda n: vector.deltas[back[n]]  # noqa: E731
    config = {**vector.origin.config, "devec_spelling": back}
    return replace(
        vector,
        deltas=LazyMap([spelling[n] for n in vector.deltas], make, lambda n: cost_of(vector.deltas)(back[n])),
        layouts={spelling[n]: vector.layouts[n] for n in vector.deltas},
        origin=replace(vector.origin, config=config),
    )
