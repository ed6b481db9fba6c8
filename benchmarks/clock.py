"""Wall and processor time of one call, on a fixed number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Seconds(NamedTuple):
    """``cpu`` is the process's own time: on one thread it stays right when the machine is shared."""

    wall: float
    cpu: float


def once(call: Callable[[], T]) -> tuple[Seconds, T]:
    """Seconds and result of a single call."""
    wall, cpu = perf_counter(), process_time()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(perf_counter() - wall, process_time() - cpu), result


def typical(call: Callable[[], T], budget: float = 1.0, least: int = 3, most: int = 30) -> tuple[Seconds, T]:
    """Medians after one call to warm up: ``least`` repeats, more while they fit ``budget`` seconds."""
    once(call)
    taken: list[Seconds] = []
    while len(taken) < least or (len(taken) < most and sum(s.wall for s in taken) < budget):
        seconds, result = once(call)
        taken.append(seconds)
    return Seconds(median(s.wall for s in taken), median(s.cpu for s in taken)), result
