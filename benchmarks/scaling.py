"""devec alone: stages, threads, and a graphics card if there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.clock import threads, typical
from benchmarks.pair import DevecPair, devec_pair
from benchmarks.planted import RANK, dense_pair, low_rank_pair
from benchmarks.rows import deltas
from devec.core.delta import Delta, DenseDelta, LowRankDelta


@dataclass(frozen=True)
class Timing:
    """``seconds`` of one pair, its stages, and the largest difference of eigenvalues from the first timing."""

    case: str
    n: int
    where: str
    seconds: float
    stages: dict[str, float]
    difference: float = 0.0


def thread_timings(n: int, counts: tuple[int, ...] = (1, 2)) -> list[Timing]:
    """The dense pair of the main table on 1, 2, ... threads."""
    return _compare("dense", n, [(f"{count} threads" if count > 1 else "1 thread", count, "cpu") for count in counts])


def gpu_timings(sizes: tuple[int, ...], count: int) -> list[Timing]:
    """The same functions on a CUDA device against the processor; nothing without one."""
    if not torch.cuda.is_available():
        return []
    places = [("processor", count, "cpu"), (torch.cuda.get_device_name(0), count, "cuda")]
    return [timing for n in sizes for case in ("low-rank", "dense") for timing in _compare(case, n, places)]


def _compare(case: str, n: int, places: list[tuple[str, int, str]]) -> list[Timing]:
    pair = deltas(dense_pair(n) if case == "dense" else low_rank_pair(n, RANK))
    rule = str(RANK) if case == "dense" else "auto"
    timings: list[Timing] = []
    reference: DevecPair | None = None
    for label, count, device in places:
        first, second = (_moved(delta, device) for delta in pair)

        def call(first: Delta = first, second: Delta = second) -> DevecPair:
            return devec_pair(first, second, rule)

        with threads(count):
            seconds, result = typical(call)
        reference = reference or result
        difference = float((result.eigenvalues.cpu() - reference.eigenvalues.cpu()).abs().max())
        timings.append(Timing(case, n, label, seconds.wall, result.seconds, difference))
    return timings


def _moved(delta: Delta, device: str) -> Delta:
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.B.to(device), delta.A.to(device))
    return DenseDelta(delta.dense().to(device))
