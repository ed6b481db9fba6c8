"""DeVec: shared and unique parts of task vectors (arXiv:2512.22511, Eq. 6-14)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import InputError
from devec.core.gram import inner_products
from devec.core.lazy import LazyDelta
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.linalg.lowrank import ThinSVD, svd_of_dense, svd_of_product
from devec.linalg.numerics import NonFiniteError
from devec.linalg.rank import RankRule
from devec.linalg.rows import ByRows
from devec.methods.decompose.costs import can_stay_in_file
from devec.methods.registry import register


@register("decompose", name="shared-unique", grain="matrix", source="arXiv:2512.22511, Eq. (6)-(14)", keeps_rank=True)
def shared_unique(
    block: Block, factoring: Factoring | None = None, *, held: bool = True, most: int | None = None
) -> TensorFactors:
    """Factor every vector's delta of one tensor, once; shared and unique parts are then read from the factors.

    Math        Eq. (6)   W_i = U_i S_i V_i^T, thin, cut by a rank rule
                Eq. (7)   P_i = U_i U_i^T (never formed)
                Eq. (8,9) nonzero eigenpairs of P_1 P_2 = (c_j^2, U_1 a_j), U_1^T U_2 = A diag(c) B^T
                Eq. (10)  Z = shared directions: eigenvalue > tau
                Eq. (12)  shared_i = Z (Z^T W_i)
                Eq. (13)  unique_i = W_i - shared_i
                Eq. (14)  shared = sum |shared_i|_F shared_i / sum |shared_i|_F
    Symbols     W_i = block.deltas[i]; r_i = its rank; c_j = cosine of the principal angle j of two vectors' column
                spaces, A and B = the principal vectors in coordinates of U_1 and U_2; tau = View.threshold
    Shapes      W_i (n, m) -> U_i (n, r_i), S_i (r_i,), V_i (m, r_i); Z (n, d)
    Guarantees  sum: shared_i + unique_i == W_i to float32 rounding, whatever the rank rule cut;
                idempotent: the shared part of a shared part is itself;
                orthogonal: Z^T unique_i == 0;
                rank: factors in give factors out with no rank added (side left or right);
                equivariant: W_i -> Q W_i with orthogonal Q rotates the parts by Q (exact paths);
                order: defaults do not depend on the order of the vectors
    Numerics    factors in float32 (float64 on request), cores in float64; entries from 1e-25 to 1e25; one delta at a
                time is whole in memory; with ``held`` False none of those in files that have more than
                ``rows.LARGE`` entries, which gives the same bytes and reads them for every product
    Differs     the paper's U is square or full rank, which makes every P_i the identity for a dense fine-tune: here
                the rank is decided (RankRule). Its eigenvectors of a non-symmetric product are replaced by principal
                vectors. Its chain and its order-dependent basis are options; defaults are order-free. Thresholds
                for k >= 3 are mapped so that tau means the same angle for every k.
    Raises      InputError: NaN or infinity in a delta, naming vector and tensor; TooManyDirections: a dense delta
                keeps more than ``most``
    """
    factoring = factoring or Factoring()
    rule = RankRule.parse(factoring.rank)
    n, m = block.layout.matrix_shape
    side_length = {"left": n, "right": m, "both": min(n, m)}[factoring.side]
    dtype = getattr(torch, factoring.dtype)
    svd: dict[int, ThinSVD] = {}
    norms: dict[int, float] = {}
    low_rank: set[int] = set()
    for i in block.present:
        delta = block.deltas[i]
        assert delta is not None
        try:
            key = (block.name, block.vectors[i])
            factors = factor(delta.to(dtype), rule, side_length, factoring, key, held, most)
        except NonFiniteError as error:
            raise unusable(block, i, error) from None
        norms[i] = factors.total**0.5
        if isinstance(delta, LowRankDelta):
            low_rank.add(i)
        if factors.rank:
            svd[i] = kept(factors, i in low_rank, factoring).row_major()
        del factors  # what of it is not kept would lie beside the next vector's
    deltas = {i: delta.to(dtype) for i in block.present if (delta := block.deltas[i]) is not None}
    target = None if factoring.target is None else block.vectors.index(factoring.target)
    gram = {(i, i): norm * norm for i, norm in norms.items()}
    gram |= inner_products(deltas, target, transposed=block.layout.transposed)
    return TensorFactors(block.name, block.layout, svd, norms, dict(sorted(gram.items())), frozenset(low_rank))


def kept(factors: ThinSVD, low_rank: bool, factoring: Factoring) -> ThinSVD:
    """What of one vector's factors a decomposition keeps."""
    # The long side of a dense delta costs as much memory as U; side left never asks for it.
    return factors if factoring.side != "left" or low_rank else replace(factors, V=factors.V[:, :0].clone())


def unusable(block: Block, i: int, error: NonFiniteError) -> InputError:
    """The error for a delta with entries that are NaN or infinite."""
    return InputError(
        f"vector {block.vectors[i]} cannot be factored: {error.reason}",
        tensor=block.name,
        remedy="Repair the file, or leave the tensor out with --exclude.",
    )


def factor(
    delta: Delta, rule: RankRule, side_length: int, factoring: Factoring, key: tuple[object, ...], held: bool = True,
    most: int | None = None,
) -> ThinSVD:  # fmt: skip
    """Eq. (6) for one delta: QR-core SVD for factors, adaptive or exact for dense."""
    if isinstance(delta, LowRankDelta):
        return svd_of_product(delta.B, delta.A, rule, side_length)
    if isinstance(delta, LazyDelta) and not held and can_stay_in_file(delta.shape, factoring):
        W: Tensor | ByRows = delta.by_rows()
    else:
        W = delta.dense()
    key = (factoring.seed, *key)
    return svd_of_dense(W, rule, side_length=side_length, exact=factoring.exact, key=key, most=most)
