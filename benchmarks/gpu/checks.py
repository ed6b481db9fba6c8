"""Is it right, and was each choice a good one: the CPU's answer, a float64 reference, and the roads not taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import asin, degrees
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import typical
from benchmarks.gpu.meter import CountedProducts
from benchmarks.gpu.stages import Case, Place, Spectra
from benchmarks.planted import dense_pair, heavy_pair
from devec.core.block import Block
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.linalg.batched import svd_of_dense_batch
from devec.linalg.batched_iteration import team_of
from devec.linalg.lowrank import ThinSVD, svd_of_dense
from devec.linalg.numerics import one_blas_thread
from devec.linalg.panels import orthonormal
from devec.linalg.subspace import pair_spectrum
from devec.methods.decompose.shared_unique import shared_unique
from devec.methods.decompose.shared_unique_batch import shared_unique_batch

THRESHOLD = 0.85


def distance(U: Tensor, V: Tensor) -> float:
    """Largest angle in degrees between two column spaces of one dimension; 90 if dimensions differ."""
    if U.shape[1] != V.shape[1]:
        return 90.0
    U, V = U.cpu().double(), V.cpu().double()
    return degrees(asin(min(float(torch.linalg.matrix_norm(U - V @ (V.T @ U), ord=2)), 1.0)))


@dataclass(frozen=True)
class Agreement:
    """Device against CPU, one tensor, two vectors: largest differences."""

    case: str
    tensor: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    cpu_ranks: tuple[int, int]
    values: float
    angle: float
    eigenvalues: float


def agreements(
    case: Case, blocks: Sequence[Block], factors: dict[str, TensorFactors], spectra: dict[str, Spectra]
) -> list[Agreement]:
    """The first tensor of every shape, its first two vectors, by the function for one block on the CPU."""
    found = []
    for shape in dict.fromkeys(block.layout.matrix_shape for block in blocks):
        block = next(b for b in blocks if b.layout.matrix_shape == shape)
        pair = replace(block, vectors=block.vectors[:2], deltas=block.deltas[:2]).on(torch.device("cpu"))
        one, ours = shared_unique(pair, Factoring()), factors[block.name]
        values = pair_spectrum(one.svd[0].U.T @ one.svd[1].U).eigenvalues
        found.append(
            Agreement(
                case.label, block.name, shape,
                (ours.svd[0].rank, ours.svd[1].rank), (one.svd[0].rank, one.svd[1].rank),
                max(_relative(ours.svd[i].S, one.svd[i].S) for i in (0, 1)),
                max(distance(ours.svd[i].U, one.svd[i].U) for i in (0, 1)),
                _largest(spectra[block.name][0, 1].eigenvalues, values),
            )
        )
    return found


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return _largest(ours.cpu() / theirs, torch.ones_like(theirs)) if ours.shape == theirs.shape else float("inf")


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() - b.cpu()).abs().max()) if a.shape == b.shape else float("inf")


@dataclass(frozen=True)
class Accuracy:
    """Products of the power steps, against a float64 Gram matrix, over all pairs of one spectrum."""

    spectrum: str
    n: int
    rank: int
    products: str
    angle: float
    values: float
    eigenvalues: float
    found: int
    exact: int
    low_share: float


def accuracies(sizes: Sequence[int], device: torch.device, pairs: int = 2) -> list[Accuracy]:
    """float32 against bfloat16 products on planted pairs: a gap in white noise, and a heavy tail without one."""
    rows = []
    for n in sizes:
        rank = min(64, n // 16)
        for spectrum, make in (("gap in white noise", dense_pair), ("heavy tail", heavy_pair)):
            planted = [make(n, rank, max(rank // 4, 1), seed=s).matrices for s in range(pairs)]
            W = torch.stack([matrix for pair in planted for matrix in pair]).to(device)
            exact = [svd_of_dense(x, rank, exact=True) for x in W]
            for products in ("float32", "bfloat16"):
                with CountedProducts() as counted:
                    got = svd_of_dense_batch(W, rank, keys=range(len(W)), products=products)  # type: ignore[arg-type]
                ours, truth = _pair_values(got), _pair_values(exact)
                # Panels are float64 in either case; float32 and bfloat16 are the products with the matrix.
                low, full = counted.flops["bfloat16"], counted.flops["float32"]
                rows.append(
                    Accuracy(
                        spectrum, n, rank, products,
                        max(distance(a.U, b.U) for a, b in zip(got, exact, strict=True)),
                        max(_relative(a.S, b.S.cpu()) for a, b in zip(got, exact, strict=True)),
                        max(_largest(a, b) for a, b in zip(ours, truth, strict=True)),
                        sum(int((a > THRESHOLD).sum()) for a in ours), sum(int((b > THRESHOLD).sum()) for b in truth),
                        low / (low + full),
                    )
                )
    return rows


def _pair_values(svds: Sequence[ThinSVD]) -> list[Tensor]:
    return [
        pair_spectrum((a.U.T @ b.U).cpu()).eigenvalues for a, b in zip(svds[::2], svds[1::2], strict=True)
    ]


@dataclass(frozen=True)
class Choice:
    """Seconds of one way to do a thing; ``taken`` is the library's."""

    what: str
    way: str
    seconds: float
    taken: bool = False


def choices(place: Place, scale: int, blocks: Sequence[Block], patience: float = 0.5) -> list[Choice]:
    """What the library does on a device against the alternatives, at the sizes of a layer. ``blocks`` have one shape;
    a way is repeated for ``patience`` seconds."""
    device, n = place.device, 4096 // scale
    gen = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=gen, device=device).to(kind)

    rows: list[Choice] = []

    def add(what: str, ways: dict[str, Callable[[], Any]]) -> None:
        for at, (way, call) in enumerate(ways.items()):
            seconds, _ = typical(call, budget=patience, least=1)
            rows.append(Choice(what, way, seconds.wall, taken=at == 0))

    def hosted(function: Callable[[Tensor], Any], matrices: Tensor) -> Callable[[], Any]:
        def call() -> Any:
            with one_blas_thread(), team_of(place.workers) as team:
                return team.map(function, list(matrices.cpu()))

        return call

    for count, width in ((40, 96 // scale), (10, 384 // scale)):
        Z = random(count, n, width)
        add(f"QR of {count} panels {n} x {width}", {
            "Cholesky twice in float64": lambda Z=Z: orthonormal(Z), "torch.linalg.qr": lambda Z=Z: torch.linalg.qr(Z),
        })
        R = random(count, width, width, kind=torch.float64)
        add(f"values of {count} cores {width} x {width}", {
            f"CPU, {place.workers} threads": hosted(torch.linalg.svdvals, R),
            "device, svdvals": lambda R=R: torch.linalg.svdvals(R),
            "device, eigvalsh of the Gram": lambda R=R: torch.linalg.eigvalsh(R.mT @ R),
        })
    for count, width in ((70, 64 // scale), (70, 256 // scale)):
        R = random(count, width, width, kind=torch.float64)
        add(f"SVD of {count} cores {width} x {width}", {
            f"CPU, {place.workers} threads": hosted(torch.linalg.svd, R), "device": lambda R=R: torch.linalg.svd(R),
        })
    X, largest = random(1, n, n) * torch.arange(1, n + 1, device=device) ** -0.5, n // 16
    add(f"one matrix {n} x {n}, {largest} directions", {
        "iteration": lambda: svd_of_dense_batch(X, largest, keys="x", workers=place.workers),
        "exact (Gram matrix in float64)": lambda: svd_of_dense_batch(X, largest, keys="x", exact=True),
    })
    add(f"{len(blocks)} tensors {n} x {n} of {len(blocks[0].present)} vectors, dense", {
        "batched": lambda: shared_unique_batch(blocks, device=device, workers=place.workers),
        "one by one on the device": lambda: [shared_unique(block.on(device)) for block in blocks],
    })
    return rows


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
