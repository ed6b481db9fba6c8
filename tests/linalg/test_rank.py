"""Rank rules: parsing, small cases by hand, the noise threshold on planted signals."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devec.linalg.lowrank import svd_of_dense
from devec.linalg.rank import (
    RankRule,
    energy_rank,
    hard_threshold_coefficient,
    noise_rank,
    nuclear_rank,
    numerical_rank,
    select_rank,
)
from reference.planted import generator, orthonormal

WORDS = ["auto", "none", "noise", "mp", "7", "energy=0.9", "nuclear=0.5"]


@pytest.mark.parametrize("word", WORDS)
def test_a_rule_is_its_own_text(word: str) -> None:
    assert str(RankRule.parse(word)) == word
    assert RankRule.parse(RankRule.parse(word)) == RankRule.parse(word)


@pytest.mark.parametrize("word", ["", "0", "-3", "2.5", "energy", "energy=0", "energy=1.5", "energy=nan", "r=3", "²"])
def test_a_rule_that_means_nothing_is_refused(word: str) -> None:
    with pytest.raises(ValueError):
        RankRule.parse(word)


def test_counting_rules_by_hand() -> None:
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)  # squares 16, 9, 4, 1 of 30
    assert [energy_rank(s, f, 30.0) for f in (0.5, 16 / 30, 0.83, 0.84, 1.0)] == [1, 1, 2, 3, 4]
    assert energy_rank(s, 1.0, 31.0) == 5, "the values given fall short: one more is asked for"
    assert [nuclear_rank(s, f) for f in (0.4, 0.41, 0.7, 0.9, 1.0)] == [1, 2, 2, 3, 4]
    assert numerical_rank(s, 0.3) == 3
    assert numerical_rank(torch.zeros(3), 1e-5) == 0
    assert numerical_rank(torch.zeros(0), 1e-5) == 0


def test_hard_threshold_is_4_over_sqrt_3_for_square_matrices() -> None:
    assert hard_threshold_coefficient(1.0) == pytest.approx(4 / sqrt(3), rel=1e-14)
    assert hard_threshold_coefficient(1e-12) == pytest.approx(sqrt(2), rel=1e-9)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40),
    st.sampled_from(["none", "noise", "mp", "auto", "energy=0.9", "energy=1", "5"]),
    st.integers(1, 40),
)
def test_a_partial_spectrum_decides_as_the_whole_does_or_asks_for_more(
    values: list[float], word: str, have: int
) -> None:
    s = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    n = s.numel()
    rule, total = RankRule.parse(word), float((s * s).sum())
    whole = select_rank(rule, s, total, n, 2 * n, 1e-12, n)
    part = select_rank(rule, s[:have], total, n, 2 * n, 1e-12, n)
    assert 0 <= whole <= n
    assert part == whole or (part > min(have, n) and whole > 0)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.integers(-60, 60))
def test_rules_ignore_scale(values: list[float], power: int) -> None:
    s = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    n = len(values)
    for word in WORDS:
        ranks = {
            select_rank(RankRule.parse(word), x, float((x * x).sum()), n, 2 * n, 1e-12, n)
            for x in (s, s * 2.0**power)  # a power of two rounds nothing
        }
        assert len(ranks) == 1, word


def test_a_single_column_keeps_its_one_direction_under_every_rule() -> None:
    """White-noise rules have no noise to estimate from one singular value: they must not call it noise."""
    for n, m in ((50, 1), (1, 50)):
        W = torch.randn(n, m, generator=generator(0))
        for word in WORDS:
            assert svd_of_dense(W, word, side_length=50).rank == 1, word


def test_auto_is_capped_at_a_quarter_of_the_side() -> None:
    g = generator(1)
    W = (orthonormal(64, 24, g) * torch.linspace(3, 2, 24, dtype=torch.float64)) @ orthonormal(400, 24, g).T
    assert svd_of_dense(W, "noise").rank == 24
    assert svd_of_dense(W, "auto", side_length=64).rank == 16
    assert svd_of_dense(W, "auto", side_length=400).rank == 24


def planted(n: int, m: int, r: int, exponent: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank-r signal with spectrum j^-exponent, its singular values)."""
    g = generator(seed)
    s = torch.arange(1, r + 1, dtype=torch.float64) ** -exponent
    return (orthonormal(n, r, g) * s) @ orthonormal(m, r, g).T, s


def white(n: int, m: int, level: float, smallest: float, seed: int) -> torch.Tensor:
    """Gaussian noise whose operator norm is ``level`` times the smallest signal value."""
    E = torch.randn(n, m, generator=generator(seed), dtype=torch.float64)
    return E * (level * smallest / (sqrt(n) + sqrt(m)))


@pytest.mark.parametrize(
    ("exponent", "level", "low", "high"),
    # Of 64 signal directions: all above the noise; half of them drowned.
    [(0.5, 0.5, 64, 64), (0.5, 1.5, 30, 37)],
)
def test_noise_rule_finds_the_signal_in_white_noise(exponent: float, level: float, low: int, high: int) -> None:
    signal, s = planted(1024, 1024, 64, exponent, seed=2)
    W = (signal + white(1024, 1024, level, float(s[-1]), seed=3)).float()
    assert low <= svd_of_dense(W, "noise").rank <= high
    assert low <= svd_of_dense(W, "noise", exact=True).rank <= high


@pytest.mark.parametrize(("exponent", "expected"), [(0.5, 64), (1.0, 180)])
def test_noise_rule_on_a_heavy_tail(exponent: float, expected: int) -> None:
    """The power law goes on below the signal at .7 of its smallest value: the steeper, the more looks like signal."""
    n = 1024
    j = torch.arange(1, n + 1, dtype=torch.float64)
    s = j**-exponent
    s[64:] *= 0.7
    total = float((s * s).sum())
    assert noise_rank(s, total, n, n, hard_threshold_coefficient(1.0)) == pytest.approx(expected, rel=0.12)


def test_a_flat_spectrum_without_noise_is_all_signal() -> None:
    """Started from nothing, the noise level takes such a signal for noise: its values barely exceed their mean."""
    for r in (20, 100, 128):
        s = torch.cat([torch.ones(r, dtype=torch.float64), torch.zeros(256 - r, dtype=torch.float64)])
        for word in ("noise", "mp"):
            assert select_rank(RankRule.parse(word), s, float(r), 256, 256, 1e-5, 256) == r
            assert select_rank(RankRule.parse(word), s[: r + 8], float(r), 256, 256, 1e-5, 256) == r


def test_noise_alone_has_rank_zero() -> None:
    for n, m in ((300, 300), (200, 700)):
        W = torch.randn(n, m, generator=generator(4))
        assert svd_of_dense(W, "auto").rank == 0
        assert svd_of_dense(W, "noise", exact=True).rank == 0


@pytest.mark.parametrize("rms", [3e-5, 1e-4, 3e-4, 1e-3])
def test_a_merged_adapter_in_bf16_keeps_its_rank(rms: float) -> None:
    """delta = bf16(W0 + D) - W0 is never numerically low rank: rounding fills all directions, and is white."""
    g = generator(5)
    n = 768
    base = (0.02 * torch.randn(n, n, generator=g)).to(torch.bfloat16)
    D = (orthonormal(n, 16, g) @ orthonormal(n, 16, g).T).float()
    D = D * (rms / float(D.square().mean().sqrt()))
    delta = (base.float() + D).to(torch.bfloat16).float() - base.float()
    assert svd_of_dense(delta, "auto").rank == 16
    if rms <= 1e-4:
        assert svd_of_dense(delta, "energy=0.99").rank > 300, "the energy rule takes the rounding for signal"
