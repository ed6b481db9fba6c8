"""``negate``: remove a behaviour by subtracting what is unique to its task vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from devec.api.decompose import decompose
from devec.api.output import Saving, edited, heads_from, require_low_rank, save_model, save_vector
from devec.api.references import load_pool, open_model
from devec.core.contracts import TensorSource
from devec.core.decomposition import Decomposition
from devec.core.errors import UsageError
from devec.core.vectors import TaskVector
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
    under = None if base is None else open_model(base)
    dtype = getattr(torch, choices.get("dtype") or "float32")
    vectors, notes = load_pool([target, *pool], base=under, selection=selection, dtype=dtype)
    name = vectors[0].name
    if part == "all":
        whole = vectors[0]
        return Negated(whole if choices.get("one_d") else whole.matrices(), coefficient, under, None)
    if len(vectors) < 2:
        raise UsageError(
            "nothing to tell the target's unique part from", remedy="Give --pool P..., or --part all."
        )
    d = decompose(vectors, base=under, mode="target", target=name, progress=progress, notes=notes, **choices)
    return Negated(d.unique(name), coefficient, under, d)


def save_negated(negated: Negated, out: str | Path, saving: Saving, *, heads: str | None = None) -> WrittenModel:
    """A checkpoint if there is a base, otherwise an adapter of ``-C x part``."""
    saving = saving.for_inputs(negated.inputs, negated.base)
    kept = heads_from(heads, negated.inputs)
    if negated.base is not None:
        terms = [(-negated.coefficient, negated.removed)]
        return save_model(edited(negated.base, terms, saving, kept), out, saving)
    require_low_rank(negated.removed, negated.removed.name, "Give --base BASE to write a checkpoint.")
    return save_vector(-negated.coefficient * negated.removed, out, saving, heads=kept)
