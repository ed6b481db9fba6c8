"""What the command does to its own process: hints that change no result, and an end that loses nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devec.cli import process


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("b.safetensors", "a.safetensors", "config.json"):
        (folder / name).write_bytes(b"x" * 100)
    return folder


def test_weights_are_found_in_every_spelling_of_a_path(model: Path) -> None:
    both = [model / "a.safetensors", model / "b.safetensors"]
    assert process._weights(str(model)) == process._weights(f"name={model}") == both
    assert process._weights(str(both[0])) == both[:1]
    for word in ("--base", f"--base={model}x", "org/name", str(model / "config.json"), "a\0b", "x" * 5000):
        assert process._weights(word) == []


class AtOnce:
    """In place of a thread: runs where it is started."""

    def __init__(self, target: Callable[..., None], args: tuple[object, ...], **_: object) -> None:
        self.start = lambda: target(*args)


def test_only_commands_that_read_everything_read_ahead(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Path]] = []
    monkeypatch.setattr(process, "_advise", asked.append)

    def ahead(*words: str) -> list[list[Path]]:
        asked.clear()
        process.read_ahead(words)
        return asked

    for words in ((), ("inspect", str(model)), ("merge", "missing"), ("merge", str(model), "--dry-run")):
        assert ahead(*words) == []
    monkeypatch.setattr(process, "Thread", AtOnce)
    assert ahead("merge", str(model)) == [[model / "a.safetensors", model / "b.safetensors"]]


def test_a_hint_about_a_file_that_is_gone_is_no_error(model: Path) -> None:
    process._advise([model / "gone.safetensors", model / "a.safetensors"])


def test_the_end_flushes_what_was_printed(tmp_path: Path) -> None:
    program = "from devec.cli import process; print('x' * 100_000, end=''); process.leave(7)"
    with (tmp_path / "out").open("wb") as out:
        assert subprocess.run([sys.executable, "-c", program], stdout=out, check=False).returncode == 7
    assert (tmp_path / "out").read_bytes() == b"x" * 100_000


def test_collection_goes_on_after_torch_is_there() -> None:
    program = (
        "import gc, sys; from devec.cli import process; assert 'torch' not in sys.modules;"
        "got = process.with_torch(lambda: (gc.isenabled(), 'torch' in sys.modules, gc.get_freeze_count() > 0))();"
        "assert got == (True, True, True), got"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert gc.isenabled()
