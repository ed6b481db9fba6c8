"""devec's side: the same parts of the same pair through the library's own functions, end to end."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.linalg.lowrank import ThinSVD, svd_of_dense, svd_of_product
from devec.linalg.subspace import assemble, overlaps, pair_coefficients, pair_spectrum


@dataclass(frozen=True)
class DevecPair:
    """``seconds`` per stage: factor (Eq. 6), overlap (Eq. 8-10), apply (Eq. 12, 13)."""

    eigenvalues: Tensor
    Z: Tensor
    rank: int
    shared: tuple[Delta, Delta]
    unique: tuple[Delta, Delta]
    seconds: dict[str, float] = field(default_factory=dict)


def factor(delta: Delta, rule: str, key: object, exact: bool = False) -> ThinSVD:
    if isinstance(delta, LowRankDelta):
        return svd_of_product(delta.B, delta.A, rule)
    return svd_of_dense(delta.dense(), rule, key=key, exact=exact)


def devec_pair(
    first: Delta, second: Delta, rule: str, threshold: float = 0.85, dense_output: bool = False
) -> DevecPair:
    """Shared and unique parts in the pair basis ``first``, which is the one that the literal recipe has.

    Parts of factors are factors, unless ``dense_output`` asks for the matrices themselves; the unique part of a dense
    delta is always a dense matrix.
    """
    clock = [perf_counter()]

    def lap(on: Tensor) -> None:
        if on.is_cuda:
            torch.cuda.synchronize()
        clock.append(perf_counter())

    svds = [factor(delta, rule, key) for key, delta in enumerate((first, second))]
    lap(svds[0].U)
    bases = [svd.U for svd in svds]
    spectrum = pair_spectrum(overlaps(bases).block(0, 1))
    keep = int((spectrum.eigenvalues > threshold).sum())
    Z = assemble(bases, pair_coefficients(spectrum, keep, "first"))
    lap(Z)
    shared: list[Delta] = [delta.project(Z) for delta in (first, second)]
    unique: list[Delta] = [delta.residual(Z) for delta in (first, second)]
    if dense_output:
        shared = [DenseDelta(delta.dense()) for delta in shared]
        unique = [DenseDelta(delta.dense()) for delta in unique]
    lap(Z)
    seconds = {stage: clock[i + 1] - clock[i] for i, stage in enumerate(("factor", "overlap", "apply"))}
    return DevecPair(
        spectrum.eigenvalues, Z, svds[0].rank, (shared[0], shared[1]), (unique[0], unique[1]), seconds
    )


def exact_eigenvalues(first: Delta, second: Delta, rank: int) -> Tensor:
    """The same eigenvalues by the exact path (Gram matrix in float64): the yardstick for the iteration."""
    left, right = (factor(delta, str(rank), 0, exact=True).U.double() for delta in (first, second))
    return pair_spectrum(left.T @ right).eigenvalues
