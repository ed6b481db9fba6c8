"""An artifact refers to dense inputs by paths relative to itself: both may move together, neither alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devec.cli.main import run


@pytest.fixture
def house(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    home = tmp_path / "house"
    home.mkdir()
    base = {"w": torch.randn(24, 16, generator=g)}
    save_file(base, home / "base.safetensors")
    for name in "ab":
        low = torch.randn(24, 2, generator=g) @ torch.randn(2, 16, generator=g)
        save_file({"w": base["w"] + low}, home / f"{name}.safetensors")
    files = [str(home / f"{n}.safetensors") for n in "ab"]
    assert run(["decompose", *files, "--base", str(home / "base.safetensors"), "-o", str(home / "parts"), "-q"]) == 0
    return home


def export(home: Path, out: Path) -> int:
    base = str(home / "base.safetensors")
    return run(["export", f"{home / 'parts'}#unique:a", "--base", base, "-o", str(out), "-q"])


def test_moved_together_the_parts_are_the_same(house: Path, tmp_path: Path) -> None:
    assert export(house, tmp_path / "before.safetensors") == 0
    moved = tmp_path / "elsewhere" / "house"
    moved.parent.mkdir()
    house.rename(moved)
    assert export(moved, tmp_path / "after.safetensors") == 0
    before, after = load_file(tmp_path / "before.safetensors"), load_file(tmp_path / "after.safetensors")
    assert torch.equal(before["w"], after["w"])


def test_moved_alone_the_missing_file_is_named(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (house / "a.safetensors").rename(house / "gone.safetensors")
    assert export(house, tmp_path / "after.safetensors") == 3
    assert "a.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "after.safetensors").exists()
