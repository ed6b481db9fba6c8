"""``negate``: remove a behaviour by subtracting what is unique to its task vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from devec.api.decompose import decompose
from devec.api.output import Saving, edited, heads_from, require_low_rank, save_model, save_vector
from devec.api.references import load_pool, open_model
from devec.core.decomposition import Decomposition
from devec.core.errors import UsageError
from devec.core.vectors import TaskVector
from devec.engine.threads import Progress, silent
from devec.io.model_folder import WrittenModel
from devec.io.names import Selection


def negation(
    target: str | Path | TaskVector,
    pool: Sequence[str | Path | TaskVector],
    *,
    base: Any = None,
    part: Literal["unique", "all"] = "unique",
    selection: Selection | None = None,
    progress: Progress = silent,
    **choices: Any,
) -> tuple[TaskVector, Decomposition | None]:
    """The part of ``target`` to subtract: unique against the pool (arXiv:2512.22511, section 4.3), or all of it.

    ``unique`` decomposes in target mode (order-free; ``target_rule="sequence"`` or ``paper=True`` for the paper's
    iteration over the pool). 1-D parameters stay in the base unless ``one_d=True``.
    """
    under = None if base is None else open_model(base)
    dtype = getattr(torch, choices.get("dtype") or "float32")
    vectors, notes = load_pool([target, *pool], base=under, selection=selection, dtype=dtype)
    name = vectors[0].name
    if part == "all":
        whole = vectors[0]
        return (whole if choices.get("one_d") else whole.matrices()), None
    if len(vectors) < 2:
        raise UsageError(
            "nothing to tell the target's unique part from", remedy="Give --pool P..., or --part all."
        )
    d = decompose(vectors, base=under, mode="target", target=name, progress=progress, notes=notes, **choices)
    return d.unique(name), d


def negate(
    removed: TaskVector,
    decomposition: Decomposition | None,
    out: str | Path,
    *,
    base: Any = None,
    coefficient: float = 1.0,
    heads: str | None = None,
    saving: Saving | None = None,
) -> WrittenModel:
    """Write ``B - C x part``: a checkpoint with ``base``, otherwise (adapters) an adapter of ``-C x part``.

    ``removed`` and ``decomposition`` are what :func:`negation` returned.
    """
    saving = saving or Saving("negate")
    under = None if base is None else open_model(base)
    vectors = list(decomposition.pool) if decomposition is not None else [removed]
    saving = saving.for_inputs(vectors, under)
    kept = heads_from(heads, vectors)
    if under is not None:
        return save_model(edited(under, [(-coefficient, removed)], saving, kept), out, saving)
    require_low_rank(removed, removed.name, "Give --base BASE to write a checkpoint.")
    return save_vector(-coefficient * removed, out, saving, heads=kept)
