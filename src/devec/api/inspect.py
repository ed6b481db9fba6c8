"""``inspect`` and ``compare``: look at sources before doing anything with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from devec.api.decompose import decompose
from devec.api.references import existing, load_pool, load_vector, open_model, parse
from devec.core.contracts import TensorSource
from devec.core.decomposition import Decomposition
from devec.core.errors import DevecError, IncompatibleError
from devec.core.findings import OUTLIER, pool_findings, total_gram
from devec.core.vectors import TaskVector
from devec.engine.threads import Progress, silent
from devec.io.adapters import is_adapter
from devec.io.artifact import artifact_kind
from devec.io.checkpoint import open_checkpoint
from devec.io.names import Selection


def inspect(
    sources: Sequence[str | Path], *, base: Any = None, selection: Selection | None = None
) -> dict[str, Any]:
    """Format, tensors, ranks, norms and outliers of each source; of several, whether they fit one another.

    Returns plain data: ``sources`` (one entry each), ``compatible`` and ``problems`` (errors found on trying, each
    with its exit code and line), ``warnings``.
    """
    under = None if base is None else open_model(base)
    entries = [_describe(str(s), under, selection or Selection()) for s in sources]
    problems: list[dict[str, Any]] = []
    warnings: list[dict[str, object]] = []
    vectors = [e.pop("_vector") for e in entries]
    models = [e.pop("_model") for e in entries]
    if len(entries) > 1:
        try:
            if all(v is not None for v in vectors):
                pool, _ = load_pool([v for v in vectors if v is not None])
                warnings = [f.as_dict() for f in pool_findings(pool)]
            elif all(m is not None for m in models):
                _compatible_models([m for m in models if m is not None])
            elif under is None:
                raise IncompatibleError("adapters and checkpoints together need --base")
        except DevecError as error:
            problems.append({"exit_code": error.exit_code, "message": error.line()})
    return {
        "schema": 1, "sources": entries, "compatible": not problems, "problems": problems, "warnings": warnings,
    }


def _describe(text: str, base: TensorSource | None, selection: Selection) -> dict[str, Any]:
    ref = parse(text)
    path = existing(ref.path, ref.text)
    kind = artifact_kind(path) if path.is_dir() else None
    name = ref.name or (path.stem if path.is_file() else path.name)
    if kind == "decomposition" and ref.part is None:
        from devec.api.references import load_decomposition

        d = load_decomposition(path)
        entry = {"kind": "decomposition", "vectors": list(d.vectors), "tensors": len(d.tensors)}
        return {"name": name, "reference": text, **entry, "_vector": None, "_model": None}
    if kind is not None or ref.part is not None or ref.base is not None or is_adapter(path):
        vector = load_vector(text, base=base, selection=selection)
        return {**_vector_entry(vector, text), "_vector": vector, "_model": None}
    model = open_checkpoint(path)
    entry = _model_entry(model, selection)
    loaded = load_vector(text, base=base, selection=selection) if base is not None else None
    if loaded is not None:
        entry["delta"] = _norms_entry(loaded)
    return {"name": name, "reference": text, **entry, "_vector": loaded, "_model": model}


def _model_entry(model: TensorSource, selection: Selection) -> dict[str, Any]:
    names = [n for n in model.names() if selection.keeps(n)]
    infos = [model.info(n) for n in names]
    sizes = [_numel(i.shape) for i in infos]
    config = getattr(model, "config", None) or {}
    return {
        "kind": "checkpoint",
        "format": Path(model.file_of(names[0])).suffix.lstrip(".") if names else "empty",
        "architecture": config.get("model_type"),
        "tensors": len(names),
        "parameters": sum(sizes),
        "dtypes": dict(Counter(str(i.dtype).removeprefix("torch.") for i in infos)),
        "integers": sum(1 for i in infos if not i.dtype.is_floating_point),
        "matrices": sum(1 for i in infos if len(i.shape) == 2),
        "convolutions": sum(1 for i in infos if len(i.shape) > 2),
        "vectors_1d": sum(1 for i in infos if len(i.shape) <= 1),
        "ties": dict(model.ties),
    }


def _numel(shape: Sequence[int]) -> int:
    out = 1
    for x in shape:
        out *= x
    return out


def _vector_entry(vector: TaskVector, text: str) -> dict[str, Any]:
    ranks = Counter(vector.deltas[n].rank_bound for n in vector.deltas)
    return {
        "name": vector.name,
        "reference": text,
        "kind": "adapter" if vector.is_low_rank() else "task-vector",
        "format": vector.origin.dialect,
        "base": vector.origin.base_name,
        "tensors": len(vector.deltas),
        "parameters": sum(_numel(vector.layouts[n].shape) for n in vector.deltas),
        "ranks": {str(r): c for r, c in sorted(ranks.items())},
        "heads": list(vector.heads),
        **_norms_entry(vector),
    }


def _norms_entry(vector: TaskVector) -> dict[str, Any]:
    norms = {n: vector.deltas[n].norm() for n in vector.deltas}
    alive = [x for x in norms.values() if x > 0]
    middle = median(alive) if alive else 0.0
    return {
        "norm": sum(x * x for x in norms.values()) ** 0.5,
        "median_tensor_norm": middle,
        "zero_tensors": [n for n, x in norms.items() if x == 0.0],
        "outlier_tensors": [n for n, x in norms.items() if middle and x > OUTLIER * middle],
    }


def _compatible_models(models: Sequence[TensorSource]) -> None:
    from devec.api.extract import delta_of
    import torch

    for other in models[1:]:
        delta_of(models[0], other, name="other", selection=Selection(), dtype=torch.float32)


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
