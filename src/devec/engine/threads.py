"""An ordered map over named jobs, on threads.

Results come back in the order of the jobs whatever the number of workers, and each job sees only its own inputs, so
the number of workers never changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Progress(Protocol):
    """Told after each finished job: how many of how many, and which one."""

    def __call__(self, done: int, total: int, name: str) -> None: ...


def silent(done: int, total: int, name: str) -> None:
    """No progress."""


def ordered_map(
    function: Callable[[T], R], jobs: Sequence[T], *, workers: int = 1, progress: Progress = silent
) -> Iterator[R]:
    """``function(job)`` for each job, in order. At most ``2 workers`` results wait to be taken.

    An exception (or Ctrl-C) cancels the jobs that have not begun and is raised as it is.
    """
    total = len(jobs)
    if workers <= 1:
        for i, job in enumerate(jobs):
            result = function(job)
            progress(i + 1, total, str(job))
            yield result
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="devec") as pool:
        waiting: list[Future[R]] = []
        begun = 0
        try:
            for i, job in enumerate(jobs):
                while begun < total and len(waiting) < 2 * workers:
                    waiting.append(pool.submit(function, jobs[begun]))
                    begun += 1
                result = waiting.pop(0).result()
                progress(i + 1, total, str(job))
                yield result
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
