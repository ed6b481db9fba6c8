"""A real process: what ``--max-memory`` promises is measured from outside, where the system counts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import devec
from reference.planted import generator

WORDS, WIDTH = 32_768, 1024
MIB = 1 << 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peaks of memory from /proc"),
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding in bf16 and two fine-tunes: a common change of rank 16 over noise."""
    folder, g = tmp_path_factory.mktemp("table"), generator(0)
    base = (0.02 * torch.randn(WORDS, WIDTH, generator=g)).bfloat16()
    change = 1e-2 * torch.randn(WORDS, 16, generator=g) @ torch.randn(16, WIDTH, generator=g) / 4
    save_file({"embed.weight": base}, folder / "base.safetensors")
    for name in "ab":
        tuned = base.float() + change + 1e-3 * torch.randn(WORDS, WIDTH, generator=g)
        save_file({"embed.weight": tuned.bfloat16()}, folder / f"{name}.safetensors")
    return folder


def measured(folder: Path, out: str, rule: str, budget: str) -> tuple[int, int, str]:
    """(exit code, peak of resident bytes, what was said)."""
    end = "import atexit; atexit.register(lambda: print([x for x in open('/proc/self/status') if 'VmHWM' in x][0]))"
    words = ["decompose", *(str(folder / f"{n}.safetensors") for n in "ab"), "--base", str(folder / "base.safetensors")]
    words += ["-o", str(folder / out), "-q", "--device", "cpu", "--rank", rule, "--max-memory", budget]
    done = subprocess.run(
        [sys.executable, "-c", f"{end}; import sys; from devec.cli.main import run; sys.exit(run(sys.argv[1:]))",
         *words],
        env={**os.environ, "PYTHONPATH": str(Path(devec.__file__).parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak is not None, done.stderr
    return done.returncode, int(peak[1]) * 1024, done.stderr


@pytest.mark.parametrize("rule", ["auto", "energy=0.9", "none"])
def test_the_process_stays_within_the_smallest_budget_that_was_named(table: Path, rule: str) -> None:
    budget = "1MiB"
    for attempt in range(4):
        code, peak, said = measured(table, f"{rule}-{attempt}", rule, budget)
        named = re.search(r"Give --max-memory (\d+)MiB", said)
        if code != 5 or named is None:
            break
        budget = f"{named[1]}MiB"
    assert code == 0, said
    assert peak <= int(budget.removesuffix("MiB")) * MIB
    if rule == "auto":  # the process itself takes most of it; both deltas would take 256 MiB
        empty = measured(table, "nothing", rule, "1MiB")[1]
        assert int(budget.removesuffix("MiB")) * MIB - empty < 4 * WORDS * WIDTH
