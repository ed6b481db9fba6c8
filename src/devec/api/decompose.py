"""``decompose``: factor every tensor of a pool once; parts and spectra are read from the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from devec.api.factor import Factored, factor_all, tensor_names
from devec.api.jobs import Job
from devec.api.records import input_record, source_paths
from devec.api.references import load_pool, named_paths, open_model, widened
from devec.api.run import Engine
from devec.core.decomposition import Decomposition
from devec.core.errors import UsageError
from devec.core.options import Factoring, View
from devec.core.provenance import InputRecord, Provenance
from devec.core.results import Finding
from devec.core.split import RowSplit, split_rows
from devec.core.summary import all_findings, as_dict
from devec.core.vectors import Pool, TaskVector
from devec.engine.threads import Progress, silent
from devec.io import artifact, complete
from devec.io.folder import OutputFolder, exists
from devec.io.names import Selection, qkv_split
from devec.io.records import installed_versions, write_records

FACTORING_FIELDS = frozenset(Factoring.__dataclass_fields__)
VIEW_FIELDS = frozenset(View.__dataclass_fields__)


def decompose(
    sources: Pool | Sequence[str | Path | TaskVector],
    *,
    base: Any = None,
    selection: Selection | None = None,
    engine: Engine | None = None,
    device: str = "auto",
    progress: Progress = silent,
    notes: Sequence[Finding] = (),
    **choices: Any,
) -> Decomposition:
    """Split task vectors into shared and unique parts (arXiv:2512.22511, Eq. 6-14).

    ``sources`` are references or task vectors; full checkpoints need ``base``. ``choices`` are the fields of
    :class:`~devec.core.options.Factoring` (mode, target, side, rank, exact, split_qkv, one_d, dtype, seed), fixed
    here, and of :class:`~devec.core.options.View` (threshold, fdr, pair_basis, joint, target_rule, angles, paper),
    which ``Decomposition.with_view`` changes at no cost. ``paper=True`` sets the paper's reading of everything.
    ``engine`` says on how many threads and in how much memory.

    Returns a :class:`~devec.core.decomposition.Decomposition`. Raises UsageError for fewer than two vectors or an
    unknown choice, IncompatibleError when the vectors do not fit one another.
    """
    factoring, view = choose(choices)
    found = list(notes)
    if isinstance(sources, Pool):
        pool = Pool(tuple(widened(v, getattr(torch, factoring.dtype)) for v in sources))
    else:
        pool, found = load_pool(
            sources, base=base, dtype=getattr(torch, factoring.dtype), selection=selection
        )
    pool, splits = prepared(pool, factoring, base)
    names = tensor_names(pool, factoring)
    tensors = factor_all(pool, factoring, names, engine or Engine(), place(device), progress)
    return Decomposition(pool, factoring, tensors, view, splits, tuple(found))


def _split(vector: TaskVector, splits: Mapping[str, RowSplit]) -> TaskVector:
    """Fused rows apart; a vector that files hold still knows them."""
    apart, whole = split_rows(vector, splits), vector.deltas
    if not isinstance(whole, artifact.SourcedMap):
        return apart
    return replace(apart, deltas=artifact.SourcedMap(list(apart.deltas), apart.deltas.__getitem__, whole.source))


def choose(choices: Mapping[str, Any]) -> tuple[Factoring, View]:
    """Sort choices into what is fixed and what is read-time; ``paper`` presets both, explicit choices win."""
    for key in choices:
        if key not in FACTORING_FIELDS | VIEW_FIELDS:
            near = get_close_matches(key, FACTORING_FIELDS | VIEW_FIELDS, n=1)
            raise UsageError(f"unknown choice {key!r}", remedy=f"Did you mean {near[0]!r}?" if near else None)
    fixed = {k: v for k, v in choices.items() if k in FACTORING_FIELDS and v is not None}
    read = {k: v for k, v in choices.items() if k in VIEW_FIELDS and v is not None and k != "paper"}
    if choices.get("paper"):
        return Factoring(**{"rank": "none", **fixed}), View.of_paper(**read)
    return Factoring(**fixed), View(**read)


def place(device: str) -> torch.device:
    """``auto`` is the GPU where there is one. Factors come back to the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}", remedy="Use auto, cpu or cuda.") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"no GPU is present for --device {device}", remedy="Use auto or cpu.")
    return chosen


def prepared(pool: Pool, factoring: Factoring, base: Any) -> tuple[Pool, dict[str, RowSplit]]:
    """The pool as it is factored: fused rows apart if asked for. A misspelt target is an error here."""
    if len(pool) < 2:
        raise UsageError(
            f"decompose needs at least two vectors, got {len(pool)}",
            remedy="What is shared is shared with something.",
        )
    if factoring.target is not None:
        pool[factoring.target]
    splits = find_splits(pool, base) if factoring.split_qkv else {}
    return (Pool(tuple(_split(v, splits) for v in pool)) if splits else pool), splits


def find_splits(pool: Pool, base: Any) -> dict[str, RowSplit]:
    """Fused query/key/value tensors of the pool and where their rows part."""
    config = getattr(open_model(base), "config", None) if base is not None else None
    splits: dict[str, RowSplit] = {}
    for n in pool.tensors():
        layout = pool.layout(n)
        parts = None if layout.is_vector else qkv_split(n, layout.matrix_shape, config)
        if parts:
            splits[n] = RowSplit(layout, tuple(parts))
    if not splits:
        raise UsageError(
            "--split-qkv found no fused query/key/value tensor", remedy="Leave it out for this architecture."
        )
    return splits


def decompose_to(
    pool: Pool,
    out: str | Path,
    *,
    base: Any = None,
    notes: Sequence[Finding] = (),
    engine: Engine | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
    job: Job | None = None,
    approve: Callable[[Sequence[Finding]], None] = lambda findings: None,
    **choices: Any,
) -> dict[str, Any]:
    """:func:`decompose` into an artifact folder: each tensor's factors go to the disk as soon as they are found.

    Memory holds the tensors in work and what is left of all others for the decisions: their overlaps. Returns the
    summary that ``spectra.json`` holds (empty for one shard of several). ``approve`` is shown the findings before the
    artifact is made, and may refuse them. ``job`` makes the pool in other processes.
    """
    _check_folder(out)
    engine = engine or Engine()
    factoring, view = choose(choices)
    pool, splits = prepared(pool, factoring, base)
    names = tensor_names(pool, factoring)
    provenance = _provenance(factoring, view)
    inputs = [*(p for v in pool for p in source_paths(v)), *_existing(base)]
    before = provenance(tuple(input_record(v, hashes=False) for v in pool))
    outputs = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    run = engine.run(before, outputs, inputs)
    with OutputFolder(Path(out), overwrite=overwrite, inputs=inputs, run=run) as folder:
        factored = Factored(pool, factoring, names, run, engine, place(device), job, progress)
        tensors = factored.into(folder)
        if engine.shard is not None:
            return {}
        d = Decomposition(pool, factoring, tensors, view, splits, tuple(notes))
        findings = all_findings(d)
        approve(findings)
        summary = as_dict(d, findings)
        records = tuple(input_record(v) for v in pool)
        artifact.write_decomposition(folder.path, d, summary, _sources(pool), place=folder.place)
        write_records(folder.path, provenance(records), summary=summary["totals"])
    return summary


def written_decomposition(
    pool: Pool, out: str | Path, *, base: Any = None, notes: Sequence[Finding] = (), **choices: Any
) -> dict[str, Any]:
    """The summary of the artifact that :func:`decompose_to` has written there before, from its ``spectra.json``.

    Raises RefusedError (the error of an output that exists) if that is not what stands there.
    """
    _check_folder(out)
    factoring, view = choose(choices)
    pool, splits = prepared(pool, factoring, base)
    place = Path(out)

    def provenance(hashes: bool) -> Provenance:
        return _provenance(factoring, view)(tuple(input_record(v, hashes) for v in pool))

    complete.written_folder(place, provenance)
    d = Decomposition(pool, factoring, {}, view, splits, tuple(notes))
    if not artifact.is_of(place, d, tensor_names(pool, factoring), _sources(pool)):
        raise exists(place, "other tensors, or another base")
    found: dict[str, Any] = json.loads((place / artifact.SPECTRA).read_text(encoding="utf-8"))
    return found


def save_decomposition(
    d: Decomposition,
    out: str | Path,
    *,
    overwrite: bool = False,
    findings: Sequence[Finding] | None = None,
    inputs: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Write the artifact folder, whole or not at all; returns the summary that ``spectra.json`` holds.

    ``inputs`` are further paths (the base) that ``out`` may not replace or lie in.
    """
    _check_folder(out)
    summary = as_dict(d, findings)
    kept = [*(p for v in d.pool for p in source_paths(v)), *(found for p in inputs for found in named_paths(str(p)))]
    provenance = _provenance(d.factoring, d.view)(tuple(input_record(v) for v in d.pool))
    with OutputFolder(Path(out), overwrite=overwrite, inputs=kept) as folder:
        artifact.write_decomposition(folder.path, d, summary, _sources(d.pool), place=folder.place)
        write_records(folder.path, provenance, summary=summary["totals"])
    return summary


def _check_folder(out: str | Path) -> None:
    if Path(out).suffix == ".safetensors":
        raise UsageError("a decomposition is a folder, not one file", file=out, remedy="Give -o a folder's name.")


def _existing(base: Any) -> list[Path]:
    return named_paths(str(base)) if isinstance(base, (str, Path)) else []


def _provenance(factoring: Factoring, view: View) -> Callable[[tuple[InputRecord, ...]], Provenance]:
    return lambda inputs: Provenance(
        command="decompose",
        parameters={"factoring": vars(factoring), "view": vars(view)},
        inputs=inputs,
        versions=installed_versions(),
        seed=factoring.seed,
        dtype=factoring.dtype,
    )


def _sources(pool: Pool) -> dict[str, artifact.Source]:
    """Vectors that are what files say, so that the artifact refers to these instead of embedding them."""
    return {
        v.name: source
        for v in pool
        if isinstance(v.deltas, artifact.SourcedMap) and (source := v.deltas.source()) is not None
    }
