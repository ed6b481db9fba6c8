"""What an unfinished output remembers, and who may write it: locks that end with their process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devec.core.errors import IncompatibleError, InputError, RefusedError
from devec.io.journal import (
    Finished,
    Identity,
    Journal,
    check_same_run,
    check_unchanged,
    lock,
    read_lines,
    read_plan,
    stamp,
    write_plan,
)

HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_SH if sys.argv[2] == "shared" else fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
"""Another process that holds a lock until its input ends; without devec, so that it starts at once."""


@contextmanager
def held_by_another_process(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_locks_between_processes(kind: str, tmp_path: Path) -> None:
    place = tmp_path
    if kind == "file":
        place = tmp_path / "x"
        place.touch()

    def free(*, shared: bool) -> bool:
        fd = os.open(place, os.O_RDONLY)
        try:
            return lock(fd, shared=shared)
        finally:
            os.close(fd)

    assert free(shared=False) and free(shared=True)
    with held_by_another_process(place, "shared"):
        assert free(shared=True) and not free(shared=False)
    with held_by_another_process(place, "exclusive") as other:
        assert not free(shared=True) and not free(shared=False)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert free(shared=False)  # a lock ends with its process, however that ends


def test_a_second_writer_of_a_journal_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(RefusedError, match=r"another process writes this part.*--shard-of"):
        Journal(tmp_path)
    other = Journal(tmp_path, "-2-of-3")
    journal.close()
    other.close()
    Journal(tmp_path).close()


records = st.builds(
    Finished, st.text(min_size=1), st.text(), st.text(), st.integers(0, 1 << 50),
    st.dictionaries(st.integers(0, 3).map(str), st.dictionaries(st.text(), st.text(), max_size=2), max_size=2),
)  # fmt: skip


@given(st.lists(records, max_size=6), st.data())
@settings(max_examples=30)
def test_what_was_finished_comes_back_whatever_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, written: list[Finished], data: st.DataObject
) -> None:
    """A process that dies leaves whole lines and perhaps a part of one."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    ends = [0]
    for record in written:
        journal.append(record)
        ends.append(journal.path.stat().st_size)
    journal.close()
    assert read_lines(journal.path) == ({r.name: r for r in written}, ends[-1])
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(journal.path, cut)
    whole = sum(end <= cut for end in ends) - 1
    again = Journal(folder)
    assert again.finished == {r.name: r for r in written[:whole]}
    more = Finished("one more", "f", "s", 1)
    again.append(more)
    again.close()
    assert read_lines(journal.path)[0] == {r.name: r for r in [*written[:whole], more]}


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b'{"name": "x"}\n', b"\xff\xfe\n", b"\n"])
def test_a_broken_line_ends_what_is_known(line: bytes, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(Finished("a", "f", "s", 1))
    journal.close()
    size = journal.path.stat().st_size
    later = json.dumps({"name": "b", "file": "f", "digest": "s", "bytes": 1}).encode() + b"\n"
    journal.path.write_bytes(journal.path.read_bytes() + line + later)
    assert read_lines(journal.path) == ({"a": Finished("a", "f", "s", 1)}, size)
    Journal(tmp_path).close()
    assert journal.path.stat().st_size == size


def test_what_is_struck_is_gone_until_it_is_finished_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in "ab":
        journal.append(Finished(name, "f", "s", 1))
    journal.forget(["a", "never there"])
    assert set(journal.finished) == {"b"}
    journal.append(Finished("a", "f", "another", 1))
    journal.close()
    assert read_lines(journal.path)[0]["a"].digest == "another"


# --- the same run ----------------------------------------------------------------------------------------------------


def identity(folder: Path, **changed: object) -> Identity:
    known: dict[str, object] = {
        "command": {"command": "merge", "seed": 0}, "outputs": "abc", "inputs": stamp([folder / "input"]),
        "words": ("merge", "x"), "place": "/somewhere",
    }  # fmt: skip
    return Identity(**{**known, **changed})  # type: ignore[arg-type]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"w")
    assert read_plan(tmp_path) is None
    for _ in range(2):  # each of several processes writes it
        write_plan(tmp_path, identity(tmp_path))
    plan = read_plan(tmp_path)
    assert plan is not None and plan == identity(tmp_path).as_dict() and plan["words"] == ["merge", "x"]
    check_same_run(tmp_path, plan, identity(tmp_path))
    check_same_run(tmp_path, plan, identity(tmp_path, words=("merge", "x", "--resume")))  # how it is run is not what
    for text in ("", "{", "[]"):
        (tmp_path / ".run" / "plan.json").write_text(text)
        assert read_plan(tmp_path) is None


def test_another_command_or_another_input_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"w")
    plan = identity(tmp_path).as_dict()
    for other, message in (
        ({"command": {"command": "merge", "seed": 1}}, r"another command.*seed then = 0, seed now = 1"),
        ({"outputs": "abd"}, "another command"),
        ({"inputs": {}}, "not an input"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            check_same_run(tmp_path, plan, identity(tmp_path, **other))
    (tmp_path / "input").write_bytes(b"longer")
    with pytest.raises(IncompatibleError, match=r"then = 1 bytes.*now = 6 bytes.*--resume") as error:
        check_same_run(tmp_path, plan, identity(tmp_path))
    assert error.value.exit_code == 4


def test_inputs_that_change_or_vanish_while_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(b"w")
    (folder / "deeper").mkdir()
    before = stamp([folder, folder / "a"])
    assert set(before) == {str(folder / "a"), str(folder / "b")}
    check_unchanged(before)
    os.utime(folder / "a", ns=(0, 1))
    with pytest.raises(IncompatibleError, match="changed while it was read") as changed:
        check_unchanged(before)
    (folder / "a").unlink()
    with pytest.raises(InputError, match="vanished") as gone:
        check_unchanged(before)
    assert changed.value.passing and gone.value.passing  # what is finished is kept
