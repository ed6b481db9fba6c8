"""``--dry-run`` of ``negate``, ``mix``, ``extract`` and of whatever writes an adapter: the stages, and what of their
results stays in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from devec.api.budget import adapter_bytes, factors_kept, likely, most, ranks
from devec.api.factor import checkpoints_of_pool, tensor_names
from devec.api.jobs import sources_of
from devec.api.merge import Compression
from devec.api.negate import Negated
from devec.api.output import Saving, edited, heads_from, require_low_rank
from devec.api.plan import Sizes, file_bytes, plan_decompose, plan_write, svd_flops
from devec.core.decomposition import part_bytes
from devec.core.delta import LowRankDelta
from devec.core.layout import Layout
from devec.core.lazy import row_blocks
from devec.core.options import Factoring
from devec.core.vectors import LazyMap, Pool, TaskVector
from devec.engine.memory import fit_workers
from devec.engine.plan import Rates, Stage, peak, wall
from devec.methods.decompose.costs import working_bytes


def plan_negate(
    whole: Negated,
    pool: Pool,
    factoring: Factoring | None,
    saving: Saving,
    *,
    heads: str | None = None,
    rates: Rates | None = None,
    bound: bool = False,
) -> list[Stage]:
    """The decomposition of the target against the pool (unless ``factoring`` is ``None``: all of it goes), and the
    writing of the edited model or adapter.

    A dense target is read twice where it shares something: for its projection, and for what is left. With ``bound``
    ranks count at the largest that there can be. Raises RefusedError where that does not fit into ``--max-memory``.
    """
    rates = rates or Rates.measured()
    target, engine = whole.removed, saving.engine
    if whole.base is None:
        require_low_rank(target, target.name, "Give --base BASE to write a checkpoint.")
    if factoring is None:
        stages, kept, removed, more = list[Stage](), 0, target, 0
    else:
        dense = (most if bound else likely)(factoring)
        names = tensor_names(pool, factoring)
        stages = plan_decompose(pool, factoring, engine, rates, stored=False, dense=dense)
        kept = factors_kept(pool, factoring, names, dense)
        removed, more = _unique_of(target, factoring), _rest(whole, pool, names)
    kept_heads = heads_from(heads, whole.inputs if factoring is None else list(pool))
    if whole.base is None:
        found = {n: ranks([target.deltas[n]], target.layouts[n].matrix_shape, min)[0] for n in target.deltas}
        if factoring is not None and factoring.side == "both":
            found = {n: min(2 * r, *target.layouts[n].matrix_shape) for n, r in found.items()}
        read = file_bytes([target]) if factoring is None else 0
        layouts, dialect = target.layouts, target.origin.dialect
        stored = _bytes_of(kept_heads)
        return [*stages, _adapter(layouts, found, dialect, saving, rates, kept=kept, heads=stored, read=read)]
    model = edited(whole.base, [(-whole.coefficient, removed)], saving, kept_heads)
    stage = plan_write(model, engine, saving.out_dtype, rates, kept=kept, more=more)
    if factoring is not None:
        dense = likely(factoring)
        shapes = [target.layouts[n].matrix_shape for n in target.deltas]
        flops = sum(4 * rows * cols * dense(rows, cols) for rows, cols in shapes)
        stage = replace(stage, flops=stage.flops + flops, seconds=stage.seconds + flops / rates.flops)
    return [*stages, stage]


def _unique_of(target: TaskVector, factoring: Factoring) -> TaskVector:
    """A stand-in for the unique part: the same tensors, and the memory that making each takes."""
    shapes = {n: layout.matrix_shape for n, layout in target.layouts.items()}
    deltas = LazyMap(target.names(), target.deltas.__getitem__, lambda n: part_bytes(shapes[n], factoring))
    return replace(target, deltas=deltas)


def _rest(whole: Negated, pool: Pool, names: list[str]) -> int:
    """Bytes that ``plan_write`` does not see: a dense target a second time, its base too (but for the blocks that are
    at hand before and after the projection), and what of the pool took no part in the decomposition and is read for the
    inputs' hashes. Less the file of an adapter, which counted already."""
    bases = {id(s): s for s in sources_of(whole.base)}
    own = {id(s): s for s in sources_of(whole.removed) if id(s) not in bases}
    others = Sizes(s for s in checkpoints_of_pool(pool) if id(s) not in {**bases, **own})
    dense = [n for n in whole.removed.deltas if not isinstance(whole.removed.deltas[n], LowRankDelta)]
    total = others.whole(but=names) - file_bytes([whole.removed])
    for n in dense:
        total += sum(size for *_, size in Sizes(own.values()).of(n))
        for source, name, size in Sizes(bases.values()).of(n):
            blocks = list(row_blocks(source.info(name).shape))
            total += size * (blocks[-1][1] - blocks[0][1]) // blocks[-1][1] if len(blocks) > 2 else 0
    return total


def plan_mix(
    pool: Pool,
    factoring: Factoring | None,
    saving: Saving,
    compression: Compression,
    *,
    heads: str | None = None,
    one_d: bool = False,
    rates: Rates | None = None,
    bound: bool = False,
) -> list[Stage]:
    """The decomposition of the adapters (unless ``factoring`` is ``None``: all of each is summed), the recompression
    where a rank is asked for or the ranks add up to more than a side, and the writing of the adapter."""
    rates = rates or Rates.measured()
    for v in pool if not compression.asked else ():
        require_low_rank(v, v.name, "Give --rank R to write an adapter.")
    stages, kept = list[Stage](), 0
    if factoring is not None:
        dense = (most if bound else likely)(factoring)
        stages = plan_decompose(pool, factoring, saving.engine, rates, stored=False, dense=dense)
        kept = factors_kept(pool, factoring, tensor_names(pool, factoring), dense)
    layouts = {n: pool.layout(n) for n in pool.tensors() if one_d or not pool.layout(n).is_vector}
    twice = 2 if factoring is not None and factoring.side == "both" else 1
    summed: dict[str, int] = {}
    for n, layout in layouts.items():
        short = min(layout.matrix_shape)
        summed[n] = sum(min(twice * r, short) for r in ranks(pool.block(n).deltas, layout.matrix_shape, min))
    after = {n: min(r, *layouts[n].matrix_shape, compression.rank or r) for n, r in summed.items()}
    work = {n: r for n, r in summed.items() if compression.asked or r > min(layouts[n].matrix_shape)}
    if work:
        single = sum(8 * sum(layouts[n].matrix_shape) * r * r for n, r in work.items())
        double = sum(22 * r**3 for r in work.values())
        needs = [_product_needs(layouts[n].matrix_shape, r) for n, r in work.items()]
        kept += adapter_bytes(layouts, after, 4, "peft") if compression.asked else 0
        fit_workers(1, saving.engine.memory, needs, kept)
        seconds = single / rates.flops + double / rates.flops64
        memory = peak(1, needs, saving.engine.memory, kept)
        stages.append(Stage("recompress", len(work), 0, 0, single + double, memory, seconds))
    read = 0 if stages and factoring is not None else file_bytes(list(pool))
    stored = _bytes_of(heads_from(heads, list(pool)))
    last = _adapter(layouts, after, pool[0].origin.dialect, saving, rates, kept=kept, heads=stored, read=read)
    return [*stages, last]


def plan_extract(
    vector: TaskVector, saving: Saving, compression: Compression, rates: Rates | None = None
) -> list[Stage]:
    """The factoring of every matrix of a difference, if a rank is asked for, and the writing of the LoRA; or the
    writing of the difference. Models are read once, all tensors, since their hashes are recorded.

    A rank that ``--energy`` or ``--error`` decides counts at the largest that there can be.
    """
    if compression.asked:
        return plan_adapter(vector, [vector], saving, compression, rates=rates, parts=not vector.partial)
    rates = rates or Rates.measured()
    read = Sizes(sources_of(vector)).whole() + file_bytes([vector])
    return [_dense_artifact(vector, saving, rates, read)]


def plan_adapter(
    vector: TaskVector,
    inputs: Sequence[TaskVector],
    saving: Saving,
    compression: Compression,
    *,
    heads: Mapping[str, torch.Tensor] | None = None,
    rates: Rates | None = None,
    parts: bool = False,
) -> list[Stage]:
    """The factoring of every matrix of a vector, if a rank is asked for, and its writing as an adapter. ``parts``:
    on threads and into files (``extract``); otherwise one after the other and kept in memory.

    Raises UsageError for a dense vector without a rank, and RefusedError over ``--max-memory``.
    """
    rates, engine, dialect = rates or Rates.measured(), saving.engine, vector.origin.dialect
    read = Sizes({id(s): s for v in (vector, *inputs) for s in sources_of(v)}.values()).whole() + file_bytes(inputs)
    stored = _bytes_of(heads or {})
    if not compression.asked:
        require_low_rank(vector, vector.name, "Give --base BASE, or --rank R to write an adapter.")
        found = {n: ranks([vector.deltas[n]], vector.layouts[n].matrix_shape, min)[0] for n in vector.deltas}
        return [_adapter(vector.layouts, found, dialect, saving, rates, heads=stored, read=read)]
    names = [n for n in vector.deltas if not vector.layouts[n].is_vector]
    factoring = Factoring(rank=str(compression.rank or "none"), side="both", exact=compression.rank is None)
    rank_of: dict[str, int] = {}
    needs: list[int] = []
    single = double = 0
    for n in names:
        shape, delta = vector.layouts[n].matrix_shape, vector.deltas[n]
        (largest,) = ranks([delta], shape, min)
        rank_of[n] = min(compression.rank or largest, largest)
        if isinstance(delta, LowRankDelta):
            one, two = 8 * sum(shape) * largest**2, 22 * largest**3
            needs.append(_product_needs(shape, largest))
        else:
            one, two = svd_flops(factoring, shape, rank_of[n])
            needs.append(working_bytes(shape, factoring))
        single, double = single + one, double + two
    made = adapter_bytes(vector.layouts, rank_of, 4, "peft")
    kept, asked = (0, engine.workers) if parts else (made, 1)
    workers, _ = fit_workers(asked, engine.memory, needs, kept)
    elements = sum(prod(vector.layouts[n].matrix_shape) for n in names)
    core = single / rates.flops + double / rates.flops64 + 2 * elements / rates.elements + read / rates.hashed
    written = made if parts else 0
    spent = wall(core, workers, read, written)
    memory = peak(workers, needs, engine.memory, kept)
    factor = Stage("factor", len(names), read, written, single + double, memory, spent)
    dialect = "peft" if parts else dialect
    return [factor, _adapter(vector.layouts, rank_of, dialect, saving, rates, kept=kept, heads=stored, read=written)]


def _dense_artifact(vector: TaskVector, saving: Saving, rates: Rates, read: int) -> Stage:
    names = vector.names()
    stored = saving.out_dtype or saving.dtype
    elements = {n: prod(vector.layouts[n].shape) for n in names}
    written = stored.itemsize * sum(elements.values())
    wide = max(saving.dtype.itemsize, 4)
    needs = [(2 * wide + stored.itemsize) * count for count in elements.values()]
    fit_workers(1, saving.engine.memory, needs)
    total = sum(elements.values())
    seconds = (read + written) / rates.hashed + written / rates.hashed_files + 3 * total / rates.elements
    memory = peak(1, needs, saving.engine.memory)
    return Stage("write", len(names), read, written, 2 * total, memory, wall(seconds, 1, read, written))


def _adapter(
    layouts: Mapping[str, Layout],
    rank_of: Mapping[str, int],
    dialect: str,
    saving: Saving,
    rates: Rates,
    *,
    kept: int = 0,
    heads: int = 0,
    read: int = 0,
) -> Stage:
    """The stage that writes an adapter: all of it is in memory first, and once more where its dtype changes."""
    dtype = saving.out_dtype or torch.float32
    matrices = {n: r for n, r in rank_of.items() if not layouts[n].is_vector}
    written = adapter_bytes(layouts, matrices, dtype.itemsize, dialect, heads)
    if len(matrices) < len(rank_of):  # a bias rides along, and then every module has one
        written += dtype.itemsize * sum(layouts[n].matrix_shape[0] for n in matrices)
    needs = [2 * max((4 * sum(layouts[n].matrix_shape) * r for n, r in matrices.items()), default=0)]
    fit_workers(1, saving.engine.memory, needs, kept + written)
    seconds = (read + written) / rates.hashed + written / rates.hashed_files
    memory = peak(1, needs, saving.engine.memory, kept + written)
    return Stage(
        "write", sum(r > 0 for r in matrices.values()), read, written, 0, memory, wall(seconds, 1, read, written)
    )


def _product_needs(shape: tuple[int, int], rank: int) -> int:
    """Bytes of recompressing ``B A``: factors, their QR, and the core in float64."""
    return 4 * 4 * sum(shape) * rank + 6 * 8 * rank * rank


def _bytes_of(heads: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in heads.values())
