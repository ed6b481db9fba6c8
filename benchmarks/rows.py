"""One row of the table: a case, both times, and whether both found the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from benchmarks.clock import Seconds, once, typical
from benchmarks.literal import LiteralPair, literal_pair
from benchmarks.pair import DevecPair, devec_pair, exact_eigenvalues
from benchmarks.planted import RANK, PlantedPair, dense_pair, low_rank_pair
from devec.core.delta import Delta, DenseDelta, LowRankDelta

REQUIRED = {
    ("low-rank", "factors", 2048, 64): 500.0,
    ("low-rank", "matrices", 2048, 64): 100.0,
    ("dense", "matrices", 2048, 64): 20.0,
    ("dense", "matrices", 4096, 64): 40.0,
}
"""(case, output, n, rank) -> least ratio of literal to devec."""

ONCE_FROM = 2048
"""From this size the literal recipe takes many seconds: timed once, without warm-up."""

LENT_FROM = 4096
"""At this size it takes the better part of a minute: once per case, and other ranks borrow the time."""


@dataclass(frozen=True)
class Row:
    """``ratio`` = literal / devec in wall time, ``cpu_ratio`` in processor time.

    ``found`` of ``planted`` directions; ``surplus`` eigenvalues above the threshold beyond these. Errors are largest
    absolute differences of eigenvalues: against the literal recipe's, and against those of a float64 Gram matrix.
    ``parts`` is the largest relative difference of shared and unique parts.
    """

    case: str
    output: str
    n: int
    rank: int
    rule: str
    devec: Seconds
    literal: Seconds
    literal_reused: bool
    found: int
    planted: int
    surplus: int
    literal_error: float
    exact_error: float
    parts: float
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.literal.wall / self.devec.wall

    @property
    def cpu_ratio(self) -> float:
        return self.literal.cpu / self.devec.cpu

    @property
    def required(self) -> float | None:
        return REQUIRED.get((self.case, self.output, self.n, self.rank))

    @property
    def verdict(self) -> str:
        """PASS or short where there is a minimum; every row must have found what was planted."""
        if self.found != self.planted or self.surplus:
            return "missed"
        if self.required is None:
            return ""
        return "PASS" if self.ratio >= self.required else "short"


def deltas(pair: PlantedPair) -> tuple[Delta, Delta]:
    if pair.factors is not None:
        (B1, A1), (B2, A2) = pair.factors
        return LowRankDelta(B1, A1), LowRankDelta(B2, A2)
    return DenseDelta(pair.matrices[0]), DenseDelta(pair.matrices[1])


def low_rank_rows(n: int, ranks: tuple[int, ...]) -> Iterator[Row]:
    """From the adapter's factors, parts as factors and as matrices. At n >= 4096 the literal recipe runs at the
    first rank only: its time hardly depends on the rank (at 2048 by 5 %)."""
    time: Seconds | None = None
    for r in ranks:
        pair = low_rank_pair(n, r)
        literal: LiteralPair | None = None
        reused = time is not None and n >= LENT_FROM
        if time is None or not reused:
            time, literal = _literal(pair, r)
        for output in ("factors", "matrices"):
            yield _row("low-rank", output, pair, r, "auto", time, literal, reused)


def dense_rows(n: int, rules: tuple[str, ...] = (str(RANK), "auto")) -> Iterator[Row]:
    """Full-rank matrices; the rank given, and found by the default rule. One literal run serves both."""
    pair = dense_pair(n)
    time, literal = _literal(pair, RANK)
    exact = exact_eigenvalues(*deltas(pair), RANK)
    for i, rule in enumerate(rules):
        yield _row("dense", "matrices", pair, RANK, rule, time, literal, i > 0, exact)


def _literal(pair: PlantedPair, rank: int) -> tuple[Seconds, LiteralPair]:
    def call() -> LiteralPair:
        return literal_pair(*pair.matrices, rank)

    if pair.matrices[0].shape[0] >= ONCE_FROM:
        return once(call)
    return typical(call, budget=0.0)


def _row(
    case: str,
    output: str,
    pair: PlantedPair,
    rank: int,
    rule: str,
    time: Seconds,
    literal: LiteralPair | None,
    reused: bool,
    exact: Tensor | None = None,
) -> Row:
    first, second = deltas(pair)
    seconds, result = typical(lambda: devec_pair(first, second, rule, dense_output=output == "matrices"))
    found = int((((result.Z.T @ pair.directions) ** 2).sum(0) > 0.85).sum())
    planted = pair.directions.shape[1]
    return Row(
        case=case,
        output=output,
        n=pair.directions.shape[0],
        rank=rank,
        rule=rule,
        devec=seconds,
        literal=time,
        literal_reused=reused,
        found=found,
        planted=planted,
        surplus=result.Z.shape[1] - planted,
        literal_error=nan if literal is None else _distance(result.eigenvalues, literal.eigenvalues),
        exact_error=nan if exact is None else _distance(result.eigenvalues, exact),
        parts=nan if literal is None else difference_of_parts(result, literal),
        stages=result.seconds,
    )


def _distance(ours: Tensor, theirs: Tensor) -> float:
    k = min(ours.numel(), theirs.numel())
    return float((ours[:k].double() - theirs[:k].double()).abs().max())


def difference_of_parts(ours: DevecPair, theirs: LiteralPair) -> float:
    """Largest ``|ours - theirs|_F / |theirs|_F`` over the four parts."""
    pairs = zip(ours.shared + ours.unique, theirs.shared + theirs.unique, strict=True)
    return max(float(torch.linalg.norm(a.dense() - b) / torch.linalg.norm(b)) for a, b in pairs)
