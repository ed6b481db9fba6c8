"""What is run: the same two merges by mergekit, by devec, and as a plain copy of the same bytes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.models import weight_files
from benchmarks.peers.setup import ENVIRONMENT, python_of

WEIGHTS = (0.47, 0.36, 0.23, 0.11)
"""One per fine-tune. Their sum is not 1, so that an average has to divide; and no few of them add up to half of it, or
averages of neighbouring bfloat16 numbers would be ties, which float32 breaks by chance."""

ROOT = Path(__file__).parents[2]

MERGEKIT_ALWAYS = ("--quiet", "--no-copy-tokenizer")
MERGEKIT_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "defaults": (),
    "small shards": ("--out-shard-size", "256M"),
    "small shards, one thread": ("--out-shard-size", "256M", "--num-threads", "1"),
    "small shards, async": ("--out-shard-size", "256M", "--async-write"),
    "small shards, one thread, async": ("--out-shard-size", "256M", "--num-threads", "1", "--async-write"),
}
"""Small shards, because mergekit holds a whole output shard in memory. --lazy-unpickle concerns pickles alone, and
--low-cpu-memory, --read-to-gpu, --multi-gpu a graphics card."""

IMPORTS = {
    "mergekit": "import torch, mergekit.merge, mergekit.scripts.run_yaml",
    "devec": "import torch, devec, devec.cli.main; devec.merge, devec.apply, devec.save",
    "copy": "import benchmarks.peers.plain_copy",
}
"""What each command imports before it does anything."""


@dataclass(frozen=True)
class Case:
    """One merge: which method, of which inputs. ``base`` is ``None`` where the method reads none."""

    method: str
    base: Path | None
    models: tuple[Path, ...]

    @property
    def inputs(self) -> list[Path]:
        """Weight files that are read."""
        folders = [*([self.base] if self.base else []), *self.models]
        return [file for folder in folders for file in weight_files(folder)]

    @property
    def output_size(self) -> int:
        """Bytes of weights that are written."""
        return sum(file.stat().st_size for file in weight_files(self.models[0]))


def cases(folders: list[Path]) -> list[Case]:
    """Task arithmetic and the weighted average, of a base and its fine-tunes."""
    base, *models = folders
    return [Case("task-arithmetic", base, tuple(models)), Case("average", None, tuple(models))]


def environment() -> dict[str, str]:
    """For the children: each tool's own choice of threads, and no look-up on the network."""
    threads = ("OMP_", "MKL_", "KMP_", "OPENBLAS_", "NUMEXPR_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(threads)}
    # so that ``-m devec.cli.main`` and ``-m benchmarks...`` mean this tree
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def import_command(tool: str) -> list[str]:
    return [str(python_of()) if tool == "mergekit" else sys.executable, "-c", IMPORTS[tool]]


def command(tool: str, case: Case, out: Path, settings: tuple[str, ...] = ()) -> list[str]:
    """The command line that writes ``out`` (a folder; for the copy, one file in it). ``settings`` are mergekit's."""
    if tool == "mergekit":
        return _mergekit(case, out, settings)
    if tool == "devec":
        return _devec(case, out)
    out.mkdir()
    files = [str(file) for file in case.inputs]
    return [
        sys.executable, "-m", "benchmarks.peers.plain_copy", str(out / "copy"), str(case.output_size), *files,
    ]  # fmt: skip


def _mergekit(case: Case, out: Path, settings: tuple[str, ...]) -> list[str]:
    document: dict[str, object] = {
        "merge_method": {"task-arithmetic": "task_arithmetic", "average": "linear"}[case.method],
        "models": [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(case.models, WEIGHTS, strict=True)
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if case.base:
        document["base_model"] = str(case.base)
    config = out.with_suffix(".yml")
    config.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return [str(ENVIRONMENT / "bin" / "mergekit-yaml"), str(config), str(out), *MERGEKIT_ALWAYS, *settings]


def _devec(case: Case, out: Path) -> list[str]:
    weights = "weights=" + ",".join(map(str, WEIGHTS))
    base = ["--base", str(case.base), "--set", "scale=1"] if case.base else []
    return [
        sys.executable, "-m", "devec.cli.main", "merge", "--method", case.method, *base, *map(str, case.models),
        "--set", weights, "--dtype", "float32", "--out-dtype", "bfloat16", "--quiet", "-o", str(out),
    ]  # fmt: skip
