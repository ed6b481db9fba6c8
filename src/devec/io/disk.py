"""The few disk operations that every output shares, with the operating system's refusals made readable.

All writing goes through ``os.write`` and ``os.pwrite`` in pieces: one call may write less than it was asked to
(Linux stops at 2 GiB), and a full disk shows itself here and nowhere else.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devec.core.errors import RefusedError

PIECE = 1 << 24
"""Bytes per write and per hash update: large enough that the call costs nothing, small beside any tensor."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` raised while writing ``path`` into a :class:`RefusedError` (exit 5)."""
    try:
        yield
    except OSError as error:
        raise refusal(error, path) from error


def refusal(error: OSError, path: Path) -> RefusedError:
    """The refusal that says what the operating system would not do."""
    if error.errno in _FULL:
        return RefusedError(
            "no space left on the disk", file=path, remedy="Free some space, or give -o a place on another disk.",
            passing=True,
        )
    if error.errno in _DENIED:
        return RefusedError(
            "the output cannot be written", values={"reason": error.strerror}, file=path,
            remedy="Give -o a place that you may write to.", passing=True,
        )
    return RefusedError(
        "writing failed", values={"reason": error.strerror or str(error)}, file=path,
        remedy="Check the disk, or give -o another place.", passing=True,
    )


def write_file(path: Path, data: bytes) -> None:
    """Create ``path`` with ``data``; an existing file is an error, and a file that cannot be finished is removed."""
    with refusing(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view[:PIECE]) :]
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of ``data`` at ``offset``, however many calls that takes."""
    while data:
        done = os.pwrite(fd, data[:PIECE], offset)
        data, offset = data[done:], offset + done


_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_START = 2  # SYNC_FILE_RANGE_WRITE


def start_writing_back(fd: int, offset: int, count: int) -> None:
    """Ask the system to bring these bytes to the disk now, without waiting: the last flush then has little to do.

    It is a hint and promises nothing (a flush reports errors); systems without it are left alone.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, count, _START)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush one file or one directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
