"""Subspace iteration of a batch: :mod:`devec.linalg.batched` without its edges.

All matrices that iterate with the same block size go together; one that has converged leaves, one that needs a larger
block waits for the others that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from devec.linalg import iteration
from devec.linalg.panels import orthonormal
from devec.linalg.rank import RankRule

T = TypeVar("T")
R = TypeVar("R")
Products = Literal["float32", "bfloat16"]
Triple = tuple[Tensor, Tensor, Tensor]

LOW_STEPS = iteration.MAX_STEPS // 2
"""Steps with bfloat16 products before float32 takes over in any case. Seen: 4 to 12 until the values stand."""


class Team:
    """Small problems on the CPU, side by side; results in order."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self.pool = pool

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return list(map(function, items) if self.pool is None else self.pool.map(function, items))


@contextmanager
def team_of(workers: int) -> Iterator[Team]:
    if workers <= 1:
        yield Team(None)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="devec-cores") as pool:
        yield Team(pool)


def some(X: Tensor, wanted: Sequence[int]) -> Tensor:
    """Those matrices of a batch; no copy when all are wanted."""
    return X if list(wanted) == list(range(X.shape[0])) else X[list(wanted)]


def product(Y: Tensor, P: Tensor) -> Tensor:
    return (Y @ P.to(Y.dtype)).to(torch.float32)


@dataclass
class _Member:
    """One matrix on its way: the next step is made from ``start`` (m, width)."""

    index: int
    gen: torch.Generator
    start: Tensor
    last: Tensor | None = None
    steps: int = 0


class Iteration:
    """Subspace iteration of a batch: all that share a block size go together."""

    def __init__(self, X: Tensor, totals: Sequence[float], rule: RankRule, side: int, team: Team) -> None:
        self.X, self.totals, self.rule, self.side, self.team = X, totals, rule, side, team
        self.n, self.m = int(X.shape[1]), int(X.shape[2])

    def run(self, keys: Sequence[object], products: Products) -> dict[int, Triple]:
        """Results by position in the batch; those that iteration does not serve are missing."""
        n, m = self.n, self.m
        block = iteration.first_block(self.rule, n, m)
        if block is None:
            return {}
        low = self.X.to(torch.bfloat16) if products == "bfloat16" else None
        gens = [iteration.seeded(key, n, m) for key in keys]
        starts = self._noise(gens, iteration.width(block, n, m))
        members = [_Member(i, gen, start) for i, (gen, start) in enumerate(zip(gens, starts, strict=True))]
        found: dict[int, Triple] = {}
        while members and block is not None:
            grown: list[_Member] = []
            if low is not None:
                members = self._until_settled(low, members, block, grown, None)
            self._until_settled(self.X, members, block, grown, found)
            wider = iteration.next_block(block, n, m)
            if wider is not None:
                more = iteration.width(wider, n, m) - iteration.width(block, n, m)
                for member, fresh in zip(grown, self._noise([g.gen for g in grown], more), strict=True):
                    member.start, member.last = torch.cat([member.start, fresh], dim=1), None
            members, block = grown, wider
        return found

    def _noise(self, gens: Sequence[torch.Generator], columns: int) -> list[Tensor]:
        return [t.to(self.X.device) for t in self.team.map(lambda g: iteration.noise(self.m, columns, g), gens)]

    def _until_settled(
        self,
        Y: Tensor,
        members: list[_Member],
        block: int,
        grown: list[_Member],
        found: dict[int, Triple] | None,
    ) -> list[_Member]:
        """Steps with the products of Y (X itself, or X in bfloat16) until no member is left.

        Members that need a larger block go to ``grown``. The others, once settled, go to ``found`` as results; without
        ``found`` they are returned, to be taken up from where they are. Members out of steps are dropped.
        """
        handed: list[_Member] = []
        if not members:
            return handed
        Y = some(Y, [member.index for member in members])
        P = torch.stack([member.start for member in members])
        while members:
            Q, _ = orthonormal(product(Y, P))
            P, R = orthonormal(product(Y.mT, Q))
            cores = list(R.cpu())
            stay: list[int] = []
            done: list[tuple[int, int]] = []
            for at, values in enumerate(self.team.map(torch.linalg.svdvals, cores)):
                member = members[at]
                verdict = self._judged(member, values, block)
                if verdict.grow:
                    member.start = P[at]
                    grown.append(member)
                elif found is None and (verdict.settled or member.steps >= LOW_STEPS):
                    member.start = P[at]
                    handed.append(member)
                elif found is not None and verdict.settled:
                    done.append((at, verdict.rank))
                elif member.steps < iteration.MAX_STEPS:
                    stay.append(at)
            if done and found is not None:
                places = [at for at, _ in done]
                results = self._rotated(some(Q, places), [cores[at] for at in places], some(P, places))
                for (at, r), (U, s, V) in zip(done, results, strict=True):
                    found[members[at].index] = U[:, :r], s[:r], V[:, :r]
            if len(stay) < len(members):
                Y, P, members = some(Y, stay), some(P, stay), [members[at] for at in stay]
        return handed

    def _judged(self, member: _Member, values: Tensor, block: int) -> iteration.Judgement:
        member.steps += 1
        last, member.last = member.last, values
        if last is None:
            return iteration.Judgement(0, False, False)
        total = self.totals[member.index]
        return iteration.judge(self.rule, values, last, total, self.n, self.m, self.side, block)

    def _rotated(self, Q: Tensor, cores: Sequence[Tensor], P: Tensor) -> list[Triple]:
        """Rayleigh-Ritz: R^T is the core of ``Q^T X = (P R)^T``, so no further product with X is needed."""
        solved = self.team.map(lambda R: torch.linalg.svd(R.T), cores)
        U = Q @ torch.stack([u for u, _, _ in solved]).to(Q)
        V = P @ torch.stack([vh.T for _, _, vh in solved]).to(P)
        return [(U[i], s, V[i]) for i, (_, s, _) in enumerate(solved)]
