"""``extract``: a task vector from two checkpoints."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from threading import local
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from devec.api.sources import hub_id, place_of, public_name
from devec.core.contracts import TensorSource
from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import IncompatibleError, InputError
from devec.core.layout import Layout
from devec.core.lazy import BLOCK, LazyDelta
from devec.core.results import Finding
from devec.core.vectors import Origin, TaskVector
from devec.io.artifact import Source, SourcedMap
from devec.io.checkpoint import Checkpoint
from devec.io.names import Selection, nearest
from devec.linalg.lowrank import ThinSVD, svd_of_dense, svd_of_product
from devec.linalg.numerics import NonFiniteError
from devec.linalg.rank import RankRule


def extract(
    base: Any, model: Any, *, name: str | None = None, selection: Selection | None = None,
    dtype: torch.dtype = torch.float32,
) -> TaskVector:
    """``W_ft - W_pre`` per tensor (arXiv:2212.04089), subtracted in ``dtype`` (float32 or wider), lazily.

    ``base`` and ``model`` are paths, state dicts or modules. Raises IncompatibleError where a tensor is missing or of
    another shape; integer tensors (step counters, masks) are left to the base.
    """
    from devec.api.references import open_model

    label = name or (label_of(model) if isinstance(model, (str, Path)) else "model")
    return delta_of(
        open_model(base), open_model(model), name=label, selection=selection or Selection(), dtype=dtype
    )[0]


def label_of(path: str | Path) -> str:
    """What a model is called where no name is given: its repository, its folder, or its file without the suffix."""
    hub = hub_id(str(path))
    if hub is not None:
        return hub.name
    place = Path(path).absolute()
    return place.name if place.is_dir() else place.stem


def delta_of(
    base: TensorSource,
    model: TensorSource,
    *,
    name: str,
    selection: Selection,
    dtype: torch.dtype,
    partial: bool = False,
) -> tuple[TaskVector, list[Finding]]:
    """The lazy difference of two checkpoints, and a finding that names the integer tensors left out.

    ``base.role`` (default "base") is what messages call it. ``partial`` skips tensors of unlike shape or that one side
    lacks (used to reopen what was selected before).
    """
    role = getattr(base, "role", "base")
    wanted = [n for n in base.names() if selection.keeps(n)]
    extra = [n for n in set(model.names()).difference(base.names()) if selection.keeps(n)]
    there = set(model.names())
    if partial:
        wanted = [n for n in wanted if n in there and base.info(n).shape == model.info(n).shape]
    else:
        for n in wanted:
            if n not in there:
                raise _lacking(base, model, n, role, "model")
            _check_tensor(base, model, n, role)
        if extra:
            raise _lacking(model, base, min(extra), "model", role)
    integers = [n for n in wanted if not base.info(n).dtype.is_floating_point]
    names = [n for n in wanted if base.info(n).dtype.is_floating_point]
    layouts = {n: layout_of(base, n) for n in names}

    def make(n: str) -> Delta:
        return difference(base, model, n, layouts[n], dtype)

    vector = TaskVector(
        name=name,
        deltas=SourcedMap(names, make, lambda: _source(base, model)),
        layouts=layouts,
        origin=Origin(
            reference=model.reference, file=place_of(model), dialect="checkpoint", base_name=public_name(base),
            model=model, base=base,
        ),
        partial=False,
    )
    notes = []
    if integers:
        notes.append(
            Finding("integer-copied", f"{name}: the {role}'s integers are kept ({len(integers)})", tuple(integers))
        )
    return vector, notes


def difference(base: TensorSource, model: TensorSource, name: str, layout: Layout, dtype: torch.dtype) -> LazyDelta:
    """One tensor of ``model`` minus the same of ``base``, in ``dtype`` or wider, as a delta that reads when asked."""
    wide = torch.promote_types(torch.promote_types(dtype, model.info(name).dtype), base.info(name).dtype)

    def weights(start: int, stop: int) -> Tensor:
        return model.rows(name, start, stop).to(wide).reshape(stop - start, prod(layout.shape[1:]))

    def read(start: int, stop: int) -> Tensor:
        before, stored = widened_rows(base, name, start, stop, wide), model.rows(name, start, stop)
        tuned = stored.to(wide)
        rows = tuned - before if tuned is stored else tuned.sub_(before)  # the widened copy is nobody else's
        return rows.reshape(stop - start, prod(rows.shape[1:]))

    whole = is_zero(base, name)
    return LazyDelta(layout.matrix_shape, wide, weights if whole else read, transposed=layout.transposed)


def is_zero(base: TensorSource, name: str) -> bool:
    """Whether ``base`` says that this tensor of it is zero and need not be read."""
    known = getattr(base, "is_zero", None)
    return known is not None and bool(known(name))


_last = local()


def widened_rows(source: TensorSource, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows of ``source`` in ``dtype``; each thread keeps its last block, which several vectors want in turn."""
    key = (name, start, stop, dtype)
    kept = getattr(_last, "block", None)
    if kept is not None and kept[0]() is source and kept[1] == key:
        found: Tensor = kept[2]
        return found
    rows = source.rows(name, start, stop).to(dtype)
    _last.block = (ref(source), key, rows) if rows.numel() <= 4 * BLOCK else None
    return rows


def _check_tensor(base: TensorSource, model: TensorSource, n: str, role: str) -> None:
    info, other = base.info(n), model.info(n)
    if tuple(info.shape) != tuple(other.shape):
        raise IncompatibleError(
            f"a tensor has another shape than in the {role}",
            tensor=n,
            values={role: tuple(info.shape), "model": tuple(other.shape)},
            file=model.file_of(n),
            remedy=f"Leave it out with --exclude (heads, resized vocabularies), or use the right {role}.",
        )
    if info.dtype.is_floating_point != other.dtype.is_floating_point:
        raise IncompatibleError(
            "a tensor is an integer on one side and a float on the other",
            tensor=n, values={role: info.dtype, "model": other.dtype}, file=model.file_of(n),
            remedy="Leave it out with --exclude.",
        )


def _lacking(has: TensorSource, lacks: TensorSource, n: str, one: str, other: str) -> IncompatibleError:
    tied = lacks.ties.get(n)
    return IncompatibleError(
        f"the {one} has a tensor that the {other} lacks",
        tensor=n,
        values={
            one: tuple(has.info(n).shape), other: f"tied to {tied}" if tied else "missing",
            "nearest": ", ".join(nearest(n, lacks.names())) or "nothing like it",
        },
        file=lacks.reference,
        remedy="Use models of one architecture and their own base, or leave the tensor out with --exclude.",
    )


def _source(base: TensorSource, model: TensorSource) -> Source | None:
    """Both sides as files with their hashes, or ``None`` where one of them lies in no file."""
    if not (isinstance(base, Checkpoint) and isinstance(model, Checkpoint)):
        return None  # an edited model is not what its file says
    if not (_on_disk(model) and _on_disk(base)):
        return None
    here, there = (str(Path(m.reference).absolute()) if m.hub is None else m.hub.pinned for m in (model, base))
    return Source(here, model.fingerprint(), there, base.fingerprint())


def _on_disk(model: Checkpoint) -> bool:
    names = model.names()
    return bool(names) and Path(model.file_of(names[0])).is_file()


def layout_of(source: TensorSource, name: str) -> Layout:
    return source.layout(name) if hasattr(source, "layout") else Layout(tuple(source.info(name).shape))


def to_lora(
    vector: TaskVector, *, rank: int | None = None, energy: float | None = None, error: float | None = None
) -> tuple[TaskVector, dict[str, float]]:
    """Low-rank factors of every matrix, and the relative Frobenius error made in each.

    Per tensor: at most ``rank`` directions, or the fewest that keep the fraction ``energy`` of ``|W|_F^2``, or the
    fewest with ``|W - BA|_F <= error |W|_F``. 1-D parameters cannot be factors and are left out (reported as error 1).
    """
    rule = lora_rule(rank, energy, error)
    errors: dict[str, float] = {}
    found: dict[str, Delta] = {}
    for n in vector.deltas:
        if vector.layouts[n].is_vector:
            errors[n] = 1.0
            continue
        svd = factored(vector, n, rule, exact=rank is None)
        errors[n] = max(1.0 - svd.energy_kept, 0.0) ** 0.5
        found[n] = lora_of(svd)
    layouts = {n: vector.layouts[n] for n in found}
    return replace(vector, deltas=found, layouts=layouts, partial=True), errors


def lora_rule(rank: int | None, energy: float | None, error: float | None) -> RankRule:
    """The rank rule of ``--rank``, ``--energy`` or ``--error``: ``|W - BA|_F <= e |W|_F`` keeps ``1 - e^2`` of the
    energy."""
    if error is not None:
        energy = max(1.0 - error * error, 1e-12)
    return RankRule.parse(rank) if rank is not None else RankRule("energy", float(energy or 1.0))


def factored(vector: TaskVector, name: str, rule: RankRule, *, exact: bool) -> ThinSVD:
    """The thin SVD of one matrix. Raises InputError (exit 3) for NaN or infinity."""
    delta = vector.deltas[name]
    try:
        if isinstance(delta, LowRankDelta):
            return svd_of_product(delta.B, delta.A, rule)
        return svd_of_dense(delta.dense(), rule, exact=exact, key=(vector.name, name))
    except NonFiniteError:
        raise InputError(
            f"NaN or infinity in {vector.name}", tensor=name, file=vector.origin.file,
            remedy="Repair the file, or leave the tensor out with --exclude.",
        ) from None


def lora_of(svd: ThinSVD) -> LowRankDelta:
    """``B = U sqrt(S)``, ``A = sqrt(S) V^T``."""
    root = svd.S.sqrt().to(svd.U.dtype)
    return LowRankDelta(svd.U * root, root[:, None] * svd.V.T)
