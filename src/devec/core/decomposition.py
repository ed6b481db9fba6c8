"""A decomposition: factors of every tensor, and the parts that can be read from them.

Equation numbers are those of arXiv:2512.22511. Parts are lazy task vectors: each tensor is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import UsageError
from devec.core.options import Factoring, View
from devec.core.results import Finding, LazyFactors, Spectrum, Subspace, TensorFactors
from devec.core.spectra import Key, LazyAlgebra, Pair, SideAlgebra, decide, side_algebra, sides_of
from devec.core.split import RowSplit, fused_name, join_rows
from devec.core.vectors import LazyMap, Pool, TaskVector
from devec.linalg import subspace
from devec.linalg.numerics import TIE, one_blas_thread

CHANCE_LEAK = 0.15
"""With ``threshold="chance"`` a removed direction may leave this much of its energy behind, as at the number 0.85: the
chance cut says which directions are shared, not how alike two of them must be to count as one."""

MOST_LEAK = 0.5
"""Nor may it leave more than half behind, however low the threshold: at 0 everything would count as removed."""


@dataclass(frozen=True)
class Decomposition:
    """``W_i = shared_i + unique_i`` for every vector i and tensor, under a :class:`View` that costs nothing to change.

    ``pool`` holds the deltas that were factored (rows apart, if fused rows were split: see ``splits``).
    """

    pool: Pool
    factoring: Factoring
    tensors: Mapping[str, TensorFactors]
    view: View = field(default_factory=View)
    splits: Mapping[str, RowSplit] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def vectors(self) -> tuple[str, ...]:
        return self.pool.names

    @property
    def target(self) -> int | None:
        name = self.factoring.target
        return None if name is None else self.index(name)

    def index(self, name: str) -> int:
        return self.vectors.index(self.pool[name].name)

    def with_view(self, view: View | None = None, **changes: Any) -> Decomposition:
        """The same factors read another way, nothing anew. ``paper=True`` presets all, as in decompose."""
        if view is None and changes.get("paper"):
            view, changes = View.of_paper(**{k: v for k, v in changes.items() if k != "paper"}), {}
        new = replace(self, view=replace(view or self.view, **changes))
        if "algebra" in vars(self) and (new.view.joint, new.view.angles) == (self.view.joint, self.view.angles):
            vars(new)["algebra"] = self.algebra  # no threshold enters it
        return new

    @cached_property
    def algebra(self) -> Mapping[tuple[str, str], SideAlgebra]:
        """(tensor, side) -> what follows from the overlaps. Of factors in files it is made anew for each tensor when it
        is asked for: for a pool of large models all of it together would not fit into memory."""
        joint = self.view.joint if self.factoring.mode == "joint" else None

        def make(name: str, side: str) -> SideAlgebra:
            with one_blas_thread():
                return side_algebra(self.tensors[name], side, self.target, joint, self.view.angles)

        sides = sides_of(self.factoring.side)
        if isinstance(self.tensors, LazyFactors):
            return LazyAlgebra(self.tensors, sides, make)
        shared = [(name, side) for name, t in self.tensors.items() if len(t.members) >= 2 for side in sides]
        return {key: make(*key) for key in shared}

    @cached_property
    def spectra(self) -> dict[Key, Spectrum]:
        """(tensor, side, pair or None for joint) -> spectrum and decision under the present view."""
        with one_blas_thread():
            return decide(self.tensors, self.algebra, self.factoring, self.view)

    # -- subspaces ---------------------------------------------------------------------------------------------------

    def pair_subspace(self, tensor: str, side: str, pair: Pair, owner: int | None = None) -> Tensor:
        """Orthonormal Z of what a pair shares (Eq. 10), in the view's pair basis."""
        return self._assembled(tensor, side, self.pair_coefficients(tensor, side, pair, owner))

    def joint_subspace(self, tensor: str, side: str) -> Tensor:
        """Orthonormal Z of what all vectors share (Eq. 8-10 for k vectors, or the consensus). Kept: a consensus is
        assembled from the bases of all k vectors, and every one of the k parts needs it."""
        if (tensor, side) not in self._joint_bases:
            self._joint_bases[tensor, side] = self._assembled(tensor, side, self.joint_coefficients(tensor, side))
        return self._joint_bases[tensor, side]

    @cached_property
    def _joint_bases(self) -> dict[tuple[str, str], Tensor]:
        return {}

    def pair_coefficients(self, tensor: str, side: str, pair: Pair, owner: int | None = None) -> subspace.Coefficients:
        """:meth:`pair_subspace` as ``{i: C_i}`` with ``Z = sum_i U_i C_i`` over vector indices."""
        i, j = min(pair), max(pair)
        found = subspace.pair_coefficients(
            self.algebra[tensor, side].pairs[i, j],
            self.spectra[tensor, side, (i, j)].count,
            self.view.pair_basis,
            0 if owner is None or owner == i else 1,
        )
        return {(i, j)[position]: C for position, C in found.items()}

    def joint_coefficients(self, tensor: str, side: str) -> subspace.Coefficients:
        """:meth:`joint_subspace` as ``{i: C_i}``."""
        joint, keep = self.algebra[tensor, side].joint, self.spectra[tensor, side, None].keep
        if isinstance(joint, subspace.ChainSpectrum):
            found = subspace.chain_coefficients(joint, keep)
        else:
            assert isinstance(joint, subspace.ConsensusSpectrum)
            found = {position: C[:, keep] for position, C in joint.coefficients.items()}
        members = self.tensors[tensor].members
        return {members[position]: C for position, C in found.items()}

    def _assembled(self, tensor: str, side: str, coefficients: subspace.Coefficients) -> Tensor:
        factors = self.tensors[tensor]
        bases = {i: factors.basis(i, side) for i in coefficients}
        return subspace.assemble(bases, coefficients)

    def union_coordinates(self, tensor: str, side: str, vector: int) -> Tensor:
        """What ``vector`` shares with any of the others, in coordinates of its own basis: ``(r, d)``, orthonormal."""
        a = self.algebra[tensor, side]
        others = [j for j in self.tensors[tensor].members if j != vector]
        rank = a.overlaps.ranks[a.positions[vector]]
        if self.view.target_rule == "sequence":
            found = {a.positions[j]: self._spectrum(tensor, side, vector, j) for j in others}
            # A part of the target overlaps no more than the whole did: what shared nothing still shares nothing.
            limits = {p: s.applied if s.count else float("inf") for p, s in found.items()}
            tie = TIE[getattr(torch, self.factoring.dtype)]

            def keep(j: int, values: Tensor) -> int:
                return int((values > limits[j] - tie).sum())

            order = [a.positions[j] for j in others]
            return subspace.sequence_coefficients(a.overlaps, a.positions[vector], order, keep)
        shared, leak = [], []
        for j in others:
            i, l = min(vector, j), max(vector, j)
            own = a.pairs[i, l].A if vector == i else a.pairs[i, l].B
            shared.append(own[:, : self._spectrum(tensor, side, vector, j).count])
            leak.append(CHANCE_LEAK if self.view.threshold == "chance" else min(1.0 - self.view.threshold, MOST_LEAK))
        return subspace.union_coefficients(shared, leak, rank)

    def _spectrum(self, tensor: str, side: str, i: int, j: int) -> Spectrum:
        return self.spectra[tensor, side, (min(i, j), max(i, j))]

    def removed(self, tensor: str, side: str, vector: int) -> Tensor | None:
        """Orthonormal Z whose projection is taken out of ``vector`` to leave its unique part; ``None`` if nothing."""
        with one_blas_thread():
            if self.factoring.mode == "joint" and self._takes_part(tensor, side, vector):
                Z = self.joint_subspace(tensor, side)
                return Z if Z.shape[1] else None
            coefficients = self.removed_coefficients(tensor, side, vector)
            return None if coefficients is None else self._assembled(tensor, side, coefficients)

    def _takes_part(self, tensor: str, side: str, vector: int) -> bool:
        return (tensor, side) in self.algebra and vector in self.tensors[tensor].svd

    def removed_coefficients(self, tensor: str, side: str, vector: int) -> subspace.Coefficients | None:
        """:meth:`removed` as ``{i: C_i}``."""
        if not self._takes_part(tensor, side, vector):
            return None
        if self.factoring.mode == "joint":
            found = self.joint_coefficients(tensor, side)
        elif self.view.paper and len(self.pool) == 2:
            found = self.pair_coefficients(tensor, side, (0, 1))
        else:
            found = {vector: self.union_coordinates(tensor, side, vector)}
        return found if next(iter(found.values())).shape[1] else None

    def subspace(self, tensor: str, vector: str, side: Literal["left", "right"] = "left") -> Subspace:
        """What ``vector`` shares in ``tensor``: the directions whose projection its unique part lacks (Eq. 10, 11).

        Zero-dimensional where nothing is shared. ``Subspace.project`` and ``residual`` apply it to any matrix.
        """
        Z = self.removed(tensor, side, self.index(vector))
        if Z is None:
            factors = self.tensors[tensor]
            Z = torch.zeros(factors.side_length(side), 0, dtype=getattr(torch, self.factoring.dtype))
        return Subspace(Z)

    def shared_energy(self, tensor: str, vector: int) -> float:
        """Fraction of ``|W|_F^2`` in the shared part. Directions cut by the rank rule count as unique: exact for
        subspaces of the vector's own basis; elsewhere (joint mode, the paper's Z of a pair) on truncated dense deltas
        a lower bound."""
        if vector not in self.tensors[tensor].svd:
            return 0.0
        svd = self.tensors[tensor].svd[vector]
        sides = sides_of(self.factoring.side)
        Z = {side: self.removed(tensor, side, vector) for side in sides}
        if any(basis is None for basis in Z.values()) or svd.rank == 0:
            return 0.0
        top = float(svd.S[0])
        core = torch.diag(svd.S / top)
        if "left" in Z:
            core = (_some(Z["left"]).T @ svd.U).double() @ core
        if "right" in Z:
            core = core @ (svd.V.T @ _some(Z["right"])).double()
        return min(float((core * core).sum()) * (top * top / svd.total), 1.0)

    # -- parts -------------------------------------------------------------------------------------------------------

    def original(self, name: str) -> TaskVector:
        """The vector as it was given, 1-D parameters and all."""
        return self._joined(self.pool[name])

    def unique(self, name: str) -> TaskVector:
        """Eq. (13): ``W - P W`` with P onto what the vector shares. Low-rank stays low-rank (side left or right)."""
        return self._part(name, "unique")

    def shared(self, *names: str) -> TaskVector:
        """``shared(A)`` = A minus its unique part (Eq. 12); ``shared(A, B)`` = Eq. (14) of the pair; ``shared()`` =
        Eq. (14) over all vectors (mode joint)."""
        if len(names) == 1:
            return self._part(names[0], "shared")
        if len(names) == 2:
            if self.factoring.mode == "joint":
                raise UsageError(
                    f"a joint decomposition has no pair {'+'.join(names)}",
                    remedy="Use #shared, or decompose with --mode pairwise.",
                )
            i, j = sorted((self.index(names[0]), self.index(names[1])))
            if i == j:
                raise UsageError(f"a pair needs two vectors, not {names[0]} twice")
            if self.target is not None and self.target not in (i, j):
                raise UsageError(
                    f"a target decomposition of {self.factoring.target} has no pair {'+'.join(names)}",
                    remedy="Decompose with --mode pairwise.",
                )
            return self._average((i, j))
        if names:
            raise UsageError(
                f"#shared takes one vector, a pair, or none, not {len(names)}", remedy="Use --mode joint for all."
            )
        if self.factoring.mode != "joint":
            raise UsageError(
                f"#shared without a name is what all vectors share, and this decomposition is {self.factoring.mode}",
                remedy="Decompose with --mode joint, or name a vector or a pair: #shared:A, #shared:A+B.",
            )
        return self._average(None)

    def part(self, text: str) -> TaskVector:
        """A part by its reference: ``unique:A``, ``shared:A``, ``shared:A+B``, ``shared``, ``original:A``."""
        kind, _, rest = text.partition(":")
        names = [n for n in rest.split("+") if n]
        if kind == "shared":
            return self.shared(*names)
        if kind in ("unique", "original") and len(names) == 1:
            return self.unique(names[0]) if kind == "unique" else self.original(names[0])
        raise UsageError(
            f"unknown part #{text}",
            remedy="Use #unique:A, #shared:A, #shared:A+B, #shared (joint) or #original:A.",
        )

    def _decomposed(self, source: TaskVector) -> list[str]:
        return [n for n in source.deltas if n in self.tensors]

    def _part(self, name: str, kind: str) -> TaskVector:
        index = self.index(name)
        if self.target is not None and index != self.target:
            raise UsageError(
                f"a target decomposition of {self.factoring.target} has no #{kind}:{name}",
                remedy=f"Use #{kind}:{self.factoring.target}, or decompose with --mode pairwise.",
            )
        source = self.pool[index]
        names = self._decomposed(source)

        make = self._unique_of if kind == "unique" else self._shared_of
        part = replace(
            source,
            name=f"{kind}-{name}",
            deltas=LazyMap(names, lambda n: make(n, index, source.deltas[n]), self._cost),
            layouts={n: source.layouts[n] for n in names},
        )
        return self._joined(part)

    def _cost(self, tensor: str) -> int:
        return part_bytes(self.pool.layout(tensor).matrix_shape, self.factoring)

    def _removed_sides(self, tensor: str, index: int) -> dict[str, Tensor] | None:
        """Z of each side; ``None`` if one of them is empty: a projector onto nothing on either side is nothing."""
        found = {side: self.removed(tensor, side, index) for side in sides_of(self.factoring.side)}
        return None if any(Z is None for Z in found.values()) else {side: _some(Z) for side, Z in found.items()}

    def _shared_of(self, tensor: str, index: int, delta: Delta) -> Delta:
        Z = self._removed_sides(tensor, index)
        return _zero_like(delta) if Z is None else _projected(delta, Z)

    def _unique_of(self, tensor: str, index: int, delta: Delta) -> Delta:
        Z = self._removed_sides(tensor, index)
        if Z is None:
            return delta
        if "right" not in Z:
            return delta.residual(Z["left"])
        if "left" not in Z:
            return delta.transpose().residual(Z["right"]).transpose()
        unique = delta.add(_projected(delta, Z).scale(-1.0))
        # P_L W P_R takes rank away from neither factor alone, so the difference is written anew.
        return unique.recompress() if isinstance(unique, LowRankDelta) else unique

    def _average(self, pair: Pair | None) -> TaskVector:
        """Eq. (14): the mean of shared components weighted by their Frobenius norms; rank at most dim(Z), or
        twice that with the pair basis ``own`` (two subspaces)."""
        label = "shared" if pair is None else "shared-" + "+".join(self.vectors[i] for i in pair)

        def members(n: str) -> list[int]:
            have = self.tensors[n].members
            return [i for i in have if pair is None or i in pair]

        have = {n for n in self.tensors if len(members(n)) >= 2}
        # Rows that fewer than two vectors touch share nothing, but a fused tensor is whole or not there.
        whole = {fused_name(n) for n in have} & set(self.splits)
        names = [n for n in self.tensors if n in have or fused_name(n) in whole]
        first = self.pool[0 if pair is None else pair[0]]
        part = replace(
            first,
            name=label,
            deltas=LazyMap(
                names, lambda n: self._weighted(n, members(n), pair), self._cost
            ),
            layouts={n: self.tensors[n].layout for n in names},
            heads={},
        )
        return self._joined(part)

    def _weighted(self, tensor: str, members: list[int], pair: Pair | None) -> Delta:
        if len(members) < 2:
            n, m = self.tensors[tensor].layout.matrix_shape
            dtype = getattr(torch, self.factoring.dtype)
            return LowRankDelta(torch.zeros(n, 0, dtype=dtype), torch.zeros(0, m, dtype=dtype))
        sides = sides_of(self.factoring.side)
        own = pair is not None and self.view.pair_basis == "own"

        def bases(owner: int | None) -> dict[str, Tensor]:
            if pair is None:
                return {side: self.joint_subspace(tensor, side) for side in sides}
            return {side: self.pair_subspace(tensor, side, pair, owner) for side in sides}

        common = {} if own else bases(None)
        terms = [
            _inside(self.pool[i].deltas[tensor], bases(i) if own else common) for i in members
        ]
        weights = [t.norm() for t in terms]
        total = sum(weights)
        if total == 0.0:
            return _zero_like(terms[0])
        return _weighted_sum(terms, [w / total for w in weights], shared_left="right" not in sides)

    def _joined(self, vector: TaskVector) -> TaskVector:
        return join_rows(vector, self.splits) if self.splits else vector


def part_bytes(shape: tuple[int, int], factoring: Factoring) -> int:
    """Bytes that making a part of one tensor takes besides its rows, at most: bases, the subspace and ``Z^T W``, of
    ranks up to a quarter of the short side."""
    n, m = shape
    return (8 if factoring.dtype == "float64" else 4) * (n + m) * min(n, m) // 2


def _some(basis: Tensor | None) -> Tensor:
    assert basis is not None
    return basis


def _projected(delta: Delta, Z: Mapping[str, Tensor]) -> Delta:
    """``P_L W P_R``, either side missing, as the kind of delta that it came as where one side is used."""
    if "left" in Z:
        delta = delta.project(Z["left"])
    return delta.transpose().project(Z["right"]).transpose() if "right" in Z else delta


def _zero_like(delta: Delta) -> LowRankDelta:
    n, m = delta.shape
    return LowRankDelta(torch.zeros(n, 0, dtype=delta.dtype), torch.zeros(0, m, dtype=delta.dtype))


def _inside(delta: Delta, Z: Mapping[str, Tensor]) -> LowRankDelta:
    """``P_L W P_R`` (either side may be missing) as factors of which one is the basis itself."""
    if not isinstance(delta, LowRankDelta) and "left" in Z:
        inside = delta.project(Z["left"])  # as factors, by rows if the delta is read by rows
        assert isinstance(inside, LowRankDelta)
        return inside if "right" not in Z else _inside(inside, {"right": Z["right"]})
    B, A = (delta.B, delta.A) if isinstance(delta, LowRankDelta) else (None, delta.dense())
    # Never narrower than the bases: rounded to bf16 they would span something else.
    dtype = torch.promote_types(delta.dtype, next(iter(Z.values())).dtype)
    A, B = A.to(dtype), None if B is None else B.to(dtype)
    if "left" in Z:
        left = Z["left"].to(dtype)
        B, A = left, left.T @ A if B is None else (left.T @ B) @ A
    if "right" in Z:
        right = Z["right"].to(dtype)
        B, A = A @ right if B is None else B @ (A @ right), right.T
    assert B is not None
    return LowRankDelta(B, A)


def _weighted_sum(terms: list[LowRankDelta], weights: list[float], shared_left: bool) -> LowRankDelta:
    """``sum w_i T_i``. Terms that stand on one common factor are added in its coordinates, so the rank stays d."""
    if shared_left and all(_same(terms[0].B, t.B) for t in terms):
        return LowRankDelta(terms[0].B, _sum_of([t.A * w for t, w in zip(terms, weights, strict=True)]))
    if not shared_left and all(_same(terms[0].A, t.A) for t in terms):
        return LowRankDelta(_sum_of([t.B * w for t, w in zip(terms, weights, strict=True)]), terms[0].A)
    return LowRankDelta(
        torch.cat([t.B * w for t, w in zip(terms, weights, strict=True)], dim=1),
        torch.cat([t.A for t in terms], dim=0),
    )


def _sum_of(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
