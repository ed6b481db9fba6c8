"""Decisions of subspace iteration, apart from its products: one matrix at a time and a batch decide alike.

A block that may return r directions has r/2 columns more. Ritz values only grow, so at each step the rank rule is asked
twice: with the values as they are, and with ``LOOKAHEAD`` times their last step added. Once both answers agree the rank
is known. If it does not fit the block, the block doubles and the iteration goes on from where it is; if it fits, the
iteration ends when every value kept stands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from devec.linalg.numerics import RANK_RTOL, generator
from devec.linalg.rank import RankRule, select_rank

RITZ_TOL = 1e-3
"""Subspace iteration stops when no Ritz value moves by more than this fraction. Fixed small numbers of steps fail on
slowly decaying spectra: one step found 9 of 15 planted shared directions, two 14, this rule all 15 (n = 2048)."""

MAX_STEPS = 40
"""Upper bound on subspace iterations; heavy tails need about 15. Past it the exact path takes over."""

LOOKAHEAD = 10
"""How far a Ritz value may still grow, in units of its last step. In a continuum the steps fall as 1/k^2, so that
k steps later the rest is about k of the last; with a gap they fall geometrically, far faster."""

FIRST_BLOCK = 64
ADAPTIVE_FRACTION = 16
"""Above min(n, m)/16 directions the exact path is as fast or faster (crossover seen between n/16 and n/8)."""

SMALL = 256
"""Below this short side the exact path takes under 20 ms and iteration gains nothing."""


class Judgement(NamedTuple):
    """``rank`` as far as it is known; ``grow``: it does not fit the block; ``settled``: the values kept stand."""

    rank: int
    grow: bool
    settled: bool


def iterates(rule: RankRule, n: int, m: int, dtype: torch.dtype, exact: bool) -> bool:
    """Whether an ``n x m`` matrix is factored by iteration at all."""
    return dtype == torch.float32 and not exact and min(n, m) >= SMALL and not rule.needs_all


def largest_block(n: int, m: int) -> int:
    return min(n, m) // ADAPTIVE_FRACTION


def first_block(rule: RankRule, n: int, m: int) -> int | None:
    """Directions of the first block; ``None`` where the rule is known to want more than iteration serves."""
    limit = largest_block(n, m)
    block = int(rule.value) if rule.kind == "fixed" else min(FIRST_BLOCK, limit)
    return None if block > limit else block


def next_block(block: int, n: int, m: int) -> int | None:
    """The doubled block; ``None`` past the largest."""
    limit = largest_block(n, m)
    return None if block == limit else min(2 * block, limit)


def width(block: int, n: int, m: int) -> int:
    """Columns to iterate with for ``block`` directions."""
    return min(block + max(block // 2, 8), min(n, m))


def seeded(key: object, n: int, m: int) -> torch.Generator:
    """Where the starting vectors of the matrix named ``key`` come from."""
    return generator("subspace", key, n, m)


def noise(m: int, columns: int, gen: torch.Generator) -> Tensor:
    """``columns`` more starting vectors of length m, on the CPU."""
    return torch.randn(m, columns, generator=gen, dtype=torch.float32)


def judge(
    rule: RankRule, values: Tensor, last: Tensor, total: float, n: int, m: int, side: int, block: int
) -> Judgement:
    """What the Ritz values of two successive steps of one block say (both float64, descending, on the CPU)."""
    step = (values - last).abs()
    r, later = (
        select_rank(rule, v, total, n, m, RANK_RTOL[torch.float32], side)
        for v in (values, values + LOOKAHEAD * step)
    )
    if min(r, later) > block:
        return Judgement(r, True, False)
    # The second term lets a rank-deficient matrix stop: values that are rounding never settle relatively.
    standing = bool((step <= RITZ_TOL * values + 1e-6 * values[0])[:r].all())
    return Judgement(r, False, r == later <= block and standing)
