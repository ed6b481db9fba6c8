"""The stages of a decomposition, on a device, through the library's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.meter import Meter
from devec.api.gpu import batches
from devec.core.block import Block
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.engine.threads import ordered_map
from devec.linalg.batched_iteration import Products
from devec.linalg.numerics import one_blas_thread
from devec.linalg.subspace import Overlaps, PairSpectrum, assemble, pair_coefficients, pair_spectrum
from devec.methods.decompose.shared_unique_batch import shared_unique_batch

Spectra = dict[tuple[int, int], PairSpectrum]
APPLIED = 64
"""Directions that every pair's subspace is given when it is applied: all of a dense delta's, as the worst case."""


@dataclass(frozen=True)
class Case:
    """``rank`` of an adapter, ``None`` for dense deltas whose rank is decided."""

    label: str
    rank: int | None
    products: Products = "float32"


CASES = (
    Case("dense, float32 products", None),
    Case("dense, bfloat16 products", None, "bfloat16"),
    Case("LoRA r = 64", 64),
    Case("LoRA r = 256", 256),
)


@dataclass(frozen=True)
class Place:
    """``budget``: bytes of working memory a batch; ``workers``: threads for cores and pairs."""

    device: torch.device
    budget: int
    workers: int


def decomposed(
    case: Case, blocks: Sequence[Block], place: Place, meter: Meter, applied: int
) -> tuple[dict[str, TensorFactors], dict[str, Spectra]]:
    """Factor, overlap, solve the pairs, apply to both members of every pair."""
    factors = meter.run(case.label, "factor", lambda: factored(blocks, case.products, place))
    products = meter.run(case.label, "overlaps", lambda: {t.name: t.overlaps("left") for t in factors})
    spectra = meter.run(case.label, "pairs", lambda: solved(products, place.workers))
    by_name = {t.name: t for t in factors}
    meter.run(case.label, "apply", lambda: unique_parts(blocks, by_name, spectra, applied))
    return by_name, spectra


def factored(blocks: Sequence[Block], products: Products, place: Place) -> list[TensorFactors]:
    """Eq. (6), shape by shape as ``decompose`` does it; deltas and factors stay on the device."""
    found: list[TensorFactors] = []
    with one_blas_thread():
        for shape in dict.fromkeys(block.layout.matrix_shape for block in blocks):
            alike = (block for block in blocks if block.layout.matrix_shape == shape)
            for batch in batches(alike, place.budget):
                found += shared_unique_batch(
                    batch, Factoring(), device=place.device, products=products, workers=place.workers
                )
    return found


def solved(overlaps: dict[str, Overlaps], workers: int) -> dict[str, Spectra]:
    """Eq. (8), (9) of every pair: SVDs of r x r matrices in float64, on the CPU."""

    def pairs(name: str) -> Spectra:
        return {at: pair_spectrum(block) for at, block in overlaps[name].blocks.items()}

    names = list(overlaps)
    return dict(zip(names, ordered_map(pairs, names, workers=workers), strict=True))


def unique_parts(
    blocks: Sequence[Block], factors: dict[str, TensorFactors], spectra: dict[str, Spectra], applied: int
) -> int:
    """Eq. (10), (13) for both members of every pair (bisectors, at most ``applied`` directions); none is kept."""
    made = 0
    for block in blocks:
        members = factors[block.name].members
        bases = [factors[block.name].basis(i, "left") for i in members]
        deltas = [delta.to(torch.float32) for i in members if (delta := block.deltas[i]) is not None]
        for (i, j), spectrum in spectra[block.name].items():
            found = pair_coefficients(spectrum, min(applied, spectrum.c.numel()), "bisector")
            Z = assemble({0: bases[i], 1: bases[j]}, found)
            for member in (i, j):
                deltas[member].residual(Z)
                made += 1
    return made
