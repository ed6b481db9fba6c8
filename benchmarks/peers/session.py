"""The order of events: models made, mergekit's settings chosen, every run in turn, outputs compared, all removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.peers.cache import evict, resident_of, warm
from benchmarks.peers.compare import Accuracy, Agreement, accuracy, agreement
from benchmarks.peers.models import llama_of, write_family
from benchmarks.peers.tools import MERGEKIT_SETTINGS, Case, cases, command, environment, import_command
from benchmarks.peers.watch import Run, watch

CACHES = ("warm", "cold")
COLD_AT_MOST, WARM_AT_LEAST = 0.001, 0.999
"""Resident fraction of the inputs up to which they count as cold, and from which as warm."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """One run. ``flush``: seconds that the output's flush to the disk took afterwards (devec and the copy flush by
    themselves); ``resident``: fraction of the inputs' bytes that lay in the page cache just before."""

    size: str
    cache: str
    method: str
    tool: str
    repeat: int
    wall: float
    cpu: float
    peak: int
    anonymous: int
    flush: float
    resident: float


@dataclass(frozen=True)
class Check:
    """What the outputs of one size and method are worth."""

    size: str
    method: str
    between: Agreement | None
    """devec's entries against mergekit's; ``None`` where only one of them ran."""
    accuracy: dict[str, Accuracy]


@dataclass
class Session:
    """Everything that was measured."""

    tools: tuple[str, ...]
    bytes: dict[str, int] = field(default_factory=dict)
    """size -> bytes of one model's weights"""
    imports: dict[str, float] = field(default_factory=dict)
    """tool -> seconds, the median of three"""
    trials: dict[str, Run] = field(default_factory=dict)
    """mergekit's settings as tried"""
    settings: str = "defaults"
    records: list[Record] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_session(
    sizes: Sequence[tuple[str, int]],
    work: Path,
    *,
    tools: Sequence[str] = ("mergekit", "devec", "copy"),
    repeats: int = 3,
    settings: str | None = None,
    keep: bool = False,
    say: Say = lambda _: None,
) -> Session:
    """Measure every size in turn. ``work`` is where models and outputs lie; what was made is removed (``keep``: the
    models stay, and a later run takes them as they are). Sizes are labels with bytes of one model's weights.

    Raises OSError before anything is written when the disk has too little room, CommandFailed when a tool fails.
    """
    session = Session(tuple(tools))
    work.mkdir(parents=True, exist_ok=True)
    for tool in tools:
        say(f"imports of {tool}")
        runs = [watch(import_command(tool), env=environment()).wall for _ in range(4)][1:]  # the first fills the cache
        session.imports[tool] = median(runs)
    for label, size in sizes:
        shape = llama_of(size)
        session.bytes[label] = shape.bytes
        _require_room(work, (5 + len(tools)) * shape.bytes)
        models = work / f"models-{shape.bytes}"
        try:
            folders = write_family(shape, models, say=say)
            if "mergekit" in tools and not session.trials:
                session.settings = settings or _choose(session, cases(folders)[0], work, say)
            for cache in CACHES:
                _measure(session, label, cache, cases(folders), work, repeats, say)
        finally:
            if not keep:
                shutil.rmtree(models, ignore_errors=True)
    return session


def _require_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; give --work another place")


def _choose(session: Session, case: Case, work: Path, say: Say) -> str:
    """The fastest of mergekit's settings, each by the better of two warm runs."""
    for _ in range(2):
        for name, options in MERGEKIT_SETTINGS.items():
            say(f"mergekit's settings: {name}")
            prepare("warm", case)
            with outputs(work) as place:
                run = watch(command("mergekit", case, place / "mergekit", options), env=environment())
            session.trials[name] = min(run, session.trials.get(name, run), key=lambda r: r.wall)
    return min(session.trials, key=lambda name: session.trials[name].wall)


@contextmanager
def outputs(work: Path) -> Iterator[Path]:
    """A folder for outputs, gone afterwards with all that a tool may have left in it."""
    place = work / "outputs"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _measure(
    session: Session, label: str, cache: str, todo: Sequence[Case], work: Path, repeats: int, say: Say
) -> None:
    for repeat in range(repeats):
        for case in todo:
            made: dict[str, Path] = {}
            with outputs(work) as place:
                for tool in turn(session.tools, repeat):
                    say(f"{label} {cache}: {case.method}, {tool}, {repeat + 1} of {repeats}")
                    here = prepare(cache, case)
                    if cache == "cold" and here > COLD_AT_MOST:
                        session.notes.append(
                            f"{label}: {here:.1%} of the inputs stayed in the page cache when told to go, so there are "
                            "no cold figures"
                        )
                        return
                    if cache == "warm" and here < WARM_AT_LEAST:
                        session.notes.append(
                            f"{label}: only {here:.1%} of the inputs of {case.method} fitted into the page cache "
                            f"(warm, {tool}, {repeat + 1})"
                        )
                    made[tool] = place / tool
                    options = MERGEKIT_SETTINGS[session.settings] if tool == "mergekit" else ()
                    run = watch(command(tool, case, made[tool], options), env=environment())
                    flush = settle(made[tool])
                    session.records.append(
                        Record(label, cache, case.method, tool, repeat, run.wall, run.cpu, run.peak, run.anonymous,
                               flush, here)
                    )  # fmt: skip
                if repeat == 0 and cache == CACHES[0]:
                    say(f"{label}: comparing the outputs of {case.method}")
                    session.checks.append(check(label, case, made))


def turn(tools: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: each tool comes first, second and third equally often."""
    shift = repeat % len(tools)
    return [*tools[shift:], *tools[:shift]]


def prepare(cache: str, case: Case) -> float:
    """Bring the inputs into, or out of, the page cache; returns the fraction that lies there."""
    os.sync()  # nothing of an earlier run is still to be written
    for file in case.inputs:
        (warm if cache == "warm" else evict)(file)
    return resident_of(case.inputs)


def settle(out: Path) -> float:
    """Flush what a run wrote and drop it from the page cache; returns the seconds of the flush."""
    files = [file for file in out.rglob("*") if file.is_file()]
    begin = perf_counter()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    seconds = perf_counter() - begin
    for file in files:
        evict(file)
    return seconds


def check(label: str, case: Case, made: dict[str, Path]) -> Check:
    """Compare what the merging tools wrote with each other and with float64."""
    merged = {tool: out for tool, out in made.items() if tool != "copy"}
    between = agreement(*merged.values()) if len(merged) == 2 else None
    return Check(label, case.method, between, {tool: accuracy(out, case) for tool, out in merged.items()})


def groups(session: Session) -> Iterator[tuple[str, str, str]]:
    """(size, cache, method) of every group of runs, in order."""
    yield from dict.fromkeys((r.size, r.cache, r.method) for r in session.records)
