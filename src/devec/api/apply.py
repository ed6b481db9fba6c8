"""``apply``: a base plus weighted parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from devec.api.edit import Edited
from devec.api.output import Saving, edited, heads_from, save_model
from devec.api.references import ViewLike, load_vector, open_model
from devec.core.errors import UsageError
from devec.core.vectors import TaskVector
from devec.io.model_folder import WrittenModel
from devec.io.names import Selection

Weighted = tuple[float, str | Path | TaskVector]


def apply(
    base: Any,
    terms: Sequence[Weighted] | TaskVector,
    out: str | Path | None = None,
    *,
    view: ViewLike = None,
    selection: Selection | None = None,
    heads: str | None = None,
    saving: Saving | None = None,
) -> Edited | WrittenModel:
    """``W = W_0 + sum_t c_t part_t``, summed in float32 (or wider), cast last.

    ``terms`` are ``(coefficient, reference or TaskVector)``, or one task vector. Without ``out`` a lazy
    :class:`~devec.api.edit.Edited` comes back (``.get(name)``, ``.state_dict()``); with it a folder is written.
    """
    saving = saving or Saving("apply")
    weighted: Sequence[Weighted] = [(1.0, terms)] if isinstance(terms, TaskVector) else terms
    if not weighted:
        raise UsageError("apply got nothing to add", remedy="Give --add W REF or --subtract W REF.")
    under = open_model(base)
    loaded: list[tuple[float, TaskVector]] = []
    for coefficient, item in weighted:
        if isinstance(item, TaskVector):
            loaded.append((float(coefficient), item))
        else:
            vector = load_vector(item, base=under, dtype=saving.dtype, selection=selection, view=view)
            loaded.append((float(coefficient), vector))
    vectors = [v for _, v in loaded]
    if out is not None:
        saving = saving.for_inputs(vectors, under)
    model = edited(under, loaded, saving, heads_from(heads, vectors))
    return model if out is None else save_model(model, out, saving)


def model_for(
    base: str, terms: Sequence[tuple[float, str]], *, dtype: str, out_dtype: str | None, **choices: Any
) -> Edited:
    """What ``apply`` writes, made anew from files: for other processes (see ``api.jobs.Job``)."""
    narrow = None if out_dtype is None else getattr(torch, out_dtype)
    saving = Saving("apply", dtype=getattr(torch, dtype), out_dtype=narrow)
    model = apply(base, terms, saving=saving, **choices)
    assert isinstance(model, Edited)
    return model

