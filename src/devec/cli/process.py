"""What the command does to its own process, and a library must not do to somebody else's."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 32 << 20
"""Bytes up to which freed memory is handed out again instead of going back to the system with every block. It is where
glibc's own adjustable threshold ends; starting there spares each block of rows a page fault for every 4 KiB."""

AHEAD = 1 << 30
"""Bytes of input that the system is asked to read while torch is still being imported, half a second of a fast disk."""

READS_ALL = ("merge", "apply", "negate", "extract", "decompose", "export")
"""Commands that read the weights that they are given from the beginning."""


def keep_memory() -> None:
    """Let the allocator keep the memory of small tensors (glibc; elsewhere nothing happens)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, 2 * _KEPT)


def with_torch(function: F) -> F:
    """``function``, called once torch is there, which is imported without garbage collection: an import makes a hundred
    thousand objects, all of them to stay, and looking through them again and again takes a tenth of its time."""

    @wraps(function)
    def ready(*args: Any, **kwargs: Any) -> Any:
        if "torch" not in sys.modules:
            gc.disable()
            try:
                import_module("torch")
            finally:
                gc.freeze()
                gc.enable()
        return function(*args, **kwargs)

    return ready  # type: ignore[return-value]


def read_ahead(arguments: Sequence[str]) -> None:
    """Ask the system for the first bytes of the weights named on the command line. A hint: nothing depends on it."""
    if not arguments or arguments[0] not in READS_ALL or not hasattr(os, "posix_fadvise") or "--dry-run" in arguments:
        return
    files = [file for word in arguments[1:] for file in _weights(word)]
    if files:
        Thread(target=_advise, args=(files,), name="devec-first", daemon=True).start()


def _weights(word: str) -> list[Path]:
    if word.startswith("-"):
        return []
    path = Path(word.rpartition("=")[2])
    try:
        if path.is_dir():
            return sorted(path.glob("*.safetensors"))
        return [path] if path.suffix == ".safetensors" and path.is_file() else []
    except (OSError, ValueError):
        return []


def _advise(files: Sequence[Path]) -> None:
    for file in files:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, AHEAD // len(files), os.POSIX_FADV_WILLNEED)
        except OSError:
            pass
        finally:
            os.close(fd)


def leave(code: int) -> NoReturn:
    """End the process with ``code`` at once: threads may sit in a product that takes longer than anybody wants to wait,
    and taking a hundred thousand objects apart takes a third of a second."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
