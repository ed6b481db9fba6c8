"""Kills and injected errors against real runs of the command: is anything ever lost, or half there?

``python tests/faults/campaign.py --kills 200 --errors`` prints one JSON document. A parent that has imported everything
and computed nothing forks a child for every run. Kills (SIGKILL) come at seeded random moments, spread evenly over the
time that an uninterrupted run takes, up to three in a row before a run is let through with ``--resume``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import save_file

from devec.api import apply, decompose, export, extract, merge, negate  # noqa: F401 - imported once, before any fork
from devec.cli import models, vectors  # noqa: F401
from devec.cli.main import run

BASE, A, B = "base.safetensors", "a.safetensors", "b.safetensors"
MERGE = ["merge", "--method", "task-arithmetic", "--base", BASE, A, B]
COMMANDS = {
    "merge, shards": [*MERGE, "--shard-size", "400KB", "-o", "OUT"],
    "merge, one file": [*MERGE, "-o", "OUT.safetensors"],
    "merge, over an old output": [*MERGE, "--overwrite", "-o", "OUT"],
    "decompose": ["decompose", "--base", BASE, A, B, "--rank", "4", "-o", "OUT"],
    "export": ["export", "parts#unique:a", "--base", BASE, "-o", "OUT"],
    "extract": ["extract", "--base", BASE, "--model", A, "-o", "OUT"],
    "extract, LoRA": ["extract", "--base", BASE, "--model", A, "--rank", "2", "-o", "OUT"],
}
SIDE = 160


def build(folder: Path) -> None:
    """A base and two fine-tunes of 24 matrices, and a decomposition of them to export from."""
    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(SIDE, SIDE, generator=g) for i in range(24)}
    save_file(base, folder / BASE)
    for name in (A, B):
        tuned = {
            n: w + 0.1 * torch.randn(SIDE, 4, generator=g) @ torch.randn(4, SIDE, generator=g) for n, w in base.items()
        }
        save_file(tuned, folder / name)


def forked(words: list[str], place: Path, kill_after: float | None = None, before: Callable[[], object] | None = None
           ) -> tuple[int, float]:  # fmt: skip
    """(exit code or -signal, seconds) of the command in a child of its own."""
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a run that hangs ends with -14
        os.chdir(place)
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        try:
            if before is not None:
                before()
            code = run(words)
        except BaseException:
            code = 99
        os._exit(code)
    if kill_after is not None:
        time.sleep(max(kill_after - (time.perf_counter() - begin), 0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - begin


def tree(path: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file; of a single file, under the empty name."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {
        "" if path.is_file() else p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
    }


def prepared(name: str, inputs: Path, place: Path) -> Path:
    """A folder with the inputs (and what the command replaces); returns the output's path."""
    shutil.copytree(inputs, place, symlinks=True)
    out = place / next(w for w in COMMANDS[name] if w.startswith("OUT"))
    if name == "merge, over an old output":
        out.mkdir()
        (out / "old").write_text("old")
    return out


def litter(place: Path, inputs: Path) -> set[str]:
    return {p.name for p in place.iterdir()} - {p.name for p in inputs.iterdir()}


def kills(name: str, count: int, inputs: Path, scratch: Path, seed: int) -> Counter[str]:
    """SIGKILL ``count`` runs at random moments and finish each."""
    rng, seen = random.Random(f"{seed} {name}"), Counter[str]()
    out = prepared(name, inputs, scratch / "reference")
    times = []
    code, spent = forked(COMMANDS[name], scratch / "reference")
    assert code == 0, (name, code)
    times.append(spent)
    want, old = tree(out), {"old": hashlib.sha256(b"old").hexdigest()}
    for i in range(count):
        place = scratch / f"kill-{i}"
        out = prepared(name, inputs, place)
        seen["tried"] += 1
        words, rounds = COMMANDS[name], rng.choice([1, 1, 2, 3])
        for _ in range(rounds):
            moment = times[0] * (i + rng.random()) / count if rounds == 1 else times[0] * rng.random()
            code, _ = forked(words, place, moment)
            seen["kills"] += 1
            now = tree(out) if out.exists() else None
            if now == want:
                break
            if now is not None and now != old:
                seen["corrupt"] += 1
            words = [*COMMANDS[name], "--resume"]
        if out.exists() and tree(out) == want:
            seen["finished before or in spite of the kill"] += 1
        else:
            kept = [p for p in place.glob("OUT*.partial-run/.run/journal*.jsonl") if p.stat().st_size]
            seen["resumed" if kept else "begun again"] += 1
            code, _ = forked([*COMMANDS[name], "--resume"], place)
            same = code == 0 and out.exists() and tree(out) == want
            seen["identical" if same else "not identical"] += 1
            if same and litter(place, inputs) != {out.name}:
                seen["litter"] += 1
        shutil.rmtree(place)
    return seen


def failing(calls: int, at: int, code: int) -> Callable[[], object]:
    """Make the ``at``-th of all writes, syncs and renames of this process fail once."""
    state = {"n": 0}

    def wrap(owner: object, attribute: str) -> None:
        real = getattr(owner, attribute)

        def call(*args: object, **kwargs: object) -> object:
            state["n"] += 1
            if calls:
                with open(os.environ["FAULT_COUNT"], "w") as file:  # noqa: PTH123
                    file.write(str(state["n"]))
            elif state["n"] == at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        setattr(owner, attribute, call)

    def install() -> None:
        for attribute in ("write", "pwrite", "fsync", "ftruncate", "mkdir", "rename", "replace"):
            wrap(os, attribute)

    return install


def errors(name: str, inputs: Path, scratch: Path, step: int) -> Counter[str]:
    """Fail every ``step``-th write, sync or rename once, then run again."""
    seen = Counter[str]()
    out = prepared(name, inputs, scratch / "reference")
    os.environ["FAULT_COUNT"] = str(scratch / "count")
    code, _ = forked(COMMANDS[name], scratch / "reference", before=failing(1, 0, 0))
    assert code == 0, (name, code)
    want, total = tree(out), int((scratch / "count").read_text())
    old = {"old": hashlib.sha256(b"old").hexdigest()}
    for at in range(1, total + 1, step):
        place = scratch / f"error-{at}"
        out = prepared(name, inputs, place)
        code, _ = forked(COMMANDS[name], place, before=failing(0, at, errno.ENOSPC if at % 2 else errno.EIO))
        seen["tried"] += 1
        seen[f"exit {code}"] += 1
        now = tree(out) if out.exists() else None
        if now not in (None, want, old) and code != 6:
            seen["corrupt"] += 1
        if now != want:
            again = ["--overwrite"] if code == 6 else ["--resume"]
            code, _ = forked([*COMMANDS[name], *again], place)
            seen["identical" if code == 0 and tree(out) == want else "not identical"] += 1
        shutil.rmtree(place)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="runs killed, over all commands")
    parser.add_argument("--errors", type=int, default=0, help="fail every N-th write, sync and rename (0: none)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        if (child := os.fork()) == 0:  # the parent computes nothing, so that its children may
            build(inputs)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert forked(["decompose", "--base", BASE, A, B, "--rank", "4", "-o", "parts"], inputs)[0] == 0
        each = -(-chosen.kills // len(COMMANDS))
        for i, name in enumerate(COMMANDS):
            scratch = Path(folder) / f"kills-{i}"
            scratch.mkdir()
            report[f"kill: {name}"] = dict(kills(name, each, inputs, scratch, chosen.seed))
            if chosen.errors:
                scratch = Path(folder) / f"errors-{i}"
                scratch.mkdir()
                report[f"error: {name}"] = dict(errors(name, inputs, scratch, chosen.errors))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
