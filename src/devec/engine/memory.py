"""Memory of this process, measured, and how many units may run at once within a budget.

``--max-memory`` bounds the resident memory of the process and its children, mapped files included. Files are read
with positioned reads and never mapped, and the system's cache of files is not the process's memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from devec.core.errors import RefusedError
from devec.engine.threads import default_workers

ARENA = 24 << 20
"""Bytes a worker thread keeps beyond its tensors: its stack, and what the allocator does not give back at once."""

GIVEN_BACK = 4 << 20
"""Bytes from which on freed memory goes back to the system at once under a budget. glibc keeps up to 32 MiB a piece for
the next who asks: with 8 MiB squares and blocks that was 76 MB beside what was in use."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)

STEP = 1 << 20
"""Budgets are named in whole MiB."""


def give_back() -> None:
    """Let the allocator keep no large piece of freed memory (glibc; elsewhere nothing happens). For a command with a
    budget: it holds for the whole process, and new pieces cost page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, GIVEN_BACK)
        mallopt(_TRIM_THRESHOLD, GIVEN_BACK)


def resident() -> int:
    """Bytes of this process in memory now."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # macOS says the peak, in bytes; nothing there tells the present

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available() -> int:
    """Bytes that may be used without driving others out: most of what the system, or this control group, has free."""
    free = [Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")]
    known: list[int] = []
    if free[0].exists():
        for line in free[0].read_text().splitlines():
            if line.startswith("MemAvailable:"):
                known.append(int(line.split()[1]) * 1024)
    if free[1].exists() and free[2].exists() and (limit := free[1].read_text().strip()).isdigit():
        known.append(int(limit) - int(free[2].read_text()))
    return max(int(0.8 * min(known)), 1 << 30) if known else 4 << 30


def fit_workers(asked: int | None, budget: int | None, needs: Sequence[int], kept: int = 0) -> tuple[int, int | None]:
    """(workers, bytes for all running units) within ``budget``: fewer workers rather than more memory.

    ``needs`` bytes of each unit; ``kept`` bytes of results that stay until the end. Raises RefusedError (exit 5) that
    names the smallest budget when not even the largest unit fits alone.
    """
    workers = min(asked or default_workers(), max(len(needs), 1))
    if budget is None:
        return workers, None
    now = resident() + kept
    largest = max(needs, default=0)
    if now + ARENA + largest > budget:
        raise refusal(budget, now + ARENA + largest)
    while workers > 1 and now + workers * ARENA + largest > budget:
        workers -= 1
    return workers, budget - now - workers * ARENA


def refusal(budget: int, needed: int, tensor: str | None = None, because: str | None = None) -> RefusedError:
    """The error for a budget that is too small, with the smallest that would do; ``because`` says what was found only
    while ``tensor`` was computed."""
    least = -(-needed // STEP)
    return RefusedError(
        "the work does not fit into --max-memory" + (f": {because}" if because else ""), tensor=tensor,
        values={"given": f"{budget:,} bytes", "needed": f"{least} MiB"},
        remedy=f"Give --max-memory {least}MiB or more.",
    )
