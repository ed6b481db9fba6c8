"""The chance null against direct simulation, the exact law and scipy; p-value and FDR mechanics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from devec.linalg import chance, nulls


def haar_bases(rng: np.random.Generator, count: int, n: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((count, n, r)))[0]


def test_edge_matches_its_closed_forms() -> None:
    assert chance.edge(8, 8, 2304) == pytest.approx(4 * (8 / 2304) * (1 - 8 / 2304))
    assert chance.edge(192, 192, 768) == pytest.approx(0.75)
    assert chance.edge(4, 60, 100) == pytest.approx(chance.edge(60, 4, 100))
    assert chance.edge(400, 368, 768) == 1.0
    assert chance.edge(700, 700, 768) == 1.0


@pytest.mark.parametrize(
    ("r1", "r2", "n"),
    [(2, 2, 8), (4, 8, 40), (8, 4, 40), (6, 6, 12), (3, 20, 50), (16, 16, 64), (40, 40, 120), (2, 9, 11)],
)
def test_pair_draws_have_the_law_of_haar_subspaces(r1: int, r2: int, n: int) -> None:
    rng = np.random.default_rng([r1, r2, n])
    direct = np.concatenate(
        [
            np.linalg.svd(
                haar_bases(rng, 500, n, r1).transpose(0, 2, 1) @ haar_bases(rng, 500, n, r2), compute_uv=False
            )[:, 0]
            ** 2
            for _ in range(6)
        ]
    )
    drawn = nulls.draw_largest_overlap(r1, r2, n, 20_000, np.random.default_rng(7))
    assert stats.ks_2samp(direct, drawn).pvalue > 1e-3


@pytest.mark.parametrize(("r1", "r2", "n"), [(64, 64, 768), (256, 256, 2304), (300, 300, 900), (100, 500, 1000)])
def test_the_corner_keeps_the_largest_eigenvalue(r1: int, r2: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, a, b = min(r1, r2), abs(r1 - r2), n - r1 - r2
    rows = nulls._corner(m, a, b)
    assert rows < m
    seen: dict[int, np.ndarray] = {}

    def longer(length: int) -> np.ndarray:
        monkeypatch.setattr(nulls, "_corner", lambda *_: length)
        return nulls.draw_largest_overlap(r1, r2, n, 200, np.random.default_rng(3))

    # Rows are drawn in order within a chunk, so the longer matrix extends the shorter one.
    seen[rows], seen[m] = longer(rows), longer(m)
    assert np.max(np.abs(seen[rows] / seen[m] - 1)) < 1e-6
    assert np.any(longer(max(2, rows // 4)) < seen[m] * (1 - 1e-4))  # and a quarter of it is too little


def test_largest_eigenvalue_of_tridiagonals_is_exact() -> None:
    rng = np.random.default_rng(0)
    d, o = rng.random((12, 50)), rng.random((11, 50))
    o[5, :10] = 0.0  # decoupled blocks
    want = [np.linalg.eigvalsh(np.diag(d[:, j]) + np.diag(o[:, j], 1) + np.diag(o[:, j], -1))[-1] for j in range(50)]
    assert np.allclose(nulls.largest_eigenvalue(d, o * o), want, rtol=1e-13)


@pytest.mark.parametrize(("a", "b"), [(0.5, 383.5), (0.5, 0.5), (4.0, 1148.0), (320.0, 4.0), (1.0, 5.0)])
def test_beta_survival_against_scipy(a: float, b: float) -> None:
    x = np.concatenate([np.linspace(0.0, 1.0, 201), stats.beta.isf(10.0 ** -np.arange(1, 280, 9), a, b)])
    want = np.clip(stats.beta.sf(x, a, b), 1e-300, 1.0)
    keep = want > 1e-290
    assert np.allclose(nulls.beta_survival(x, a, b)[keep], want[keep], rtol=1e-11, atol=0)


def test_rank_one_uses_the_exact_law() -> None:
    null = chance.pair_null(1, 12, 768)
    assert null.draws == 0
    x = torch.tensor([0.0, 0.01, 0.05, 0.3, 1.0])
    want = stats.beta.sf(x.double().numpy(), 6.0, 378.0)
    got = chance.pair_p_values(x, 12, 1, 768).numpy()
    assert np.allclose(got[:4], want[:4], rtol=1e-10)
    assert got[4] == 1e-300


@pytest.mark.parametrize(("r1", "r2", "n"), [(2, 2, 768), (1, 1, 640), (4, 8, 40), (8, 8, 2304), (3, 3, 6)])
def test_p_values_are_monotone_positive_and_bounded(r1: int, r2: int, n: int) -> None:
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    p = chance.pair_p_values(x, r1, r2, n)
    assert p.dtype == torch.float64
    assert bool((p[1:] <= p[:-1]).all())
    assert bool((p > 0).all()) and bool((p <= 1).all())
    assert float(p[0]) == 1.0
    out_of_range = chance.pair_p_values(torch.tensor([-1e-9, 1 + 1e-7]), r1, r2, n)
    assert torch.equal(out_of_range, p[[0, -1]])


def test_empirical_part_counts_draws_and_meets_the_tail() -> None:
    null = chance.pair_null(4, 8, 640).empirical
    assert null is not None and null.draws == 100_000 and null.y.shape == (9_750,)
    for place in (0, 1, 2_000, 4_749, 4_750, 6_000, 9_000):
        i = int(null.counts[place]) - 1  # this is the i-th smallest draw
        p, exact = null.p_values(null.y[place : place + 1])[0], (1 + 100_000 - i) / 100_001
        if i > 95_000:
            assert p == exact
        else:
            assert exact <= p <= exact * 1.005
    at = null.start
    below, above = null.p_values(np.array([at, np.nextafter(at, 1)]))
    assert above == pytest.approx(below, rel=1e-9)


def test_far_tail_is_not_anti_conservative() -> None:
    # The law of rank 2 against rank r has no atom and a known limit of its hazard; a thousand times more draws than
    # the tail was fitted to must lie above the fitted tail, up to their noise.
    r1, r2, n = 2, 2, 64
    fresh = np.sort(nulls.draw_largest_overlap(r1, r2, n, 1_000_000, np.random.default_rng(99)))[::-1]
    for exceed in (1000, 100, 30):
        p = float(chance.pair_p_values(torch.tensor(fresh[exceed - 1]), r1, r2, n))
        assert p * 1_000_000 > exceed * (1 - 2.5 / math.sqrt(exceed) - 0.1)


@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 2, 100), (3, 3, 100), (2, 5, 100), (8, 8, 200)])
def test_hazard_of_the_transformed_null_does_not_fall(shape: tuple[int, int, int]) -> None:
    r1, r2, n = shape
    y = np.sort(chance._nearness(nulls.draw_largest_overlap(r1, r2, n, 300_000, np.random.default_rng(1))))
    rates, errors = [], []
    for quantile in (0.5, 0.9, 0.99, 0.995, 0.999):
        i = int(quantile * y.size)
        rates.append(1 / np.mean(y[i:] - y[i]))
        errors.append(rates[-1] / math.sqrt(y.size - i))
    for i in range(1, 5):
        assert rates[i] > rates[i - 1] - 3 * math.hypot(errors[i], errors[i - 1])
    assert rates[-1] < (n - r1 - r2 + 1) / 2 + 4 * errors[-1]


def test_hazard_of_a_single_cosine_falls_so_it_needs_the_exact_law() -> None:
    y = -np.log1p(-stats.beta.rvs(0.5, 49.5, size=300_000, random_state=1))
    y.sort()
    half, deep = (1 / np.mean(y[i:] - y[i]) for i in (150_000, 299_000))
    assert deep < 0.9 * half


def test_intersecting_subspaces_have_p_one() -> None:
    p = chance.pair_p_values(torch.tensor([0.1, 1.0]), 6, 6, 11)
    assert p.tolist() == [1.0, 1.0]
    assert chance.pair_null(6, 6, 11).draws == 0
    assert chance.joint_p_values(torch.tensor([1.0]), (8, 8, 8), 11, "consensus").tolist() == [1.0]


def test_symmetric_in_the_ranks_cached_and_repeatable() -> None:
    assert chance.pair_null(4, 8, 640).empirical is chance.pair_null(8, 4, 640).empirical
    x = torch.tensor([0.02, 0.03, 0.05])
    first = chance.pair_p_values(x, 4, 8, 640)
    chance._drawn.cache_clear()
    assert torch.equal(first, chance.pair_p_values(x, 8, 4, 640))


@pytest.mark.parametrize(("r1", "r2", "n"), [(17, 17, 2304), (70, 70, 768), (5, 21, 128), (25, 38, 200)])
def test_ranks_between_nodes_have_calibrated_p_values(r1: int, r2: int, n: int) -> None:
    null = chance.pair_null(r1, r2, n)
    assert null.node != (r1, r2) and null.draws == 100_000
    p = null.p_values(nulls.draw_largest_overlap(r1, r2, n, 20_000, np.random.default_rng(17)))
    assert np.abs(np.sort(p) - np.linspace(0, 1, p.size)).max() < 0.015
    for level in (0.1, 0.01, 0.001):
        assert np.mean(p <= level) <= level + 2.5 * math.sqrt(level / p.size)
    grid = null.p_values(np.linspace(0.0, 1.0, 10_001))
    assert np.all(np.diff(grid) <= 0) and grid[0] == 1.0 and grid[-1] > 0


def test_thousands_of_rank_pairs_need_few_nulls() -> None:
    nodes = {chance._node(r) for r in range(17, 600)}
    assert len(nodes) <= 22
    assert all(abs(math.log2(chance._node(r) / r)) < 0.17 for r in range(17, 4096))
    assert chance.pair_null(100, 100, 300).node == (100, 100)  # near r1 + r2 = n the mapping does not hold


def test_empty_spectra_and_bad_input() -> None:
    assert chance.pair_p_values(torch.zeros(0), 0, 3, 10).shape == (0,)
    assert chance.joint_p_values(torch.zeros(0), (0, 3), 10, "chain").shape == (0,)
    with pytest.raises(ValueError, match="ranks 0, 3"):
        chance.pair_p_values(torch.zeros(1), 0, 3, 10)
    with pytest.raises(ValueError, match="NaN"):
        chance.pair_p_values(torch.tensor([float("nan")]), 2, 3, 10)
    with pytest.raises(ValueError, match="at least two"):
        chance.joint_null((4,), 10, "chain")
    with pytest.raises(ValueError, match="unknown joint statistic"):
        chance.joint_null((4, 4, 4), 10, "mean")  # type: ignore[arg-type]


def direct_joint(ranks: tuple[int, ...], n: int, kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """n x n projectors, as the definition says."""
    bases = [haar_bases(rng, count, n, r) for r in ranks]
    P = [U @ U.transpose(0, 2, 1) for U in bases]
    if kind == "consensus":
        return np.linalg.eigvalsh(sum(P) / len(P))[:, -1]
    product = P[0]
    for Q in P[1:]:
        product = product @ Q
    values = np.linalg.eigvals(product)
    # The n - r structural zeros of the product are not eigenvalues of a shared direction.
    order = np.argsort(-np.abs(values), axis=1)[:, : min(ranks)]
    return np.take_along_axis(values.real, order, axis=1).max(axis=1)


@pytest.mark.parametrize("kind", ["consensus", "chain"])
@pytest.mark.parametrize(
    ("ranks", "n"), [((4, 4, 4), 30), ((2, 5, 3, 7), 24), ((6, 6, 6), 14), ((1, 2, 3), 9), ((3, 3, 3, 3, 3), 40)]
)
def test_joint_draws_have_the_law_of_haar_subspaces(ranks: tuple[int, ...], n: int, kind: str) -> None:
    direct = direct_joint(ranks, n, kind, 3000, np.random.default_rng([n, *ranks]))
    drawn = nulls.draw_largest_joint(ranks, n, kind, 8000, np.random.default_rng(11))  # type: ignore[arg-type]
    assert stats.ks_2samp(direct, drawn).pvalue > 1e-3


@pytest.mark.parametrize("ranks", [(16, 16, 16), (20, 30, 40), (32,) * 5])
def test_lanczos_agrees_with_a_dense_solver(ranks: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    bases = list(nulls._random_bases(ranks, 400, 60, rng))
    rows = bases[-1].shape[1]
    S = torch.cat([torch.nn.functional.pad(U, (0, 0, 0, rows - U.shape[1])) for U in bases], dim=2)
    want = torch.linalg.eigvalsh(S.mT @ S / len(ranks))[:, -1].numpy()
    got = nulls._consensus(bases, rng)
    assert np.mean(np.abs(got - want)) < 1e-3 * want.std()


def test_joint_of_two_is_the_pair() -> None:
    x = torch.tensor([0.01, 0.03, 0.08], dtype=torch.float64)
    pair = chance.pair_p_values(x, 4, 8, 640)
    assert torch.equal(chance.joint_p_values(x, (8, 4), 640, "chain"), pair)
    assert torch.allclose(chance.joint_p_values((1 + x.sqrt()) / 2, (4, 8), 640, "consensus"), pair, rtol=1e-9)


@pytest.mark.parametrize("kind", ["consensus", "chain"])
def test_joint_p_values_are_calibrated_monotone_and_state_their_draws(kind: chance.JointKind) -> None:
    ranks, n = (2, 4, 3), 60
    assert chance.joint_null(ranks, n, kind).draws == 100_000
    fresh = torch.from_numpy(nulls.draw_largest_joint(ranks, n, kind, 10_000, np.random.default_rng(5)))
    p = chance.joint_p_values(fresh, ranks, n, kind)
    for level in (0.1, 0.01, 0.001):
        assert float((p <= level).double().mean()) <= level + 2.5 * math.sqrt(level / 10_000)
    grid = chance.joint_p_values(torch.linspace(-0.1, 1, 5001), ranks, n, kind)
    assert bool((grid[1:] <= grid[:-1]).all()) and float(grid[0]) == 1.0 and float(grid[-1]) > 0


def test_joint_null_ignores_what_the_statistic_ignores() -> None:
    assert chance.joint_null((2, 3, 4), 50, "consensus") is chance.joint_null((4, 2, 3), 50, "consensus")
    assert chance.joint_null((2, 3, 4), 50, "chain") is chance.joint_null((4, 3, 2), 50, "chain")
    assert chance._joint_draws((64,) * 10, "consensus") == 1000


def test_benjamini_hochberg_worked_example() -> None:
    # The fifteen p-values of the 1995 paper's example: at 0.05 the four smallest are rejected, Bonferroni three.
    p = torch.tensor(
        [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
         0.7590, 1.0], dtype=torch.float64,
    )  # fmt: skip
    shuffled = p[torch.randperm(15, generator=torch.Generator().manual_seed(0))]
    assert chance.benjamini_hochberg(shuffled, 0.05) == pytest.approx(0.0095)
    assert chance.benjamini_hochberg(torch.ones(4), 0.1) == 0.0
    assert chance.benjamini_hochberg(torch.zeros(0), 0.1) == 0.0
    # A step-up rule: a larger p-value under its own line carries the smaller ones that miss theirs.
    assert chance.benjamini_hochberg(torch.tensor([0.04, 0.045, 0.049], dtype=torch.float64), 0.05) == 0.049
    with pytest.raises(ValueError, match="false discovery rate"):
        chance.benjamini_hochberg(p, 1.5)
