"""Bytes of a file straight into a new tensor: no mapping, no shared file position, safe from several threads."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from devec.core.errors import InputError

# Linux hands over at most 0x7ffff000 bytes a call; smaller pieces lose nothing and keep signals prompt
_PIECE = 1 << 28


def read_bytes(fd: int, offset: int, count: int, *, path: Path, tensor: str) -> Tensor:
    """``count`` bytes at ``offset`` as a new uint8 tensor. Raises InputError when the file ends before them."""
    out = torch.empty(count, dtype=torch.uint8)
    if count == 0:
        return out
    view = memoryview(out.numpy().data)
    done = 0
    while done < count:
        try:
            got = os.preadv(fd, [view[done : done + _PIECE]], offset + done)
        except OSError as error:
            raise InputError(f"reading failed: {error.strerror}", tensor=tensor, file=path, passing=True) from None
        if got == 0:
            raise InputError(
                "the file ends inside a tensor",
                tensor=tensor,
                values={"bytes wanted": count, "bytes found": done},
                file=path,
                remedy="The file is truncated or changed while it was read; get it again.",
                passing=True,
            )
        done += got
    return out


def typed(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, path: Path, tensor: str) -> Tensor:
    """``raw`` bytes seen as ``dtype`` in ``shape``. Raises InputError for a boolean that is neither 0 nor 1."""
    if prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and bool((raw > 1).any()):
        raise InputError("a boolean tensor holds a byte other than 0 and 1", tensor=tensor, file=path)
    return raw.view(dtype).reshape(shape)
