"""Saved decompositions and task vectors: safetensors beside a JSON manifest.

A decomposition keeps its factors. Low-rank inputs are embedded whole, so their parts need no other file; dense inputs
are referred to by path and SHA-256, and a source that changed since is refused. Vectors that live in memory have no
file to refer to and are embedded too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import InputError
from devec.core.lazy import LazyDelta
from devec.core.options import Factoring, View
from devec.core.results import Finding, LazyFactors, TensorFactors
from devec.core.split import RowSplit, split_rows
from devec.core.vectors import LazyMap, Origin, Pool, TaskVector
from devec.io.disk import sha256_of, write_file
from devec.io.hub_id import SCHEME
from devec.io.parts import factors_from, layout_in, layout_out, row_of, tensors_of
from devec.io.rounding import cast
from devec.io.safetensors_file import SafetensorsFile
from devec.io.writer import SafetensorsWriter

MANIFEST = "manifest.json"
FACTORS = "factors.safetensors"
DELTAS = "delta.safetensors"
SPECTRA = "spectra.json"
FILES = (MANIFEST, FACTORS, DELTAS)
SCHEMA = 1


@dataclass(frozen=True)
class Source:
    """How to find a dense vector again, with the hashes that its files had.

    ``model`` is a checkpoint, and the vector its difference from ``base``; or (``base`` empty) a saved task vector.
    Each is a path, or a commit on the Hugging Face Hub (``hf://org/name@commit``).
    """

    model: str
    model_sha256: str
    base: str = ""
    base_sha256: str = ""

    def seen_from(self, folder: Path) -> Source:
        """With paths relative to the artifact: it may be moved together with what it refers to."""
        return replace(self, model=_relative(self.model, folder), base=_relative(self.base, folder))

    def found_from(self, folder: Path) -> Source:
        """The inverse of :meth:`seen_from`, for an artifact that lies in ``folder`` now."""
        return replace(self, model=_absolute(self.model, folder), base=_absolute(self.base, folder))


class SourcedMap(LazyMap):
    """Deltas that are what files say and nothing else, so that an artifact may refer to the files.

    Arithmetic, parts and maps of a vector make plain maps, which have no file and are embedded.
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[str], Delta], source: Callable[[], Source | None]
    ) -> None:
        super().__init__(names, make)
        self.source = source

    def only(self, names: Sequence[str]) -> SourcedMap:
        """Some of the deltas; the rest of the files is not looked at."""
        return SourcedMap(names, self.__getitem__, self.source)


Reopen = Callable[[str, Source, torch.dtype], TaskVector]
"""``reopen(vector name, source, compute dtype)`` -> the dense vector, after checking the hashes (api does this)."""


def artifact_kind(path: Path) -> str | None:
    """"decomposition", "task-vector", or ``None`` if the folder is no artifact of ours."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return None
    ours = (path / FACTORS).is_file() or (path / DELTAS).is_file()
    try:
        kind = _read_json(manifest).get("kind")
    except InputError:
        if ours:
            raise  # a broken artifact is not "no artifact"
        return None
    return kind if kind in ("decomposition", "task-vector") else None


def decomposed_side(folder: Path) -> str | None:
    """The side that a saved decomposition was made for; ``None`` for any other artifact."""
    side = _read_json(folder / MANIFEST).get("factoring", {}).get("side")
    return None if side is None else str(side)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("a file of the artifact is missing", file=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the artifact: {error}", file=path) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", file=path)
    return value


def write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _relative(path: str, folder: Path) -> str:
    if path.startswith(SCHEME):
        return path
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix() if path else ""


def _absolute(path: str, folder: Path) -> str:
    if path.startswith(SCHEME):
        return path
    return os.path.normpath(Path(os.path.realpath(folder)) / path) if path else ""


def _origin_out(origin: Origin, source: Source | None = None) -> dict[str, Any]:
    shown = replace(origin, base_fingerprint=origin.base_hash(), model=None, base=None, others=())
    plain = asdict(shown if source is None else _from_source(shown, source))
    for open_source in ("model", "base", "others"):
        del plain[open_source]
    return {**plain, "config": dict(origin.config)}


def _from_source(origin: Origin, source: Source) -> Origin:
    base = origin.base_name if source.base.startswith(SCHEME) else source.base or None
    return replace(origin, file=source.model, base_name=base)


# --- decompositions ------------------------------------------------------------------------------------------------


def write_decomposition(
    folder: Path,
    d: Decomposition,
    summary: Mapping[str, Any],
    sources: Mapping[str, Source],
    *,
    place: Path | None = None,
) -> None:
    """Write ``factors.safetensors``, ``spectra.json`` and ``manifest.json`` into an existing empty folder.

    ``sources`` says for which vectors the deltas are referred to instead of embedded, by paths that start from
    ``place``, where the folder will stand (default: where it stands).
    """
    # Twice over the factors and embedded deltas: once for the header, once for the numbers, so that one is in memory.
    rows = [row_of(t) for t in d.tensors.values()]
    vectors = _vectors_out(d, sources, folder if place is None else place)
    entries = [(n, TensorInfo(tuple(t.shape), t.dtype)) for n, t in _numbers(d, vectors)]
    with SafetensorsWriter(folder / FACTORS, entries, {"format": "pt", "devec.kind": "decomposition"}) as writer:
        for n, t in _numbers(d, vectors):
            writer.put(n, t)
    write_json(folder / SPECTRA, summary)
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "kind": "decomposition",
            "factoring": asdict(d.factoring),
            "view": asdict(d.view),
            "vectors": vectors,
            "splits": _splits_out(d),
            "notes": [f.as_dict() for f in d.notes],
            "tensors": rows,
        },
    )


def _vectors_out(d: Decomposition, sources: Mapping[str, Source], place: Path) -> list[dict[str, Any]]:
    seen = {name: source.seen_from(place) for name, source in sources.items()}
    return [_vector_out(d.original(name), seen.get(name)) for name in d.vectors]


def _splits_out(d: Decomposition) -> dict[str, Any]:
    return {n: {"layout": layout_out(s.layout), "parts": [list(p) for p in s.parts]} for n, s in d.splits.items()}


def is_of(folder: Path, d: Decomposition, names: Sequence[str], sources: Mapping[str, Source]) -> bool:
    """Whether an artifact is the decomposition of these vectors, with these tensors factored (``d`` needs no factors).

    Compares what the manifest says of vectors, tensors and splits, not the numbers.
    """
    manifest = _read_json(folder / MANIFEST)
    wanted = {"kind": "decomposition", "vectors": _vectors_out(d, sources, folder), "splits": _splits_out(d)}
    known = {key: manifest.get(key) for key in wanted}
    rows = [row.get("name") for row in manifest.get("tensors", [])]
    return json.dumps(known) == json.dumps(wanted) and rows == list(names)


def _numbers(d: Decomposition, vectors: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a decomposition's file, one at a time: factors, then embedded deltas and heads."""
    for index, t in enumerate(d.tensors.values()):
        for key, value in tensors_of(t).items():
            yield f"t{index:05d}.{key}", value
    for i, row in enumerate(vectors):
        v = d.original(d.vectors[i])
        for k, n in enumerate(row["names"] if row["source"] is None else ()):
            delta, key = v.deltas[n], f"v{i}.d{k:05d}"
            if isinstance(delta, LowRankDelta):
                yield f"{key}.B", delta.B
                yield f"{key}.A", delta.A
            else:
                yield f"{key}.W", delta.dense()
        for k, n in enumerate(row["heads"]):
            yield f"v{i}.h{k:05d}", v.heads[n]


def _vector_out(v: TaskVector, source: Source | None) -> dict[str, Any]:
    names = v.names()
    return {
        "name": v.name,
        "names": names,
        "layouts": [layout_out(v.layouts[n]) for n in names],
        "heads": list(v.heads),
        "origin": _origin_out(v.origin, source),
        "space": v.space,
        "partial": v.partial,
        "source": None if source is None else asdict(source),
    }


def _vector_in(row: Mapping[str, Any], prefix: str, file: SafetensorsFile) -> TaskVector:
    names: list[str] = list(row["names"])
    place = {n: f"{prefix}.d{k:05d}" for k, n in enumerate(names)}
    stored = set(file.names())

    def make(n: str) -> Delta:
        key = place[n]
        if f"{key}.W" in stored:
            return DenseDelta(file.get(f"{key}.W"))
        return LowRankDelta(file.get(f"{key}.B"), file.get(f"{key}.A"))

    return TaskVector(
        name=row["name"],
        deltas=LazyMap(names, make),
        layouts=dict(zip(names, map(layout_in, row["layouts"]), strict=True)),
        heads={n: file.get(f"{prefix}.h{k:05d}") for k, n in enumerate(row["heads"])},
        origin=Origin(**row["origin"]),
        space=row["space"],
        partial=row["partial"],
    )


def read_decomposition(folder: Path, reopen: Reopen) -> Decomposition:
    """The decomposition as it was written; dense vectors are reopened through ``reopen``."""
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("kind") != "decomposition" or manifest.get("schema") != SCHEMA:
        raise InputError(
            "not a decomposition that this version reads",
            values={"kind": manifest.get("kind"), "schema": manifest.get("schema")},
            file=folder / MANIFEST,
        )
    file = SafetensorsFile(folder / FACTORS)
    try:
        return _decomposition(folder, manifest, file, reopen)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the manifest and the factors do not fit: {error!r}", file=folder / MANIFEST) from None


def _decomposition(
    folder: Path, manifest: Mapping[str, Any], file: SafetensorsFile, reopen: Reopen
) -> Decomposition:
    factoring = Factoring(**manifest["factoring"])
    dtype: torch.dtype = getattr(torch, factoring.dtype)
    vectors = [
        _vector_in(row, f"v{i}", file) if row["source"] is None else _reopened(folder, row, reopen, dtype)
        for i, row in enumerate(manifest["vectors"])
    ]
    splits = {
        n: RowSplit(layout_in(s["layout"]), tuple((p[0], p[1], p[2]) for p in s["parts"]))
        for n, s in manifest["splits"].items()
    }
    read = {row["name"]: _factors_in(row, f"t{index:05d}", file) for index, row in enumerate(manifest["tensors"])}
    counts = {row["name"]: len(row["members"]) for row in manifest["tensors"]}
    view = dict(manifest["view"])
    return Decomposition(
        pool=Pool(tuple(split_rows(v, splits) if splits else v for v in vectors)),
        factoring=factoring,
        tensors=LazyFactors(counts, lambda name: read[name]()),
        view=View(**view),
        splits=splits,
        notes=tuple(Finding(f["code"], f["message"], tuple(f["tensors"])) for f in manifest["notes"]),
    )


def _reopened(folder: Path, row: Mapping[str, Any], reopen: Reopen, dtype: torch.dtype) -> TaskVector:
    """A dense vector whose file is opened (and checked) only when one of its deltas is asked for."""
    opened: list[TaskVector] = []
    source = Source(**row["source"]).found_from(folder)
    origin = _from_source(Origin(**row["origin"]), source)

    def vector() -> TaskVector:
        if not opened:
            opened.append(reopen(row["name"], source, dtype))
        return opened[0]

    names: list[str] = list(row["names"])
    return TaskVector(
        name=row["name"],
        deltas=LazyMap(names, lambda n: vector().deltas[n]),
        layouts=dict(zip(names, map(layout_in, row["layouts"]), strict=True)),
        origin=origin,
        space=row["space"],
        partial=row["partial"],
    )


def _factors_in(row: Mapping[str, Any], key: str, file: SafetensorsFile) -> Callable[[], TensorFactors]:
    """How to read the factors of one tensor, after a look at what the file's header says of them."""
    names = [n for i in row["members"] for n in (f"v{i}.U", f"v{i}.S", f"v{i}.V")]
    stored = {n: f"{key}.{n}" for n in names if not n.endswith(".V") or f"{key}.{n}" in file}
    n, m = layout_in(row["layout"]).matrix_shape
    for i in row["members"]:
        (rank,) = file.info(stored[f"v{i}.S"]).shape
        sides = {"U": (n, rank)} | ({"V": (m, rank)} if f"v{i}.V" in stored else {})
        for side, shape in sides.items():
            if file.info(stored[f"v{i}.{side}"]).shape != shape:
                raise ValueError(f"{row['name']}: {side} of vector {i} is not {shape}")
    return lambda: factors_from(dict(row), {short: file.get(full) for short, full in stored.items()})


# --- task vectors --------------------------------------------------------------------------------------------------


def write_task_vector(folder: Path, v: TaskVector, dtype: torch.dtype = torch.float32) -> None:
    """Write ``delta.safetensors`` (deltas in the shapes of the base) and ``manifest.json``."""
    names = v.names()
    entries = [(n, TensorInfo(v.layouts[n].shape, dtype)) for n in names]
    with SafetensorsWriter(folder / DELTAS, entries, {"format": "pt", "devec.kind": "task-vector"}) as writer:
        for n in names:
            value = v.layouts[n].to_stored(v.deltas[n].dense()).contiguous()
            writer.put(n, cast(n, value, dtype, v.origin.file), finite=True)
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "kind": "task-vector",
            "name": v.name,
            "layouts": {n: layout_out(v.layouts[n]) for n in names},
            "origin": _origin_out(v.origin),
            "space": v.space,
            "partial": v.partial,
        },
    )


def delta_hash(folder: Path) -> str:
    """SHA-256 of a saved task vector's numbers."""
    return sha256_of(folder / DELTAS)


def read_task_vector(folder: Path, dtype: torch.dtype = torch.float32, pinned: str | None = None) -> TaskVector:
    """The vector that :func:`write_task_vector` wrote; ``pinned`` is where others find the folder, if on the Hub."""
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("kind") != "task-vector" or manifest.get("schema") != SCHEMA:
        raise InputError("not a task vector that this version reads", file=folder / MANIFEST)
    file = SafetensorsFile(folder / DELTAS)
    try:
        layouts = {n: layout_in(x) for n, x in manifest["layouts"].items()}
        origin = Origin(**manifest["origin"])
        space, partial, name = manifest["space"], manifest["partial"], manifest["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the manifest is broken: {error!r}", file=folder / MANIFEST) from None
    missing = [n for n in layouts if n not in set(file.names())]
    if missing:
        raise InputError("a delta named in the manifest is missing", tensor=missing[0], file=folder / DELTAS)
    unlike = [n for n in layouts if file.info(n).shape != layouts[n].shape]
    if unlike:
        raise InputError(
            "a delta has another shape than the manifest says", tensor=unlike[0],
            values={"file": file.info(unlike[0]).shape, "manifest": layouts[unlike[0]].shape}, file=folder / DELTAS,
        )

    def make(n: str) -> Delta:
        layout, wide = layouts[n], torch.promote_types(dtype, file.info(n).dtype)

        def read(start: int, stop: int) -> Tensor:
            rows = file.rows(n, start, stop).to(wide)
            return rows.reshape(stop - start, prod(rows.shape[1:]))

        return LazyDelta(layout.matrix_shape, wide, read, transposed=layout.transposed)

    return TaskVector(
        name=name,
        deltas=SourcedMap(list(layouts), make, lambda: Source(pinned or str(folder.absolute()), delta_hash(folder))),
        layouts=layouts,
        # no longer the checkpoint that it was taken from: its file is a difference already
        origin=replace(origin, file=str(folder / DELTAS), dialect="artifact"),
        space=space,
        partial=partial,
    )

