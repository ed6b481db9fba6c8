"""One output by several processes, some of which die: shards that ``devec join`` finishes, workers of a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from faults.client import Ended
from faults.trial import PROCESSES, Field, Tally, tree
from faults.world import Case

SPLIT = ["merge", "merge to a file", "decompose"]
COUNT = 3


def shard(field: Field, case: Case, folder: Path, part: int, *more: str, **how: object) -> Ended:
    return field.run(case, folder, "--shard-of", f"{part}/{COUNT}", *more, **how)


def join(field: Field, case: Case, folder: Path, **how: object) -> Ended:
    return field.server.run(["join", case.out], folder, out=case.out, **how)


def whole(field: Field, case: Case, folder: Path) -> bool:
    return field.state(case, folder) == "new" and [p.name for p in folder.iterdir()] == [case.out]


@pytest.mark.parametrize("name", SPLIT)
def test_a_shard_that_died_goes_on_and_the_rest_waits(name: str, tiny: Field) -> None:
    case = tiny.cases[name]
    folder = tiny.folder(case)
    died = f"write {case.out}.partial-run/.run/journal-2-of-3.jsonl #1"
    assert shard(tiny, case, folder, 1).code == 0
    assert shard(tiny, case, folder, 2, fault={"call": died, "kind": "kill half"}).signal == signal.SIGKILL
    early = join(tiny, case, folder)
    assert early.code == 5 and "not" in early.line and "--resume" in early.line, early.said
    again = shard(tiny, case, folder, 1)
    assert again.code == 5 and "an unfinished run" in again.line
    beside = tiny.run(case, folder, "--resume")  # the whole command may take over what its shards have done
    assert beside.code == 0, beside.said
    assert whole(tiny, case, folder)


@pytest.mark.parametrize("name", SPLIT)
def test_shards_side_by_side(name: str, tiny: Field) -> None:
    case = tiny.cases[name]
    folder = tiny.folder(case)
    words = [case.command("--shard-of", f"{part}/{COUNT}") for part in range(1, COUNT + 1)]
    begun = [tiny.server.start(w, folder, out=case.out, stop_at="entered") for w in words]
    assert [tiny.server.wait(trial).stopped for trial in begun] == [True] * COUNT
    twice = shard(tiny, case, folder, 2, "--resume")
    assert twice.code == 5 and "another process writes this part" in twice.line
    for refused in (tiny.run(case, folder), tiny.run(case, folder, "--overwrite"), join(tiny, case, folder)):
        assert refused.code == 5 and "another run is writing this output" in refused.line, refused.said
    for trial in begun:
        tiny.server.go(trial)
    assert [tiny.server.wait(trial).code for trial in begun] == [0] * COUNT
    assert join(tiny, case, folder).code == 0
    assert whole(tiny, case, folder)


@pytest.mark.parametrize("name", SPLIT)
def test_a_shard_among_parts_of_another_command(name: str, tiny: Field) -> None:
    """It may not delete what others have done, --overwrite or not; what it says to do helps."""
    case = tiny.cases[name]
    folder = tiny.folder(case)
    other = {"decompose": ("--rank", "1"), "merge": ("--set", "scale=0.5")}[case.words[0]]
    assert shard(tiny, replace(case, words=(*case.words, *other)), folder, 2).code == 0
    for more in ([], ["--resume"], ["--overwrite"]):
        refused = shard(tiny, case, folder, 1, *more)
        assert refused.code == 4 and "another command" in refused.line, refused.said
        assert "delete OUT.partial-run" in refused.line and "--overwrite" not in refused.line
    shutil.rmtree(folder / f"{case.out}.partial-run")
    for part in range(1, COUNT + 1):
        assert shard(tiny, case, folder, part).code == 0
    again = shard(tiny, case, folder, 2, "--overwrite")
    assert again.code == 5 and "delete OUT.partial-run" in again.line, again.said
    assert join(tiny, case, folder).code == 0
    assert whole(tiny, case, folder)


@pytest.mark.faults
@pytest.mark.parametrize("name", SPLIT)
def test_shards_and_joins_are_killed(name: str, small: Field, tally: Tally) -> None:
    case, schedule = small.cases[name], Random(name)
    seconds = small.whole(case).seconds
    for _ in range(6):
        folder = small.folder(case)
        tally.tried += 1
        for part in range(1, COUNT + 1):
            more: list[str] = []
            while (ended := shard(small, case, folder, part, *more, kill=_soon(schedule, seconds / 2))).code != 0:
                assert ended.signal is not None, ended.said
                tally.kills += 1
                tally.landed[PROCESSES[0]] += 1
                more = ["--resume"]
                tally.problems += small.after_a_kill(case, folder)
        while (ended := join(small, case, folder, kill=_soon(schedule, seconds))).code != 0:
            if small.state(case, folder) == "new":
                break
            assert ended.signal is not None, ended.said
            tally.kills += 1
            tally.landed[PROCESSES[1]] += 1
            tally.problems += small.after_a_kill(case, folder)
        tally.killed += 1
        good = small.state(case, folder) == "new"
        tally.complete += good
        tally.resumed += good
        tally.problems += [] if good else [f"{case.name} in shards: {small.state(case, folder)}"]


def _soon(schedule: Random, seconds: float) -> dict[str, float]:
    """A kill within the run, or (every third time) long after it."""
    return {"after": schedule.random() * seconds if schedule.random() < 0.67 else 100.0}


# --- a cluster -------------------------------------------------------------------------------------------------------


def workers_below(pid: int) -> list[int]:
    """Process ids of Ray's workers that descend from a process and are busy with a call of ours."""
    parent, title = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                title[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended

    def descends(child: int) -> bool:
        while child > 1 and child != pid:
            child = parent.get(child, 0)
        return child == pid

    return [p for p, text in title.items() if text.startswith(b"ray::_call") and descends(p)]


@pytest.mark.faults
@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_worker_of_the_cluster_is_killed(tmp_path: Path) -> None:
    """Its calls are made again elsewhere, and the output is that of an undisturbed run on threads."""
    pytest.importorskip("ray")
    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(400, 400, generator=g) for i in range(24)}
    save_file(base, tmp_path / "base.safetensors")
    for name in "ab":
        save_file({n: w + torch.randn(w.shape, generator=g) for n, w in base.items()}, tmp_path / f"{name}.safetensors")
    words = [
        sys.executable, "-m", "devec.cli.main", "decompose", "a.safetensors", "b.safetensors", "--base",
        "base.safetensors", "--exact", "--rank", "4", "-q",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*words, "-o", "out", "--executor", "ray", "--workers", "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    journal, killed = tmp_path / "out.partial-run" / ".run" / "journal.jsonl", 0
    while process.poll() is None and killed < 2:
        if journal.exists() and journal.read_bytes().count(b"\n") > 3 * killed:
            for pid in workers_below(process.pid)[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        time.sleep(0.01)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert killed == 2
    subprocess.run([*words, "-o", "one"], cwd=tmp_path, check=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    assert not (tmp_path / "out.partial-run").exists()
