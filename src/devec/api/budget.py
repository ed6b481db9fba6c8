"""What stays in memory between the stages of a command, so that ``--max-memory`` is kept or refused beforehand.

A decomposition that is written to a folder keeps nothing but overlaps. One that only serves a command (``negate``,
``mix``, ``decompose`` without an output) keeps every tensor's factors until the end, and an adapter is in memory as a
whole before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from devec.core.delta import Delta, LowRankDelta
from devec.core.layout import Layout
from devec.core.options import Factoring
from devec.core.vectors import Pool
from devec.linalg.rank import RankRule

RankOf = Callable[[int, int], int]
"""The rank at which a dense delta of so many rows and columns is counted."""


def most(factoring: Factoring) -> RankOf:
    """The largest rank that the rule can find."""
    rule = RankRule.parse(factoring.rank)

    def rank(rows: int, cols: int) -> int:
        short = min(rows, cols)
        if rule.kind == "fixed":
            return min(int(rule.value), short)
        side = {"left": rows, "right": cols, "both": short}[factoring.side]
        return min(max(side // 4, 1), short) if rule.kind == "auto" else short

    return rank


def likely(factoring: Factoring) -> RankOf:
    """The rank that plans count with: 64 where noise decides it, the largest where the spectrum does."""
    rule = RankRule.parse(factoring.rank)
    largest = most(factoring)
    by_noise = rule.kind in ("auto", "noise", "mp")
    return lambda rows, cols: min(64, largest(rows, cols)) if by_noise else largest(rows, cols)


def ranks(deltas: Sequence[Delta | None], shape: tuple[int, int], dense: RankOf) -> list[int]:
    """The rank of each delta that is there: its own where it is factored."""
    present = [d for d in deltas if d is not None]
    return [min(d.B.shape[1], *shape) if isinstance(d, LowRankDelta) else dense(*shape) for d in present]


def factors_kept(pool: Pool, factoring: Factoring, names: Sequence[str], dense: RankOf | None = None) -> int:
    """Bytes of the factors and overlaps of all tensors, at most (or with dense deltas of the ranks given).

    Of a dense delta U (with side right or both, V too), of factors both; of each pair that is compared the overlap
    and its singular vectors, in float64.
    """
    size, dense = (8 if factoring.dtype == "float64" else 4), dense or most(factoring)
    target = None if factoring.target is None else pool.names.index(factoring.target)
    total = 0
    for name in names:
        block = pool.block(name)
        rows, cols = shape = block.layout.matrix_shape
        found = dict(zip(block.present, ranks(block.deltas, shape, dense), strict=True))
        for i, r in found.items():
            both = factoring.side != "left" or isinstance(block.deltas[i], LowRankDelta)
            total += r * (size * (rows + (cols if both else 0)) + 8)
        sides = 2 if factoring.side == "both" else 1
        for i, r in found.items():
            for j, s in found.items():
                if i < j and (target is None or target in (i, j)):
                    total += sides * 8 * (r * s + (r + s) * min(r, s))
    return total


def adapter_bytes(
    shapes: Mapping[str, Layout], rank_of: Mapping[str, int], itemsize: int, dialect: str, heads: int = 0
) -> int:
    """Bytes of an adapter's tensors: ``(n + m) r`` numbers a matrix, and its heads.

    In diffusers keys all modules of a component (unet, text encoder) have the largest rank of any. A module of rank 0
    is left out.
    """
    wide = dict(rank_of)
    if dialect == "diffusers":
        largest: dict[str, int] = {}
        for n, r in rank_of.items():
            largest[n.partition(".")[0]] = max(largest.get(n.partition(".")[0], 0), r)
        wide = {n: largest[n.partition(".")[0]] if r else 0 for n, r in rank_of.items()}
    return heads + itemsize * sum(sum(shapes[n].matrix_shape) * r for n, r in wide.items())
