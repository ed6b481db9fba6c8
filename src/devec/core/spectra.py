"""From factors to decisions: which directions of which tensor are shared, for a given view.

With ``threshold="chance"`` the decision spans all tensors (one false discovery rate), so this works on the whole
decomposition at once; everything else is per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import local

import torch
from torch import Tensor

from devec.core.options import Factoring, View
from devec.core.results import Chance, LazyFactors, Spectrum, TensorFactors
from devec.linalg import chance, subspace
from devec.linalg.numerics import TIE

Pair = tuple[int, int]
Coverage = tuple[Tensor, tuple[int, ...], int]
"""Of a consensus: ``coverage[i, j]`` of direction j by vector i, the vectors' ranks, and the length of a column."""
Key = tuple[str, str, Pair | None]
"""(tensor, side, pair of vector indices); the pair is None for the joint spectrum."""


@dataclass(frozen=True)
class SideAlgebra:
    """Everything derived from one tensor's overlaps on one side, before any threshold."""

    overlaps: subspace.Overlaps
    positions: Mapping[int, int]  # vector index -> index in overlaps
    pairs: Mapping[Pair, subspace.PairSpectrum]
    joint: subspace.ConsensusSpectrum | subspace.ChainSpectrum | None
    chances: Mapping[Pair | None, Chance]  # kept here, so that another view draws no null again


class LazyAlgebra(Mapping[tuple[str, str], SideAlgebra]):
    """:class:`SideAlgebra` of each tensor and side, made from factors that are read then; the last one is kept."""

    def __init__(
        self, tensors: LazyFactors, sides: Sequence[str], make: Callable[[str, str], SideAlgebra]
    ) -> None:
        self._make = make
        self._keys = {(n, side): None for n in tensors if tensors.count(n) >= 2 for side in sides}
        self._last = local()

    def __getitem__(self, key: tuple[str, str]) -> SideAlgebra:
        if key not in self._keys:
            raise KeyError(key)
        kept: tuple[tuple[str, str], SideAlgebra] | None = getattr(self._last, "made", None)
        if kept is None or kept[0] != key:
            kept = self._last.made = (key, self._make(*key))
        return kept[1]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


def sides_of(side: str) -> tuple[str, ...]:
    return ("left", "right") if side == "both" else (side,)


def wanted_pairs(members: Sequence[int], target: int | None) -> list[Pair]:
    """All pairs i < j, or with a target only those that hold it (the target's cost is linear in the pool)."""
    return [
        (i, j)
        for a, i in enumerate(members)
        for j in members[a + 1 :]
        if target is None or target in (i, j)
    ]


def side_algebra(
    factors: TensorFactors, side: str, target: int | None, joint: str | None, angles: bool
) -> SideAlgebra:
    position = {i: p for p, i in enumerate(factors.members)}
    wanted = wanted_pairs(factors.members, target)
    M = factors.overlaps(side, [(position[i], position[j]) for i, j in wanted])
    pairs: dict[Pair, subspace.PairSpectrum] = {}
    for i, j in wanted:
        if angles:
            pairs[i, j], _ = subspace.angle_spectrum(factors.basis(i, side), factors.basis(j, side))
        else:
            pairs[i, j] = subspace.pair_spectrum(M.block(position[i], position[j]))
    both: subspace.ConsensusSpectrum | subspace.ChainSpectrum | None = None
    if joint == "consensus":
        both = subspace.consensus_spectrum(M)
    elif joint == "chain":
        both = subspace.chain_spectrum(M)
    n = factors.side_length(side)
    chances: dict[Pair | None, Chance] = {
        (i, j): Chance(s.eigenvalues, (M.ranks[position[i]], M.ranks[position[j]]), n, "pair")
        for (i, j), s in pairs.items()
    }
    if isinstance(both, subspace.ChainSpectrum):
        chances[None] = Chance(both.real, M.ranks, n, "chain")
    elif both is not None:
        chances[None] = Chance(both.mean, M.ranks, n, "consensus")
    return SideAlgebra(M, position, pairs, both, chances)


def decide(
    tensors: Mapping[str, TensorFactors],
    algebra: Mapping[tuple[str, str], SideAlgebra],
    factoring: Factoring,
    view: View,
) -> dict[Key, Spectrum]:
    """One :class:`Spectrum` per tensor, side and pair (and joint), with the shared directions marked."""
    tie = TIE[getattr(torch, factoring.dtype)]
    spectra: dict[Key, Spectrum] = {}
    joints: dict[tuple[str, str], Coverage] = {}
    for (name, side), a in algebra.items():
        n = tensors[name].side_length(side)
        for pair in a.pairs:
            p = a.chances[pair]
            r1, r2 = p.ranks
            spectra[name, side, pair] = _against(p, view.threshold, chance.edge(r1, r2, n), tie)
        if a.joint is not None:
            spectra[name, side, None] = _joint(a, n, view, tie)
            if isinstance(a.joint, subspace.ConsensusSpectrum):
                joints[name, side] = (a.joint.coverage, a.overlaps.ranks, a.overlaps.n)
    if view.threshold == "chance":
        draw_nulls(spectra)
        _false_discovery(spectra, joints, view, factoring)
    return spectra


def draw_nulls(spectra: Mapping[Key, Spectrum]) -> None:
    """Draw at once what the p-values of many pairs need (each would otherwise be drawn when it is first asked for)."""
    pairs = (s.chance for s in spectra.values() if s.chance.kind == "pair")
    chance.prepare_pairs((c.ranks[0], c.ranks[1], c.n) for c in pairs)


def _against(p: Chance, threshold: float | str, edge: float, tie: float) -> Spectrum:
    values = p.eigenvalues
    if isinstance(threshold, str):  # "chance": marked later, over all tensors at once
        return Spectrum(values, p, 1.0, edge, torch.zeros_like(values, dtype=torch.bool))
    keep = values > threshold - tie
    return Spectrum(values, p, threshold, edge, keep, int(((values - threshold).abs() <= tie).sum()))


def _joint(a: SideAlgebra, n: int, view: View, tie: float) -> Spectrum:
    ranks, k = a.overlaps.ranks, a.overlaps.k
    second, first = sorted(ranks)[-2:]
    edge = chance.edge(first, second, n)  # the largest of all pairs: it grows with either rank
    chain = isinstance(a.joint, subspace.ChainSpectrum)
    p = a.chances[None]
    if isinstance(view.threshold, str):
        return _against(p, view.threshold, edge, tie)
    tau = view.threshold
    if view.paper:
        mapped = tau
    else:
        mapped = subspace.chain_threshold(tau, k) if chain else subspace.consensus_threshold(tau, k)
    spectrum = _against(p, mapped, edge, tie)
    if isinstance(a.joint, subspace.ConsensusSpectrum):
        # A direction that one vector lacks can pass the mean of 14 or more; every vector must hold it.
        spectrum = replace(spectrum, keep=spectrum.keep & (a.joint.coverage.min(0).values > tau - tie))
    return spectrum


def _false_discovery(
    spectra: dict[Key, Spectrum], joints: Mapping[tuple[str, str], Coverage], view: View, factoring: Factoring
) -> None:
    """Benjamini-Hochberg at ``view.fdr`` over everything tested: joint spectra in joint mode, pairs otherwise."""
    tested = [key for key in spectra if (key[2] is None) == (factoring.mode == "joint")]
    if not tested:
        return
    cutoff = chance.benjamini_hochberg(torch.cat([spectra[key].p_values for key in tested]), view.fdr)
    for key, s in spectra.items():
        keep = s.p_values <= cutoff
        if key[2] is None and (key[0], key[1]) in joints:
            keep = keep & _held_by_all(*joints[key[0], key[1]], view.fdr)
        applied = float(s.eigenvalues[keep].min()) if bool(keep.any()) else 1.0
        spectra[key] = replace(s, keep=keep, applied=applied)


def _held_by_all(coverage: Tensor, ranks: Sequence[int], n: int, fdr: float) -> Tensor:
    """Every vector must hold the direction beyond chance: its coverage against one random direction, at fdr/k."""
    held = torch.ones(coverage.shape[1], dtype=torch.bool)
    for i, r in enumerate(ranks):
        held &= chance.pair_p_values(coverage[i], 1, r, n) <= fdr / len(ranks)
    return held
