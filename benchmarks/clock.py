"""Wall time of one call, on a fixed number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import TypeVar

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


def once(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds and result of a single call."""
    start = perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start, result


def typical(call: Callable[[], T], budget: float = 1.0, least: int = 3, most: int = 30) -> tuple[float, T]:
    """Median seconds after one call to warm up: ``least`` repeats, more while they fit ``budget`` seconds."""
    once(call)
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < budget):
        duration, result = once(call)
        seconds.append(duration)
    return median(seconds), result
