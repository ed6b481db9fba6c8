"""Is the chance null calibrated? Fresh pairs are drawn here from scratch (Gaussian matrices or their Bartlett
factors), never by the code under test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from devec.linalg import chance
from devec.linalg.nulls import draw_largest_joint

LEVELS = (0.1, 0.01, 0.001)


def triangular(rng: np.random.Generator, count: int, n: int, r: int) -> np.ndarray:
    """R factor of an n x r Gaussian matrix: chi diagonals with n, n - 1, ... degrees of freedom, normals above."""
    R = np.triu(rng.standard_normal((count, r, r)), 1)
    R[:, range(r), range(r)] = np.sqrt(rng.chisquare([n - j for j in range(r)], (count, r)))
    return R


def fresh_largest(rng: np.random.Generator, count: int, r1: int, r2: int, n: int) -> np.ndarray:
    """Largest squared cosine. The first subspace is the first r1 coordinates (rotations change nothing), the second
    the range of a Gaussian matrix with top block X and bottom block Y: cos^2 are the eigenvalues of
    ``(X^T X + Y^T Y)^-1 X^T X``."""
    r1, r2 = max(r1, r2), min(r1, r2)
    out = []
    for start in range(0, count, 500):
        size = min(500, count - start)
        X = triangular(rng, size, r1, r2)
        Y = triangular(rng, size, n - r1, r2)
        A = X.transpose(0, 2, 1) @ X
        inverse = np.linalg.inv(np.linalg.cholesky(A + Y.transpose(0, 2, 1) @ Y))
        out.append(np.linalg.eigvalsh(inverse @ A @ inverse.transpose(0, 2, 1))[:, -1])
    return np.concatenate(out)


def test_the_fresh_pairs_are_haar_pairs() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    Q1, Q2 = (np.linalg.qr(rng.standard_normal((3000, 24, r)))[0] for r in (3, 5))
    want = np.linalg.svd(Q1.transpose(0, 2, 1) @ Q2, compute_uv=False)[:, 0] ** 2
    assert stats.ks_2samp(want, fresh_largest(rng, 3000, 3, 5, 24)).pvalue > 1e-3


def check(r1: int, r2: int, n: int, pairs: int) -> None:
    fresh = torch.from_numpy(fresh_largest(np.random.default_rng([1, r1, r2, n]), pairs, r1, r2, n))
    p = chance.pair_p_values(fresh, r1, r2, n).numpy()
    shares = [float(np.mean(p < level)) for level in LEVELS]
    print(f"r1={r1} r2={r2} n={n}: " + ", ".join(f"{s:.4f} < {a}" for s, a in zip(shares, LEVELS, strict=True)))
    for share, level in zip(shares, LEVELS, strict=True):
        assert share <= level + 2 * math.sqrt(level * (1 - level) / pairs)
        # Nor needlessly conservative.
        assert share >= level - 4 * math.sqrt(level * (1 - level) / pairs)


@pytest.mark.parametrize(
    ("r1", "r2", "n"),
    [
        (1, 1, 768),
        (4, 4, 640),
        (8, 8, 768),
        (8, 8, 2304),
        (16, 16, 2304),
        (4, 8, 768),
        (1, 8, 2304),
        (2, 16, 2304),
        (16, 16, 128),
        (20, 20, 768),
    ],
)
def test_p_values_of_independent_pairs(r1: int, r2: int, n: int) -> None:
    check(r1, r2, n, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize(("r1", "r2", "n"), [(64, 64, 768), (64, 48, 2304), (32, 32, 2304), (72, 72, 768)])
def test_p_values_of_independent_pairs_at_large_rank(r1: int, r2: int, n: int) -> None:
    check(r1, r2, n, 10_000)


def spectra(rng: np.random.Generator, pairs: int, planted: int, r: int, n: int, cosine: float) -> np.ndarray:
    """All squared cosines ``(pairs, r)``; in the first ``planted`` pairs one direction of the second subspace stands
    at ``cosine`` to the first subspace."""
    G = rng.standard_normal((pairs, n, r))
    # The first subspace is the first r coordinates. A direction at a given angle to it: cosine inside, sine outside.
    inside, outside = rng.standard_normal((planted, r)), rng.standard_normal((planted, n - r))
    inside *= cosine / np.linalg.norm(inside, axis=1, keepdims=True)
    outside *= math.sqrt(1 - cosine**2) / np.linalg.norm(outside, axis=1, keepdims=True)
    G[:planted, :, 0] = np.concatenate([inside, outside], axis=1)
    L = np.linalg.cholesky(G.transpose(0, 2, 1) @ G)
    top = np.linalg.solve(L, G[:, :r].transpose(0, 2, 1))
    return np.linalg.svd(top, compute_uv=False) ** 2


def false_discoveries(families: int, pairs: int, planted: int, r: int, n: int, fdr: float) -> tuple[np.ndarray, float]:
    """False discovery proportion of each family over all directions of all pairs, and the power.

    In a planted pair the leading direction is the true one; every other direction there and elsewhere is chance."""
    rng = np.random.default_rng([2, r, n])
    proportion, found = [], 0
    for _ in range(families):
        values = spectra(rng, pairs, planted, r, n, cosine=0.8)
        p = chance.pair_p_values(torch.from_numpy(values), r, r, n)
        rejected = (p <= chance.benjamini_hochberg(p, fdr)).numpy()
        true = np.zeros_like(rejected)
        true[:planted, 0] = True
        found += int((rejected & true).sum())
        proportion.append((rejected & ~true).sum() / max(1, rejected.sum()))
    return np.asarray(proportion), found / (families * planted)


@pytest.mark.parametrize(("r", "n", "families"), [(4, 64, 500), (8, 128, 500)])
def test_false_discovery_rate(r: int, n: int, families: int) -> None:
    proportion, power = false_discoveries(families, 100, 10, r, n, fdr=0.1)
    error = proportion.std(ddof=1) / math.sqrt(families)
    print(f"r={r} n={n}: false discovery proportion {proportion.mean():.4f} +- {error:.4f}, power {power:.3f}")
    assert proportion.mean() <= 0.1 + 2 * error
    assert power > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("r", "n"), [(8, 768), (4, 640), (1, 768), (16, 256)])
def test_false_discovery_rate_at_adapter_sizes(r: int, n: int) -> None:
    proportion, power = false_discoveries(500, 100, 10, r, n, fdr=0.1)
    error = proportion.std(ddof=1) / math.sqrt(500)
    print(f"r={r} n={n}: false discovery proportion {proportion.mean():.4f} +- {error:.4f}, power {power:.3f}")
    assert proportion.mean() <= 0.1 + 2 * error
    assert power > 0.5


@pytest.mark.parametrize(
    ("ranks", "n", "kind"), [((61, 96, 61, 72, 72, 88, 64), 384, "consensus"), ((61, 96, 61, 72), 384, "chain")]
)
def test_joint_nulls_drawn_at_a_smaller_size_err_on_the_safe_side(
    ranks: tuple[int, ...], n: int, kind: chance.JointKind
) -> None:
    values = draw_largest_joint(ranks, n, kind, 300, np.random.default_rng(7))
    p = chance.joint_p_values(torch.tensor(values), ranks, n, kind)
    for level in (0.1, 0.05, 0.01):
        assert float((p < level).double().mean()) <= level + 2 * (level * (1 - level) / 300) ** 0.5
