"""``python -m benchmarks.peers.setup``: mergekit in an environment of its own, below ``benchmarks/out`` (git-ignored).

Packages come from whatever index pip is configured for; ``--torch-index`` takes torch from another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

HOME = Path(__file__).parents[1] / "out" / "peers"
ENVIRONMENT = HOME / "mergekit"
WANTED = {"torch": "2.13.0", "mergekit": "0.1.5"}
_ASK = (
    "import json, importlib.metadata as m, platform;"
    "print(json.dumps({'python': platform.python_version(), **{d.name.lower(): d.version for d in m.distributions()}}))"
)


def python_of(environment: Path = ENVIRONMENT) -> Path:
    return environment / "bin" / "python"


def versions(environment: Path = ENVIRONMENT) -> dict[str, str]:
    """Python and packages of an environment; empty where there is none."""
    if not python_of(environment).exists():
        return {}
    asked = subprocess.run([python_of(environment), "-c", _ASK], capture_output=True, text=True, check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else {}


def is_ready(environment: Path = ENVIRONMENT) -> bool:
    """Whether the environment holds the versions that the benchmark is about (``2.13.0+cpu`` is 2.13.0)."""
    found = versions(environment)
    return all(found.get(name, "").partition("+")[0] == version for name, version in WANTED.items())


def set_up(environment: Path = ENVIRONMENT, torch_index: str | None = None) -> None:
    """Create the environment and install into it. Raises CalledProcessError with pip's own words on the screen."""
    environment.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [str(python_of(environment)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch, mergekit = (f"{name}=={version}" for name, version in WANTED.items())
    if torch_index:
        subprocess.run([*pip, "--index-url", torch_index, torch], check=True)
    subprocess.run([*pip, torch, mergekit], check=True)


@click.command()
@click.option("--torch-index", metavar="ADDRESS", help="Take torch from this package index (e.g. one without CUDA).")
def main(torch_index: str | None) -> None:
    """Set up mergekit's environment, unless it stands already."""
    if not is_ready():
        wanted = ", ".join(f"{name} {version}" for name, version in WANTED.items())
        click.echo(f"setting up {wanted}: once, a few minutes, most of it the download of torch")
        set_up(torch_index=torch_index)
    click.echo("mergekit's environment is ready")


if __name__ == "__main__":
    main()
