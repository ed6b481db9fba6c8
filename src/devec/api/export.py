"""``export``: one part of a decomposition as a file that other programs load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from devec.api.edit import Edited
from devec.api.output import (
    Saving,
    edited,
    require_low_rank,
    save_model,
    save_vector,
    written_model,
    written_vector,
)
from devec.api.references import ViewLike, load_vector, open_model
from devec.core.vectors import TaskVector
from devec.io.model_folder import WrittenModel


def export(
    part: str | TaskVector,
    out: str | Path,
    *,
    base: Any = None,
    view: ViewLike = None,
    saving: Saving | None = None,
) -> WrittenModel:
    """Write ``ARTIFACT#part`` (or any task vector): an adapter in the input's own format, or ``base + part``.

    Low-rank parts become adapters with the heads of their own input; with ``base`` the part is added to it and a
    checkpoint is written, with those heads that the base has too (``notes`` names the others). A dense part without a
    base is refused (exit 2).
    """
    saving = saving or Saving("export")
    vector = load_vector(part, base=base, view=view) if isinstance(part, str) else part
    if base is not None:
        model, saving = _on_base(vector, base, saving)
        written = save_model(model, out, saving)
        lost = [n for n in vector.heads if n not in model.heads]
        note = (f"the base has no place for {len(lost)} heads of the adapter: {', '.join(lost[:4])}",) if lost else ()
        return replace(written, notes=(*written.notes, *note))
    require_low_rank(vector, f"part {vector.name}", "Give --base BASE to write a checkpoint.")
    return save_vector(vector, out, saving.for_inputs([vector]), heads=vector.heads)


def written_export(vector: TaskVector, out: str | Path, *, base: Any, saving: Saving) -> WrittenModel:
    """What :func:`export` has written there before; RefusedError if that is not what stands there."""
    if base is None:
        return written_vector(out, saving.for_inputs([vector]))
    model, saving = _on_base(vector, base, saving)
    return written_model(model, out, saving)


def _on_base(vector: TaskVector, base: Any, saving: Saving) -> tuple[Edited, Saving]:
    under = open_model(base)
    saving = saving.for_inputs([vector], under)
    stored = set(under.names())
    heads = {n: t for n, t in vector.heads.items() if n in stored}
    return edited(under, [(1.0, vector)], saving, heads), saving
