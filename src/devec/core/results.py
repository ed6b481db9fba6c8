"""Frozen results: factors of one tensor, spectra of overlaps, findings.

Equation numbers are those of arXiv:2512.22511.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import local
from typing import Literal

import torch
from torch import Tensor

from devec.core.layout import Layout
from devec.linalg import chance
from devec.linalg.lowrank import ThinSVD
from devec.linalg.subspace import Overlaps, overlaps


@dataclass(frozen=True)
class Subspace:
    """Orthonormal columns ``Z (n, d)``, with the two things that one does with them, as thin products."""

    basis: Tensor

    @property
    def dimension(self) -> int:
        return int(self.basis.shape[1])

    def project(self, W: Tensor) -> Tensor:
        """``Z Z^T W`` (Eq. 11, 12), in O(n d m) and in the wider dtype; the n x n projector is never formed."""
        wide = torch.promote_types(self.basis.dtype, W.dtype)  # a basis rounded to bf16 would be no projector
        Z = self.basis.to(wide)
        return Z @ (Z.T @ W.to(wide))

    def residual(self, W: Tensor) -> Tensor:
        """``W - Z Z^T W`` (Eq. 13)."""
        return W - self.project(W)


@dataclass(frozen=True)
class TensorFactors:
    """What a decomposition keeps of one tensor.

    ``svd[i]``   thin SVD of vector i's delta, cut by the rank rule; vectors without the tensor, or with a zero
                 delta, have none and take no part in this tensor
    ``norms[i]`` Frobenius norm of the whole delta
    ``gram``     inner products ``<Delta_i, Delta_j>`` of the whole deltas, for i <= j, of vectors that have the tensor
                 (in mode target: of each with itself and with the target)
    ``low_rank`` vectors whose delta came as factors
    """

    name: str
    layout: Layout
    svd: Mapping[int, ThinSVD]
    norms: Mapping[int, float] = field(default_factory=dict)
    gram: Mapping[tuple[int, int], float] = field(default_factory=dict)
    low_rank: frozenset[int] = frozenset()

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self.svd))

    def basis(self, i: int, side: str) -> Tensor:
        return self.svd[i].U if side == "left" else self.svd[i].V

    def side_length(self, side: str) -> int:
        n, m = self.layout.matrix_shape
        return n if side == "left" else m

    def on(self, device: torch.device) -> TensorFactors:
        """The same factors on a device."""
        moved = {
            i: ThinSVD(s.U.to(device), s.S.to(device), s.V.to(device), s.total) for i, s in self.svd.items()
        }
        return replace(self, svd=moved)

    def overlaps(self, side: str, pairs: Iterable[tuple[int, int]] | None = None) -> Overlaps:
        """Overlaps of the members' bases (of all ``pairs``, or those positions named); position in ``members`` is the
        index there."""
        return overlaps([self.basis(i, side) for i in self.members], pairs)


class LazyFactors(Mapping[str, TensorFactors]):
    """Factors that are read when they are asked for; each thread keeps the last it asked for.

    ``counts`` says how many vectors have a nonzero delta in each tensor.
    """

    def __init__(self, counts: Mapping[str, int], read: Callable[[str], TensorFactors]) -> None:
        self._names = dict(counts)
        self._read = read
        self._last = local()

    def count(self, name: str) -> int:
        """How many vectors have a nonzero delta there."""
        return self._names[name]

    def __getitem__(self, name: str) -> TensorFactors:
        if name not in self._names:
            raise KeyError(name)
        kept: TensorFactors | None = getattr(self._last, "factors", None)
        if kept is None or kept.name != name:
            kept = self._last.factors = self._read(name)
        return kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True, eq=False)
class Chance:
    """The p-values of a spectrum, drawn when first asked for: a null of new ranks takes a fraction of a second to
    several seconds, and a part cut at a number needs none. ``kind`` is "pair", "consensus" or "chain"."""

    eigenvalues: Tensor
    ranks: tuple[int, ...]
    n: int
    kind: Literal["pair", "consensus", "chain"]

    @cached_property
    def p_values(self) -> Tensor:
        if self.kind == "pair":
            r1, r2 = self.ranks
            return chance.pair_p_values(self.eigenvalues, r1, r2, self.n)
        return chance.joint_p_values(self.eigenvalues, self.ranks, self.n, self.kind)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one pair (or of all vectors jointly) of one tensor on one side, and what was decided.

    ``eigenvalues`` cos^2 (pairs), mean coverage (consensus) or real part (chain), descending
    ``p_values``    chance of a null *largest* eigenvalue this large (made when asked for)
    ``applied``     the threshold these eigenvalues were held against (mapped for k >= 3); with "chance" the smallest
                    eigenvalue that passed, or 1 if none did
    ``edge``        where independent subspaces of these ranks end, asymptotically (pairs; the largest pair for joint)
    ``keep``        mask of the eigenvalues called shared
    ``ties``        how many lie within rounding of the threshold
    """

    eigenvalues: Tensor
    chance: Chance
    applied: float
    edge: float
    keep: Tensor
    ties: int = 0

    @property
    def p_values(self) -> Tensor:
        return self.chance.p_values

    @property
    def count(self) -> int:
        return int(self.keep.sum())


@dataclass(frozen=True)
class Finding:
    """A warning with a code of docs/commands.md, the tensors it concerns, and one sentence."""

    code: str
    message: str
    tensors: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {"code": self.code, "tensors": list(self.tensors), "message": self.message}
