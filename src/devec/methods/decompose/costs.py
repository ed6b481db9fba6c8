"""How much memory factoring one tensor takes: bounds, from its shape and the choices alone."""

from __future__ import annotations

from devec.core.lazy import BLOCK
from devec.core.options import Factoring
from devec.linalg import iteration, rows
from devec.linalg.rank import RankRule

GRAM_COLUMNS = 1024
"""Columns in float64 at one time while the Gram matrix of a matrix in memory is summed."""


def most_directions(shape: tuple[int, int], factoring: Factoring) -> int:
    """How many directions the rank rule keeps at most, whatever the numbers are."""
    n, m = shape
    short, rule = min(n, m), RankRule.parse(factoring.rank)
    if rule.kind == "fixed":
        return min(int(rule.value), short)
    side = {"left": n, "right": m, "both": short}[factoring.side]
    return min(short, max(side // 4, 1)) if rule.kind == "auto" else short


def first_directions(shape: tuple[int, int], factoring: Factoring) -> int:
    """How many directions there is memory for when a tensor is begun.

    All that the rule can keep, but for matrices with more than ``rows.LARGE`` entries whose numbers decide: their
    bases could be as large as the matrix and hardly ever are. There is memory for a sixteenth of the short side, which
    is what iteration finds; a matrix that keeps more says so once its spectrum is known, and is begun again with memory
    for that.
    """
    n, m = shape
    most = most_directions(shape, factoring)
    if not rows.is_large(n, m) or RankRule.parse(factoring.rank).kind in ("fixed", "none", "nuclear"):
        return most
    return min(most, iteration.largest_block(n, m))


def can_stay_in_file(shape: tuple[int, int], factoring: Factoring) -> bool:
    """Whether a matrix of this shape can be factored without being in memory."""
    return factoring.dtype == "float32" and rows.is_large(*shape)


def working_bytes(
    shape: tuple[int, int], factoring: Factoring, *, vectors: int = 1, directions: int | None = None,
    held: bool = True, transposed: bool = False,
) -> int:  # fmt: skip
    """Bytes that factoring one tensor of ``vectors`` dense deltas takes at most, one delta after the other.

    The delta itself if it is ``held``; blocks of it; bases of the vectors before it; and the largest of four steps
    that follow one another, as each lets go of what the last one held: panels of the iteration (two of each side); the
    Gram matrix of the short side with its eigenvectors and LAPACK's workspace; the long side's basis and the panel that
    it is made from, for ``directions`` (by default :func:`first_directions`); a block of every delta in float64, for
    their inner products. ``transposed``: the file holds the transpose.
    """
    n, m = shape
    short, long = min(n, m), max(n, m)
    r = first_directions(shape, factoring) if directions is None else min(directions, short)
    size = 8 if factoring.dtype == "float64" else 4
    matrix = size * n * m if held else 0
    basis = size * r * (n if factoring.side == "left" else n + m)
    kept = (vectors - 1) * basis
    filed = (m, n) if transposed else (n, m)
    read = min(max(BLOCK, filed[1]), n * m)
    inner = basis + (8 * vectors + 24) * read
    if size == 8:  # a copy, both sides' vectors, LAPACK's workspace; and what is kept, in rows
        return matrix + kept + max(8 * (3 * n * m + 3 * short * short + (n + m) * r), inner)
    if rows.is_large(n, m):
        blocks = rows.buffers(*filed)
    else:
        blocks = 8 * GRAM_COLUMNS * short
    steps = [inner, 32 * short * short, 8 * short * short + 4 * r * (2 * long + 2 * short)]
    rule = RankRule.parse(factoring.rank)
    if not factoring.exact and not rule.needs_all and short >= iteration.SMALL:
        limit = iteration.largest_block(n, m)
        width = iteration.width(min(int(rule.value), limit) if rule.kind == "fixed" else limit, n, m)
        steps.append(8 * (n + m) * width + 64 * width * width)
    return matrix + kept + blocks + max(steps)
