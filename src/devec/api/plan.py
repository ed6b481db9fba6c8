"""``--dry-run``: tensors, bytes, FLOPs, memory and time of every stage, before anything is computed.

Sizes come from the headers of whatever gives tensors by name; of adapters the factors themselves are looked at. An
input that is read block by block counts as often as it is read, hashes of inputs included; the small files of adapters
and parts count once, since the system still holds them when they are read again. ``api.plan_verbs`` puts the stages of
the other commands together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from devec.api.budget import RankOf, factors_kept, likely, ranks
from devec.api.edit import Edited
from devec.api.factor import checkpoints_of_pool, tensor_names
from devec.api.jobs import sources_of, working_bytes
from devec.api.needs import Need, plan_needs
from devec.api.records import source_paths
from devec.api.run import Engine
from devec.core.contracts import TensorSource
from devec.core.delta import LowRankDelta
from devec.core.lazy import BLOCK, LazyDelta
from devec.core.options import Factoring
from devec.core.split import fused_name
from devec.core.vectors import Pool, TaskVector
from devec.engine.memory import fit_workers
from devec.engine.plan import Rates, Stage, peak, wall
from devec.io.model_folder import plan_entries
from devec.io.writer import nbytes
from devec.linalg.iteration import first_block, iterates
from devec.linalg.rank import RankRule

ITERATIONS = 10
"""Steps that the subspace iteration takes on a realistic spectrum (5 to 15 were seen)."""


class Sizes:
    """What each tensor takes in every source, from headers; a name that is tied to another is that one."""

    def __init__(self, sources: Iterable[TensorSource]) -> None:
        self.sources = list(sources)
        self._names = [set(source.names()) | set(source.ties) for source in self.sources]

    def of(self, name: str) -> list[tuple[TensorSource, str, int]]:
        """(source, name, bytes) of those that have the tensor."""
        found = zip(self.sources, self._names, strict=True)
        return [(source, name, nbytes(source.info(name))) for source, names in found if name in names]

    def whole(self, but: Collection[str] = ()) -> int:
        """Bytes of all sources, without the tensors named in ``but``."""
        return sum(nbytes(source.info(n)) for source in self.sources for n in source.names() if n not in but)


def plan_write(
    model: TensorSource,
    engine: Engine,
    out_dtype: object = None,
    rates: Rates | None = None,
    *,
    kept: int = 0,
    more: int = 0,
    looks: int = 0,
) -> Stage:
    """The stage that computes and writes every tensor of a model, and reads what is left for the inputs' hashes.

    ``kept`` bytes stay in memory beside it; ``more`` bytes are read beyond every source once, and a merge
    reads everything ``looks`` times before.
    """
    rates = rates or Rates.measured()
    entries = plan_entries(model, out_dtype)  # type: ignore[arg-type]
    sizes = Sizes(sources_of(model))
    names = [n for n, _ in entries]
    needs = [working_bytes(model, n) for n in names]
    workers, _ = fit_workers(engine.workers, engine.memory, needs, kept)
    stored = sizes.whole() + more
    read = stored + looks * sizes.whole() + file_bytes(vectors_of(model))
    written = sum(nbytes(info) for _, info in entries)
    elements, flops = 0, 0
    for n, info in entries:
        operands = len(sizes.of(n))
        elements += prod(info.shape) * max(operands, 1) * (1 + looks)
        flops += 3 * prod(info.shape) * operands * (1 + looks)
    products = sum(_product_flops(v) for v in vectors_of(model))
    seconds = (stored + written) / rates.hashed + written / rates.hashed_files + elements / rates.elements
    seconds += products / rates.flops
    return Stage(
        "write", len(entries), read, written, flops + products, peak(workers, needs, engine.memory, kept),
        wall(seconds, workers, read, written),
    )


def plan_decompose(
    pool: Pool,
    factoring: Factoring,
    engine: Engine,
    rates: Rates | None = None,
    *,
    stored: bool = True,
    dense: RankOf | None = None,
) -> list[Stage]:
    """The stages of a decomposition: factoring, and the overlaps of what was found.

    Without ``stored`` the factors stay in memory. Dense deltas count at the rank ``dense`` (see ``budget.likely``).
    What iteration serves costs ``4 n m`` a step and column; a rank past a sixteenth of the short side costs the Gram
    matrix of that side instead, up to ``2 n m min(n, m) + 9 min(n, m)^3`` in float64.
    """
    rates, dense, size = rates or Rates.measured(), dense or likely(factoring), 8 if factoring.dtype == "float64" else 4
    names = tensor_names(pool, factoring)
    kept = 0 if stored else factors_kept(pool, factoring, names, dense)
    planned = plan_needs(pool, factoring, names, engine, kept)
    needs, workers = planned.of, planned.workers
    read = file_bytes(list(pool))
    single = double = elements = written = pairs = 0
    target = None if factoring.target is None else pool.names.index(factoring.target)
    of_vectors, bases = _dense_sizes(pool)
    for n in names:
        block = pool.block(n)
        rows, cols = shape = block.layout.matrix_shape
        read += _read(n, needs[n], prod(shape), of_vectors, bases, len(pool))
        at = dict(zip(block.present, ranks(block.deltas, shape, dense), strict=True))
        matrices = 0
        for i, r in at.items():
            delta = block.deltas[i]
            low = isinstance(delta, LowRankDelta)
            both = low or factoring.side != "left"
            written += r * (size * (rows + (cols if both else 0)) + 8)
            if low:
                single += 8 * (rows + cols) * r * r
                double += 22 * r**3
                continue
            matrices += 1
            if isinstance(delta, LazyDelta) and i not in of_vectors:  # an artifact, which is no model
                read += (1 if needs[n].whole else 2) * prod(shape) * delta.dtype.itemsize
            one, two = svd_flops(factoring, shape, r)
            single, double = single + one, double + two
        elements += prod(shape) * matrices * (2 + len(pool) // 2)
        for i, r in at.items():
            for j, s in at.items():
                if i < j and (target is None or target in (i, j)):
                    pairs += 2 * max(rows, cols) * r * s + 20 * min(r, s) ** 3
    if stored:  # what takes no part is read for the hashes of the inputs alone
        read += Sizes(checkpoints_of_pool(pool)).whole(but={fused_name(n) or n for n in names} | set(names))
    core = single / rates.flops + double / rates.flops64 + elements / rates.elements + read / rates.hashed
    memory = peak(workers, [needs[n].memory for n in names], engine.memory, kept)
    out = written if stored else 0
    core += out / rates.hashed_files
    factor = Stage("factor", len(names), read, out, single + double, memory, wall(core, workers, read, out))
    spent = wall(pairs / rates.flops64, 1, 0, out)
    return [factor, Stage("overlaps", len(names), out, out, pairs, peak(1, [0], engine.memory, kept), spent)]


def _dense_sizes(pool: Pool) -> tuple[dict[int, Sizes], Sizes]:
    """The models of each vector that is a difference of models, and what they are taken against."""
    bases = {id(s): s for v in pool if v.origin.base is not None for s in sources_of(v.origin.base)}
    own: dict[int, Sizes] = {}
    for i, v in enumerate(pool):
        if sources := sources_of(v):
            own[i] = Sizes(s for s in sources if id(s) not in bases)
    return own, Sizes(bases.values())


def _read(name: str, need: Need, elements: int, own: Mapping[int, Sizes], bases: Sizes, k: int) -> int:
    """Bytes read of the models behind one tensor. Each vector is read once and kept, or once more for its inner
    products, or anew for every product; the base with every one of them, but for the last block, which threads keep."""
    passes = 1 if need.held else 2 * ITERATIONS + 2
    again = passes if need.whole else 1 + passes
    times = k * passes + (not need.whole) if elements > BLOCK else 1

    def stored(sizes: Sizes) -> int:
        found = sizes.of(name) or sizes.of(fused_name(name))  # a part of a fused tensor is so many of its rows
        return sum(size * elements // max(prod(source.info(at).shape), 1) for source, at, size in found)

    return again * sum(map(stored, own.values())) + times * stored(bases)


def svd_flops(factoring: Factoring, shape: tuple[int, int], r: int) -> tuple[int, int]:
    """Operations of factoring one dense delta, in single and in double precision."""
    rows, cols = shape
    rule, short = RankRule.parse(factoring.rank), min(shape)
    iterated = iterates(rule, rows, cols, getattr(torch, factoring.dtype), factoring.exact)
    if iterated and first_block(rule, rows, cols) and r <= short // 16:
        return ITERATIONS * 4 * rows * cols * (r + max(r // 2, 8)), 0
    return 2 * rows * cols * r, 2 * rows * cols * short + 9 * short**3


def vectors_of(model: TensorSource) -> list[TaskVector]:
    """The vectors that an edited model adds to its base, each once."""
    if not isinstance(model, Edited):
        return []
    return list(model.vectors)


def file_bytes(vectors: Sequence[TaskVector]) -> int:
    """Sizes of weight files that are read whole: adapters and parts."""
    files: set[Path] = set()
    for v in vectors:
        if not sources_of(v):
            files.update(p for p in source_paths(v) if p.is_file())
    return sum(p.stat().st_size for p in files)


def _product_flops(vector: TaskVector) -> int:
    """Products ``B A`` of an adapter on a base: ``2 n m r``, its mean rank taken from the size of its file."""
    sizes = [vector.layouts[n].matrix_shape for n in vector.deltas]
    stored = file_bytes([vector])
    sides = sum(n + m for n, m in sizes)
    return int(sum(2 * n * m for n, m in sizes) * stored / 4 / sides) if stored and sides else 0
