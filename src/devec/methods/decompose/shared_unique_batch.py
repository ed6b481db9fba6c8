"""``shared_unique`` for many blocks of one shape at once: what a GPU wants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.linalg.batched import svd_of_dense_batch, svd_of_product_batch
from devec.linalg.batched_iteration import Products
from devec.linalg.inner import inner_products_of_dense, inner_products_of_factors
from devec.linalg.lowrank import ThinSVD
from devec.linalg.numerics import NonFiniteError
from devec.linalg.rank import RankRule
from devec.methods.decompose.shared_unique import kept, unusable

Place = tuple[int, int]
"""(block, vector)."""


def shared_unique_batch(
    blocks: Sequence[Block],
    factoring: Factoring | None = None,
    *,
    device: torch.device | str = "cpu",
    products: Products = "float32",
    workers: int = 1,
) -> list[TensorFactors]:
    """:func:`~devec.methods.decompose.shared_unique.shared_unique` of every block, factored together on ``device``.

    Eq. (6) of arXiv:2512.22511 for blocks of one matrix shape: dense and sparse deltas of all blocks and vectors are
    one batch, factored ones a batch per rank. Factors stay on ``device``. Ranks and values are those of the function
    for one block up to rounding (see :mod:`devec.linalg.batched`); ``products`` and ``workers`` as there.

    Raises InputError for NaN or infinity in a delta, naming vector and tensor; ValueError for unlike shapes.
    """
    factoring = factoring or Factoring()
    if not blocks:
        return []
    n, m = blocks[0].layout.matrix_shape
    if any(block.layout.matrix_shape != (n, m) for block in blocks):
        raise ValueError("blocks of a batch have one matrix shape")
    dtype, device = getattr(torch, factoring.dtype), torch.device(device)
    rule, side_length = RankRule.parse(factoring.rank), {"left": n, "right": m, "both": min(n, m)}[factoring.side]
    dense: list[Place] = []
    factored: dict[int, list[Place]] = defaultdict(list)
    for b, block in enumerate(blocks):
        for i in block.present:
            delta = block.deltas[i]
            (factored[delta.B.shape[1]] if isinstance(delta, LowRankDelta) else dense).append((b, i))

    moved: dict[Place, Delta] = {}
    svds: dict[Place, ThinSVD] = {}

    def take(places: Sequence[Place], results: Sequence[ThinSVD]) -> None:
        svds.update(zip(places, results, strict=True))

    places: Sequence[Place] = dense
    try:
        if dense:
            W = _stacked((_of(blocks, place).dense() for place in dense), (len(dense), n, m), dtype, device)
            moved.update((place, DenseDelta(W[at])) for at, place in enumerate(dense))
            keys = [(factoring.seed, blocks[b].name, blocks[b].vectors[i]) for b, i in dense]
            take(dense, svd_of_dense_batch(
                W, rule, side_length=side_length, exact=factoring.exact, keys=keys, products=products, workers=workers
            ))
        for r, places in factored.items():
            deltas = [_low_rank(blocks, place) for place in places]
            B = _stacked((delta.B for delta in deltas), (len(places), n, r), dtype, device)
            A = _stacked((delta.A for delta in deltas), (len(places), r, m), dtype, device)
            moved.update((place, LowRankDelta(B[at], A[at])) for at, place in enumerate(places))
            take(places, svd_of_product_batch(B, A, rule, side_length=side_length, workers=workers))
    except NonFiniteError as error:
        assert error.index is not None
        b, i = places[error.index]
        raise unusable(blocks[b], i, error) from None
    return [_assembled(b, block, moved, svds, factoring) for b, block in enumerate(blocks)]


def _of(blocks: Sequence[Block], place: Place) -> Delta:
    delta = blocks[place[0]].deltas[place[1]]
    assert delta is not None
    return delta


def _low_rank(blocks: Sequence[Block], place: Place) -> LowRankDelta:
    delta = _of(blocks, place)
    assert isinstance(delta, LowRankDelta)
    return delta


def _stacked(
    matrices: Iterable[Tensor], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A batch on the device, filled in place by one matrix after the other: deltas that are made when they are asked
    for exist once, and only there."""
    out = torch.empty(shape, dtype=dtype, device=device)
    for row, matrix in zip(out, matrices, strict=True):
        row.copy_(matrix)
    return out


def _assembled(
    b: int, block: Block, moved: Mapping[Place, Delta], svds: Mapping[Place, ThinSVD], factoring: Factoring
) -> TensorFactors:
    present = block.present
    deltas = {i: moved[b, i] for i in present}
    low_rank = frozenset(i for i, delta in deltas.items() if isinstance(delta, LowRankDelta))
    svd = {i: kept(svds[b, i], i in low_rank, factoring) for i in present if svds[b, i].rank}
    norms = {i: svds[b, i].total ** 0.5 for i in present}
    return TensorFactors(block.name, block.layout, svd, norms, _inner_products(deltas), low_rank)


def _inner_products(deltas: Mapping[int, Delta]) -> dict[tuple[int, int], float]:
    found = list(deltas.items())
    dense = [d.value for _, d in found if isinstance(d, DenseDelta)]
    factors = [(d.B, d.A) for _, d in found if isinstance(d, LowRankDelta)]
    if dense and factors:  # one of each: no common form but the matrix itself
        return {(i, j): x.inner(y) for i, x in found for j, y in found if i <= j}
    if not found:
        return {}
    G = (inner_products_of_dense(dense) if dense else inner_products_of_factors(factors)).tolist()
    return {(i, j): G[p][q] for p, (i, _) in enumerate(found) for q, (j, _) in enumerate(found) if i <= j}
