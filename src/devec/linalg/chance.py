"""Chance: how large overlaps of independent subspaces are, and p-values of the ones that were found.

The null of a pair is the law of the *largest* squared cosine between independent, uniformly random subspaces of
dimensions r_1, r_2 in R^n; every eigenvalue of the pair is held against it, so a whole spectrum needs no further
correction. That law is the largest eigenvalue of the real Jacobi ensemble with m = min(r_1, r_2), a = |r_1 - r_2|,
b = n - r_1 - r_2, drawn from its bidiagonal model (Edelman and Sutton, Found. Comput. Math. 8, 2008): 2m - 1
independent beta variables replace an n x r Gaussian matrix, exactly. For m = 1 it is Beta(max/2, (n - max)/2) and no
draw is made.

Beyond the draws the survival function is continued as an exponential in y = -log(1 - lambda), from the mean excess
of the top draws. The continuation errs towards large p: y has a non-decreasing hazard rate for m >= 2. With
y_1 > y_2 > ... the joint density is

    prod_j exp(-(b + 1) y_j / 2) (1 - exp(-y_j))^((a - 1)/2)  prod_{i<j} exp(-(y_i + y_j)/2) 2 sinh((y_i - y_j)/2),

log-concave for a >= 1, hence so is the law of y_1, and log-concave laws have that property; for a = 0, m >= 2 the
first factor is not log-concave by itself and the property is checked numerically in the tests. The hazard tends to
(b + 1)/2 from below, which also bounds the fitted rate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import asin, log, sin, sqrt, tan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from devec.linalg.nulls import (
    SMALLEST,
    Array,
    JointKind,
    beta_survival,
    draw_largest_joint,
    draw_largest_overlap,
    edge,
)

__all__ = [
    "EmpiricalNull",
    "JointKind",
    "JointNull",
    "PairNull",
    "benjamini_hochberg",
    "edge",
    "joint_null",
    "joint_p_values",
    "pair_null",
    "pair_p_values",
    "prepare_pairs",
]

DRAWS = 100_000
"""Draws of a null. The standard error of an empirical p-value of 0.001 is then 10 % of it."""
SEED = 20_251_222
TAIL = 0.005
"""The top share of the draws that the tail is fitted to and beyond which it is used: its rate has 4.5 % error."""
FINE, STRIDE = 0.05, 20
"""Of the draws, the top 5 % are kept one by one and of the others every 20th."""
EXACT_RANK = 16
"""Ranks up to here are drawn for every (r1, r2, n); larger ones at nodes a factor 2^(1/4) apart (see PairNull)."""


# --- a null distribution ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EmpiricalNull:
    """Draws of a statistic in ascending order, with an exponential tail of ``rate`` above the draw at ``anchor``.

    Of the lower 95 % every 20th draw is kept: p-values above 0.05 come out at most 0.4 % too large, and a null takes
    0.16 MB instead of 0.8 MB, so that the nulls of a large model stay in memory. ``counts[i]`` is how many draws are
    no larger than ``y[i]``; ``start`` is the value at the anchor.
    """

    y: Array
    counts: NDArray[np.int64]
    draws: int
    anchor: int
    start: float
    rate: float

    @classmethod
    def fit(cls, y: Array, rate_limit: float = np.inf, heavy: bool = False) -> EmpiricalNull:
        """``rate_limit``: a known bound of the hazard. ``heavy``: the tail is ``y^(-1/2) exp(-rate y)``, whose
        hazard falls towards its limit, as it does where all ranks are 1 (products of single cosines); ``1/(2u)`` is
        its largest excess over the limit beyond u."""
        y = np.sort(y)
        size = y.shape[0]
        top = max(round(TAIL * size), min(100, size // 10))
        anchor = size - top
        excess = float(np.mean(y[anchor:] - y[anchor]))
        rate = min(1.0 / excess, rate_limit)
        if heavy:
            rate = max(rate - 0.5 / float(y[anchor]), 0.5 * rate)
        fine = round(FINE * size)
        kept = np.concatenate([np.arange(0, size - fine, STRIDE), np.arange(size - fine, size)])
        return cls(y[kept], kept + 1, size, anchor, float(y[anchor]), rate)

    def p_values(self, y: Array) -> Array:
        """``(1 + #{draws >= y})/(N + 1)``, and beyond the anchor its value there times ``exp(-rate (y - anchor))``."""
        size, start = self.draws, self.start
        place = np.searchsorted(self.y, y, side="left")
        below = np.where(place > 0, self.counts[np.maximum(place - 1, 0)], 0)
        p = (1.0 + size - below) / (size + 1.0)
        with np.errstate(under="ignore"):  # to the floor below
            tail = (1.0 + size - self.anchor) / (size + 1.0) * np.exp(-self.rate * np.maximum(y - start, 0.0))
        return np.asarray(np.clip(np.where(y > start, tail, p), SMALLEST, 1.0))


def _nearness(eigenvalues: Array) -> Array:
    """``y = -log(1 - lambda)``, with ``1 - lambda`` no smaller than float64 resolves next to 1 (so y <= 36.8)."""
    return np.asarray(-np.log(np.maximum(1.0 - np.clip(eigenvalues, 0.0, 1.0), 2.0**-53)))


def _checked(values: Tensor) -> Array:
    x = values.detach().to(device="cpu", dtype=torch.float64).numpy()
    if not np.isfinite(x).all():
        raise ValueError("an eigenvalue is NaN or infinite: it has no p-value")
    return np.asarray(x)


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairNull:
    """Null of the largest eigenvalue of ``P_1 P_2`` for independent subspaces.

    Ranks above 16 with ``r1 + r2 <= n/2`` share the draws of the nearest node of a geometric grid of ranks, so that a
    model whose every tensor has ranks of its own needs a few dozen nulls and not thousands. In the centring mu and
    scale sigma of Johnstone (Ann. Statist. 36, 2008) the law of ``(logit lambda - mu)/sigma`` hardly depends on the
    ranks: moving them by one node step changes it by less than 100,000 draws can tell (measured: Kolmogorov distance
    0.002-0.004, shares beyond the 0.1, 0.01, 0.001 quantiles within 1, 4 and 7 % of nominal). The eigenvalue is
    mapped to the node through that variable.

    ``draws`` is 0 where the law is exact (a rank of 1) or a point mass at 1 (``r1 + r2 > n``: the subspaces must
    intersect).
    """

    r1: int
    r2: int
    n: int
    empirical: EmpiricalNull | None
    node: tuple[int, int]

    @property
    def draws(self) -> int:
        return 0 if self.empirical is None else self.empirical.draws

    def p_values(self, eigenvalues: Array) -> Array:
        """Non-increasing in the eigenvalue, in [1e-300, 1]; eigenvalues are clipped to [0, 1]."""
        if self.r1 + self.r2 > self.n:
            return np.ones_like(eigenvalues)
        if self.empirical is None:
            big = max(self.r1, self.r2)
            return beta_survival(eigenvalues, big / 2, (self.n - big) / 2)
        if self.node != (self.r1, self.r2):
            eigenvalues = self._at_node(eigenvalues)
        return self.empirical.p_values(_nearness(eigenvalues))

    def _at_node(self, eigenvalues: Array) -> Array:
        centre, scale = _johnstone(self.r1, self.r2, self.n)
        node_centre, node_scale = _johnstone(*self.node, self.n)
        x = np.clip(eigenvalues, SMALLEST, 1.0 - 2.0**-53)
        logit = np.log(x) - np.log1p(-x)
        with np.errstate(over="ignore"):
            return np.asarray(1.0 / (1.0 + np.exp(-(node_centre + node_scale / scale * (logit - centre)))))


def _johnstone(r1: int, r2: int, n: int) -> tuple[float, float]:
    """Centre and scale of ``logit`` of the largest eigenvalue: Eq. (5), (6) of Johnstone (2008) for subspaces, with
    the smaller rank as dimension and the larger and its complement as degrees of freedom."""
    small, big = min(r1, r2), max(r1, r2)
    size = n - 1
    gamma = 2.0 * asin(sqrt((small - 0.5) / size))
    phi = 2.0 * asin(sqrt((big - 0.5) / size))
    centre = 2.0 * log(tan((phi + gamma) / 2.0))
    scale = (16.0 / (size * size * sin(phi + gamma) ** 2 * sin(phi) * sin(gamma))) ** (1.0 / 3.0)
    return centre, scale


def _node(r: int) -> int:
    return r if r <= EXACT_RANK else round(EXACT_RANK * 2.0 ** (round(4.0 * log(r / EXACT_RANK, 2.0)) / 4.0))


def _node_of(r1: int, r2: int, n: int) -> tuple[int, int]:
    return (_node(r1), _node(r2)) if 2 * (r1 + r2) <= n else (r1, r2)


def pair_null(r1: int, r2: int, n: int) -> PairNull:
    """The null of ``(r1, r2, n)``: symmetric in the ranks, deterministic, its draws kept for the life of the
    process (0.16 MB each)."""
    if min(r1, r2) < 1 or max(r1, r2) > n:
        raise ValueError(f"ranks {r1}, {r2} in R^{n}: each must lie between 1 and {n}")
    r1, r2 = min(r1, r2), max(r1, r2)
    if r1 == 1 or r1 + r2 > n:
        return PairNull(r1, r2, n, None, (r1, r2))
    node = _node_of(r1, r2, n)
    return PairNull(r1, r2, n, _drawn(*node, n), node)


@lru_cache(maxsize=8192)
def _drawn(r1: int, r2: int, n: int) -> EmpiricalNull:
    rng = np.random.default_rng([SEED, r1, r2, n])
    y = _nearness(draw_largest_overlap(r1, r2, n, DRAWS, rng))
    return EmpiricalNull.fit(y, rate_limit=(n - r1 - r2 + 1) / 2)


def prepare_pairs(shapes: Iterable[tuple[int, int, int]]) -> None:
    """Draw the nulls of several ``(r1, r2, n)`` on every core. Each has its own seed: who draws it changes nothing."""
    wanted: dict[tuple[int, int, int], None] = {}
    for r1, r2, n in shapes:
        if min(r1, r2) > 1 and r1 + r2 <= n:
            wanted[(*_node_of(min(r1, r2), max(r1, r2), n), n)] = None
    if len(wanted) > 1:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda key: _drawn(*key), wanted))


def pair_p_values(eigenvalues: Tensor, r1: int, r2: int, n: int) -> Tensor:
    """p-value of each eigenvalue (cos^2) of a pair of ranks r1, r2 in R^n, float64 on the CPU, same shape.

    Raises ``ValueError`` for a NaN or infinite eigenvalue.
    """
    x = _checked(eigenvalues)
    if not x.size:
        return torch.zeros(x.shape, dtype=torch.float64)
    return torch.from_numpy(pair_null(r1, r2, n).p_values(x))


# --- all vectors jointly ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class JointNull:
    """Null of the largest joint eigenvalue of k independent subspaces of dimensions ``ranks`` in R^n.

    ``consensus``: largest eigenvalue of ``(1/k) sum P_i``; ``chain``: largest real part of an eigenvalue of
    ``P_1 ... P_k``. ``draws`` says how many there were: 100,000 for sums of ranks up to 48, fewer above (the tail is
    then fitted to a larger share); 0 where the law is exact or the subspaces must intersect (``sum r_i > (k-1) n``).
    """

    ranks: tuple[int, ...]
    n: int
    kind: JointKind
    empirical: EmpiricalNull | None
    pair: PairNull | None = None

    @property
    def draws(self) -> int:
        if self.pair is not None:
            return self.pair.draws
        return 0 if self.empirical is None else self.empirical.draws

    def p_values(self, values: Array) -> Array:
        """Non-increasing in the value, in [1e-300, 1]."""
        overlap = equivalent_overlap(values, len(self.ranks), self.kind)
        if self.pair is not None:
            return self.pair.p_values(overlap)
        if self.empirical is None:
            return np.ones_like(values)
        return self.empirical.p_values(_nearness(overlap))


def equivalent_overlap(values: Array, k: int, kind: JointKind) -> Array:
    """The pairwise ``cos^2`` at which k subspaces, all pairs alike, would give this joint eigenvalue.

    Inverse of the mapped thresholds: ``tau^(k/2)`` for a chain, ``(1 + (k-1) sqrt(tau))/k`` for the consensus. On
    this scale the tail of the null is close to exponential for every k; the raw chain eigenvalue, a product of k
    cosines, has a far heavier one.
    """
    if kind == "chain":
        return np.asarray(np.clip(values, 0.0, 1.0) ** (2.0 / k))
    return np.asarray(np.clip((k * values - 1.0) / (k - 1), 0.0, 1.0) ** 2)


def joint_null(ranks: Sequence[int], n: int, kind: JointKind) -> JointNull:
    """The null of ``(r_1 .. r_k, n)``, deterministic, kept for the life of the process. k = 2 is the pair's null."""
    key = tuple(int(r) for r in ranks)
    if len(key) < 2 or min(key) < 1 or max(key) > n:
        raise ValueError(f"ranks {key} in R^{n}: at least two, each between 1 and {n}")
    if kind not in ("consensus", "chain"):
        raise ValueError(f"unknown joint statistic {kind!r}; use consensus or chain")
    if len(key) > 2 and sum(key) <= (len(key) - 1) * n:
        key, n = _reduced(key, n)
    return _joint_null(tuple(sorted(key)) if kind == "consensus" else _rotated(key), n, kind)


def joint_p_values(values: Tensor, ranks: Sequence[int], n: int, kind: JointKind) -> Tensor:
    """p-value of each joint eigenvalue (mean coverage, or real part of a chain eigenvalue), float64, same shape."""
    x = _checked(values)
    if not x.size:
        return torch.zeros(x.shape, dtype=torch.float64)
    return torch.from_numpy(joint_null(ranks, n, kind).p_values(x))


def _rotated(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Nonzero eigenvalues of a product of projectors are unchanged by rotating and by reversing it: one canonical
    order, smallest rank first."""
    turns = [ranks[i:] + ranks[:i] for i in range(len(ranks))]
    return min(turns + [turn[:1] + turn[:0:-1] for turn in turns])


JOINT_SIZE = 192
"""Joint nulls of more columns than this are drawn at proportionally smaller ranks and n. The asymptotic edge depends on
the ratios r_i/n alone, and the spread about it shrinks with size, so p-values below 0.1 come out too large, never too
small: the safe side, at a cost that no longer grows with the model."""


def _reduced(ranks: tuple[int, ...], n: int) -> tuple[tuple[int, ...], int]:
    total = sum(ranks)
    if total <= JOINT_SIZE:
        return ranks, n
    small_n = max(round(n * JOINT_SIZE / total), len(ranks))
    return tuple(min(max(-(-r * JOINT_SIZE // total), 2), small_n) for r in ranks), small_n


def _joint_draws(ranks: tuple[int, ...], kind: JointKind) -> int:
    size = sum(ranks) if kind == "consensus" else max(sum(ranks), 4 * min(ranks))
    return DRAWS if size <= 48 else max(1000, round(DRAWS * (48 / size) ** 3))


@lru_cache(maxsize=64)
def _joint_null(ranks: tuple[int, ...], n: int, kind: JointKind) -> JointNull:
    k = len(ranks)
    if k == 2:
        return JointNull(ranks, n, kind, None, pair_null(ranks[0], ranks[1], n))
    if sum(ranks) > (k - 1) * n:
        return JointNull(ranks, n, kind, None)
    rng = np.random.default_rng([SEED, 0 if kind == "consensus" else 1, n, *ranks])
    values = draw_largest_joint(ranks, n, kind, _joint_draws(ranks, kind), rng)
    y = _nearness(equivalent_overlap(values, k, kind))
    return JointNull(ranks, n, kind, EmpiricalNull.fit(y, heavy=min(ranks) == 1))


# --- many tests ------------------------------------------------------------------------------------------------------


def benjamini_hochberg(p: Tensor, fdr: float) -> float:
    """The largest ``p_(i)`` with ``p_(i) <= fdr i/m`` (Benjamini and Hochberg 1995), or 0.0 when there is none.

    Rejecting every test with a p-value of at most this cut-off keeps the expected share of false discoveries under
    ``fdr`` for independent or positively dependent tests.
    """
    if not 0.0 < fdr < 1.0:
        raise ValueError(f"a false discovery rate lies strictly between 0 and 1, not {fdr}")
    ordered = torch.sort(p.detach().flatten().to(device="cpu", dtype=torch.float64)).values
    line = fdr * torch.arange(1, ordered.numel() + 1, dtype=torch.float64) / max(ordered.numel(), 1)
    under = (ordered <= line).nonzero()
    return float(ordered[under[-1, 0]]) if under.numel() else 0.0
