"""What every LoRA dialect shares: checked factors, and the delta that a pair of them makes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.delta import LowRankDelta
from devec.core.errors import IncompatibleError, InputError, RefusedError
from devec.core.layout import Layout
from devec.io.checkpoint import Checkpoint
from devec.io.dialect import TensorFile
from devec.io.names import resolve_names


def read_finite(file: TensorFile, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """A floating-point tensor, converted to ``dtype``. Raises InputError for NaN or Inf, before or after converting."""
    value = file.get(name)
    if dtype is not None:
        if not value.is_floating_point():
            raise IncompatibleError(
                "an adapter's factor is not floating point",
                tensor=name,
                values={"dtype": value.dtype},
                file=file.path,
                remedy="Use the adapter before it was quantised.",
            )
        value = value.to(dtype)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise InputError(
            "NaN or Inf in a tensor",
            tensor=name,
            values={"bad entries": f"{bad} of {value.numel()}"},
            file=file.path,
            remedy="The training diverged or the file is damaged; use another one.",
        )
    return value


def check_rank(file: TensorFile, a: str, b: str, rank: int | None) -> tuple[TensorInfo, TensorInfo]:
    """The shapes of a pair of factors, whose inner sizes must agree with each other and with the stated ``rank``."""
    A, B = file.info(a), file.info(b)
    if len(A.shape) != len(B.shape) or not 2 <= len(A.shape) <= 5 or 0 in A.shape + B.shape:
        raise IncompatibleError(
            "these are not a pair of LoRA factors (an export of sharded training?)",
            tensor=b,
            values={"A": A.shape, "B": B.shape},
            file=file.path,
            remedy="Save the adapter again after gathering its parts.",
        )
    if len(A.shape) > 2 and prod(B.shape[2:]) == 1 and A.shape[0] != B.shape[1] and A.shape[0] % B.shape[1] == 0:
        raise RefusedError(
            "LoRA on a grouped convolution is not read",
            tensor=b,
            values={"A": A.shape, "B": B.shape},
            file=file.path,
        )
    if A.shape[0] != B.shape[1] or prod(B.shape[2:]) != 1:
        raise IncompatibleError(
            "the factors' ranks differ", tensor=b, values={"A": A.shape, "B": B.shape}, file=file.path
        )
    if rank is not None and rank != A.shape[0]:
        raise IncompatibleError(
            "the rank in the configuration is not that of the factors",
            tensor=a,
            values={"configuration": rank, "file": A.shape[0]},
            file=file.path,
            remedy="Configuration and weights are of different adapters, or r was edited by hand.",
        )
    return A, B


def product(A: Tensor, B: Tensor, scale: float) -> LowRankDelta:
    """``scale * B A`` with the scale folded into B.

    Linear: A ``(r, in)``, B ``(out, r)``. Convolution: A ``(r, in, k, k)``, B ``(out, r, 1, 1)``, whose composition is
    the kernel ``sum_r B[o, r] A[r, i, :, :]``, that is the matrix product over flattened kernels.
    """
    return LowRankDelta(B.reshape(B.shape[0], -1) * scale, A.reshape(A.shape[0], -1))


class Fit:
    """How an adapter's canonical names lie in a base, where one is given."""

    def __init__(self, base: Checkpoint | None, names: Sequence[str], file: Path) -> None:
        self.base = base
        self.file = file
        self.names: dict[str, str] = {}
        if base is not None:
            self.names = resolve_names(names, [*base.names(), *base.ties])

    def layout(self, name: str, guess: Layout) -> Layout:
        """The base's layout of a tensor, or ``guess`` without a base.

        Raises IncompatibleError when the delta's matrix does not fit the base's tensor.
        """
        if self.base is None:
            return guess
        there = self.base.layout(self.names[name])
        silent = self.base.config is None and not there.transposed
        if (
            len(there.shape) == 2
            and there.shape == guess.shape
            and (silent or there.matrix_shape != guess.matrix_shape)
        ):
            # a base without its configuration does not say that it stores in x out; the adapter does
            there = guess
        if there.matrix_shape != guess.matrix_shape:
            raise IncompatibleError(
                "the adapter does not fit the base",
                tensor=name,
                values={"adapter": guess.matrix_shape, "base": there.matrix_shape},
                file=self.file,
                remedy="Is this adapter for another size of the model?",
            )
        return there

    def weight(self, name: str) -> Tensor:
        """The base's tensor as stored."""
        if self.base is None:
            raise ValueError("no base was given")
        return self.base.get(self.names[name])
