"""``decompose``: factor every tensor of a pool once; parts and spectra are read from the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.api.gpu import factored_in_batches
from devec.api.references import load_pool, named_paths, open_model, widened
from devec.core.decomposition import Decomposition
from devec.core.errors import IncompatibleError, UsageError
from devec.core.options import Factoring, View
from devec.core.provenance import InputRecord, Provenance
from devec.core.results import Finding, TensorFactors
from devec.core.split import RowSplit, split_rows
from devec.core.summary import as_dict
from devec.core.vectors import Pool, TaskVector
from devec.engine.threads import Progress, ordered_map, silent
from devec.io import artifact
from devec.io.checkpoint import open_checkpoint
from devec.io.disk import sha256_of
from devec.io.folder import OutputFolder
from devec.io.names import Selection, qkv_split
from devec.io.records import installed_versions, write_records
from devec.methods.decompose.shared_unique import shared_unique

FACTORING_FIELDS = frozenset(Factoring.__dataclass_fields__)
VIEW_FIELDS = frozenset(View.__dataclass_fields__)


def decompose(
    sources: Pool | Sequence[str | Path | TaskVector],
    *,
    base: Any = None,
    selection: Selection | None = None,
    workers: int | None = None,
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
    if len(pool) < 2:
        raise UsageError(
            f"decompose needs at least two vectors, got {len(pool)}",
            remedy="What is shared is shared with something.",
        )
    splits = find_splits(pool, base) if factoring.split_qkv else {}
    if splits:
        pool = Pool(tuple(_split(v, splits) for v in pool))
    if factoring.target is not None:
        pool[factoring.target]  # a misspelt target is an error before anything is computed
    return Decomposition(
        pool=pool,
        factoring=factoring,
        tensors=factorise(pool, factoring, workers, progress, place(device)),
        view=view,
        splits=splits,
        notes=tuple(found),
    )


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


def factorise(
    pool: Pool, factoring: Factoring, workers: int | None, progress: Progress, device: torch.device
) -> dict[str, TensorFactors]:
    """Every tensor that takes part, factored on ``device``: matrices, and 1-D parameters if asked for."""
    names = [n for n in pool.tensors() if factoring.one_d or not pool.layout(n).is_vector]
    if not names:
        raise IncompatibleError(
            "there is no matrix to decompose", values={"tensors": len(pool.tensors())},
            remedy="1-D parameters are decomposed with --one-d only; check --include and --exclude.",
        )

    if device.type != "cpu":
        found: dict[str, TensorFactors] = {}
        for factors in factored_in_batches(pool, names, factoring, device, workers=workers):
            found[factors.name] = _as_stored(factors)
            progress(len(found), len(names), factors.name)
        return {name: found[name] for name in names}

    def job(name: str) -> TensorFactors:
        return _as_stored(shared_unique(pool.block(name), factoring))

    return {t.name: t for t in ordered_map(job, names, workers=workers, progress=progress)}


def _as_stored(factors: TensorFactors) -> TensorFactors:
    """As a file holds them, strides and all: parts read from disk are then the same to the last bit."""
    rows = {i: replace(s, U=_row_major(s.U), V=_row_major(s.V)) for i, s in factors.svd.items()}
    return replace(factors, svd=rows)


def _row_major(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves one column its odd strides


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
    if Path(out).suffix == ".safetensors":
        raise UsageError("a decomposition is a folder, not one file", file=out, remedy="Give -o a folder's name.")
    summary = as_dict(d, findings)
    sources = {
        v.name: source
        for v in d.pool
        if isinstance(v.deltas, artifact.SourcedMap) and (source := v.deltas.source()) is not None
    }
    kept = [*(p for v in d.pool for p in source_paths(v)), *(Path(p) for p in inputs if Path(p).exists())]
    provenance = Provenance(
        command="decompose",
        parameters={"factoring": vars(d.factoring), "view": vars(d.view)},
        inputs=tuple(input_record(v) for v in d.pool),
        versions=installed_versions(),
        seed=d.factoring.seed,
        dtype=d.factoring.dtype,
    )
    with OutputFolder(Path(out), overwrite=overwrite, inputs=kept) as folder:
        artifact.write_decomposition(folder.path, d, summary, sources)
        write_records(folder.path, provenance, summary=summary["totals"])
    return summary


def input_record(v: TaskVector) -> InputRecord:
    """A vector as an input in recipe, lock and card, with the hash of what was read."""
    reference = v.origin.reference if v.origin.reference != "memory" else v.name
    named = source_paths(v)
    if named and named[0].is_dir() and artifact.artifact_kind(named[0]):
        hashes = {n: sha256_of(named[0] / n) for n in artifact.FILES if (named[0] / n).is_file()}
        return InputRecord(reference, str(named[0]), hashes, "artifact")
    path = Path(v.origin.file) if v.origin.file else None
    digest: str | None = None
    if path is not None and path.is_file():
        digest = sha256_of(path)
    elif path is not None and path.is_dir() and v.origin.dialect == "checkpoint":
        digest = open_checkpoint(path).fingerprint()
    return InputRecord(reference, None if path is None else str(path), digest, v.origin.dialect)


def source_paths(v: TaskVector) -> list[Path]:
    """The files and folders that a vector was read from, as the user named them; an output may not change them."""
    found = [Path(v.origin.file)] if v.origin.file else []
    if v.origin.reference != "memory":
        found = [*named_paths(v.origin.reference), *found]
    if v.origin.dialect == "checkpoint" and v.origin.base_name:
        found.append(Path(v.origin.base_name))
    return [path for path in found if path.exists()]
