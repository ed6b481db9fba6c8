"""The demo on a network small enough for a test: complete, and the same bytes twice."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest

from devec.api import demo as demo_module
from devec.evaluate import demo_net

pytest.importorskip("sklearn", reason="the demo's data come with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws pictures")


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_net, "NetConfig", partial(demo_net.NetConfig, width=48, blocks=1))
    monkeypatch.setattr(demo_net, "Pretraining", partial(demo_net.Pretraining, steps=5))
    monkeypatch.setattr(demo_net, "Finetuning", partial(demo_net.Finetuning, steps=10))
    monkeypatch.setattr(demo_module, "STEPS", 2)
    monkeypatch.setattr(demo_module, "DRAWS", 2)
    tasks = demo_module.make_tasks
    monkeypatch.setattr(demo_module, "make_tasks", lambda seed: tasks(seed)[:3])


def test_two_runs_write_the_same_bytes_and_every_part_can_be_read(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from devec.cli.main import run

    monkeypatch.chdir(tmp_path)
    assert run(["demo", "-o", "one", "-q"]) == 0
    assert run(["demo", "-o", "two", "-q"]) == 0
    first, second = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert first == second
    for name in ("report.html", "results.json", "merged.safetensors", "scores.png", "models/base.safetensors"):
        assert name in first
    for path in (tmp_path / "one").rglob("*"):
        if path.suffix in (".json", ".yaml", ".html", ".md"):
            assert ".partial-" not in path.read_text(encoding="utf-8"), path
    methods = [row["method"] for row in json.loads((tmp_path / "one" / "results.json").read_text())["table"]]
    for method in ("zero-shot (pre-trained)", "individual (one model a task)", "task arithmetic, learned"):
        assert method in methods
    assert run(["verify", "one/merged.safetensors"]) == 0
    edit = ["apply", "--base", "one/models/base.safetensors", "--subtract", "1", "one/decomposition#unique:digits"]
    assert run([*edit, "-o", "edited.safetensors", "-q"]) == 0
    assert run(["demo", "-o", "one", "-q"]) == 5
