"""How much memory a computation has in use at its worst: every allocation of torch, LAPACK's workspaces included."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_memory(action: Callable[[], object]) -> int:
    """Bytes that tensors made in ``action`` take at most at one time, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    live = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most
