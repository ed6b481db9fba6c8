"""The wheel is complete, and the command works from it, outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path, **extra_env: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra_env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would pack whatever an older build left in the checkout's build folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    [found] = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    package = ROOT / "src" / "devec"
    here = {
        f"devec/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert here - packed == set(), "not packed: name them under [tool.setuptools.package-data]"
    strangers = {name for name in packed - here if ".dist-info/" not in name}
    assert strangers == set()
    assert "devec/py.typed" in packed
    assert any(name.endswith("/licenses/LICENSE") for name in packed)


def test_version_of_the_installed_wheel_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import devec; print(devec.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)
    printed = run(installed / "bin" / "devec", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert PROJECT["version"] in printed.split()


def test_help_of_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    printed = run(sys.executable, "-m", "devec.cli.main", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "decompose" in printed
