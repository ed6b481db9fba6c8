"""Runs that stop for a reason: what is refused, what is said, and that going on gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from faults.client import Ended
from faults.trial import Field, tree
from faults.world import Case

JOURNAL = ".run/journal.jsonl"


@pytest.fixture(params=["merge", "merge to a file", "decompose", "extract LoRA"])
def case(request: pytest.FixtureRequest, tiny: Field) -> Case:
    """Commands that can be gone on with."""
    return tiny.cases[str(request.param)]


@pytest.fixture
def folder(case: Case, tiny: Field) -> Iterator[Path]:
    place = tiny.folder(case)
    yield place
    shutil.rmtree(place)


def partial(case: Case, folder: Path) -> Path:
    return folder / f"{case.out}.partial-run"


def begin(tiny: Field, case: Case, folder: Path, lines: int = 3) -> None:
    """A run that is killed while it enters a tensor in its journal: so many lines, the last one torn."""
    call = f"write {case.out}.partial-run/{JOURNAL} #{lines}"
    ended = tiny.run(case, folder, fault={"call": call, "kind": "kill half"})
    assert ended.signal == signal.SIGKILL
    journal = (partial(case, folder) / JOURNAL).read_bytes()
    assert journal.count(b"\n") == lines - 1 and not journal.endswith(b"\n")


def ends_well(tiny: Field, case: Case, folder: Path, *more: str) -> Ended:
    ended = tiny.run(case, folder, *more, counting=True)
    assert ended.code == 0, ended.said
    assert tiny.state(case, folder) == "new" and [p.name for p in folder.iterdir()] == [case.out]
    return ended


def refused(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code and ended.line.startswith("devec: "), ended.said
    assert "Traceback" not in ended.said
    for word in words:
        assert word in ended.line, ended.line


# --- what was finished -----------------------------------------------------------------------------------------------


def entered(case: Case, calls: Sequence[str]) -> int:
    """How many tensors were made and entered in the journal."""
    return sum(call.startswith(f"write {case.out}.partial-run/{JOURNAL}") for call in calls)


def test_what_is_finished_is_not_made_again(tiny: Field, case: Case, folder: Path) -> None:
    """However often the run is killed, and though each time a line is torn."""
    every = entered(case, tiny.whole(case).calls)
    begin(tiny, case, folder)
    call = f"write {case.out}.partial-run/{JOURNAL} #2"
    killed = tiny.run(case, folder, "--resume", fault={"call": call, "kind": "kill half"})
    assert killed.signal == signal.SIGKILL
    assert entered(case, ends_well(tiny, case, folder, "--resume").calls) == every - 3


def test_a_disk_that_fills_up_at_the_last_write_costs_nothing(tiny: Field) -> None:
    """The header of a single file holds the hashes of its tensors, and is written last."""
    case = tiny.cases["merge to a file"]
    folder = tiny.folder(case)
    last = [call for call in tiny.whole(case).calls if call.startswith("pwrite")][-1]
    ended = tiny.run(case, folder, fault={"call": last, "kind": "full"})
    every = entered(case, tiny.whole(case).calls)
    refused(ended, 5, "no space left", f"{every} tensors are finished and kept", "--resume")
    assert entered(case, ends_well(tiny, case, folder, "--resume").calls) == 0


def test_what_the_disk_did_not_confirm_is_made_again(tiny: Field) -> None:
    """After a failed flush the system may hold in memory what is not on the disk, and call it clean."""
    case = tiny.cases["merge"]
    folder = tiny.folder(case)
    name = next(call for call in tiny.whole(case).calls if call.startswith("fsync") and "model-00001" in call)
    lost = sum(b"model-00001" in line for line in tiny.whole(case).tree[".devec/journal.jsonl"].splitlines())
    ended = tiny.run(case, folder, fault={"call": name, "kind": "EIO"})
    every = entered(case, tiny.whole(case).calls)
    refused(ended, 5, f"{every - lost} tensors are finished and kept", "--resume")
    assert entered(case, ends_well(tiny, case, folder, "--resume").calls) == lost


@pytest.mark.parametrize("harm", ["a bit", "the file", "the plan", "the journal", "a line", "rubbish"])
def test_what_was_harmed_is_made_again(harm: str, tiny: Field, case: Case, folder: Path) -> None:
    begin(tiny, case, folder)
    place, journal = partial(case, folder), partial(case, folder) / JOURNAL
    record = json.loads(journal.read_text().splitlines()[1])
    (file,) = [p for p in place.rglob(record["file"]) if p.is_file()]
    if harm == "a bit":
        data = bytearray(file.read_bytes())
        data[8 + int.from_bytes(data[:8], "little") :] = bytes(
            x ^ 1 for x in data[8 + int.from_bytes(data[:8], "little") :]
        )
        file.write_bytes(data)
    elif harm == "the file":
        file.unlink()
    elif harm == "the plan":
        (place / ".run" / "plan.json").write_bytes(b"")
    elif harm == "the journal":
        journal.unlink()
    elif harm == "a line":
        journal.write_bytes(journal.read_bytes()[40:])
    else:
        (place / "output" / "stray.bin").write_bytes(b"stray")
        (place / ".run" / "stray.bin").write_bytes(b"stray")
        (place / "stray.bin").write_bytes(b"stray")
    ends_well(tiny, case, folder, "--resume")


# --- who may go on ---------------------------------------------------------------------------------------------------


def test_without_resume_an_unfinished_run_is_refused(tiny: Field, case: Case, folder: Path) -> None:
    begin(tiny, case, folder)
    before = tree(folder)
    refused(tiny.run(case, folder), 5, "an unfinished run", "2", "--resume", "--overwrite")
    assert tree(folder).keys() == before.keys()
    ends_well(tiny, case, folder, "--overwrite")


def test_another_command_does_not_go_on(tiny: Field, case: Case, folder: Path) -> None:
    begin(tiny, case, folder)
    changed = {"merge": ("--set", "scale=0.5")}.get(case.words[0], ("--rank", "1"))
    other = replace(case, words=(*case.words, *changed))
    refused(tiny.run(other, folder, "--resume"), 4, "another command or version", "--resume", "--overwrite")
    ends_well(tiny, case, folder, "--resume")


def test_nothing_begun_is_nothing_to_go_on_with(tiny: Field, case: Case, folder: Path) -> None:
    ends_well(tiny, case, folder, "--resume")
    assert "is complete already" in ends_well(tiny, case, folder, "--resume").said
    refused(tiny.run(case, folder), 5, "the output exists already")


OTHERS = {
    "again": [], "over it": ["--overwrite"], "going on": ["--resume"], "anew": ["--resume", "--overwrite"],
    "a shard": ["--shard-of", "1/2"],
}  # fmt: skip


def test_two_runs_into_one_output(tiny: Field, case: Case, folder: Path) -> None:
    """The first stands still in the middle; whatever the second wants, it is refused and harms nothing."""
    first = tiny.server.start(case.command(), folder, out=case.out, stop_at="entered")
    assert tiny.server.wait(first).stopped
    for what, more in OTHERS.items():
        if what == "a shard" and case.words[0] == "extract":
            continue  # the work of one process
        refused(tiny.run(case, folder, *more), 5, "another run is writing this output")
    if case.out == "out":
        for other in ("mix", "extract", "export LoRA"):
            refused(tiny.run(tiny.cases[other], folder), 5, "another run is writing this output")
    tiny.server.go(first)
    ended = tiny.server.wait(first)
    assert ended.code == 0, ended.said
    assert tiny.state(case, folder) == "new" and [p.name for p in folder.iterdir()] == [case.out]


def test_a_run_that_deletes_the_old_output_is_not_disturbed(tiny: Field) -> None:
    """The new output stands; the first run is still busy with the old one when the second comes to replace it."""
    case = tiny.cases["merge over"]
    folder = tiny.folder(case)
    first = tiny.server.start(case.command(), folder, out=case.out, stop_at="renamed")
    assert tiny.server.wait(first).stopped
    assert tiny.state(case, folder) == "new"
    refused(tiny.run(case, folder), 5, "another run is writing this output")
    refused(tiny.run(tiny.cases["merge"], folder), 5, "the output exists already")
    tiny.server.go(first)
    assert tiny.server.wait(first).code == 0
    assert tiny.state(case, folder) == "new" and [p.name for p in folder.iterdir()] == [case.out]


def test_an_output_that_appears_meanwhile_is_not_touched(tiny: Field, case: Case, folder: Path) -> None:
    first = tiny.server.start(case.command(), folder, out=case.out, stop_at="entered")
    assert tiny.server.wait(first).stopped
    (folder / case.out).write_bytes(b"theirs")
    tiny.server.go(first)
    refused(tiny.server.wait(first), 5, "appeared while", "--overwrite", "--resume")
    assert (folder / case.out).read_bytes() == b"theirs"
    (folder / case.out).unlink()
    ends_well(tiny, case, folder, "--resume")


# --- inputs ----------------------------------------------------------------------------------------------------------


@contextmanager
def input_of(tiny: Field) -> Iterator[Path]:
    """A weight file that the commands read; it is put back as it was, time and all."""
    file = tiny.world / "a" / "model.safetensors"
    data, status = file.read_bytes(), file.stat()
    try:
        yield file
    finally:
        restore(file, data, status)


def restore(file: Path, data: bytes, status: os.stat_result) -> None:
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_numbers(file: Path) -> None:
    """The same header and length, other numbers (small and finite, so that nothing else is wrong with them)."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = torch.full(((len(data) - start) // 4,), 0.25).numpy().tobytes()
    with file.open("r+b") as opened:  # in place: whoever has it open reads the new numbers
        opened.write(data)


CHANGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "touched": (lambda file: os.utime(file), 4, "changed"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"more"), 4, "size"),
    "other numbers": (other_numbers, 4, "changed"),
    "gone": (lambda file: file.unlink(), 3, "vanished"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_meanwhile(change: str, tiny: Field, case: Case, folder: Path) -> None:
    """Exit 4 (3 if it is gone), no output; once the file is as it was, --resume gives the bytes of an undisturbed run,
    without a number that was read in between."""
    act, code, word = CHANGES[change]
    with input_of(tiny) as file:
        trial = tiny.server.start(case.command(), folder, out=case.out, stop_at="entered")
        assert tiny.server.wait(trial).stopped
        time.sleep(0.01)  # the clock of the file system may be coarse
        act(file)
        tiny.server.go(trial)
        refused(tiny.server.wait(trial), code, word, "model.safetensors", "--resume")
        assert [p.name for p in folder.iterdir()] == [f"{case.out}.partial-run"]
    ends_well(tiny, case, folder, "--resume")


def test_an_input_that_changed_between(tiny: Field, case: Case, folder: Path) -> None:
    begin(tiny, case, folder)
    with input_of(tiny) as file:
        time.sleep(0.01)
        other_numbers(file)
        refused(tiny.run(case, folder, "--resume"), 4, "is not what it was", "model.safetensors", "--overwrite")
        file.unlink()
        assert tiny.run(case, folder, "--resume").code == 3
    ends_well(tiny, case, folder, "--resume")


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------

PROMPT = 5.0
"""Seconds: 2 are promised on a machine that has nothing else to do."""


def test_ctrl_c_in_the_middle_of_a_long_product(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Tensors that take a fraction of a second, and one that takes seconds and cannot be asked to stop."""
    g = torch.Generator().manual_seed(0)
    sides = {f"layers.{i}.weight": 120 if i < 6 else 1300 for i in range(7)}
    base = {n: torch.randn(s, s, generator=g) for n, s in sides.items()}
    save_file(base, tmp_path / "base.safetensors")
    for name in "ab":
        save_file({n: w + torch.randn(w.shape, generator=g) for n, w in base.items()}, tmp_path / f"{name}.safetensors")
    words = [
        sys.executable, "-m", "devec.cli.main", "decompose", "a.safetensors", "b.safetensors", "--base",
        "base.safetensors", "--exact", "--rank", "4", "-q",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*words, "-o", "out"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    journal = tmp_path / "out.partial-run" / JOURNAL
    end = time.monotonic() + 60
    while time.monotonic() < end and not (journal.exists() and journal.read_bytes().count(b"\n") >= 6):
        time.sleep(0.002)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    seconds = time.monotonic() - begun
    record_property("seconds to stop", round(seconds, 2))
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("devec: interrupted") and "6 tensors are finished and kept" in said
    assert "--resume" in said and seconds < PROMPT
    assert not (tmp_path / "out").exists()
    for more in (["-o", "out", "--resume"], ["-o", "one"]):
        subprocess.run([*words, *more], cwd=tmp_path, check=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    assert not (tmp_path / "out.partial-run").exists()
