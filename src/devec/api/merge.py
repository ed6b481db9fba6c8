"""``merge``: any registered method over a pool, from a recipe or from arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.api.coefficients import TRANSDUCTIVE, described, read_coefficients, weighted
from devec.api.extract import to_lora
from devec.api.output import Saving, edited, heads_from, save_model, save_vector
from devec.api.references import ViewLike, existing, load_pool, open_model, parse
from devec.api.sources import hub_of, public_name
from devec.core.block import Block
from devec.core.coefficients import Coefficients
from devec.core.contracts import TensorInfo, TensorSource
from devec.core.delta import Delta
from devec.core.errors import InputError, UsageError
from devec.core.lazy import LazyDelta, is_dense
from devec.core.results import Finding
from devec.core.vectors import LazyMap, Pool, TaskVector, cost_of
from devec.io.adapters import is_adapter
from devec.io.artifact import artifact_kind
from devec.io.hub_id import HubFolder
from devec.io.model_folder import WrittenModel
from devec.io.names import Selection
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
        return to_lora(vector, rank=self.rank, energy=self.energy, error=self.error)


@dataclass(frozen=True)
class Merged:
    """The merged vector (lazy), its pool, and the base it stands on (``None``: adapters only)."""

    vector: TaskVector
    pool: Pool
    base: TensorSource | None
    findings: tuple[Finding, ...] = ()
    coefficients: Coefficients | None = None

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
    coefficients: str | Path | Coefficients | None = None,
) -> Merged:
    """Run a registered merge method block by block, lazily.

    ``coefficients`` (what ``learn`` returns, or its file) take the place of task arithmetic's scale and weights.

    Raises UsageError for an unknown method or parameter (with a suggestion), and when the method needs a base that is
    not given; IncompatibleError for coefficients that were learned on other inputs.
    """
    chosen = registry.get("merge", method)
    bound = registry.bind(chosen, dict(parameters or {}))
    if not sources:
        raise UsageError("merge got no sources", remedy="Name at least one model or adapter.")
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
        scaled, bound = weighted(learned, chosen, bound, pool, under, view, selection)
    vector = merged_vector(chosen, scaled, bound)
    return Merged(vector, pool, under, tuple(notes), learned)


def _is_checkpoint(source: str | Path | TaskVector) -> bool:
    if isinstance(source, TaskVector):
        return False
    ref = parse(str(source))
    if ref.part is not None:
        return False
    path = existing(ref.path, ref.text)
    return not (path.is_dir() and artifact_kind(path)) and (ref.base is not None or not is_adapter(path))


def merged_vector(method: registry.Method, pool: Pool, parameters: Mapping[str, Any]) -> TaskVector:
    """The method's result as a lazy task vector over every tensor that any vector touches."""

    def make(name: str) -> Delta:
        return merged_delta(method, pool.block(name), parameters)

    first = pool[0]
    names = pool.tensors()
    sources = list({id(s): s for v in pool for s in v.origin.sources()}.values())

    def cost(name: str) -> int:
        parts = sum(cost_of(v.deltas)(name) for v in pool if name in v.deltas)
        if method.grain == "elements" or (method.grain == "rows" and not pool.layout(name).transposed):
            return parts
        n, m = pool.layout(name).matrix_shape
        return parts + (len(pool) + 2) * n * m * 8  # whole matrices, and as much again for the method's own
    return replace(
        first,
        name=f"{method.name}-of-{len(pool)}",
        deltas=LazyMap(names, make, cost),
        layouts={n: pool.layout(n) for n in names},
        heads={},
        origin=replace(first.origin, reference="memory", file=None, others=tuple(sources)),
        partial=all(v.partial for v in pool),
    )


def merged_delta(method: registry.Method, block: Block, parameters: Mapping[str, Any]) -> Delta:
    """The method on one block: in blocks of rows where its grain allows that and a dense delta makes it worth while.

    A method of elements does not care which way a matrix lies, so blocks follow the file; one of rows does.
    """
    dense = [d for d in block.deltas if is_dense(d)]
    if not dense or method.grain not in ("elements", "rows") or (method.grain == "rows" and block.layout.transposed):
        whole: Delta = method.call(block, **parameters)
        return whole
    filed = block.in_file()

    def read(start: int, stop: int) -> Tensor:
        merged: Delta = method.call(filed.rows(start, stop), **parameters)
        return merged.dense()

    dtype = reduce(torch.promote_types, (d.dtype for d in block.deltas if d is not None))
    return LazyDelta(block.layout.matrix_shape, dtype, read, transposed=block.layout.transposed)


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
    saving = saving.for_inputs(merged.pool, merged.reference_base)
    if merged.coefficients is not None:
        parameters = {**saving.parameters, "coefficients": described(merged.coefficients)}
        text = TRANSDUCTIVE if merged.coefficients.transductive else saving.card_text
        saving = replace(saving, parameters=parameters, card_text=text)
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
    if compression.asked and isinstance(merged.base, ZeroBase):
        raise UsageError(
            "an average of whole models is no adapter", remedy="Give --base BASE to write its difference as an adapter."
        )
    if compression.asked:
        vector, errors = compression.apply(vector)
    elif not vector.is_low_rank():
        raise UsageError(
            "the merge is dense and no base is given", remedy="Give --base BASE, or --rank R to write an adapter."
        )
    return save_vector(vector, out, saving, heads=kept), errors

