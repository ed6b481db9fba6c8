"""The engine's threads: every result once, memory within its bound, errors at once, and hints that cannot hurt."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devec.engine import stream as engine
from devec.engine.stream import Check, MoreMemory, Unit, stream

pytestmark = pytest.mark.timeout(120)  # a wait that never ends is an error


def units(count: int, memory: int = 0) -> list[Unit[int]]:
    return [Unit(i, memory) for i in range(count)]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine threads may take long to end; no test is about that but the one that says so."""
    monkeypatch.setattr(engine, "PATIENCE", 60.0)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 8, None])
@pytest.mark.parametrize("count", [0, 1, 5, 60])
def test_every_unit_gives_its_result_once(workers: int | None, count: int) -> None:
    choice = random.Random(0)

    def work(key: int, check: Check) -> int:
        check()
        time.sleep(choice.random() / 1000)
        return key * key

    found = list(stream(work, units(count), workers=workers))
    assert sorted(found) == [(i, i * i) for i in range(count)]


def test_units_begin_in_the_order_given() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(key: int, check: Check) -> None:
        with lock:
            begun.append(key)

    list(stream(work, units(40), workers=1))
    assert begun == list(range(40))
    begun.clear()
    list(stream(work, units(40), workers=4))
    assert sorted(begun) == list(range(40))
    assert all(abs(place - key) <= 4 for place, key in enumerate(begun))  # no more out of step than there are workers


def test_no_more_at_once_than_there_are_workers() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(key: int, check: Check) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    list(stream(work, units(30), workers=3))
    assert 1 <= most <= 3


def test_work_has_one_blas_thread_and_the_caller_keeps_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = dict(stream(lambda key, check: torch.get_num_threads(), units(4), workers=2))
        assert set(found.values()) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- memory ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 12), max_size=25), st.integers(0, 15), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40)
def test_running_units_stay_within_the_memory_or_run_alone(
    needs: list[int], budget: int, workers: int, seed: int
) -> None:
    choice, lock = random.Random(seed), threading.Lock()
    running: dict[int, int] = {}
    seen: list[tuple[int, int]] = []

    def work(key: int, check: Check) -> int:
        with lock:
            running[key] = needs[key]
            seen.append((sum(running.values()), len(running)))
        time.sleep(choice.random() / 2000)
        with lock:
            del running[key]
        return key

    todo = [Unit(i, need) for i, need in enumerate(needs)]
    assert sorted(key for key, _ in stream(work, todo, workers=workers, memory=budget)) == list(range(len(needs)))
    assert all(total <= budget or alone == 1 for total, alone in seen)


def test_a_unit_that_is_too_large_waits_until_it_is_alone_and_then_runs() -> None:
    small, large = threading.Event(), threading.Event()
    order: list[str] = []

    def work(key: str, check: Check) -> None:
        if key == "large":
            assert small.is_set()
            large.set()
        else:
            time.sleep(0.02)
            small.set()
        order.append(key)

    list(stream(work, [Unit("small", 1), Unit("large", 100)], workers=2, memory=10))
    assert order == ["small", "large"] and large.is_set()


# --- errors and stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("a"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_comes_out_as_it_is(error: BaseException, workers: int) -> None:
    def work(key: int, check: Check) -> int:
        if key == 5:
            raise error
        return key

    with pytest.raises(type(error)) as caught:
        list(stream(work, units(50), workers=workers))
    assert caught.value is error


def test_an_error_stops_the_others_at_their_next_check() -> None:
    stopped: list[int] = []
    second = threading.Event()

    def work(key: int, check: Check) -> None:
        if key == 0:
            second.wait()
            raise ValueError
        second.set()
        try:
            while True:
                check()
                time.sleep(0.001)
        except BaseException:
            stopped.append(key)
            raise

    with pytest.raises(ValueError):
        list(stream(work, units(100), workers=2))
    assert stopped == [1]


def test_a_worker_that_never_looks_up_holds_nobody_for_longer_than_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.05)
    busy, end, ended = threading.Event(), threading.Event(), threading.Event()

    def work(key: int, check: Check) -> None:
        if key == 1:
            busy.set()
            end.wait()
            ended.set()
        else:
            busy.wait()
            raise ValueError

    try:
        with pytest.raises(ValueError):
            list(stream(work, units(2), workers=2))
        assert not ended.is_set(), "the error waited for a worker that does not look up"
    finally:
        end.set()


def test_a_caller_that_has_enough_stops_the_work() -> None:
    begun: list[int] = []

    def work(key: int, check: Check) -> int:
        begun.append(key)
        time.sleep(0.001)
        return key

    found = stream(work, units(10_000), workers=2)
    assert next(found) is not None
    found.close()  # type: ignore[attr-defined]
    count = len(begun)
    time.sleep(0.02)
    assert len(begun) == count < 10_000


def test_an_interrupt_of_the_caller_stops_the_work() -> None:
    begun: list[int] = []

    def work(key: int, check: Check) -> int:
        begun.append(key)
        return key

    with pytest.raises(KeyboardInterrupt):
        for done, _ in enumerate(stream(work, units(10_000), workers=2)):
            if done == 3:
                time.sleep(0)
                raise KeyboardInterrupt
    assert not [t for t in threading.enumerate() if t.name.startswith("devec-") and t.name != "devec-hash"]


# --- read-ahead ------------------------------------------------------------------------------------------------------

Advice = list[tuple[int, int, int]]


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    """(file descriptor, offset, bytes) of every hint given to the system."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system takes no hints")
    given: Advice = []
    advise: Callable[..., None] = os.posix_fadvise

    def recording(fd: int, offset: int, count: int, kind: int) -> None:
        assert kind == os.POSIX_FADV_WILLNEED
        given.append((fd, offset, count))
        advise(fd, offset, count, kind)

    monkeypatch.setattr(os, "posix_fadvise", recording)
    return given


def test_the_next_units_are_read_ahead_in_order_and_not_too_far(
    tmp_path: Path, advice: Advice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "READ_AHEAD", 1000)
    (tmp_path / "x").write_bytes(bytes(100_000))
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    todo = [Unit(i, 0, ((fd, 400 * i, 150), (fd, 400 * i + 200, 200))) for i in range(100)]
    lead: list[int] = []

    def work(key: int, check: Check) -> None:
        # the next unit is on its way while this one computes
        while key < 99 and not (advice and advice[-1][1] >= 400 * (key + 1)):
            time.sleep(0.0005)
        lead.append(len(advice) // 2 - key)

    try:
        list(stream(work, todo, workers=1))
    finally:
        os.close(fd)
    everything = [place for unit in todo for place in unit.ahead]
    assert advice in (everything, everything[2:])  # each once, in order; the first unit may begin before its hint
    assert max(lead) <= 5  # 1000 bytes are three units; one more is begun, and one is being advised


def test_a_file_that_is_closed_ends_the_hints_and_nothing_else(tmp_path: Path, advice: Advice) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    os.close(fd)
    todo = [Unit(i, 0, ((fd, 0, 10),)) for i in range(20)]
    assert len(list(stream(lambda key, check: time.sleep(0.001), todo, workers=2))) == 20


def test_an_error_ends_the_hints(tmp_path: Path, advice: Advice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "READ_AHEAD", 10)
    (tmp_path / "x").write_bytes(bytes(1000))
    with (tmp_path / "x").open("rb") as file:
        todo = [Unit(i, 0, ((file.fileno(), 10 * i, 10),)) for i in range(100)]

        def work(key: int, check: Check) -> None:
            raise ValueError

        with pytest.raises(ValueError):
            list(stream(work, todo, workers=1))
    assert len(advice) < 100
    assert not [t for t in threading.enumerate() if t.name == "devec-ahead"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_of_several_errors_the_first_in_order_is_raised(workers: int) -> None:
    """Unit 0 fails last, and is what the run reports whatever the number of workers."""

    def work(key: int, check: Check) -> None:
        time.sleep(0.2 if key == 0 else 0.0)
        raise ValueError(str(key))

    with pytest.raises(ValueError, match=r"^0$"):
        list(stream(work, [Unit(i) for i in range(6)], workers=workers))


# --- units that find out what they need ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_unit_that_needs_more_is_begun_again_with_that(workers: int) -> None:
    """Some need three times what they said, one more than there is (alone it may). Never more in use than there is."""
    lock, given, in_use, most = threading.Lock(), dict.fromkeys(range(20), 10), [0], [0]

    def work(key: int, check: Check) -> int:
        with lock:
            mine = given[key]
            in_use[0] += mine
            most[0] = max(most[0], in_use[0] if mine <= 60 else 0)
        try:
            time.sleep(0.001)
            wanted = 100 if key == 7 else 30 if key % 3 == 0 else 10
            if mine < wanted:
                with lock:
                    given[key] = wanted
                raise MoreMemory(wanted)
            if mine > 60:
                assert in_use[0] == mine, "it is alone"
            return mine
        finally:
            with lock:
                in_use[0] -= mine

    found = dict(stream(work, units(20, memory=10), workers=workers, memory=60))
    assert found == {i: 100 if i == 7 else 30 if i % 3 == 0 else 10 for i in range(20)} and most[0] <= 60


def test_a_unit_that_needs_more_comes_before_those_not_begun() -> None:
    begun: list[int] = []

    def work(key: int, check: Check) -> None:
        begun.append(key)
        if key == 1 and begun.count(1) == 1:
            raise MoreMemory(5)

    list(stream(work, units(4, memory=1), workers=1, memory=5))
    assert begun == [0, 1, 1, 2, 3]
