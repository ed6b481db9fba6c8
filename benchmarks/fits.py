"""Exponents: straight lines through logarithms, by least squares, with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np


@dataclass(frozen=True)
class Exponent:
    """``seconds ~ x^value``: one slope for all curves, each with its own factor.

    ``error`` is the standard error of the slope from the residuals. ``last`` is the slope of the two largest x of the
    last curve, without standard error: constant costs bend a curve at its small end and leave this one alone.
    """

    value: float
    error: float
    last: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


def exponent(curves: Sequence[Sequence[tuple[float, float]]]) -> Exponent:
    """Least squares of ``log y = a_c + p log x`` over curves c of points ``(x, y)``: at least two x in each."""
    X, Y, dof = [], [], -1
    for curve in curves:
        x, y = np.log([p[0] for p in curve]), np.log([p[1] for p in curve])
        X.append(x - x.mean())
        Y.append(y - y.mean())
        dof += len(curve) - 1
    x, y = np.concatenate(X), np.concatenate(Y)
    square = float(x @ x)
    slope = float(x @ y) / square
    residual = y - slope * x
    error = (float(residual @ residual) / dof / square) ** 0.5 if dof > 0 else float("nan")
    (x0, y0), (x1, y1) = sorted(curves[-1])[-2:]
    return Exponent(slope, error, (log(y1) - log(y0)) / (log(x1) - log(x0)))
