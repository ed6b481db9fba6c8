"""How much memory each tensor of a pool is given while it is factored, and how it is factored within that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from devec.api.run import Engine
from devec.core.block import Block
from devec.core.delta import LowRankDelta
from devec.core.lazy import LazyDelta
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.core.vectors import Pool
from devec.engine.memory import available, fit_workers, refusal
from devec.engine.stream import MoreMemory
from devec.linalg.lowrank import TooManyDirections
from devec.methods.decompose.costs import can_stay_in_file, first_directions, most_directions, working_bytes
from devec.methods.decompose.shared_unique import shared_unique


@dataclass(frozen=True)
class Need:
    """How one tensor is factored: in ``memory`` bytes at most, with ``most`` directions of a vector at most.

    ``whole``  every delta is in memory at once: files are read once
    ``held``   one delta after the other is in memory, and read again for the inner products
    neither    none is: files are read anew for every product (``linalg.rows``)

    The same numbers come out, to the byte.
    """

    memory: int
    whole: bool
    held: bool
    most: int | None


def need_of(pool: Pool, factoring: Factoring, name: str, room: int, directions: int | None = None) -> Need:
    """What a tensor needs when there is ``room`` for it: the way that reads least of those that fit, or the smallest.

    ``directions`` is how many a vector is known to keep; before that is known there is memory for those that tensors of
    its shape begin with, or for all that ``energy`` could keep, if that fits.
    """
    block = pool.block(name)
    present = [d for d in block.deltas if d is not None]
    shape = block.layout.matrix_shape
    size = 8 if factoring.dtype == "float64" else 4
    thin = sum((d.B.numel() + d.A.numel()) * 6 * size for d in present if isinstance(d, LowRankDelta))
    dense = [d for d in present if not isinstance(d, LowRankDelta)]
    if not dense:
        return Need(thin, True, True, None)
    lazy = [d for d in dense if isinstance(d, LazyDelta)]
    matrix = shape[0] * shape[1] * size
    made = (len(dense) - len(lazy)) * matrix  # rows of fused tensors, widened halves: all of them stand in the block

    def taken(ranks: int, held: bool) -> int:
        transposed = bool(lazy) and lazy[0].transposed
        return thin + made + working_bytes(
            shape, factoring, vectors=len(dense), directions=ranks, held=held, transposed=transposed
        )

    ranks = [first_directions(shape, factoring) if directions is None else directions]
    if directions is None and factoring.rank.strip().lower().startswith("energy"):
        ranks.insert(0, most_directions(shape, factoring))
    ways = [Need(taken(r, True) + max(len(lazy) - 1, 0) * matrix, True, True, r) for r in ranks]
    ways += [Need(taken(r, True), False, True, r) for r in ranks]
    if len(lazy) == len(dense) and can_stay_in_file(shape, factoring):
        ways += [Need(taken(r, False), False, False, r) for r in ranks]
    return next((way for way in ways if way.memory <= room), ways[-1])


@dataclass
class Needs:
    """The needs of all tensors, on so many ``workers`` with ``room`` bytes together."""

    pool: Pool
    factoring: Factoring
    engine: Engine
    workers: int
    room: int
    of: dict[str, Need] = field(default_factory=dict)

    def factors(self, name: str) -> TensorFactors:
        """Eq. (6) for every vector of one tensor, within its need.

        Raises MoreMemory where a spectrum turns out to need more, RefusedError where the budget does not hold that.
        """
        need, block = self.of[name], self.pool.block(name)
        try:
            return factor_tensor(block.whole() if need.whole else block, self.factoring, need)
        except TooManyDirections as found:
            rank = found.rank
        grown = need_of(self.pool, self.factoring, name, self.room // max(self.workers, 1), rank)
        if self.engine.memory is not None and grown.memory > self.room:
            because = f"--rank {self.factoring.rank} keeps {rank} directions of a vector, found while it was factored"
            needed = self.engine.memory - self.room + grown.memory
            raise refusal(self.engine.memory, needed, tensor=name, because=because)
        self.of[name] = grown
        raise MoreMemory(grown.memory)


def factor_tensor(block: Block, factoring: Factoring, need: Need | None = None) -> TensorFactors:
    """Eq. (6) for every vector of one tensor."""
    if need is None:
        return as_stored(shared_unique(block, factoring))
    return as_stored(shared_unique(block, factoring, held=need.held, most=need.most))


def as_stored(factors: TensorFactors) -> TensorFactors:
    """As a file holds them, strides and all: parts read from disk are then the same to the last bit."""
    return replace(factors, svd={i: s.row_major() for i, s in factors.svd.items()})


def plan_needs(pool: Pool, factoring: Factoring, names: Sequence[str], engine: Engine, kept: int = 0) -> Needs:
    """Each tensor's need, the workers, and the bytes for all of them, within ``--max-memory`` (or what is free), beside
    ``kept`` bytes of results.

    Raises RefusedError (exit 5) with the smallest budget when a tensor cannot be begun in this one.
    """
    least = [need_of(pool, factoring, n, 0).memory for n in names]
    workers, room = fit_workers(engine.workers, engine.memory, least, kept)
    if room is None:
        room = available()
    share = room // max(workers, 1)
    return Needs(
        pool, factoring, engine, workers, room, {n: need_of(pool, factoring, n, share) for n in names}
    )
