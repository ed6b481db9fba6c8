"""``inspect`` and ``compare``: look at sources before doing anything with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from devec.api.decompose import decompose
from devec.api.extract import delta_of, label_of
from devec.api.references import existing, load_decomposition, load_pool, load_vector, open_model, parse
from devec.core.contracts import TensorSource
from devec.core.decomposition import Decomposition
from devec.core.errors import DevecError, InputError, UsageError
from devec.core.findings import OUTLIER, pool_findings, total_gram
from devec.core.results import Finding
from devec.core.vectors import TaskVector
from devec.engine.threads import Progress, silent
from devec.io.adapters import is_adapter
from devec.io.artifact import artifact_kind
from devec.io.names import Selection
from devec.linalg.lowrank import frobenius


def inspect(
    sources: Sequence[str | Path], *, base: Any = None, selection: Selection | None = None, details: bool = False
) -> dict[str, Any]:
    """Format, tensors, ranks, norms and outliers of each source; of several, whether they fit one another.

    Returns plain data: ``sources`` (one entry each, with ``per_tensor`` rows if ``details``), ``compatible`` and
    ``problems`` (errors found on trying, each with its exit code and line), ``warnings``.
    """
    under = None if base is None else open_model(base)
    chosen = selection or Selection()
    found = [_look(str(s), under, chosen, details) for s in sources]
    problems: list[dict[str, Any]] = []
    warnings = [w.as_dict() for one in found for w in one.warnings]
    if len(found) > 1:
        try:
            warnings += [f.as_dict() for f in _fit(found, chosen)]
        except DevecError as error:
            problems.append({"exit_code": error.exit_code, "message": error.line()})
    return {
        "schema": 1, "sources": [one.entry for one in found], "compatible": not problems, "problems": problems,
        "warnings": warnings,
    }


@dataclass(frozen=True)
class _Look:
    """One source: its entry, and what it is read as (a vector, a model, or a decomposition: neither)."""

    entry: dict[str, Any]
    vector: TaskVector | None = None
    model: TensorSource | None = None
    warnings: tuple[Finding, ...] = ()


def _look(text: str, base: TensorSource | None, selection: Selection, details: bool) -> _Look:
    ref = parse(text)
    path = existing(ref.path, ref.text)
    kind = artifact_kind(path) if path.is_dir() else None
    name = ref.name or label_of(ref.path)
    if kind == "decomposition" and ref.part is None:
        d = load_decomposition(path)
        return _Look(
            {"name": name, "reference": text, "kind": "decomposition", "format": "artifact", "tensors": len(d.tensors),
             "mode": d.factoring.mode, "target": d.factoring.target, "side": d.factoring.side,
             "threshold": d.view.threshold, "vectors": list(d.vectors)}
        )  # fmt: skip
    if ref.base is None and (kind is not None or ref.part is not None or is_adapter(path)):
        vector = load_vector(text, base=base, selection=selection)
        entry, warnings = _vector_entry(vector, details)
        return _Look({"name": vector.name, "reference": text, **entry}, vector, None, warnings)
    model = open_model(text)
    entry = {"name": name, "reference": text, **_model_entry(model, selection, details)}
    if base is None:
        return _Look(entry, None, model)
    vector = load_vector(text, base=base, selection=selection, name=name)
    norms, warnings = _norms_entry(vector)
    return _Look({**entry, "delta": norms}, vector, model, warnings)


def _fit(found: Sequence[_Look], selection: Selection) -> list[Finding]:
    """Raises what stands between the sources, if anything; otherwise what is worth knowing."""
    vectors = [one.vector for one in found if one.vector is not None]
    models = [one.model for one in found if one.model is not None]
    if any(one.vector is None and one.model is None for one in found):
        raise UsageError(
            "a decomposition holds several vectors", remedy="Inspect it alone, or name parts: ARTIFACT#unique:A."
        )
    if len(vectors) == len(found):
        pool, _ = load_pool(vectors)
        return pool_findings(pool)
    if len(models) < len(found):
        raise UsageError("adapters and checkpoints together need the base", remedy="Give --base BASE.")
    for other in models[1:]:
        delta_of(models[0], other, name="other", selection=selection, dtype=torch.float32)
    return []


def _model_entry(model: TensorSource, selection: Selection, details: bool) -> dict[str, Any]:
    names = [n for n in model.names() if selection.keeps(n)]
    infos = {n: model.info(n) for n in names}
    config = getattr(model, "config", None) or {}
    entry = {
        "kind": "checkpoint",
        "format": Path(model.file_of(names[0])).suffix.lstrip(".") if names else "empty",
        "architecture": config.get("model_type"),
        "tensors": len(names),
        "parameters": sum(prod(i.shape) for i in infos.values()),
        "dtypes": dict(Counter(_short(i.dtype) for i in infos.values())),
        "integers": sum(1 for i in infos.values() if not i.dtype.is_floating_point),
        "matrices": sum(1 for i in infos.values() if len(i.shape) == 2),
        "convolutions": sum(1 for i in infos.values() if len(i.shape) > 2),
        "vectors_1d": sum(1 for i in infos.values() if len(i.shape) <= 1),
        "ties": dict(model.ties),
    }
    if details:
        entry["per_tensor"] = [
            {"tensor": n, "shape": list(i.shape), "dtype": _short(i.dtype), "rank": None,
             "norm": _finite(frobenius(model.get(n).float().reshape(-1, 1)), n, "the model", model.file_of(n))
                if i.dtype.is_floating_point else None}
            for n, i in infos.items()
        ]  # fmt: skip
    return entry


def _finite(norm: float, tensor: str, what: str, file: str | None) -> float:
    if not isfinite(norm):
        raise InputError(
            f"NaN or infinity in {what}", tensor=tensor, file=file, remedy="Repair the file, or use another one."
        )
    return norm


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _vector_entry(vector: TaskVector, details: bool) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    low_rank = vector.is_low_rank()
    norms, warnings = _norms_entry(vector)
    entry = {
        "kind": "adapter" if low_rank else "task-vector",
        "format": vector.origin.dialect,
        "base": vector.origin.base_name,
        "tensors": len(vector.deltas),
        "parameters": sum(prod(vector.layouts[n].shape) for n in vector.deltas),
        "heads": list(vector.heads),
        **norms,
    }
    if low_rank:
        ranks = Counter(vector.deltas[n].rank_bound for n in vector.deltas)
        entry["ranks"] = {str(r): c for r, c in sorted(ranks.items())}
    if details:
        entry["per_tensor"] = [
            {"tensor": n, "shape": list(vector.layouts[n].shape), "dtype": _short(vector.deltas[n].dtype),
             "rank": vector.deltas[n].rank_bound if low_rank else None, "norm": vector.deltas[n].norm()}
            for n in vector.deltas
        ]  # fmt: skip
    return entry, warnings


def _norms_entry(vector: TaskVector) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    norms = {n: _finite(vector.deltas[n].norm(), n, vector.name, vector.origin.file) for n in vector.deltas}
    alive = [x for x in norms.values() if x > 0]
    middle = median(alive) if alive else 0.0
    zero = [n for n, x in norms.items() if x == 0.0]
    large = [n for n, x in norms.items() if middle and x > OUTLIER * middle]
    warnings = []
    if zero and not alive:
        warnings.append(Finding("zero-vector", f"{vector.name} changes nothing: every delta is zero"))
    elif zero:
        warnings.append(Finding("zero-vector", f"{vector.name} changes nothing in {len(zero)} tensors", tuple(zero)))
    if large:
        message = f"{vector.name} has {len(large)} tensors of more than {OUTLIER:g} times its median norm"
        warnings.append(Finding("norm-outlier", message, tuple(large)))
    entry = {
        "norm": sum(x * x for x in norms.values()) ** 0.5,
        "median_tensor_norm": middle,
        "zero_tensors": zero,
        "outlier_tensors": large,
    }
    return entry, tuple(warnings)


def compare(
    sources: Sequence[str | Path | TaskVector],
    *,
    base: Any = None,
    selection: Selection | None = None,
    progress: Progress = silent,
    **choices: Any,
) -> tuple[Decomposition, dict[str, Any]]:
    """Cosines, Gram and overlaps against chance of every pair, over all tensors.

    Per pair: ``cosine``; ``median_largest`` (median over tensors of the largest cos^2), its ratio to the chance edge
    (``median_over_edge``, each tensor to its own), ``largest``, and how many directions stand above chance
    (``p < 0.01`` each, uncorrected) of how many.
    """
    if choices.get("mode") == "target":
        raise UsageError("compare looks at every pair, mode target at the target's alone", remedy="Leave mode out.")
    d = decompose(sources, base=base, selection=selection, progress=progress, **choices)
    gram = total_gram(d)
    k = len(d.vectors)
    norms = [max(gram.get((i, i), 0.0), 0.0) ** 0.5 for i in range(k)]
    pairs = []
    for i in range(k):
        for j in range(i + 1, k):
            own = [s for key, s in d.spectra.items() if key[2] == (i, j) and s.eigenvalues.numel()]
            tops = [float(s.eigenvalues[0]) for s in own]
            inner = gram.get((i, j), 0.0)
            pairs.append(
                {
                    "a": d.vectors[i],
                    "b": d.vectors[j],
                    "cosine": inner / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0,
                    "tensors": len(own),
                    "median_largest": median(tops) if tops else None,
                    "largest": max(tops) if tops else None,
                    "median_over_edge": (
                        median(t / s.edge for t, s in zip(tops, own, strict=True) if s.edge) if tops else None
                    ),
                    "shared_directions": sum(s.count for s in own),
                    "above_chance": sum(int((s.p_values < 0.01).sum()) for s in own),
                    "directions": sum(int(s.eigenvalues.numel()) for s in own),
                }
            )
    matrix = [[gram.get((min(i, j), max(i, j)), 0.0) for j in range(k)] for i in range(k)]
    return d, {"schema": 1, "vectors": list(d.vectors), "norms": norms, "gram": matrix, "pairs": pairs}
