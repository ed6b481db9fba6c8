"""What a run will cost, said before it starts, from headers alone and a fifth of a second of measuring this machine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from blake3 import blake3

from devec.engine.memory import ARENA, resident
from devec.linalg.numerics import one_blas_thread

DISK_READ, DISK_WRITE = 1.0e9, 0.4e9
"""Bytes a second of a plain solid-state disk. A disk cannot be measured without reading what is not in the system's
cache, or writing, and a plan does neither; inputs that are in the cache come several times faster."""

OVERLAP = 0.8
"""How much of the processor's and the disk's work goes on at the same time: not the first read, nor the last flush."""


@dataclass(frozen=True)
class Rates:
    """What one core does in a second: bytes of tensors (BLAKE3) and of files (SHA-256) hashed, elements summed, and
    float32 and float64 FLOP of matrix products."""

    hashed: float
    hashed_files: float
    elements: float
    flops: float
    flops64: float

    @classmethod
    def measured(cls) -> Rates:
        """Measured on one thread of this machine, as the engine works."""
        with one_blas_thread():
            data = bytes(1 << 22)
            x, y = torch.ones(1 << 17), torch.ones(1 << 17, dtype=torch.bfloat16)
            a = torch.ones(512, 512)
            b = a.double()
            return cls(
                hashed=(1 << 22) / _seconds(lambda: blake3(data).digest()),
                hashed_files=(1 << 22) / _seconds(lambda: hashlib.sha256(data).digest()),
                # to float32, minus the base, times a weight, added: what each operand of a sum goes through
                elements=(1 << 17) / _seconds(lambda: (y.float().sub_(x) * 0.5).add_(x)),
                flops=2 * 512**3 / _seconds(lambda: a @ a),
                flops64=2 * 512**3 / _seconds(lambda: b @ b),
            )


def _seconds(call: Callable[[], object], least: float = 0.04) -> float:
    call()
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < least:
        call()
        count += 1
    return spent / count


@dataclass(frozen=True)
class Stage:
    """One stage of a run. ``memory`` bytes of the whole process at its worst; ``seconds`` of wall time, about."""

    name: str
    tensors: int
    bytes_read: int
    bytes_written: int
    flops: int
    memory: int
    seconds: float

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "seconds": round(self.seconds, 2)}


def peak(workers: int, needs: Sequence[int], budget: int | None = None, kept: int = 0) -> int:
    """Resident bytes of the process with the largest needs at work at once, as far as a budget lets them, beside
    ``kept`` bytes of results that stay."""
    most = resident() + kept + workers * ARENA + sum(sorted(needs, reverse=True)[:workers])
    return most if budget is None else min(most, budget)


def wall(core_seconds: float, workers: int, bytes_read: int, bytes_written: int) -> float:
    """Seconds of wall time of work that overlaps with reading and writing."""
    disk = bytes_read / DISK_READ + bytes_written / DISK_WRITE
    busy = core_seconds / max(workers, 1)
    longer, shorter = max(disk, busy), min(disk, busy)
    return longer + (1.0 - OVERLAP) * shorter
