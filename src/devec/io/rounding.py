"""The last step of every computation: to the output dtype, rounded to nearest, and finite or refused by name."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from devec.core.errors import IncompatibleError, RefusedError

_WIDENED_AT_ONCE = 1 << 22
"""Elements of an eight-bit float that are widened at once to be looked at: bounds the temporary memory."""


def extremes(tensor: Tensor) -> tuple[float, float] | None:
    """Smallest and largest value, NaN if there is one; ``None`` for integers and empty tensors.

    One pass that makes no mask of the tensor's size: a minimum carries NaN along, and infinities are extremes.
    """
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return None
    flat = tensor.reshape(-1)
    if flat.dtype.itemsize > 1:
        low, high = torch.aminmax(flat)
        return float(low), float(high)
    starts = range(0, flat.numel(), _WIDENED_AT_ONCE)
    parts = [torch.aminmax(flat[i : i + _WIDENED_AT_ONCE].to(torch.float32)) for i in starts]
    return float(torch.stack([p.min for p in parts]).min()), float(torch.stack([p.max for p in parts]).max())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    found = extremes(tensor)
    return found is None or (isfinite(found[0]) and isfinite(found[1]))


def cast(name: str, tensor: Tensor, dtype: torch.dtype, file: str | Path | None = None) -> Tensor:
    """``tensor`` in the output dtype, rounded to nearest and finite; the last step of every computation.

    Raises :class:`IncompatibleError` when a value is NaN or infinite already, or when a float would become an
    integer or the reverse; :class:`RefusedError` when a finite value does not fit ``dtype``.
    """
    if tensor.dtype != dtype and not (tensor.dtype.is_floating_point and dtype.is_floating_point):
        raise IncompatibleError(
            "a tensor cannot change between float and integer",
            tensor=name,
            values={"value": tensor.dtype, "output": dtype},
            file=file,
            remedy="Copy it from the base, or leave it out with --exclude.",
        )
    found = extremes(tensor)
    if found is not None:
        if not all(map(isfinite, found)):
            raise not_finite(name, file)
        if not _fits(largest := max(map(abs, found)), tensor.dtype, dtype):
            raise RefusedError(
                f"a value is too large for {str(dtype).removeprefix('torch.')}",
                tensor=name,
                values={"largest": f"{largest:.6g}", "limit": f"{torch.finfo(dtype).max:.6g}"},
                file=file,
                remedy="Choose a wider type: --out-dtype bfloat16 or float32.",
            )
    return tensor.to(dtype)


def _fits(largest: float, dtype: torch.dtype, out: torch.dtype) -> bool:
    """Whether a finite tensor stays finite in ``out``: rounding keeps order, so its largest value decides.

    Eight-bit floats saturate silently instead of overflowing, so for them the range itself decides.
    """
    if dtype == out or largest <= torch.finfo(out).max:
        return True
    if out.itemsize == 1:
        return False
    return bool(torch.isfinite(torch.tensor(largest, dtype=torch.float64).to(dtype).to(out)))


def not_finite(name: str, file: str | Path | None) -> IncompatibleError:
    """The error for a tensor that holds NaN or infinity."""
    return IncompatibleError(
        "the result is not finite (NaN or infinity)",
        tensor=name,
        file=file,
        remedy="Look for it with `devec inspect` on the inputs, or leave it out with --exclude.",
    )
