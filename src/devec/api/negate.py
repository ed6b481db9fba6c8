"""``negate``: remove a behaviour by subtracting what is unique to its task vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from devec.api.decompose import decompose
from devec.api.factor import checkpoints_of_pool
from devec.api.output import (
    Saving,
    edited,
    heads_from,
    require_low_rank,
    save_model,
    save_vector,
    written_model,
    written_vector,
)
from devec.api.references import load_pool, open_model
from devec.core.contracts import TensorSource
from devec.core.decomposition import Decomposition
from devec.core.errors import UsageError
from devec.core.results import Finding
from devec.core.vectors import Pool, TaskVector
from devec.engine.threads import Progress, silent
from devec.io.model_folder import WrittenModel
from devec.io.names import Selection


@dataclass(frozen=True)
class Negated:
    """``B - C x removed`` (lazy), and the decomposition that told what to remove (``None`` for the whole vector)."""

    removed: TaskVector
    coefficient: float
    base: TensorSource | None
    decomposition: Decomposition | None

    @property
    def inputs(self) -> list[TaskVector]:
        return list(self.decomposition.pool) if self.decomposition is not None else [self.removed]


def negate(
    target: str | Path | TaskVector,
    pool: Sequence[str | Path | TaskVector] = (),
    *,
    base: Any = None,
    part: Literal["unique", "all"] = "unique",
    coefficient: float = 1.0,
    selection: Selection | None = None,
    progress: Progress = silent,
    **choices: Any,
) -> Negated:
    """Subtract the part of ``target`` that is unique against the pool (arXiv:2512.22511, section 4.3), or all of it.

    ``unique`` decomposes in target mode (order-free; ``target_rule="sequence"`` or ``paper=True`` for the paper's
    iteration over the pool). 1-D parameters stay in the base unless ``one_d=True``. Without a base, adapters give an
    adapter of ``-C x part``. Nothing is written: see :func:`devec.save`.
    """
    whole, vectors, notes = negate_inputs(
        target, pool, base=base, part=part, coefficient=coefficient, selection=selection, dtype=choices.get("dtype"),
        one_d=bool(choices.get("one_d")),
    )
    if part == "all":
        return whole
    name, under = vectors[0].name, whole.base
    for source in checkpoints_of_pool(vectors):
        source.digests.watch()  # what is written will name the inputs' hashes
    d = decompose(vectors, base=under, mode="target", target=name, progress=progress, notes=notes, **choices)
    return Negated(d.unique(name), coefficient, under, d)


def negate_inputs(
    target: str | Path | TaskVector,
    pool: Sequence[str | Path | TaskVector],
    *,
    base: Any,
    part: Literal["unique", "all"],
    coefficient: float,
    selection: Selection | None,
    dtype: str | None,
    one_d: bool,
) -> tuple[Negated, Pool, list[Finding]]:
    """The inputs of :func:`negate`: the target as a whole to be removed, it and the pool, and what was noticed."""
    under = None if base is None else open_model(base)
    vectors, notes = load_pool(
        [target, *pool], base=under, selection=selection, dtype=getattr(torch, dtype or "float32")
    )
    if part == "unique" and len(vectors) < 2:
        raise UsageError(
            "nothing to tell the target's unique part from", remedy="Give --pool P..., or --part all."
        )
    whole = vectors[0] if one_d else vectors[0].matrices()
    return Negated(whole, coefficient, under, None), vectors, notes


def save_negated(negated: Negated, out: str | Path, saving: Saving, *, heads: str | None = None) -> WrittenModel:
    """A checkpoint if there is a base, otherwise an adapter of ``-C x part``."""
    saving = saving.for_inputs(negated.inputs, negated.base)
    kept = heads_from(heads, negated.inputs)
    if negated.base is not None:
        terms = [(-negated.coefficient, negated.removed)]
        return save_model(edited(negated.base, terms, saving, kept), out, saving)
    require_low_rank(negated.removed, negated.removed.name, "Give --base BASE to write a checkpoint.")
    return save_vector(-negated.coefficient * negated.removed, out, saving, heads=kept)


def written_negated(
    whole: Negated, pool: Pool, out: str | Path, saving: Saving, *, part: str, heads: str | None = None
) -> WrittenModel:
    """What :func:`save_negated` has written there before, from the inputs alone (:func:`negate_inputs`).

    Raises RefusedError if that is not what stands there.
    """
    saving = saving.for_inputs(whole.inputs if part == "all" else pool, whole.base)
    if whole.base is None:
        return written_vector(out, saving)
    kept = heads_from(heads, list(saving.vectors))
    return written_model(edited(whole.base, [(-whole.coefficient, whole.removed)], saving, kept), out, saving)
