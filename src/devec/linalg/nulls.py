"""Draws of the largest overlap of independent, uniformly random subspaces, exact and fast.

A pair needs no n x r Gaussian matrix: the squared cosines are the eigenvalues of the real Jacobi ensemble, whose
bidiagonal model (Edelman and Sutton, Found. Comput. Math. 8, 2008) has 2m - 1 independent beta variables, m the
smaller rank. Of the bidiagonal matrix only the leading corner matters for the largest eigenvalue. k subspaces are
drawn in the coordinates of their joint QR, whose triangular factor has independent entries (Bartlett). Neither costs
anything that grows with n.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, lgamma, sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
JointKind = Literal["consensus", "chain"]

SMALLEST = 1e-300
"""p-values never reach 0: a logarithm can be taken of each of them."""
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


# --- largest eigenvalue of many tridiagonal matrices -----------------------------------------------------------------


def largest_eigenvalue(diagonal: Array, off2: Array, ceiling: float = np.inf) -> Array:
    """Largest eigenvalue of N symmetric tridiagonal matrices: ``diagonal (K, N)``, squared off-diagonals ``(K-1, N)``.

    Laguerre's iteration from a Gershgorin bound: monotone from above and cubically convergent, since all roots are
    real. The Sturm recurrence ``q_i = x - d_i - o_i^2/q_{i-1}`` gives ``log det`` and, differentiated, the sums of
    ``1/(x - lambda)`` and ``1/(x - lambda)^2`` that the step needs. A non-positive q means that rounding put x under
    the root: that column is done.
    """
    K = diagonal.shape[0]
    if K == 1:
        return np.array(diagonal[0])
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
        out[start : start + count] = largest_eigenvalue(d2 + e2, e2[:-1] * d2[1:], ceiling=1.0)
    return out


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


# --- k subspaces -----------------------------------------------------------------------------------------------------


def draw_largest_joint(ranks: tuple[int, ...], n: int, kind: JointKind, size: int, rng: np.random.Generator) -> Array:
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
    """Largest eigenvalue of the mean projector: dense for small sizes, else Lanczos from a random start.

    Lanczos runs in float32 (its rounding is a thousandth of the spread of the draws) for as many steps as bring the
    mean error below 1e-3 of that spread, measured up to 640 = sum of ranks.
    """
    rows, k = bases[-1].shape[1], len(bases)
    S = torch.cat([torch.nn.functional.pad(U, (0, 0, 0, rows - U.shape[1])) for U in bases], dim=2) / sqrt(k)
    if S.shape[2] > rows:
        S = S.mT
    count, _, size = S.shape
    steps = 12 + ceil(5 * size ** (1 / 3))
    if size <= steps:
        return np.asarray(torch.linalg.eigvalsh(S.mT @ S)[:, -1].numpy())
    S = S.float()
    G = S.mT @ S if size <= 64 else None  # above, two thin products a step cost less than forming it
    # Row vectors: a batched row times matrix runs at memory speed, matrix times column ten times slower.
    v = torch.from_numpy(rng.standard_normal((count, 1, size))).float()
    v = v / torch.linalg.vector_norm(v, dim=2, keepdim=True)
    before, length = torch.zeros_like(v), torch.zeros(count, 1, 1)
    diagonal, off2 = [], []
    for i in range(steps):
        w = (v @ G if G is not None else (v @ S.mT) @ S) - length * before
        alpha = (w * v).sum(dim=2, keepdim=True)
        w = w - alpha * v
        diagonal.append(alpha.flatten())
        if i + 1 < steps:
            length = torch.linalg.vector_norm(w, dim=2, keepdim=True)
            off2.append((length * length).flatten())
            before, v = v, w / length
    return largest_eigenvalue(torch.stack(diagonal).double().numpy(), torch.stack(off2).double().numpy(), 1.0)


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
