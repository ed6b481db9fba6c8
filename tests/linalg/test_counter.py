"""Random numbers by place: the same for any cut, even, and unlike for unlike keys."""

from __future__ import annotations

import itertools

import pytest
import torch

from devec.linalg.counter import key_of, uniform
from reference.elementwise import draws


def test_as_whole_numbers_give_it() -> None:
    found = uniform(key_of("mask", 7, "layer.w", "poetry"), 6, 5)
    assert torch.equal(found, torch.from_numpy(draws(7, "layer.w", "poetry", (6, 5))))


def test_any_rows_alone_are_those_of_the_whole() -> None:
    key = key_of("a")
    whole = uniform(key, 50, 7)
    for start, stop in itertools.pairwise([0, 1, 20, 33, 50]):
        assert torch.equal(uniform(key, stop - start, 7, start), whole[start:stop])
    for start, stop in itertools.pairwise([0, 1, 4, 7]):  # the same matrix, read from a file that holds its transpose
        assert torch.equal(uniform(key, stop - start, 50, start, flipped=True), whole.T[start:stop])


@pytest.mark.parametrize("other", [("a", 1, "w", "B"), ("a", 0, "v", "B"), ("a", 0, "w", "A")])
def test_another_key_is_another_draw(other: tuple[object, ...]) -> None:
    """400 x 400 entries: the correlation of independent numbers stays below 5 standard deviations, 5/400."""
    x, y = (uniform(key_of(*key), 400, 400).flatten() - 0.5 for key in (("a", 0, "w", "B"), other))
    assert abs(float((x * y).mean() / (x * x).mean())) < 5 / 400


def test_the_numbers_are_uniform_and_neighbours_independent() -> None:
    """A million draws: counts in 100 bins by chi-squared (99 degrees: below 160 but for 1 in 10,000 seeds)."""
    x = uniform(key_of("uniform"), 1000, 1000)
    assert float(x.min()) >= 0.0 and float(x.max()) < 1.0
    counts = torch.histc(x, 100, 0.0, 1.0)
    assert float(((counts - 1e4) ** 2 / 1e4).sum()) < 160
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[1:, 1:], x[:-1, :-1])):
        assert abs(float(((a - 0.5) * (b - 0.5)).mean() * 12)) < 5e-3
    assert torch.equal(x, (x * 2.0**53).round() / 2.0**53)
