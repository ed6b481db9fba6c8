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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, lgamma, sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
JointKind = Literal["consensus", "chain"]

DRAWS = 100_000
"""Draws of a null. The standard error of an empirical p-value of 0.001 is then 10 % of it."""
SEED = 20_251_222
SMALLEST = 1e-300
"""p-values never reach 0: a logarithm can be taken of each of them."""
TAIL = 0.005
"""The top share of the draws that the tail is fitted to and beyond which it is used: its rate has 4.5 % error."""
CHUNK = 8192
"""Draws worked on at once: the vectors of the recurrences stay in cache."""


def edge(r1: int, r2: int, n: int) -> float:
    """Upper edge of the spectrum of independent subspaces: ``(sqrt(a(1-b)) + sqrt(b(1-a)))^2``, a = r1/n, b = r2/n.

    1 if ``r1 + r2 >= n``. An asymptotic edge and no bound: at ranks of a few, 5-12 % of independent pairs exceed it.
    """
    a, b = r1 / n, r2 / n
    if r1 + r2 >= n:
        return 1.0
    return (sqrt(a * (1 - b)) + sqrt(b * (1 - a))) ** 2


# --- a null distribution ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EmpiricalNull:
    """Sorted draws of a statistic, with an exponential tail of ``rate`` above the value at ``anchor``."""

    y: Array
    anchor: int
    rate: float

    @classmethod
    def fit(cls, y: Array, rate_limit: float = np.inf, heavy: bool = False) -> EmpiricalNull:
        """``rate_limit``: a known bound of the hazard. ``heavy``: the tail is ``y^(-1/2) exp(-rate y)``, whose
        hazard falls towards its limit, as it does where a single cosine or a product of single cosines is tested;
        ``1/(2u)`` is its largest excess over the limit beyond u."""
        y = np.sort(y)
        size = y.shape[0]
        top = max(round(TAIL * size), min(100, size // 10))
        anchor = size - top
        excess = float(np.mean(y[anchor:] - y[anchor]))
        rate = min(1.0 / excess, rate_limit)
        if heavy:
            rate = max(rate - 0.5 / float(y[anchor]), 0.5 * rate)
        return cls(y, anchor, rate)

    def p_values(self, y: Array) -> Array:
        """``(1 + #{draws >= y})/(N + 1)``, and beyond the anchor its value there times ``exp(-rate (y - anchor))``."""
        size = self.y.shape[0]
        below = np.searchsorted(self.y, y, side="left")
        p = (1.0 + size - below) / (size + 1.0)
        start = self.y[self.anchor]
        with np.errstate(under="ignore"):
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


# --- largest eigenvalue of many tridiagonal matrices -----------------------------------------------------------------


def _largest_eigenvalue(diagonal: Array, off2: Array, ceiling: float = np.inf) -> Array:
    """Largest eigenvalue of N symmetric tridiagonal matrices: ``diagonal (K, N)``, squared off-diagonals ``(K-1, N)``.

    Laguerre's iteration from a Gershgorin bound: monotone from above and cubically convergent, since all roots are
    real. The Sturm recurrence ``q_i = x - d_i - o_i^2/q_{i-1}`` gives ``log det`` and, differentiated, the sums of
    ``1/(x - lambda)`` and ``1/(x - lambda)^2`` that the step needs. A non-positive q means that rounding put x under
    the root: that column is done.
    """
    K = diagonal.shape[0]
    if K == 1:
        return diagonal[0].copy()
    off = np.sqrt(off2)
    bound = diagonal.copy()
    bound[:-1] += off
    bound[1:] += off
    x = np.minimum(bound.max(axis=0), ceiling)
    with np.errstate(all="ignore"):
        for _ in range(60):
            q = x - diagonal[0]
            least = q.copy()
            slope = 1.0 / q  # q'/q
            bend = np.zeros_like(q)  # q''/q
            s1, s2 = slope.copy(), slope * slope
            for i in range(1, K):
                w = off2[i - 1] / q
                first, second = w * slope, w * (bend - 2.0 * slope * slope)
                q = x - diagonal[i] - w
                np.minimum(least, q, out=least)
                slope, bend = (1.0 + first) / q, second / q
                s1 += slope
                s2 += slope * slope - bend
            step = K / (s1 + np.sqrt(np.maximum((K - 1) * (K * s2 - s1 * s1), 0.0)))
            step = np.where((least > 0.0) & np.isfinite(step), step, 0.0)
            x = x - step
            if float(np.max(step / x)) < 1e-8:  # the next step would be of the order of its cube
                break
    return np.asarray(x)


# --- pairs -----------------------------------------------------------------------------------------------------------


def _corner(m: int, a: int, b: int) -> int:
    """How many leading rows of the bidiagonal matrix hold its largest singular vector.

    Beyond its turning point the vector decays at ``acosh((edge - d_i)/(2 o_i))`` a row, with d and o the mean
    tridiagonal entries; rows are kept until its square has fallen by e^45. Measured error of the largest eigenvalue:
    below 4e-9. Near ``r_1 + r_2 = n`` nothing decays and all rows stay.
    """
    k = np.arange(m, 0, -1.0)
    c = (a + k) / (a + b + 2 * k)
    c_prime = (k - 1) / (a + b + 2 * k - 1)
    d2 = c * np.concatenate([[1.0], 1.0 - c_prime[:-1]])
    e2 = (1.0 - c) * c_prime
    off = np.sqrt(e2[:-1] * d2[1:])
    decay = np.arccosh(np.maximum((edge(m, m + a, 2 * m + a + b) - (d2 + e2)[:-1]) / (2 * off), 1.0))
    return min(m, int(np.searchsorted(2.0 * np.cumsum(decay), 45.0)) + 1)


def _beta(rng: np.random.Generator, a: float, b: float, size: int) -> Array:
    x = rng.standard_gamma(a, size)
    return np.asarray(x / (x + rng.standard_gamma(b, size)))


def draw_largest_overlap(r1: int, r2: int, n: int, size: int, rng: np.random.Generator) -> Array:
    """``size`` draws of the largest squared cosine of independent uniform subspaces, ``r1 + r2 <= n``.

    Squared entries of the upper bidiagonal matrix, m = min(r1, r2): ``d_1^2 = c_m``, ``d_i^2 = c_k (1 - c'_k)``,
    ``e_i^2 = (1 - c_{k+1}) c'_k`` with ``c_k ~ Beta((a + k)/2, (b + k)/2)``, ``c'_k ~ Beta(k/2, (a + b + 1 + k)/2)``.
    """
    m, a, b = min(r1, r2), abs(r1 - r2), n - r1 - r2
    rows = _corner(m, a, b)
    out = np.empty(size)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        d2, e2 = np.empty((rows, count)), np.zeros((rows, count))
        stay: Array | float = 1.0
        for i in range(rows):
            k = m - i
            c = _beta(rng, (a + k) / 2, (b + k) / 2, count)
            d2[i] = c * stay
            if k > 1:
                c_prime = _beta(rng, (k - 1) / 2, (a + b + k) / 2, count)
                e2[i] = (1.0 - c) * c_prime
                stay = 1.0 - c_prime
        out[start : start + count] = _largest_eigenvalue(d2 + e2, e2[:-1] * d2[1:], ceiling=1.0)
    return out


@dataclass(frozen=True, eq=False)
class PairNull:
    """Null of the largest eigenvalue of ``P_1 P_2`` for independent subspaces. ``draws`` is 0 where the law is exact
    (a rank of 1) or a point mass at 1 (``r1 + r2 > n``: the subspaces must intersect)."""

    r1: int
    r2: int
    n: int
    empirical: EmpiricalNull | None

    @property
    def draws(self) -> int:
        return 0 if self.empirical is None else int(self.empirical.y.shape[0])

    def p_values(self, eigenvalues: Array) -> Array:
        """Non-increasing in the eigenvalue, in [1e-300, 1]; eigenvalues are clipped to [0, 1]."""
        if self.r1 + self.r2 > self.n:
            return np.ones_like(eigenvalues)
        if self.empirical is not None:
            return self.empirical.p_values(_nearness(eigenvalues))
        big = max(self.r1, self.r2)
        return beta_survival(eigenvalues, big / 2, (self.n - big) / 2)


def pair_null(r1: int, r2: int, n: int) -> PairNull:
    """The null of ``(r1, r2, n)``: symmetric in the ranks, deterministic, kept for the life of the process."""
    if min(r1, r2) < 1 or max(r1, r2) > n:
        raise ValueError(f"ranks {r1}, {r2} in R^{n}: each must lie between 1 and {n}")
    return _pair_null(min(r1, r2), max(r1, r2), n)


@lru_cache(maxsize=256)
def _pair_null(r1: int, r2: int, n: int) -> PairNull:
    if r1 == 1 or r1 + r2 > n:
        return PairNull(r1, r2, n, None)
    rng = np.random.default_rng([SEED, r1, r2, n])
    y = _nearness(draw_largest_overlap(r1, r2, n, DRAWS, rng))
    return PairNull(r1, r2, n, EmpiricalNull.fit(y, rate_limit=(n - r1 - r2 + 1) / 2))


def pair_p_values(eigenvalues: Tensor, r1: int, r2: int, n: int) -> Tensor:
    """p-value of each eigenvalue (cos^2) of a pair of ranks r1, r2 in R^n, float64 on the CPU, same shape.

    Raises ``ValueError`` for a NaN or infinite eigenvalue.
    """
    x = _checked(eigenvalues)
    return torch.from_numpy(pair_null(r1, r2, n).p_values(x)) if x.size else torch.zeros(x.shape, dtype=torch.float64)


def beta_survival(x: Array, a: float, b: float) -> Array:
    """``P(X >= x)`` for ``X ~ Beta(a, b)``: regularised incomplete beta by its continued fraction, in logarithms.

    The fraction (modified Lentz) converges fast below the mean, so each side of it is computed from its own tail;
    relative accuracy 1e-12 far into the upper tail. Clipped to [1e-300, 1].
    """
    x = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
    upper = x > (a + 1.0) / (a + b + 2.0)
    log_norm = lgamma(a + b) - lgamma(a) - lgamma(b)
    with np.errstate(divide="ignore", under="ignore"):
        log_kernel = a * np.log(x) + b * np.log1p(-x) + log_norm
        lower_tail = np.exp(log_kernel - np.log(a)) * _beta_fraction(np.where(upper, 0.0, x), a, b)
        upper_tail = np.exp(log_kernel - np.log(b)) * _beta_fraction(np.where(upper, 1.0 - x, 0.0), b, a)
    return np.asarray(np.clip(np.where(upper, upper_tail, 1.0 - lower_tail), SMALLEST, 1.0))


def _beta_fraction(x: Array, a: float, b: float) -> Array:
    c = np.ones_like(x)
    d = 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    h = d.copy()
    for i in range(1, 500):
        even = i * (b - i) * x / ((a + 2 * i - 1) * (a + 2 * i))
        odd = -(a + i) * (a + b + i) * x / ((a + 2 * i) * (a + 2 * i + 1))
        change = np.ones_like(x)
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d)
            c = 1.0 + term / c
            h = h * (c * d)
            change = c * d
        if float(np.max(np.abs(change - 1.0), initial=0.0)) < 1e-15:
            break
    return np.asarray(h)


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
        return 0 if self.empirical is None else int(self.empirical.y.shape[0])

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
    return _joint_null(tuple(sorted(key)) if kind == "consensus" else _rotated(key), n, kind)


def joint_p_values(values: Tensor, ranks: Sequence[int], n: int, kind: JointKind) -> Tensor:
    """p-value of each joint eigenvalue (mean coverage, or real part of a chain eigenvalue), float64, same shape."""
    x = _checked(values)
    return torch.from_numpy(joint_null(ranks, n, kind).p_values(x)) if x.size else torch.zeros(x.shape, dtype=torch.float64)


def _rotated(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Nonzero eigenvalues of a product of projectors are unchanged by rotating and by reversing it: one canonical
    order, smallest rank first."""
    turns = [ranks[i:] + ranks[:i] for i in range(len(ranks))]
    return min(turns + [turn[:1] + turn[:0:-1] for turn in turns])


def _joint_draws(ranks: tuple[int, ...], kind: JointKind) -> int:
    size = sum(ranks) if kind == "consensus" else max(sum(ranks), 4 * min(ranks))
    return DRAWS if size <= 48 else max(2000, round(DRAWS * (48 / size) ** 2))


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
    return JointNull(ranks, n, kind, EmpiricalNull.fit(y, heavy=kind == "chain" and min(ranks) == 1))


def draw_largest_joint(
    ranks: tuple[int, ...], n: int, kind: JointKind, size: int, rng: np.random.Generator
) -> Array:
    """``size`` draws of the joint statistic. Independent of n in cost: only ``min(n, sum r_i)`` rows are drawn."""
    total = sum(ranks)
    chunk = max(8, min(CHUNK, (1 << 19) // (total * total)))
    out = []
    for start in range(0, size, chunk):
        bases = list(_random_bases(ranks, n, min(chunk, size - start), rng))
        out.append(_consensus(bases, rng) if kind == "consensus" else _chain(bases))
    return np.concatenate(out)


def _random_bases(ranks: tuple[int, ...], n: int, count: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Orthonormal bases of independent uniform subspaces, in coordinates of the QR of all of them side by side.

    For ``G = [G_1 .. G_k] = Q T`` Gaussian, T is upper trapezoidal with independent entries (Bartlett): normal above
    a diagonal of chi variables with n, n - 1, ... degrees of freedom. Column block i has its last ``r_i`` rows on
    that diagonal, and rows past the n-th do not exist. Yields ``(count, min(n, r_1 + .. + r_i), r_i)``.
    """
    offset = 0
    for r in ranks:
        rows = min(n, offset + r)
        T = rng.standard_normal((count, rows, r))
        for j in range(min(r, n - offset)):
            T[:, offset + j + 1 :, j] = 0.0
            T[:, offset + j, j] = np.sqrt(2.0 * rng.standard_gamma((n - offset - j) / 2, count))
        X = torch.from_numpy(T)
        L = torch.linalg.cholesky(X.mT @ X)
        yield torch.linalg.solve_triangular(L, X.mT, upper=False).mT
        offset += r


def _consensus(bases: list[Tensor], rng: np.random.Generator) -> Array:
    """Largest eigenvalue of the mean projector: dense for small sizes, else Lanczos from a random start."""
    rows, k = bases[-1].shape[1], len(bases)
    S = torch.cat([torch.nn.functional.pad(U, (0, 0, 0, rows - U.shape[1])) for U in bases], dim=2) / sqrt(k)
    if S.shape[2] > rows:
        S = S.mT
    size = S.shape[2]
    G = S.mT @ S if size <= 64 else None  # above, two thin products a step cost less than forming it
    steps = 12 + ceil(5 * size ** (1 / 3))  # error of the largest Ritz value: see the tests
    if G is not None and size <= steps:
        return np.asarray(torch.linalg.eigvalsh(G)[:, -1].numpy())
    v = torch.from_numpy(rng.standard_normal((S.shape[0], size, 1)))
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    before, length = torch.zeros_like(v), torch.zeros(S.shape[0], 1, 1, dtype=torch.float64)
    diagonal, off2 = [], []
    for i in range(steps):
        w = (G @ v if G is not None else S.mT @ (S @ v)) - length * before
        alpha = (w * v).sum(dim=1, keepdim=True)
        w = w - alpha * v
        diagonal.append(alpha.flatten().numpy())
        if i + 1 < steps:
            length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            off2.append((length * length).flatten().numpy())
            before, v = v, w / length
    return _largest_eigenvalue(np.stack(diagonal), np.stack(off2), ceiling=1.0)


def _chain(bases: list[Tensor]) -> Array:
    """Largest real part of the eigenvalues of ``U_1^T U_2 U_2^T ... U_k^T U_1``."""
    product: Tensor | None = None
    for i, U in enumerate(bases):
        V = bases[(i + 1) % len(bases)]
        rows = min(U.shape[1], V.shape[1])
        block = U[:, :rows].mT @ V[:, :rows]
        product = block if product is None else product @ block
    assert product is not None
    if product.shape[1] == 1:
        return np.asarray(product[:, 0, 0].numpy())
    return np.asarray(torch.linalg.eigvals(product).real.amax(dim=1).numpy())


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
