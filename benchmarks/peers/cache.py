"""The page cache of single files: thrown out, filled, and looked at with ``mincore``."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_PIECE = 1 << 24
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_FAILED = ctypes.c_void_p(-1).value


def resident(path: Path) -> float:
    """Fraction of a file's pages that lie in the page cache; 0 for an empty file.

    The file is mapped but never touched, so looking changes nothing. Raises OSError if the system will not say.
    """
    size = path.stat().st_size
    if not size:
        return 0.0
    fd = os.open(path, os.O_RDONLY)
    try:
        # not the mmap module: its objects do not give away the address of a read-only mapping
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == _FAILED:
        raise _error(path)
    try:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if _libc.mincore(address, size, pages):
            raise _error(path)
    finally:
        _libc.munmap(address, size)
    flags = bytes(pages.raw)
    return sum(flags.count(value) for value in range(1, 256, 2)) / len(flags)  # the lowest bit says resident


def _error(path: Path) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), str(path))


def resident_of(paths: Iterable[Path]) -> float:
    """Fraction of several files' bytes that lie in the page cache."""
    sizes = {path: path.stat().st_size for path in paths}
    return sum(resident(path) * size for path, size in sizes.items()) / max(sum(sizes.values()), 1)


def evict(path: Path) -> None:
    """Flush a file and ask the system to drop its pages (which it may not do: see :func:`resident`)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def warm(path: Path) -> None:
    """Read a file once."""
    buffer = bytearray(_PIECE)
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while got := os.preadv(fd, [buffer], at):
            at += got
    finally:
        os.close(fd)
