"""One command, one fault, and what must be true afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from faults.child import MARKS
from faults.client import Ended, Server
from faults.world import PREPARATIONS, Case, Size, build, cases, older

PHASES = {
    None: "planning", "open": "before the first tensor", "tensor": "between tensors", "finish": "index, card, records",
    "sync": "flushing", "renamed": "tidying up", "end": "at the end",
}  # fmt: skip
"""What a run does after each mark."""

PROCESSES = ("a shard", "join")
"""Where kills land in a run of several processes."""

SIDE_STEPS = {"README.md", "tokenizer.json", "chat_template.jinja"}
REFUSED, SIDE_STEP = 5, 6
COMPLETE = "is complete already"

Tree = dict[str, bytes]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it left, when it reached its marks, which calls changed the disk."""

    tree: Tree
    marks: dict[str, float]
    seconds: float
    calls: tuple[str, ...]


@dataclass
class Tally:
    """What a test tried, for the report at the end: trials, those ``killed`` at least once and all ``kills``, where
    these landed (or which faults were injected), trials that ended ``complete``, and by being ``resumed``."""

    tried: int = 0
    killed: int = 0
    kills: int = 0
    landed: Counter[str] = field(default_factory=Counter)
    complete: int = 0
    resumed: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "landed": dict(self.landed)}


def tree(path: Path) -> Tree:
    """Every file below a folder, or the one file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if not p.is_dir()}


class Field:
    """Models, a fork server, and what each command leaves when nobody disturbs it."""

    def __init__(self, root: Path, server: Server, size: Size, workers: int) -> None:
        self.root, self.server = root, server
        self.world = root / "world"
        build(self.world, size)
        for words in PREPARATIONS:
            made = server.run(words, self.world)
            assert made.code == 0, made.said
        self.cases = {case.name: case for case in cases(self.world, size, workers)}
        self._whole: dict[str, Whole] = {}
        self._folders = 0

    def folder(self, case: Case) -> Path:
        """A new working folder, with the older output, or the unfinished run, that the case begins with."""
        self._folders += 1
        folder = self.root / f"trial-{self._folders}"  # all equally deep: artifacts hold relative paths
        folder.mkdir()
        if case.old:
            older(case, folder)
        if case.begun:
            killed = self.run(replace(case, begun=None), folder, fault={"call": case.begun, "kind": "kill half"})
            assert killed.signal is not None, killed.said
        return folder

    def run(self, case: Case, folder: Path, *more: str, **how: Any) -> Ended:
        return self.server.run(case.command(*more), folder, out=case.out, swap=case.swap, **how)

    def whole(self, case: Case) -> Whole:
        """The uninterrupted run: the second, since the first reads its files from the disk."""
        if case.name not in self._whole:
            for _ in range(2):
                folder = self.folder(case)
                ended = self.run(case, folder, counting=True)
                assert ended.code == 0, ended.said
                assert [p.name for p in folder.iterdir()] == [case.out]
                found = tree(folder / case.out)
                shutil.rmtree(folder)
            self._whole[case.name] = Whole(found, ended.marks, ended.seconds, tuple(ended.calls))
        return self._whole[case.name]

    # --- what is there -----------------------------------------------------------------------------------------------

    def state(self, case: Case, folder: Path) -> str:
        """``absent``, ``old`` (untouched), ``new`` (whole), ``new without ...`` (side steps), or ``broken``."""
        out = folder / case.out
        if not out.exists():
            return "absent"
        there, wanted = tree(out), self.whole(case).tree
        if there == wanted:
            return "new"
        if case.old and there == self._older(case):
            return "old"
        lacking = set(wanted) - set(there)
        same = {n for n in there if there[n] == wanted.get(n)}
        if lacking and lacking <= SIDE_STEPS and set(there) - same == {".devec/manifest.json"} and _verified(there):
            return f"new without {', '.join(sorted(lacking))}"
        return f"broken: lacks {sorted(lacking)}, differs in {sorted(set(there) - same)}"

    def _older(self, case: Case) -> Tree:
        place = self.root / "older" / case.out
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            older(case, place.parent)
        return tree(place)

    def strays(self, case: Case, folder: Path) -> list[str]:
        """Names beside the output that nobody promised."""
        promised = {case.out, f"{case.out}.partial-run"}
        return sorted(p.name for p in folder.iterdir() if p.name not in promised)

    def kept(self, case: Case, folder: Path) -> bool:
        """Whether an unfinished run is there with something finished in it."""
        lines = (folder / f"{case.out}.partial-run" / ".run").glob("journal*.jsonl")
        return any(p.stat().st_size for p in lines)

    # --- what must be true -------------------------------------------------------------------------------------------

    def after_a_kill(self, case: Case, folder: Path) -> list[str]:
        """What a dead process may leave: no output, the old one, or a whole one; and its temporary folder."""
        state, strays = self.state(case, folder), self.strays(case, folder)
        right = {"absent", "new", "old"} if not case.old or not case.swap else {"new", "old"}
        return [] if state in right and not strays else [f"after the kill: {state}, beside it {strays}"]

    def after_an_error(self, case: Case, folder: Path, ended: Ended) -> list[str]:
        """What a run that met an error and could speak leaves and says."""
        wrong = []
        state, strays, line = self.state(case, folder), self.strays(case, folder), ended.line
        there = (folder / f"{case.out}.partial-run").exists()
        if "Traceback" in ended.said:
            wrong.append(f"a traceback: {ended.said}")
        if ended.code == 0:
            right = state == "new" and not there
        elif ended.code == SIDE_STEP:
            right = state.startswith("new without") if not there else state == "new" and "could not be deleted" in line
        elif ended.code == REFUSED:
            right = state in ("absent", "old") or (state == "new" and "is in place" in line)
            right = right and line.startswith("devec: ") and there == ("--resume" in line) == self.kept(case, folder)
        else:
            right = False
        if not right or strays:
            wrong.append(f"exit {ended.code}, {state}, beside it {strays}, partial {there}: {line}")
        return wrong

    def goes_on(self, case: Case, folder: Path) -> tuple[bool, list[str]]:
        """``--resume`` ends with the whole output and nothing beside it; True if there was something left to do."""
        before = self.state(case, folder)
        resume = (folder / f"{case.out}.partial-run").exists()
        more = ["--resume"] if resume or not before.startswith("new without") else []
        more += ["--overwrite"] if before.startswith("new without") and not case.old else []
        ended = self.run(case, folder, *more)
        wrong = []
        if before == "new" and not case.old and COMPLETE not in ended.said:
            wrong.append(f"resumed over a whole output: exit {ended.code}: {ended.said}")
        if ended.code != 0:
            wrong.append(f"resumed: exit {ended.code}: {ended.said}")
        state, beside = self.state(case, folder), sorted(p.name for p in folder.iterdir() if p.name != case.out)
        if state != "new" or beside:
            wrong.append(f"after resuming: {state}, beside it {beside}")
        return before != "new", wrong

    # --- kills -------------------------------------------------------------------------------------------------------

    def kill(self, case: Case, schedule: Random, tally: Tally, phase: str | None = "anywhere") -> None:
        """Kill a run, perhaps what resumes it too, let the last through. A run that ended before it was killed is none.

        ``phase``: the mark after which the kill falls, within the time that the phase took undisturbed.
        """
        whole, folder = self.whole(case), self.folder(case)
        more: list[str] = []
        tally.tried += 1
        before = tally.kills
        while True:
            killed = self.run(case, folder, *more, kill=_when(whole, schedule, phase))
            if killed.signal is None:
                tally.problems += [] if killed.code == 0 else [f"{case.name}, not killed: {killed.said}"]
                break
            tally.kills += 1
            landed = PHASES[next((m for m in reversed(MARKS) if m in killed.marks), None)]
            tally.landed[landed] += 1
            tally.problems += [f"{case.name}, {landed}: {w}" for w in self.after_a_kill(case, folder)]
            more, phase = ["--resume"], "anywhere"
            if schedule.random() < 0.6 or (self.state(case, folder) == "new" and not case.old):
                break
        tally.killed += tally.kills > before
        busy, wrong = self.goes_on(case, folder)
        tally.problems += [f"{case.name}: {w}" for w in wrong]
        tally.resumed += busy
        tally.complete += not wrong
        if not wrong:
            shutil.rmtree(folder)

    # --- faults in single calls --------------------------------------------------------------------------------------

    def inject(self, case: Case, call: str, kind: str, tally: Tally) -> None:
        """Let one call fail (``ENOSPC``, ``EIO``), or all writes from it on (``full``), or the process end there."""
        folder = self.folder(case)
        ended = self.run(case, folder, fault={"call": call, "kind": kind})
        if case.begun and "met" not in ended.marks:
            return  # how far a worker was ahead of the journal when the earlier run died differs
        tally.tried += 1
        if ended.signal is not None:
            tally.kills += 1
            tally.killed += 1
            wrong = self.after_a_kill(case, folder)
        else:
            wrong = self.after_an_error(case, folder, ended)
        if "met" not in ended.marks:
            wrong.append("the call never came")
        tally.landed[kind] += 1
        busy, more = self.goes_on(case, folder) if ended.code != 0 else (False, [])
        tally.resumed += busy
        tally.complete += not wrong and not more
        tally.problems += [f"{case.name}, {kind} at {call}: {w}" for w in (*wrong, *more)]
        if not wrong and not more:
            shutil.rmtree(folder)


def _when(whole: Whole, schedule: Random, phase: str | None) -> dict[str, Any]:
    marks: list[tuple[str | None, float]] = [(None, 0.0), *((m, whole.marks[m]) for m in MARKS if m in whole.marks)]
    if phase == "anywhere":
        return {"after": schedule.random() * whole.seconds}
    spans = {m: end - start for (m, start), (_, end) in pairwise(marks)}
    return {"mark": phase, "after": schedule.random() * spans.get(phase, 0.0)}


def _verified(there: Tree) -> bool:
    """Whether the manifest is true of every other file."""
    files = json.loads(there[".devec/manifest.json"])["files"]
    rest = {n: data for n, data in there.items() if n != ".devec/manifest.json"}
    return set(files) == set(rest) and all(files[n]["sha256"] == hashlib.sha256(d).hexdigest() for n, d in rest.items())


def faults_of(call: str, thorough: bool) -> list[str]:
    """What may go wrong in a call; ``thorough``: the disk may be full from then on, or the process die there."""
    word = call.partition(" ")[0]
    if word in ("write", "pwrite"):
        return ["ENOSPC", "EIO", *(["full", "kill half"] if thorough else [])]
    return ["ENOSPC" if word in ("open", "mkdir") else "EIO", *(["kill before"] if thorough else [])]
