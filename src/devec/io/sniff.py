"""What a file looks like from its first bytes, so that a wrong file is refused by the name of what it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from devec.core.errors import InputError

GGUF = "a GGUF file"
ZIP = "a zip archive (a PyTorch checkpoint?)"
PICKLE = "a Python pickle (an old PyTorch checkpoint?)"

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", GGUF),
    (b"FUGG", GGUF),  # big-endian writers
    (b"ggjt", "a GGML file"),
    (b"tjgg", "a GGML file"),
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", ZIP),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"version https://git-lfs", "a Git LFS pointer; the weights themselves were not downloaded"),
)


def looks_like(head: bytes) -> str | None:
    """A short noun phrase for the kind of file that starts with ``head``, or ``None`` if that is not known."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return PICKLE
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML or XML page (a failed download?)"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return None


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular, non-empty file for reading; returns (file descriptor, size in bytes).

    Raises InputError when the path is missing, a folder, a device, unreadable or empty.
    """
    try:
        # O_NONBLOCK: opening a named pipe must fail below rather than wait for a writer
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise InputError("no such file", file=path, remedy="Check the path.") from None
    except OSError as error:
        raise InputError(f"the file cannot be opened: {error.strerror}", file=path) from None
    info = os.fstat(fd)
    what = None
    if stat.S_ISDIR(info.st_mode):
        what = "a folder was given where a weight file belongs"
    elif not stat.S_ISREG(info.st_mode):
        what = "not a regular file"
    elif info.st_size == 0:
        what = "the file is empty"
    if what is not None:
        os.close(fd)
        raise InputError(what, file=path, remedy="Check the path, or download the file again.")
    return fd, info.st_size


def head_of(path: Path, count: int = 64) -> bytes:
    """The first ``count`` bytes of a regular file."""
    fd, _ = open_regular(path)
    try:
        return os.pread(fd, count, 0)
    finally:
        os.close(fd)


def refuse_gguf(path: Path) -> InputError:
    """The error for GGUF: its weights are quantised blocks in another tensor naming."""
    return InputError(
        "this is a GGUF file, which devec does not read",
        file=path,
        remedy="Use the model's original safetensors weights.",
    )
