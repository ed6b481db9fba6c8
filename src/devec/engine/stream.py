"""Units of work through worker threads, within a budget of memory, the disk read ahead of them.

What answers which requirement:

* units are begun in the order given, which is the order of the files, so the disk reads forward;
* a unit begins when the memory that it says it needs is free beside what is running (one alone always may);
* while units compute, the system is asked to read the next ones (``READ_AHEAD`` bytes) into its cache;
* a unit that finds that it needs more (``MoreMemory``) is begun again, before any other, when that much is free;
* results come back in the order in which they are finished, and each unit sees only its own inputs and one BLAS
  thread, so the number of workers changes no byte of them;
* an error stops the others at their next ``check()`` and is raised: of several the first in order, if the units
  before it end within ``PATIENCE``. Ctrl-C waits no longer either: threads that sit in a long product do not hold it up
  (they are daemons and end with the process).
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Condition, Event, Thread
from typing import Generic, TypeVar

from devec.engine.threads import default_workers
from devec.linalg.numerics import one_blas_thread

K = TypeVar("K")
R = TypeVar("R")

READ_AHEAD = 1 << 28
"""Bytes that the system is asked to read before they are wanted: half a second of a fast disk."""

PATIENCE = 1.0
"""Seconds that an interrupt waits for workers to come to a point where they can stop."""


@dataclass(frozen=True)
class Unit(Generic[K]):
    """A piece of work. ``memory`` bytes it needs at most; ``ahead`` the (descriptor, offset, bytes) that it reads."""

    key: K
    memory: int = 0
    ahead: tuple[tuple[int, int, int], ...] = ()


class Stopped(Exception):
    """Raised by ``check()`` in a worker whose run was stopped."""


class MoreMemory(Exception):
    """Raised by a unit that cannot go on with what it said it needs: it is begun again with ``memory`` bytes."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        super().__init__(f"{memory:,} bytes are needed")


Check = Callable[[], None]


def stream(
    function: Callable[[K, Check], R],
    units: Sequence[Unit[K]],
    *,
    workers: int | None = None,
    memory: int | None = None,
) -> Iterator[tuple[K, R]]:
    """``(key, function(key, check))`` of every unit, as they are finished. ``function`` calls ``check()`` now and then.

    ``memory`` bounds the sum of what running units need (bytes; ``None``: no bound). The first error is raised.
    """
    count = min(workers or default_workers(), max(len(units), 1))
    with one_blas_thread():
        pool = _Pool(function, units, count, memory)
        try:
            for _ in range(len(units)):
                yield pool.next()
        finally:
            pool.stop()


class _Pool(Generic[K, R]):
    def __init__(
        self, function: Callable[[K, Check], R], units: Sequence[Unit[K]], workers: int, memory: int | None
    ) -> None:
        self._function, self._units, self._memory = function, list(units), memory
        self._again: list[int] = []  # units that are to be begun again, with more memory
        self._next = self._used = self._running = 0
        self._changed = Condition()
        self._stop = Event()
        self._done: queue.SimpleQueue[tuple[int, tuple[K, R] | BaseException]] = queue.SimpleQueue()
        self._open: set[int] = set()  # units that were begun and are not finished
        self._halted = False
        self._threads = [
            Thread(target=self._work, name=f"devec-{i}", daemon=True) for i in range(workers)
        ]
        if any(unit.ahead for unit in units) and hasattr(os, "posix_fadvise"):
            self._threads.append(Thread(target=self._read_ahead, name="devec-ahead", daemon=True))
        for thread in self._threads:
            thread.start()

    def next(self) -> tuple[K, R]:
        index, found = self._done.get()
        if isinstance(found, BaseException):
            raise self._first_error(index, found)
        return found

    def _first_error(self, index: int, error: BaseException) -> BaseException:
        """Of several units that fail, the first in order: what a run says does not depend on which was quicker."""
        end = time.monotonic() + PATIENCE
        with self._changed:
            self._halted = True
            while any(i < index for i in self._open) and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
        while not self._done.empty():
            other, found = self._done.get()
            if isinstance(found, BaseException) and other < index:
                index, error = other, found
        return error

    def stop(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _take(self) -> tuple[int, Unit[K]] | None:
        """The next unit, once there is room for it; ``None`` when there is none or the run is stopped."""
        with self._changed:
            while not self._stop.is_set() and not self._halted and (self._again or self._next < len(self._units)):
                index = min(self._again, default=self._next)
                unit = self._units[index]
                if self._running == 0 or self._memory is None or self._used + unit.memory <= self._memory:
                    if index in self._again:
                        self._again.remove(index)
                    else:
                        self._next += 1
                    self._running += 1
                    self._used += unit.memory
                    self._open.add(index)
                    self._changed.notify_all()
                    return index, unit
                self._changed.wait()
        return None

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            index, unit = taken
            try:
                self._done.put((index, (unit.key, self._function(unit.key, self._check))))
            except Stopped:
                return
            except MoreMemory as more:
                with self._changed:
                    self._units[index] = replace(unit, memory=more.memory)
                    self._again.append(index)
            except BaseException as error:
                self._done.put((index, error))
                return
            finally:
                with self._changed:
                    self._open.discard(index)
                    self._running -= 1
                    self._used -= unit.memory
                    self._changed.notify_all()

    def _read_ahead(self) -> None:
        """Keep about READ_AHEAD bytes beyond the unit that was begun last on their way into the system's cache."""
        advised, distance = 0, 0
        sizes = [sum(count for _, _, count in unit.ahead) for unit in self._units]
        taken = 0
        while advised < len(self._units):
            with self._changed:
                while distance >= READ_AHEAD and self._next == taken and not self._stop.is_set():
                    self._changed.wait()
                if self._stop.is_set():
                    return
                begun = self._next
            while taken < begun:
                distance -= sizes[taken] if taken < advised else 0
                taken += 1
            advised = max(advised, taken)
            if advised < len(self._units) and distance < READ_AHEAD:
                for descriptor, offset, count in self._units[advised].ahead:
                    try:
                        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)
                    except OSError:
                        return  # a hint: the reads themselves will say what is wrong
                distance += sizes[advised]
                advised += 1
