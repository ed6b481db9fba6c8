"""``--dry-run``: tensors, bytes, FLOPs, memory and time of every stage, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from devec.api.edit import Edited
from devec.api.factor import checkpoints_of_pool, plan_needs, tensor_names
from devec.api.jobs import checkpoints_of, working_bytes
from devec.api.records import source_paths
from devec.api.run import Engine
from devec.core.contracts import TensorSource
from devec.core.options import Factoring
from devec.core.vectors import Pool, TaskVector
from devec.engine.memory import fit_workers
from devec.engine.plan import Rates, Stage, peak, wall
from devec.io.checkpoint import Checkpoint
from devec.io.model_folder import plan_entries
from devec.io.writer import nbytes
from devec.linalg.rank import RankRule

ITERATIONS = 10
"""Steps that the subspace iteration takes on a realistic spectrum (5 to 15 were seen)."""


def plan_write(
    model: TensorSource, engine: Engine, out_dtype: object = None, rates: Rates | None = None, *, looks: int = 0
) -> Stage:
    """The stage that computes and writes every tensor of a model. ``looks``: times that a merge reads all before."""
    rates = rates or Rates.measured()
    entries = plan_entries(model, out_dtype)  # type: ignore[arg-type]
    sources = checkpoints_of(model)
    names = [n for n, _ in entries]
    needs = [working_bytes(model, n) for n in names]
    workers, _ = fit_workers(engine.workers, engine.memory, needs)
    stored = sum(nbytes(c.info(n)) for c in sources for n in names if n in c)
    read = stored * (1 + looks) + _adapter_bytes(_vectors(model))
    written = sum(nbytes(info) for _, info in entries)
    elements, flops = 0, 0
    for n, info in entries:
        operands = sum(n in c for c in sources)
        elements += prod(info.shape) * max(operands, 1) * (1 + looks)
        flops += 3 * prod(info.shape) * operands * (1 + looks)
    flops += sum(_product_flops(v) for v in _vectors(model))
    seconds = (stored + written) / rates.hashed + written / rates.hashed_files + elements / rates.elements
    seconds += sum(_product_flops(v) for v in _vectors(model)) / rates.flops
    return Stage(
        "write", len(entries), read, written, flops, peak(workers, needs, engine.memory),
        wall(seconds, workers, read, written),
    )


def plan_decompose(pool: Pool, factoring: Factoring, engine: Engine, rates: Rates | None = None) -> list[Stage]:
    """The stages of a decomposition: factoring, and the overlaps of what was found.

    Dense deltas whose rank the data decide are counted as found by iteration at rank 64; a rank past a sixteenth of the
    short side costs the Gram matrix of that side instead, up to ``2 n m min(n, m) + 9 min(n, m)^3`` in float64.
    """
    rates = rates or Rates.measured()
    names = tensor_names(pool, factoring)
    needs, workers, _ = plan_needs(pool, factoring, names, engine)
    sources = checkpoints_of_pool(pool)
    bases = {id(v.origin.base) for v in pool}
    read = _adapter_bytes(list(pool))
    for c in sources:
        # one vector after the other: each vector twice, and the base with every one of them
        again = {n: 1 if needs[n].whole else (len(pool) + 1 if id(c) in bases else 2) for n in names}
        read += sum(again[n] * nbytes(c.info(n)) for n in names if n in c)
    single = double = elements = written = pairs = 0
    k = len(pool)
    for n in names:
        rows, cols = pool.layout(n).matrix_shape
        dense = sum(n in c for c in sources if id(c) not in bases)
        r = _rank(factoring, rows, cols)
        width = r + max(r // 2, 8)
        iterated = dense and r <= min(rows, cols) // 16 and not factoring.exact
        single += dense * (ITERATIONS * 4 * rows * cols * width if iterated else 2 * rows * cols * r)
        double += dense * (0 if iterated else 2 * rows * cols * min(rows, cols) + 9 * min(rows, cols) ** 3)
        elements += rows * cols * dense * (2 + k // 2)
        adapters = k - dense
        single += adapters * 8 * (rows + cols) * 16 * 16
        written += k * 4 * r * (rows if factoring.side == "left" else rows + cols)
        pairs += k * (k - 1) // 2 * (2 * rows * r * r + 20 * r**3)
    core = single / rates.flops + double / rates.flops64 + elements / rates.elements
    core += read / rates.hashed + written / rates.hashed_files
    memory = peak(workers, [needs[n].memory for n in names], engine.memory)
    factor = Stage("factor", len(names), read, written, single + double, memory, wall(core, workers, read, written))
    spent = pairs / rates.flops64
    overlap = Stage("overlaps", len(names), written, written, pairs, peak(1, [0]), wall(spent, 1, 0, written))
    return [factor, overlap]


def _rank(factoring: Factoring, rows: int, cols: int) -> int:
    rule = RankRule.parse(factoring.rank)
    if rule.kind == "fixed":
        return min(int(rule.value), rows, cols)
    return min(64, rows, cols) if rule.kind in ("auto", "noise", "mp") else min(rows, cols)


def _vectors(model: TensorSource) -> list[TaskVector]:
    if not isinstance(model, Edited):
        return []
    return list({id(v): v for terms in model.terms.values() for _, v, *_ in terms}.values())


def _adapter_bytes(vectors: Sequence[TaskVector]) -> int:
    """Sizes of weight files that are read whole: adapters and parts."""
    files: set[Path] = set()
    for v in vectors:
        if not any(isinstance(s, Checkpoint) for s in v.origin.sources()):
            files.update(p for p in source_paths(v) if p.is_file())
    return sum(p.stat().st_size for p in files)


def _product_flops(vector: TaskVector) -> int:
    """Products ``B A`` of an adapter on a base: ``2 n m r``, its mean rank taken from the size of its file."""
    sizes = [vector.layouts[n].matrix_shape for n in vector.deltas]
    stored = _adapter_bytes([vector])
    sides = sum(n + m for n, m in sizes)
    return int(sum(2 * n * m for n, m in sizes) * stored / 4 / sides) if stored and sides else 0
