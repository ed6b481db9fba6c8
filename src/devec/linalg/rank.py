"""Rank rules: how many singular directions of a delta are signal.

The projector of a full-rank matrix is the identity and everything is then "shared" with everything, so the rank is
always decided explicitly. For an ``n x m`` delta of rank r, independent subspaces overlap up to about
``4 rho (1 - rho)``, rho = r/n: keeping r <= n/4 keeps chance below 0.75, under the method's threshold 0.85.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankRule:
    """A rule, parsed from ``auto | none | N | energy=F | nuclear=F | noise | mp``.

    * ``auto``: an adapter's numerical rank; for a dense delta ``noise``, capped at a quarter of the side used;
    * ``none``: the numerical rank (what the paper writes, made well defined);
    * ``N``: at most N directions;
    * ``energy=F``: the fewest directions with ``sum s^2 >= F |W|_F^2``;
    * ``nuclear=F``: the fewest with ``sum s >= F |W|_*``;
    * ``noise``: the optimal hard threshold of Gavish and Donoho (arXiv:1305.5870) for white noise of unknown level;
    * ``mp``: the Marchenko-Pastur edge ``sigma (sqrt n + sqrt m)``.
    """

    kind: str
    value: float = 0.0

    @classmethod
    def parse(cls, text: str | int | RankRule) -> RankRule:
        if isinstance(text, RankRule):
            return text
        word = str(text).strip().lower()
        if word in ("auto", "none", "noise", "mp"):
            return cls(word)
        if word.isdigit() and int(word) > 0:
            return cls("fixed", int(word))
        kind, _, number = word.partition("=")
        if kind in ("energy", "nuclear"):
            try:
                fraction = float(number)
            except ValueError:
                fraction = -1.0
            if 0.0 < fraction <= 1.0:
                return cls(kind, fraction)
            raise ValueError(f"{kind} wants a fraction in (0, 1], got {number!r}")
        raise ValueError(f"unknown rank rule {text!r}; use auto, none, N, energy=F, nuclear=F, noise or mp")

    def __str__(self) -> str:
        if self.kind == "fixed":
            return str(int(self.value))
        return f"{self.kind}={self.value:g}" if self.kind in ("energy", "nuclear") else self.kind

    @property
    def needs_all(self) -> bool:
        """True if the rule needs every singular value (so no partial factorisation can serve it)."""
        return self.kind in ("none", "nuclear")


def numerical_rank(s: Tensor, rtol: float) -> int:
    """The number of singular values above ``rtol`` times the largest. Expects ``s`` in descending order."""
    if s.numel() == 0 or float(s[0]) == 0.0:
        return 0
    return int((s > rtol * float(s[0])).sum())


def energy_rank(s: Tensor, fraction: float, total: float) -> int:
    """The fewest leading values with ``sum s^2 >= fraction * total``; ``len(s) + 1`` if all of them fall short."""
    cumulative = torch.cumsum(s.double() ** 2, 0)
    # Rounding in the total must not ask for one direction more than there are at fraction 1.
    reached = (cumulative >= fraction * total * (1 - 1e-12)).nonzero()
    return int(reached[0, 0]) + 1 if reached.numel() else int(s.numel()) + 1


def nuclear_rank(s: Tensor, fraction: float) -> int:
    """The fewest leading values with ``sum s >= fraction * |W|_*``; needs every singular value."""
    cumulative = torch.cumsum(s.double(), 0)
    return int((cumulative < fraction * float(cumulative[-1]) * (1 - 1e-12)).sum()) + 1 if s.numel() else 0


def hard_threshold_coefficient(beta: float) -> float:
    """lambda(beta) of Gavish and Donoho (arXiv:1305.5870), Eq. (11): threshold lambda sqrt(max(n, m)) sigma."""
    return sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + sqrt(beta * beta + 14 * beta + 1)))


def noise_rank(s: Tensor, total: float, n: int, m: int, coefficient: float) -> int:
    """Directions above ``coefficient * sqrt(max(n, m)) * sigma``, with the noise level found from the same data.

    sigma^2 = (|W|_F^2 - sum_{j<=r} s_j^2) / ((n - r)(m - r)), iterated from r = 0 until r stands still. Starting
    from nothing, sigma can only fall and r only grow, so the answer depends on the values above the threshold
    alone: a partial factorisation that holds them all gives what the full spectrum gives. Returns ``len(s) + 1``
    when every value given passes (more are needed), unless these are all there are.
    """
    energy = s.double() ** 2
    cumulative = torch.cat([energy.new_zeros(1), torch.cumsum(energy, 0)])
    short = min(n, m)
    r = 0
    while True:
        if r >= short:
            return short
        rest = max(total - float(cumulative[r]), 0.0)
        sigma = sqrt(rest / ((n - r) * (m - r)))
        found = int((s > coefficient * sqrt(max(n, m)) * sigma).sum())
        if found <= r:
            return r
        if found == s.numel() < short:
            return found + 1
        r = found


def select_rank(rule: RankRule, s: Tensor, total: float, n: int, m: int, rtol: float, side_length: int) -> int:
    """Apply ``rule`` to leading singular values ``s`` of an ``n x m`` matrix with ``|W|_F^2 = total``.

    Returns a rank larger than ``len(s)`` if the values given do not suffice to decide. ``side_length`` is the
    number of rows of the side whose subspace is used (it sets the cap of ``auto``).
    """
    short = min(n, m)
    have = int(s.numel())
    if short == 1:
        return min(have, 1)  # one direction is all there is: no rule has a second value to hold it against
    limit = numerical_rank(s, rtol)
    if limit < have:
        short = limit  # the rest is rounding: no rule may count it
    if rule.kind == "none":
        return limit if have == min(n, m) or limit < have else have + 1
    if rule.kind == "fixed":
        return min(int(rule.value), short)
    if rule.kind == "energy":
        return min(energy_rank(s, rule.value, total), short)
    if rule.kind == "nuclear":
        return min(nuclear_rank(s, rule.value), short)
    beta = min(n, m) / max(n, m)
    if limit < have and 2 * limit <= min(n, m):
        r = limit  # the median singular value is zero, and so is the noise: flat spectra would fool the iteration
    else:
        coefficient = 1 + sqrt(beta) if rule.kind == "mp" else hard_threshold_coefficient(beta)
        r = min(noise_rank(s, total, n, m, coefficient), short)
    return min(r, max(side_length // 4, 1)) if rule.kind == "auto" else r
