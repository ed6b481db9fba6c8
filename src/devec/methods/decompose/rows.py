"""The decomposition in two passes over blocks of rows: a matrix that no memory holds is never whole.

Write ``W_i = T_i R_i``: for a dense delta ``T_i = W_i`` (n x m, m the short side), for factors ``T_i = B_i`` and
``R_i = A_i``. The first pass sums ``G_ij = T_i^T T_j`` over blocks of rows. Everything that the method decides follows
from these: bases ``U_i = T_i X_i``, overlaps ``X_i^T G_ij X_j``, and so shared subspaces ``Z = sum_i T_i Y_i``. The
second pass reads the rows again and gives the same rows of every part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Grain
from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.core.layout import Layout
from devec.core.options import Factoring, View
from devec.core.results import TensorFactors
from devec.core.spectra import wanted_pairs
from devec.core.vectors import Pool, TaskVector
from devec.linalg.lowrank import ThinSVD
from devec.linalg.numerics import CORE, NonFiniteError, compute_dtype, one_blas_thread, peak
from devec.linalg.rank import RankRule, select_rank
from devec.linalg.subspace import Overlaps
from devec.methods.decompose.shared_unique import unusable

GRAM_RTOL = 1e-6
"""Numerical rank from a Gram matrix: it squares the condition number, and eigenvalues carry rounding of about 1e-15
of the largest, so singular values below about 1e-7 of the largest are noise."""


@dataclass(frozen=True)
class RowState:
    """Cross-Grams summed so far, in float64. ``right[i]`` is A_i of a factored delta, ``None`` for a dense one."""

    name: str
    vectors: tuple[str, ...]
    columns: int
    right: Mapping[int, Tensor | None]
    grams: Mapping[tuple[int, int], Tensor]
    rows: int = 0


@dataclass(frozen=True)
class GramFactors(TensorFactors):
    """Factors whose bases exist only as ``T_i X_i``: overlaps are given, left bases are not."""

    known: Overlaps | None = None

    def overlaps(self, side: str, pairs: Iterable[tuple[int, int]] | None = None) -> Overlaps:
        assert self.known is not None
        return self.known


@dataclass(frozen=True)
class Removal:
    """What is taken from one vector. Left: ``Z = sum_j T_j Y_j`` and ``Z^T T_i = inner``; right: Z itself."""

    terms: Mapping[int, Tensor] = field(default_factory=dict)
    inner: Tensor | None = None
    basis: Tensor | None = None


@dataclass(frozen=True)
class RowSolution:
    """Small matrices that turn rows of the deltas into the same rows of the parts.

    ``decomposition`` spectra and decisions, as of the whole-matrix form (it holds no deltas: ask it for no parts)
    ``condition``     largest ``s_1/s_r`` of any vector
    ``error``         bound to first order on the sine between any basis found here and the exact one:
                      ``eps s_1^2/(s_r^2 - s_{r+1}^2)``. Below 1e-11 where s_1/s_r <= 100 and the spectrum has a
                      gap at r; near 1 where it has none, and then r itself cuts through a cluster
    """

    decomposition: Decomposition
    removals: Mapping[int, Removal | None]
    condition: float
    error: float


@dataclass(frozen=True)
class SharedUniqueRows:
    """A ``TwoPassMethod``: shared and unique parts (arXiv:2512.22511, Eq. 6-13) from blocks of rows.

    Math        G_ij = sum over blocks of T_i^T T_j                            (first pass)
                dense: G_ii = V S^2 V^T, X_i = V S^-1; factors: SVD of G_ii^{1/2} A_i on the r x r core
                M_ij = X_i^T G_ij X_j = U_i^T U_j -> coefficients C_i          (as for whole matrices)
                Z = sum_i T_i X_i C_i, Z^T W_i = sum_j (X_j C_j)^T G_ji R_i
                shared_i = Z (Z^T W_i), unique_i = W_i - shared_i              (second pass, row by row)
    Shapes      state: (m, m) per pair of dense deltas, (r_i, r_j) per pair of factored ones, never anything with n;
                mode target: only pairs that hold the target
    Guarantees  split: any blocks of rows in any order give one result up to float64 rounding;
                equal: to the whole-matrix form, within ``RowSolution.error``;
                rank: factors in, factors out with no rank added
    Numerics    sums in float64; a Gram matrix squares the condition number, so the error is reported
    Differs     side ``both`` and decisions by angles need whole bases and are refused
    Raises      InputError: NaN or infinity, naming vector and tensor; UsageError: a wide dense delta
    """

    factoring: Factoring = field(default_factory=Factoring)
    view: View = field(default_factory=View)
    grain: ClassVar[Grain] = "rows"

    def __post_init__(self) -> None:
        if self.factoring.side == "both" or self.view.angles:
            what = "side both" if self.factoring.side == "both" else "angles"
            raise UsageError(f"{what} cannot be decided from blocks of rows", remedy="Decompose whole matrices.")

    def start(self, block: Block) -> RowState:
        """An empty state for a tensor; ``block`` may hold any of its rows."""
        columns = block.layout.matrix_shape[1]
        right = {i: d.A.to(CORE) if isinstance(d, LowRankDelta) else None for i, d in _present(block)}
        for i, A in right.items():
            if A is None and columns > block.layout.matrix_shape[0]:
                raise UsageError(
                    f"vector {block.vectors[i]} is wider than tall: its Gram matrix would exceed the matrix",
                    values={"shape": block.layout.matrix_shape},
                    remedy="Decompose the whole matrix.",
                )
            if A is not None:
                _check(A, block, i)
        width = {i: columns if A is None else A.shape[0] for i, A in right.items()}
        target = None if self.factoring.target is None else block.vectors.index(self.factoring.target)
        pairs = sorted([*((i, i) for i in width), *wanted_pairs(list(width), target)])
        grams = {(i, j): torch.zeros(width[i], width[j], dtype=CORE) for i, j in pairs}
        return RowState(block.name, block.vectors, columns, right, grams)

    def update(self, state: RowState, part: Block) -> RowState:
        """The state with one more block of rows."""
        T = {i: _tall(d).to(CORE) for i, d in _present(part)}
        for i, rows in T.items():
            _check(rows, part, i)
        with one_blas_thread():  # the same bytes on every machine; blocks are what runs in parallel
            grams = {(i, j): G + T[i].T @ T[j] for (i, j), G in state.grams.items()}
        count = next((int(x.shape[0]) for x in T.values()), 0)
        return RowState(state.name, state.vectors, state.columns, state.right, grams, state.rows + count)

    def combine(self, left: RowState, right: RowState) -> RowState:
        """The state of both sets of rows (associative up to rounding)."""
        if left.name != right.name or left.grams.keys() != right.grams.keys():
            raise ValueError(f"states of unlike tensors: {left.name} and {right.name}")
        grams = {key: G + right.grams[key] for key, G in left.grams.items()}
        return RowState(left.name, left.vectors, left.columns, left.right, grams, left.rows + right.rows)

    def solve(self, state: RowState) -> RowSolution:
        """Decide what is shared, for the whole tensor, from the sums alone."""
        with one_blas_thread():
            return self._solve(state)

    def _solve(self, state: RowState) -> RowSolution:
        bases = {i: self._basis(state, i) for i in state.right}
        alive = {i: b for i, b in bases.items() if b.rank}
        pool = Pool(tuple(TaskVector(name, {}, {}) for name in state.vectors))
        factors = GramFactors(
            name=state.name,
            layout=Layout((state.rows, state.columns)),
            svd={i: ThinSVD(torch.zeros(0, b.rank, dtype=CORE), b.S, b.V, b.total) for i, b in alive.items()},
            norms={i: sqrt(b.total) for i, b in bases.items()},
            gram={(i, j): _inner(state, i, j) for i, j in state.grams},
            low_rank=frozenset(i for i, A in state.right.items() if A is not None),
            known=self._overlaps(state, alive),
        )
        d = Decomposition(pool, self.factoring, {state.name: factors}, self.view)
        wanted = alive if d.target is None else {i: b for i, b in alive.items() if i == d.target}
        return RowSolution(
            decomposition=d,
            removals={i: self._removal(state, d, bases, i) if i in wanted else None for i in bases},
            condition=max((b.condition for b in alive.values()), default=1.0),
            error=max((b.error for b in alive.values()), default=0.0),
        )

    def apply(self, solution: RowSolution, part: Block) -> Mapping[str, Delta]:
        """``{"unique:A": ..., "shared:A": ...}`` for the rows of ``part``; only the target's in mode target."""
        d, present = solution.decomposition, dict(_present(part))
        out: dict[str, Delta] = {}
        with one_blas_thread():
            for i, delta in present.items():
                if d.target is not None and i != d.target:
                    continue
                shared = self._shared(solution.removals.get(i), delta, present)
                out[f"shared:{part.vectors[i]}"] = shared
                out[f"unique:{part.vectors[i]}"] = _minus(delta, shared)
        return out

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _basis(self, state: RowState, i: int) -> _Basis:
        G, A = state.grams[i, i], state.right[i]
        values, E = torch.linalg.eigh(G)
        values, E = values.flip(0).clamp_min(0.0), E.flip(1)
        noise = 0.0
        if A is None:
            s, X, V, total = values.sqrt(), E / values.sqrt(), E, float(torch.trace(G))
        else:
            good = values > GRAM_RTOL**2 * values[:1]
            root, E = values[good].sqrt(), E[:, good]
            noise = float((values[0] / values[good][-1:]).sum())  # B's own condition, squared
            QA, RA = torch.linalg.qr(A.T)
            u, s, vh = torch.linalg.svd((root[:, None] * E.T) @ RA.T, full_matrices=False)
            X, V, total = (E / root) @ u, QA @ vh.T, float((s * s).sum())
        if total == 0.0:
            return _Basis(X[:, :0], s[:0], V[:, :0], 0.0, 1.0, 0.0)
        rule = RankRule.parse(self.factoring.rank)
        if A is not None and rule.kind == "auto":
            rule = RankRule("none")
        n, m = state.rows, state.columns
        full = torch.cat([s, s.new_zeros(max(min(n, m) - s.numel(), 0))])[: max(min(n, m), 0)]
        side_length = n if self.factoring.side == "left" else m
        r = min(select_rank(rule, full, total, n, m, self._rtol(), side_length), int(s.numel()))
        if r == 0:
            return _Basis(X[:, :0], s[:0], V[:, :0], total, 1.0, 0.0)
        following = float(s[r]) if r < s.numel() else 0.0
        gap = max(float(s[r - 1]) ** 2 - following**2, 0.0)
        error = torch.finfo(CORE).eps * max(float(s[0]) ** 2 / gap, noise) if gap > 0.0 else 1.0
        condition = float(s[0] / s[r - 1])
        return _Basis(X[:, :r], s[:r], V[:, :r], total, condition, min(error, 1.0))

    def _rtol(self) -> float:
        return 1e-5 if self.factoring.dtype == "float32" else GRAM_RTOL

    def _overlaps(self, state: RowState, bases: Mapping[int, _Basis]) -> Overlaps:
        members = sorted(bases)
        blocks = {}
        for a, i in enumerate(members):
            for b, j in enumerate(members[a + 1 :], start=a + 1):
                if (i, j) not in state.grams:  # mode target: no pair without the target
                    continue
                left, right = bases[i], bases[j]
                if self.factoring.side == "left":
                    blocks[a, b] = left.X.T @ state.grams[i, j] @ right.X
                else:
                    blocks[a, b] = left.V.T @ right.V
        n = state.rows if self.factoring.side == "left" else state.columns
        return Overlaps(n, tuple(bases[i].rank for i in members), blocks)

    def _removal(self, state: RowState, d: Decomposition, bases: Mapping[int, _Basis], i: int) -> Removal | None:
        side = self.factoring.side
        coefficients = d.removed_coefficients(state.name, side, i)
        if coefficients is None:
            return None
        if side == "right":
            return Removal(basis=_sum([bases[j].V @ C for j, C in coefficients.items()]))
        terms = {j: bases[j].X @ C for j, C in coefficients.items()}
        inner = _sum([Y.T @ (state.grams[j, i] if j <= i else state.grams[i, j].T) for j, Y in terms.items()])
        return Removal(terms=terms, inner=inner)

    def _shared(self, removal: Removal | None, delta: Delta, present: Mapping[int, Delta]) -> LowRankDelta:
        dtype = torch.promote_types(compute_dtype(delta.dtype), getattr(torch, self.factoring.dtype))
        if removal is None:
            n, m = delta.shape
            return LowRankDelta(torch.zeros(n, 0, dtype=dtype), torch.zeros(0, m, dtype=dtype))
        if removal.basis is not None:
            return delta.to(CORE).transpose().project(removal.basis).transpose().to(dtype)  # type: ignore[return-value]
        Z = _sum([_tall(present[j]).to(CORE) @ Y for j, Y in removal.terms.items()])
        assert removal.inner is not None
        if isinstance(delta, LowRankDelta):
            return LowRankDelta((Z @ removal.inner).to(dtype), delta.A.to(dtype))
        return LowRankDelta(Z.to(dtype), removal.inner.to(dtype))


@dataclass(frozen=True)
class _Basis:
    """``U = T X`` (left), V (right) and singular values of one delta, and how far they can be trusted."""

    X: Tensor
    S: Tensor
    V: Tensor
    total: float
    condition: float
    error: float

    @property
    def rank(self) -> int:
        return int(self.S.numel())


def _present(block: Block) -> list[tuple[int, Delta]]:
    return [(i, d) for i, d in enumerate(block.deltas) if d is not None]


def _tall(delta: Delta) -> Tensor:
    return delta.B if isinstance(delta, LowRankDelta) else delta.dense()


def _check(rows: Tensor, block: Block, i: int) -> None:
    try:
        peak(rows)
    except NonFiniteError as error:
        raise unusable(block, i, error) from None


def _inner(state: RowState, i: int, j: int) -> float:
    """``<W_i, W_j> = <T_i^T T_j, R_i R_j^T>``."""
    G, A, C = state.grams[i, j], state.right[i], state.right[j]
    if A is not None and C is not None:
        return float((G * (A @ C.T)).sum())
    if A is not None:
        return float((G * A).sum())
    return float((G * C.T).sum()) if C is not None else float(torch.trace(G))


def _minus(delta: Delta, shared: LowRankDelta) -> Delta:
    if shared.rank_bound == 0:
        return delta
    if isinstance(delta, LowRankDelta):
        # Both stand on one factor: A on the left side, and on the right side B.
        dtype = shared.dtype
        if shared.A.shape == delta.A.shape and torch.equal(shared.A, delta.A.to(dtype)):
            return LowRankDelta(delta.B.to(dtype) - shared.B, shared.A)
        return LowRankDelta(delta.B.to(dtype), delta.A.to(dtype) - shared.A)
    return DenseDelta(torch.addmm(delta.dense().to(shared.dtype), shared.B, shared.A, alpha=-1.0))


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total
