"""One pool in one mode, timed stage by stage: processor time on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.clock import once
from devec.core.decomposition import Decomposition
from devec.core.gram import inner_products
from devec.core.options import Factoring, View
from devec.core.results import TensorFactors
from devec.core.vectors import Pool
from devec.linalg import subspace
from devec.linalg.rank import RankRule
from devec.methods.decompose.shared_unique import factor, shared_unique

MODES = ("target", "chain", "consensus", "pairwise")
"""Mode target with the rule ``union``; chain and consensus are the two kinds of mode joint."""

STAGES = ("factor", "products", "algebra", "pairs", "read")


@dataclass(frozen=True)
class Cost:
    """Seconds of each stage of one decomposition.

    ``factor``    thin factors of every delta (Eq. 6): the same in every mode
    ``products``  inner products of the deltas, from which cosines and warnings come
    ``algebra``   the overlaps and spectra that the mode itself needs (Eq. 8, 9)
    ``pairs``     joint modes only: the pairs' overlaps, spectra and decisions, which every decomposition stores
    ``read``      decisions, subspaces (Eq. 10) and the unique parts (Eq. 13): of the target, else of all
    """

    kind: str
    mode: str
    side: int
    tensors: int
    rank: int
    pool: int
    parameters: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def stage(self, name: str) -> float:
        return self.total if name == "total" else self.seconds[name]


def options(mode: str, rank: str) -> tuple[Factoring, View]:
    if mode == "target":
        return Factoring(mode="target", target="v0", rank=rank), View()
    if mode == "pairwise":
        return Factoring(rank=rank), View()
    return Factoring(mode="joint", rank=rank), View(joint="chain" if mode == "chain" else "consensus")


def costs(kind: str, pool: Pool, rank: int, rule: str, repeats: int) -> Iterator[Cost]:
    """One pool in every mode: medians of ``repeats`` after a call to warm up. The factors are the same in all modes."""
    blocks = list(pool.blocks())
    factors = {block.name: shared_unique(block, Factoring(rank=rule)) for block in blocks}
    factoring = _factoring(pool, rule, repeats)
    n, m = blocks[0].layout.matrix_shape
    parameters = ((n + m) * rank if kind == "low-rank" else n * m) * len(blocks)
    for mode in MODES:
        chosen, view = options(mode, rule)
        taken = [
            {"products": _products(pool, mode), **_after(pool, chosen, view, factors)} for _ in range(repeats + 1)
        ]
        middle = {name: median(row[name] for row in taken[1:]) for name in taken[0]}
        yield Cost(kind, mode, n, len(blocks), rank, len(pool), parameters, {"factor": factoring, **middle})


def _factoring(pool: Pool, rule: str, repeats: int) -> float:
    """Seconds to factor every delta of the pool, once each."""
    rank_rule, chosen = RankRule.parse(rule), Factoring(rank=rule)
    jobs = [(n, v.name, d) for v in pool for n, d in v.deltas.items()]

    def all_of_them() -> None:
        for n, name, delta in jobs:
            factor(delta, rank_rule, delta.shape[0], chosen, (n, name))

    return median(once(all_of_them)[0].cpu for _ in range(repeats))


def _products(pool: Pool, mode: str) -> float:
    target = 0 if mode == "target" else None
    blocks = [{i: delta for i, delta in enumerate(block.deltas) if delta is not None} for block in pool.blocks()]
    return once(lambda: [inner_products(deltas, target) for deltas in blocks])[0].cpu


def _after(pool: Pool, factoring: Factoring, view: View, factors: dict[str, TensorFactors]) -> dict[str, float]:
    d = Decomposition(pool, factoring, factors, view)  # anew each time: it keeps what it has computed
    own = 0.0
    if factoring.mode == "joint":
        own = once(lambda: [_joint(t, view.joint) for t in factors.values()])[0].cpu
    algebra = once(lambda: d.algebra)[0].cpu
    decide = once(lambda: d.spectra)[0].cpu
    read = once(lambda: _read(d))[0].cpu
    if factoring.mode != "joint":
        return {"algebra": algebra, "pairs": 0.0, "read": decide + read}
    return {"algebra": own, "pairs": max(algebra - own, 0.0) + decide, "read": read}


def _joint(t: TensorFactors, kind: str) -> None:
    """What a joint spectrum needs: the chain k overlaps, the consensus all of them."""
    k = len(t.members)
    if kind == "chain":
        circle = {(min(i, j), max(i, j)) for i, j in ((i, (i + 1) % k) for i in range(k))}
        subspace.chain_spectrum(t.overlaps("left", sorted(circle)))
    else:
        subspace.consensus_spectrum(t.overlaps("left"))


def _read(d: Decomposition) -> int:
    """Every unique part that the mode has, at the default threshold."""
    names = d.vectors if d.target is None else d.vectors[:1]
    return sum(delta.shape[0] for name in names for delta in d.unique(name).deltas.values())
