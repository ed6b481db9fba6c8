"""``merge``: any registered method over a pool, from a recipe or from arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.api.coefficients import TRANSDUCTIVE, described, read_coefficients, weighted
from devec.api.extract import to_lora
from devec.api.jobs import checkpoints_of
from devec.api.output import (
    Saving,
    edited,
    heads_from,
    save_model,
    save_vector,
    written_model,
    written_vector,
)
from devec.api.references import ViewLike, existing, load_pool, open_model, parse
from devec.api.settings import Settings, bind
from devec.api.sources import hub_of, public_name
from devec.api.statistics import Statistics, checked, names_in, once_known, stats_of
from devec.api.whole import WholeModel, WholeTensor, by_blocks, find
from devec.core.block import Block
from devec.core.coefficients import Coefficients
from devec.core.contracts import TensorInfo, TensorSource
from devec.core.delta import Delta, DenseDelta
from devec.core.errors import InputError, UsageError
from devec.core.layout import Layout
from devec.core.lazy import BLOCK, LazyDelta, is_dense, once
from devec.core.results import Finding
from devec.core.vectors import LazyMap, Pool, TaskVector, cost_of
from devec.io.adapters import is_adapter
from devec.io.artifact import artifact_kind
from devec.io.hub_id import HubFolder
from devec.io.model_folder import WrittenModel
from devec.io.names import Selection, resolve_names
from devec.linalg.numerics import one_blas_thread
from devec.linalg.select import BINS
from devec.methods import registry


class ZeroBase:
    """A base of zeros in the shapes of a model, so that methods which need no base see weights as deltas.

    Integer tensors, and those that the selection leaves out, are the model's own: copied, never averaged.
    """

    role = "first model"

    def __init__(self, like: TensorSource, selection: Selection) -> None:
        self.like, self.selection = like, selection

    @property
    def reference(self) -> str:
        return self.like.reference

    @property
    def hub(self) -> HubFolder | None:
        return hub_of(self.like)

    @property
    def ties(self) -> Mapping[str, str]:
        return self.like.ties

    @property
    def config(self) -> dict[str, Any] | None:
        return getattr(self.like, "config", None)

    @property
    def folder(self) -> Path | None:
        return getattr(self.like, "folder", None)

    def names(self) -> Sequence[str]:
        return self.like.names()

    def info(self, name: str) -> TensorInfo:
        return self.like.info(name)

    def file_of(self, name: str) -> str:
        return self.like.file_of(name)

    def get(self, name: str) -> Tensor:
        info = self.info(name)
        return torch.zeros(info.shape, dtype=info.dtype) if self.is_zero(name) else self.like.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not self.is_zero(name):
            return self.like.rows(name, start, stop)
        info = self.info(name)
        return torch.zeros((stop - start, *info.shape[1:]), dtype=info.dtype)

    def is_zero(self, name: str) -> bool:
        """Whether the tensor is zero here, not the model's own."""
        return self.like.info(name).dtype.is_floating_point and self.selection.keeps(name)


@dataclass(frozen=True)
class Compression:
    """How a result is made low-rank: at most one of the three (see ``to_lora``)."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.rank, self.energy, self.error)) > 1:
            raise UsageError("give one of --rank, --energy and --error")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank wants a whole number from 1 on, got {self.rank}")
        for label, value in (("--energy", self.energy), ("--error", self.error)):
            if value is not None and not 0.0 < value <= 1.0:
                raise UsageError(f"{label} wants a fraction in (0, 1], got {value:g}")

    @property
    def asked(self) -> bool:
        return any(x is not None for x in (self.rank, self.energy, self.error))

    def apply(self, vector: TaskVector) -> tuple[TaskVector, dict[str, float]]:
        """The vector as factors, and the relative error made in each tensor; what is read is hashed on the way."""
        for source in checkpoints_of(vector):
            source.digests.watch()
        return to_lora(vector, rank=self.rank, energy=self.energy, error=self.error)


@dataclass(frozen=True)
class Merged:
    """The merged vector (lazy), its pool, and the base it stands on (``None``: adapters only)."""

    method: str
    vector: TaskVector
    pool: Pool
    base: TensorSource | None
    findings: tuple[Finding, ...] = ()
    statistics: Callable[[], Any] | None = None
    """What the method's pass over the model finds, made when first asked for; ``None`` if it takes none."""
    looks: int = 0
    """How often an input is read, at most, before it is merged."""
    coefficients: Coefficients | None = None
    data: Callable[[], Statistics] | None = None
    """What was collected of the data that the method needs."""

    @property
    def reference_base(self) -> TensorSource | None:
        """The base that the user gave; ``None`` also where whole weights are averaged."""
        return None if isinstance(self.base, ZeroBase) else self.base


def merge(
    method: str,
    sources: Sequence[str | Path | TaskVector],
    *,
    base: Any = None,
    parameters: Mapping[str, Any] | None = None,
    view: ViewLike = None,
    selection: Selection | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    statistics: Any = None,
    coefficients: str | Path | Coefficients | None = None,
    statistics_of: str | Path | Statistics | Callable[[], Statistics] | None = None,
) -> Merged:
    """Run a registered merge method block by block, lazily.

    ``parameters`` are numbers and words, or vary over the model (see ``api.varying``).
    ``workers`` threads take the pass over the whole model that some methods need (all cores by default);
    ``coefficients`` (what ``learn`` returns, or its file) take the place of task arithmetic's scale and weights.
    ``statistics`` is what that pass found in another process, which is then not taken here. ``statistics_of`` is what
    ``collect`` found (or its folder, or a function that gives it when the first tensor is merged), for a method that
    needs data.

    Raises UsageError for an unknown method or parameter (with a suggestion), and when the method needs a base that is
    not given, or data; IncompatibleError for coefficients and statistics of other inputs.
    """
    chosen = registry.get("merge", method)
    settings = bind(chosen, parameters or {})
    if not sources:
        raise UsageError("merge got no sources", remedy="Name at least one model or adapter.")
    _check_needs(chosen, statistics_of is not None, base is not None)
    under = open_model(base) if base is not None else None
    if under is None and (whole := [s for s in sources if _is_checkpoint(s)]):
        if chosen.needs_base:
            raise UsageError(f"{chosen.name} of full checkpoints needs their base", remedy="Give --base BASE.")
        if len(whole) < len(sources):  # weights and changes of weights are not the same kind of thing
            raise UsageError(
                "full checkpoints and adapters (or parts) together need the base", values={"checkpoint": whole[0]},
                remedy="Give --base BASE.",
            )
        under = ZeroBase(open_model(sources[0]), selection or Selection())
    pool, notes = load_pool(sources, base=under, dtype=dtype, selection=selection, view=view)
    scaled, learned = pool, coefficients
    if learned is not None:
        learned = learned if isinstance(learned, Coefficients) else read_coefficients(learned)
        scaled, given = weighted(learned, chosen, parameters or {}, pool, under, view, selection)
        settings = bind(chosen, given)
    common, bound = settings.whole(), _over(settings, scaled, under)
    different = list({id(values): values for values in bound.values()}.values())
    for values in different:
        _try_parameters(chosen, scaled, values)
    looks = max((chosen.looks(chosen.filled(values)) for values in different), default=0)
    found: Callable[[], Any] | None = None
    if chosen.measures_model(common):
        known = statistics is not None
        found = once(lambda: statistics if known else find(chosen, WholeModel(scaled, chosen, common, workers), common))
    data: Callable[[], Statistics] | None = None
    stats: Callable[[Block], Mapping[str, object]] | None = None
    if statistics_of is not None and under is not None:
        data = once_known(statistics_of, lambda s: checked(s, chosen, pool, under, view, selection))
        stats = stats_of(data, names_in(pool, under))
    vector = merged_vector(chosen, scaled, bound, found, stats)
    return Merged(chosen.name, vector, pool, under, tuple(notes), found, looks, learned, data)


def _check_needs(method: registry.Method, data: bool, base: bool) -> None:
    if method.needs and not data:
        raise UsageError(
            f"{method.name} needs data: {', '.join(method.needs)} of every fine-tune on its own task",
            remedy="In Python: devec.merge(..., statistics_of=devec.collect(...)).",
        )
    if data and not method.needs:
        raise UsageError(f"{method.name} needs no data", remedy="Leave out statistics_of.")
    if data and not base:
        raise UsageError(f"{method.name} needs the base", remedy="Give --base BASE.")


def _over(settings: Settings, pool: Pool, base: TensorSource | None) -> dict[str, dict[str, Any]]:
    """The parameters of every tensor of the pool; filters see the names of the base where there is one."""
    own = pool.tensors()
    if not settings.varying or base is None:
        return settings.over({n: n for n in own}, own)
    there = [*base.names(), *base.ties]
    return settings.over(resolve_names(own, there), there)


def _is_checkpoint(source: str | Path | TaskVector) -> bool:
    if isinstance(source, TaskVector):
        return False
    ref = parse(str(source))
    if ref.part is not None:
        return False
    path = existing(ref.path, ref.text)
    return not (path.is_dir() and artifact_kind(path)) and (ref.base is not None or not is_adapter(path))


def merged_vector(
    method: registry.Method,
    pool: Pool,
    parameters: Mapping[str, Mapping[str, Any]],
    model: Callable[[], Any] | None = None,
    stats: Callable[[Block], Mapping[str, object]] | None = None,
) -> TaskVector:
    """The method's result as a lazy task vector over every tensor that any vector touches.

    ``parameters`` are those of each tensor; ``model`` gives what a method finds that goes over the whole model first,
    ``stats`` what it needs of data for a block.
    """

    def make(name: str) -> Delta:
        block = pool.block(name)
        if stats is not None:
            block = replace(block, stats=stats(block))
        return merged_delta(method, block, parameters[name], model)

    first = pool[0]
    names = pool.tensors()
    sources = list({id(s): s for v in pool for s in v.origin.sources()}.values())

    def cost(name: str) -> int:
        parts = sum(cost_of(v.deltas)(name) for v in pool if name in v.deltas)
        n, m = pool.layout(name).matrix_shape
        grain = method.grain_with(parameters[name])
        if by_blocks(method, Block(name, pool.layout(name), (), ()), parameters[name]):
            # of every vector a few copies of a block in float64, and the counts of a selection
            sums = method.keeps_rank and grain == "elements"
            return parts + (0 if sums else len(pool) * 6 * 8 * (max(BLOCK, m) + BINS))
        if grain == "rows":  # sorting a row and drawing for it take a few copies of one matrix
            return parts + (len(pool) + 8) * n * m * 8
        return parts + method.working_bytes((n, m), len(pool), parameters[name])

    return replace(
        first,
        name=f"{method.name}-of-{len(pool)}",
        deltas=LazyMap(names, make, cost),
        layouts={n: pool.layout(n) for n in names},
        heads={},
        origin=replace(first.origin, reference="memory", file=None, others=tuple(sources)),
        partial=all(v.partial for v in pool),
    )


def _try_parameters(method: registry.Method, pool: Pool, parameters: Mapping[str, Any]) -> None:
    """The method on a tensor without rows: a wrong number of weights is said now and not when half is written."""
    if method.grain in ("elements", "rows") and not method.needs:
        nothing = DenseDelta(torch.zeros(0, 1))
        method.call(Block("", Layout((0, 1)), pool.names, (nothing,) * len(pool)), **parameters)


def merged_delta(
    method: registry.Method, block: Block, parameters: Mapping[str, Any], model: Callable[[], Any] | None = None
) -> Delta:
    """The method on one block: in blocks of rows where its grain allows that and the result is dense.

    Of adapters a method that keeps rank is given the factors. ``model`` gives what it finds over the whole model.
    """
    factors = method.keeps_rank and not any(is_dense(d) for d in block.deltas)
    if factors or not by_blocks(method, block, parameters):
        if model is not None:
            block = replace(block, stats={**block.stats, "measured": model()})
        with one_blas_thread():  # factorisations round otherwise in a team of threads
            whole: Delta = method.call(block, **parameters)
        return whole
    filed = block.in_file()
    tensor = None if method.measure is None else once(lambda: find(method, WholeTensor(filed), parameters))
    first = model or tensor

    def read(start: int, stop: int) -> Tensor:
        part = filed.rows(start, stop)
        if first is not None:
            part = replace(part, stats={**part.stats, "measured": first()})
        merged: Delta = method.call(part, **parameters)
        return merged.dense()

    return LazyDelta(block.layout.matrix_shape, block.dtype, read, transposed=block.layout.transposed)


def model_for(*, dtype: str, out_dtype: str | None, heads: str | None = None, **given: Any) -> TensorSource:
    """The checkpoint that ``merge`` writes, made anew from files: for other processes (see ``api.jobs.Job``)."""
    merged = merge(**given, dtype=getattr(torch, dtype))
    assert merged.base is not None
    narrow = None if out_dtype is None else getattr(torch, out_dtype)
    saving = Saving("merge", dtype=getattr(torch, dtype), out_dtype=narrow)
    return edited(merged.base, [(1.0, merged.vector)], saving, heads_from(heads, list(merged.pool)))


def save_merged(
    merged: Merged,
    out: str | Path,
    saving: Saving,
    *,
    compression: Compression | None = None,
    heads: str | None = None,
) -> tuple[WrittenModel, dict[str, float]]:
    """Write a merge: a checkpoint on its base; an adapter if all inputs are adapters and rank is kept or asked for.

    Returns what was written and, where the result was compressed, the relative Frobenius error per tensor.
    """
    compression = compression or Compression()
    saving = _saving(merged, saving)
    kept = heads_from(heads, list(merged.pool))
    vector, errors = merged.vector, dict[str, float]()
    if merged.base is not None and not compression.asked:
        model = edited(merged.base, [(1.0, vector)], saving, kept)
        names = [] if merged.reference_base is None else [public_name(merged.base)]
        try:
            return save_model(model, out, saving, names or [v.origin.reference for v in merged.pool]), errors
        except InputError as error:
            if error.tensor in vector.deltas:  # the merge is not finite: say whose numbers are not
                edited(merged.base, [(1.0, v) for v in merged.pool], saving).blame(str(error.tensor))
            raise
    check_is_change(merged, compression)
    if compression.asked:
        vector, errors = compression.apply(vector)
    elif not vector.is_low_rank():
        raise UsageError(
            f"{merged.method} makes full matrices, which no adapter can hold, and no base is given",
            remedy="Give --base BASE to write a checkpoint, or --rank R, --energy E or --error X to write an adapter.",
        )
    return save_vector(vector, out, saving, heads=kept), errors


def check_is_change(merged: Merged, compression: Compression) -> None:
    """Raises UsageError where whole weights, and no change of a base, are to become an adapter."""
    if compression.asked and isinstance(merged.base, ZeroBase):
        raise UsageError(
            "an average of whole models is no adapter", remedy="Give --base BASE to write its difference as an adapter."
        )


def _saving(merged: Merged, saving: Saving) -> Saving:
    """With the inputs, and what the coefficients were learned on."""
    saving = saving.for_inputs(merged.pool, merged.reference_base)
    if merged.data is not None:
        saving = replace(saving, parameters={**saving.parameters, "statistics": merged.data().description})
    if merged.coefficients is None:
        return saving
    parameters = {**saving.parameters, "coefficients": described(merged.coefficients)}
    text = TRANSDUCTIVE if merged.coefficients.transductive else saving.card_text
    return replace(saving, parameters=parameters, card_text=text)


def written_merge(
    merged: Merged, out: str | Path, saving: Saving, *, compression: Compression, heads: str | None = None
) -> WrittenModel:
    """What :func:`save_merged` has written there before; RefusedError if that is not what stands there."""
    saving = _saving(merged, saving)
    if merged.base is None or compression.asked:
        return written_vector(out, saving)
    model = edited(merged.base, [(1.0, merged.vector)], saving, heads_from(heads, list(merged.pool)))
    return written_model(model, out, saving)
