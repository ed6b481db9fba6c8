"""WUDI: the merged matrix that interferes least with what each task's delta responds to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.linalg.lowrank import frobenius
from devec.linalg.numerics import CORE
from devec.methods.merge.matrices import Conv, Others, cores, is_matrix, nothing, positive, rest
from devec.methods.registry import register

LEAST_RIDGE = 1e-10
"""Below this the normal equations of rank-deficient deltas are singular to float64."""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""torch's defaults for Adam, which the published code uses."""


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """The deltas; their sum, the pull towards them and the optimiser's; the input side's quadratic form with what one
    task adds and its Cholesky factor, or the dual's, where the tasks have fewer rows together than columns."""
    n, m = shape
    side = min(m, n * tasks)
    stacked = 0 if side == m else 2 * side * m
    return 8 * ((tasks + 7) * n * m + stacked + 5 * side * side)


@register("merge", grain="matrix", source="arXiv:2503.08099", memory=memory)
def wudi(
    block: Block, solver: Literal["adam", "ridge"] = "adam", steps: int = 300, rate: float = 1e-5, ridge: float = 0.01,
    scale: float = 1.0, others: Others = "mean", matrices: str = "", conv: Conv = "matrix",
) -> Delta:  # fmt: skip
    """WUDI-Merging: from the sum of the task vectors towards the matrix that agrees with each on its own directions.

    Math        L(M) = sum_i |(M - Delta_i) Delta_i^T|_F^2 / |Delta_i|_F^2; M_0 = sum_i Delta_i; W = W_0 + scale * M
                adam: ``steps`` steps of Adam from M_0 with learning rate ``rate``
                ridge: M = argmin L(M) + lambda |M - M_0|_F^2 = M_0 - K (S + lambda I)^-1, where
                    G_i = Delta_i^T Delta_i / |Delta_i|_F^2, S = sum_i G_i, K = sum_i (M_0 - Delta_i) G_i,
                    lambda = ridge * |S|_F^2 / tr S
    Symbols     lambda / ridge: a mean eigenvalue of S, weighted with the eigenvalues themselves;
                M_0 = the sum of the task vectors; tr = trace
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  identity: one task comes back exactly, with either solver;
                better: with ridge, L(M) is never above L(M_0);
                limits: ridge -> infinity is task arithmetic (the sum), ridge -> 0 a minimiser of L;
                permutation: order does not matter up to rounding;
                ridge only: tasks whose rows are orthogonal are summed, the result is homogeneous of
                degree 1 in the deltas, Delta_i -> Q Delta_i R with orthogonal Q, R turns it alike, and adapters give
                an adapter of rank at most the sum of their ranks
    Numerics    S and K in float64. The gradient is 2 ((M - M_0) S + K): a step costs one product with S whatever the
                number of tasks. adam keeps M - M_0, its gradient and moments in the compute dtype; ridge is one
                Cholesky solve in float64, of the size of the smaller of m and T n
    Differs     the published numbers rest on adam, stopped early: steps 300 and rate 1e-5 are the paper's code,
                FusionBench's configuration says 400 steps. rate is a step per entry, so adam suits deltas with entries
                of about 1e-3 (CLIP fine-tunes) and does next to nothing to larger ones; it mixes no coordinates, so a
                rotation does not turn its result, and its result has full rank (no adapter). ridge is ours: the same
                objective held to the same start, free of a rate; no number is published for it. On eight 384 x 384
                matrices with entries of 4e-4, 300 steps of adam lower L to 0.104 of L(M_0) and ridge 0.01 to 0.096;
                both move M by 0.65 of |M_0|. The paper's code treats attention and MLP matrices alone and leaves the
                other tensors at the base (matrices=attn|mlp, others=base); FusionBench treats every 2-D tensor and
                averages the others
    Raises      UsageError: a solver, steps, rate or ridge that means nothing; InputError: NaN or infinity
    """
    if steps < 0:
        raise UsageError(f"wudi wants steps from 0 on, got {steps}")
    positive("wudi", "rate", rate)
    if not ridge >= LEAST_RIDGE:
        raise UsageError(f"wudi wants ridge from {LEAST_RIDGE:g} on, got {ridge:g}")
    if not is_matrix(block, matrices, conv):
        return rest(block, others, scale)
    if len(block.present) == 1:
        return rest(block, "sum", scale)
    found = cores(block, factored=solver == "ridge")
    if found is None:
        return nothing(block)
    deltas = list(found.each())
    start, _ = found.total(deltas)
    problem = Quadratic.of(deltas, start)
    del deltas
    if problem is None:
        return nothing(block)
    moved = problem.ridge(ridge) if solver == "ridge" else problem.adam(steps, rate, found.dtype)
    return found.whole(start.add_(moved).mul_(scale))


@dataclass(frozen=True)
class Quadratic:
    """``L(M_0 + D) = |X D^T|_F^2 + 2 <D, K> + const``, X the rows of every ``Delta_i / |Delta_i|_F``.

    ``S = X^T X (m, m)``, or X itself where it has fewer rows than columns. ``K (n, m)`` is half the gradient at D = 0;
    made of differences, it is exactly zero where M_0 is Delta_i. ``Y X = K``.
    """

    K: Tensor
    S: Tensor | None
    X: Tensor | None
    Y: Tensor | None

    @classmethod
    def of(cls, deltas: Sequence[Tensor], start: Tensor) -> Quadratic | None:
        """None if every delta is zero."""
        alive = [(C, norm) for C in deltas if (norm := frobenius(C)) > 0.0]
        if not alive:
            return None
        n, m = start.shape
        if n * len(alive) < m:
            units = [C.to(CORE) / norm for C, norm in alive]
            Y = torch.cat([(start - C) @ x.T for x, (C, _) in zip(units, alive, strict=True)], dim=1)
            X = torch.cat(units)
            return cls(Y @ X, None, X, Y)
        S, K = start.new_zeros(m, m), start.new_zeros(n, m)
        for C, norm in alive:
            unit = C.to(CORE) / norm
            S.addmm_(unit.T, unit)
            if n < m:
                K.addmm_((start - C) @ unit.T, unit)
            else:
                K.addmm_(start - C, unit.T @ unit)
        return cls(K, S, None, None)

    def ridge(self, ridge: float) -> Tensor:
        """``-K (S + lambda I)^-1``, with X as ``-Y (X X^T + lambda I)^-1 X``: the same, and smaller."""
        if self.X is not None and self.Y is not None:
            return -_solve(self.X @ self.X.T, ridge, self.Y) @ self.X
        assert self.S is not None
        return -_solve(self.S, ridge, self.K)

    def adam(self, steps: int, rate: float, dtype: torch.dtype) -> Tensor:
        """What Adam moves M_0 by, in float64 (Kingma and Ba, arXiv:1412.6980, algorithm 1)."""
        K = self.K.to(dtype)
        S = None if self.S is None else self.S.to(dtype)
        X = None if self.X is None else self.X.to(dtype)
        D, mean, square = torch.zeros_like(K), torch.zeros_like(K), torch.zeros_like(K)
        for t in range(1, steps + 1):
            half = torch.addmm(K, D, S) if S is not None else torch.addmm(K, D @ X.T, X)  # type: ignore[union-attr, arg-type]
            gradient = half.mul_(2.0)
            mean.lerp_(gradient, 1 - BETA1)
            square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            below = torch.sqrt(square, out=gradient).div_(sqrt(1 - BETA2**t)).add_(EPSILON)
            D.addcdiv_(mean, below, value=-rate / (1 - BETA1**t))
        return D.to(CORE)


def _solve(S: Tensor, ridge: float, right: Tensor) -> Tensor:
    """``right (S + lambda I)^-1`` for a symmetric S with nonnegative eigenvalues; S is changed."""
    S = S.clone()
    S.diagonal().add_(ridge * float((S * S).sum()) / float(S.diagonal().sum()))
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(S)).T
