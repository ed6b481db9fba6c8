"""Two paths change places, or nothing moves."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from devec.io.exchange import exchange


def put(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "inside").write_text(text)
    else:
        path.write_text(text)


def text_of(path: Path) -> str:
    return (path / "inside").read_text() if path.is_dir() else path.read_text()


@pytest.mark.parametrize("one", ["file", "folder"])
@pytest.mark.parametrize("other", ["file", "folder"])
def test_two_paths_change_places(one: str, other: str, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b ü"
    put(a, one, "one")
    put(b, other, "other")
    inodes = a.stat().st_ino, b.stat().st_ino
    if not exchange(a, b):
        pytest.skip("this file system cannot exchange two paths")
    assert text_of(a) == "other" and text_of(b) == "one"
    assert (b.stat().st_ino, a.stat().st_ino) == inodes  # moved, not copied
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b ü"]


@pytest.mark.parametrize("missing", ["a", "b", "both"])
def test_a_path_that_is_missing_moves_nothing(missing: str, tmp_path: Path) -> None:
    for name in "ab":
        if missing not in (name, "both"):
            put(tmp_path / name, "folder", name)
    before = sorted(tmp_path.rglob("*"))
    assert not exchange(tmp_path / "a", tmp_path / "b")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_system_without_the_call_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", "file", "a")
    put(tmp_path / "b", "file", "b")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    assert not exchange(tmp_path / "a", tmp_path / "b") and text_of(tmp_path / "a") == "a"
