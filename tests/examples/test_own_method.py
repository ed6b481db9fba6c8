"""A merge method from another package, by entry point: found, documented, and run by the engine as its own are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SOURCE = Path(__file__).parents[2] / "examples" / "own_method"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy, target = tmp_path_factory.mktemp("source") / "own_method", tmp_path_factory.mktemp("installed")
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True, capture_output=True)
    return target


def devec(installed: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "devec.cli.main", *map(str, words)], cwd=cwd, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )


@pytest.fixture
def models(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A base and three models of one matrix that is cut into several blocks of rows, and of one vector."""
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(1500, 400, generator=g) for name in ("base", "a", "b", "wild")}
    made["wild"] *= 1000
    for name, value in made.items():
        save_file({"w.weight": value, "w.bias": value[:, 0].contiguous()}, tmp_path / f"{name}.safetensors")
    return made


def test_the_method_is_listed_with_its_page(installed: Path, tmp_path: Path) -> None:
    assert "trimmed-mean" in devec(installed, "methods", cwd=tmp_path).stdout
    page = devec(installed, "methods", "trimmed-mean", cwd=tmp_path).stdout
    assert "Guarantees" in page and "trim" in page and "Tukey" in page


def test_the_engine_runs_it_as_its_own(
    installed: Path, models: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sources = ["a.safetensors", "b.safetensors", "wild.safetensors"]
    for workers in (1, 2):
        done = devec(
            installed, "merge", "--method", "trimmed-mean", "--base", "base.safetensors", *sources,
            "--set", "scale=0.5", "--workers", workers, "-o", f"out{workers}.safetensors", "-q", cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out1.safetensors").read_bytes() == (tmp_path / "out2.safetensors").read_bytes()
    base = models["base"]
    middle = torch.stack([models[n] - base for n in ("a", "b", "wild")]).median(dim=0).values
    found = load_file(tmp_path / "out1.safetensors")
    torch.testing.assert_close(found["w.weight"], base + 0.5 * middle, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["w.bias"], (base + 0.5 * middle)[:, 0], rtol=0, atol=1e-6)


def test_its_errors_are_a_users(installed: Path, models: dict[str, torch.Tensor], tmp_path: Path) -> None:
    words = ["merge", "--method", "trimmed-mean", "--base", "base.safetensors", "a.safetensors", "b.safetensors"]
    done = devec(installed, *words, "-o", "out.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and "needs 3 vectors, got 2" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
    done = devec(installed, *words, "--set", "trims=0", "-o", "out.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean trim?" in done.stderr
