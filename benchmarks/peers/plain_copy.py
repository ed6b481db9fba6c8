"""The floor of the input and output: read every byte of the inputs once, write as many as the output has, flush.

``python -m benchmarks.peers.plain_copy OUT BYTES IN...``: one reused buffer of 16 MiB, ``preadv`` and ``pwrite``, one
``fsync``; what is written is what the first inputs hold. Imports nothing beyond the standard library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

PIECE = 1 << 24


def plain_copy(out: str, size: int, inputs: Sequence[str]) -> int:
    """Returns the number of bytes read. Raises ValueError if the inputs have fewer than ``size`` bytes."""
    buffer = memoryview(bytearray(PIECE))
    read = written = 0
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for path in inputs:
            source, at = os.open(path, os.O_RDONLY), 0
            try:
                while got := os.preadv(source, [buffer], at):
                    at += got
                    piece = buffer[: min(got, size - written)]
                    while piece:
                        done = os.pwrite(target, piece, written)
                        piece, written = piece[done:], written + done
            finally:
                os.close(source)
            read += at
        if written < size:
            raise ValueError(f"the inputs have {read} bytes, the output was to have {size}")
        os.fsync(target)
    finally:
        os.close(target)
    return read


if __name__ == "__main__":
    plain_copy(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
