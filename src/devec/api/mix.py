"""``mix``: several adapters into one, by their unique parts (or shared, or whole)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from devec.api.decompose import decompose
from devec.api.merge import Compression
from devec.api.output import Saving, heads_from, require_low_rank, save_vector, written_vector
from devec.api.references import load_pool
from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import UsageError
from devec.core.results import Finding
from devec.core.vectors import Pool, TaskVector
from devec.engine.threads import Progress, silent
from devec.io.model_folder import WrittenModel
from devec.io.names import Selection

Part = Literal["unique", "shared", "all"]


@dataclass(frozen=True)
class Mixed:
    """The mixed vector (lazy) and, unless whole adapters were summed, the decomposition that it was made from."""

    vector: TaskVector
    inputs: tuple[TaskVector, ...]
    decomposition: Decomposition | None


def mix(
    adapters: Sequence[str | Path | TaskVector],
    *,
    part: Part = "unique",
    weights: Sequence[float] | None = None,
    selection: Selection | None = None,
    progress: Progress = silent,
    **choices: Any,
) -> Mixed:
    """``sum_i w_i part_i`` over adapters: exact, without a base, whatever their ranks (ranks add).

    ``part`` is ``unique`` (the paper's style mixing, section 4.2), ``shared`` or ``all`` (the plain sum). 1-D
    parameters are left out unless ``one_d=True``. ``choices`` are those of :func:`devec.decompose`.
    """
    pool, notes = mix_inputs(adapters, selection=selection, dtype=choices.get("dtype"))
    w = [1.0] * len(pool) if weights is None else [float(x) for x in weights]
    if len(w) != len(pool):
        raise UsageError(f"{len(w)} weights for {len(pool)} adapters", remedy="Give one weight an adapter: -w 1,0.5")
    d: Decomposition | None = None
    if part == "all":
        parts = [v if choices.get("one_d") else v.matrices() for v in pool]
    else:
        d = decompose(pool, progress=progress, notes=notes, **choices)
        parts = [d.unique(n) if part == "unique" else d.shared(n) for n in d.vectors]
    total = w[0] * parts[0]
    for x, p in zip(w[1:], parts[1:], strict=True):
        total = total + x * p
    return Mixed(total.named(f"mix-of-{len(pool)}").map(_tidy), tuple(pool), d)


def mix_inputs(
    adapters: Sequence[str | Path | TaskVector], *, selection: Selection | None = None, dtype: str | None = None
) -> tuple[Pool, list[Finding]]:
    """The adapters of a mix, read, and what was noticed."""
    return load_pool(adapters, selection=selection, dtype=getattr(torch, dtype or "float32"))


def _tidy(_name: str, delta: Delta) -> Delta:
    """No wider than the matrix itself: a sum whose ranks exceed its sides is rewritten at its numerical rank."""
    if isinstance(delta, LowRankDelta) and delta.B.shape[1] > min(delta.shape):
        return delta.recompress()
    return delta


def save_mix(
    mixed: Mixed,
    out: str | Path,
    saving: Saving,
    *,
    compression: Compression | None = None,
    heads: str | None = None,
) -> tuple[WrittenModel, dict[str, float]]:
    """Write the mix in the first input's dialect; with ``compression``, also the relative error per tensor."""
    saving = saving.for_inputs(mixed.inputs)
    vector, errors = mixed.vector, dict[str, float]()
    if compression is not None and compression.asked:
        vector, errors = compression.apply(vector)
    require_low_rank(vector, "the mix", "Give --rank R to write an adapter.")
    return save_vector(vector, out, saving, heads=heads_from(heads, mixed.inputs)), errors


def written_mix(pool: Pool, out: str | Path, saving: Saving) -> WrittenModel:
    """What :func:`save_mix` has written there before; RefusedError if that is not what stands there."""
    return written_vector(out, saving.for_inputs(pool))
