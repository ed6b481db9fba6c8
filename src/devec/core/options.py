"""The choices of a decomposition, apart by when they can be made.

``Factoring`` fixes what is computed from the weights; ``View`` is applied when a result is read, so a sweep over
thresholds, bases or rules factorises nothing again. Equation and theorem numbers are those of arXiv:2512.22511.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from devec.core.errors import UsageError
from devec.linalg.rank import RankRule
from devec.linalg.subspace import PairBasis

Mode = Literal["pairwise", "joint", "target"]
Side = Literal["left", "right", "both"]
Joint = Literal["consensus", "chain"]
TargetRule = Literal["union", "sequence"]

MODES: tuple[Mode, ...] = ("pairwise", "joint", "target")
SIDES: tuple[Side, ...] = ("left", "right", "both")


def _one_of(label: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"unknown {label} {value!r}", remedy=f"Use one of: {', '.join(allowed)}.")


@dataclass(frozen=True)
class Factoring:
    """Fixed when decomposing.

    ``mode``      pairwise: every pair; joint: one subspace of all; target: one vector against the others
    ``side``      left: column space (outputs, the paper); right: row space (inputs); both: P_L W P_R
    ``rank``      a rank rule (see ``RankRule``), per vector and tensor
    ``exact``     no iterative factorisation
    ``split_qkv`` split fused query/key/value rows and decompose each apart
    ``one_d``     decompose 1-D parameters too, as columns
    ``seed``      for iterative factorisations, together with the names of vector and tensor
    """

    mode: Mode = "pairwise"
    target: str | None = None
    side: Side = "left"
    rank: str = "auto"
    exact: bool = False
    split_qkv: bool = False
    one_d: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("side", self.side, SIDES)
        _one_of("compute dtype", self.dtype, ("float32", "float64"))
        try:
            RankRule.parse(self.rank)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if self.one_d and self.side == "right":
            raise UsageError(
                "1-D parameters are columns and have no row space to compare",
                values={"side": self.side, "one-d": True},
                remedy="Use --side left or both, or leave out --one-d.",
            )
        if (self.mode == "target") != (self.target is not None):
            raise UsageError(
                "mode target and a target's name belong together",
                values={"mode": self.mode, "target": self.target},
                remedy="Give --mode target --target NAME, or neither.",
            )


@dataclass(frozen=True)
class View:
    """Applied when read.

    ``threshold``   pairwise cos^2 above which a direction is shared (0.85 = within 22.8 degrees; the paper's value for
                    every experiment), or "chance": directions whose overlap chance does not explain
    ``fdr``         with "chance": false discovery rate over all tensors x pairs x directions
    ``pair_basis``  bisector (default, order-free) | first (the paper) | own; used by ``#shared:A+B`` alone
    ``joint``       consensus (default, order-free) | chain (the paper)
    ``target_rule`` union (default, order-free) | sequence (the paper)
    ``angles``      decide pairs by principal angles (Theorem 6.1) instead of eigenvalues; joint spectra stay
    ``paper``       raw threshold for every k, and one common Z for both vectors of a pair
    """

    threshold: float | Literal["chance"] = 0.85
    fdr: float = 0.01
    pair_basis: PairBasis = "bisector"
    joint: Joint = "consensus"
    target_rule: TargetRule = "union"
    angles: bool = False
    paper: bool = False

    def __post_init__(self) -> None:
        number = not isinstance(self.threshold, (str, bool)) and 0.0 <= self.threshold <= 1.0
        if self.threshold != "chance" and not number:
            raise UsageError(
                f"a threshold is a number from 0 to 1, or 'chance', not {self.threshold!r}",
                remedy="The default is 0.85.",
            )
        if not 0.0 < self.fdr < 1.0:
            raise UsageError(f"a false discovery rate lies between 0 and 1, not {self.fdr!r}")
        _one_of("pair basis", self.pair_basis, ("bisector", "first", "own"))
        _one_of("joint kind", self.joint, ("consensus", "chain"))
        _one_of("target rule", self.target_rule, ("union", "sequence"))

    @classmethod
    def of_paper(cls, **changes: object) -> View:
        """The paper's reading: order-dependent (pair basis first, chain, sequence), one raw threshold for every k."""
        view = cls(pair_basis="first", joint="chain", target_rule="sequence", paper=True)
        return replace(view, **changes)  # type: ignore[arg-type]
