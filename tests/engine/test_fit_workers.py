"""A budget of memory: fewer workers rather than more memory, and a refusal that names the smallest that would do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devec.core.errors import RefusedError
from devec.engine import memory
from devec.engine.memory import ARENA, STEP, available, fit_workers, resident
from devec.engine.threads import default_workers

NOW = 200 << 20
needs_of = st.lists(st.integers(0, 3 << 30), max_size=6)


@pytest.fixture(autouse=True, scope="module")
def a_process_of_a_known_size() -> object:
    before = memory.resident
    memory.resident = lambda: NOW  # type: ignore[assignment]
    yield
    memory.resident = before


@given(needs_of, st.integers(1, 16), st.integers(0, 8 << 30), st.integers(0, 1 << 30))
def test_what_is_allowed_fits(needs: list[int], asked: int, extra: int, kept: int) -> None:
    largest = max(needs, default=0)
    budget = NOW + kept + ARENA + largest + extra
    workers, room = fit_workers(asked, budget, needs, kept)
    assert room is not None
    assert 1 <= workers <= min(asked, max(len(needs), 1)) and room >= largest
    assert NOW + kept + workers * ARENA + room <= budget
    if workers < min(asked, len(needs)):  # one more would not have left room for the largest
        assert NOW + kept + (workers + 1) * ARENA + largest > budget


@given(needs_of, st.integers(1, 16), st.integers(0, 4 << 30))
def test_a_refusal_names_the_smallest_budget_that_would_do(needs: list[int], asked: int, budget: int) -> None:
    try:
        fit_workers(asked, budget, needs)
    except RefusedError as error:
        named = re.search(r"Give --max-memory (\d+)MiB or more", error.line())
        assert named is not None and error.exit_code == 5
        least = int(named[1]) * STEP
        assert least > budget
        assert fit_workers(asked, least, needs)[0] >= 1
        with pytest.raises(RefusedError):
            fit_workers(asked, least - STEP, needs)


def test_without_a_budget_there_are_as_many_as_asked_for_or_there_is_work_for() -> None:
    assert fit_workers(3, None, [1] * 10) == (3, None)
    assert fit_workers(8, None, [1, 1]) == (2, None)
    assert fit_workers(8, None, []) == (1, None)
    assert fit_workers(None, None, [1] * 1000) == (default_workers(), None)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_resident_memory_is_that_of_this_process() -> None:
    before = resident()
    kept = torch.ones(64 << 20)  # 256 MiB, touched
    grown = resident() - before
    assert (128 << 20) < grown < (320 << 20) and float(kept[0]) == 1.0  # what was freed before may serve again
    assert available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") or available() == 1 << 30
