"""Nothing is lost: kills and injected errors never leave a broken output, and --resume gives the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


def campaign(*words: str) -> dict[str, Counter[str]]:
    script = Path(__file__).with_name("campaign.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Counter(seen) for name, seen in json.loads(done.stdout).items()}


def check(report: dict[str, Counter[str]], least: int) -> None:
    total = sum(report.values(), Counter())
    lines = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in seen.items()) for name, seen in report.items()]
    print("\n".join(lines))
    assert sum(seen["tried"] for name, seen in report.items() if name.startswith("kill")) >= least
    for bad in ("corrupt", "not identical", "litter", "exit 1", "exit 99", "exit -14"):
        assert total[bad] == 0, "\n".join(lines)


def test_twenty_kills() -> None:
    check(campaign("--kills", "20"), 20)


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_two_hundred_kills_and_an_error_at_every_write(capsys: pytest.CaptureFixture[str]) -> None:
    report = campaign("--kills", "210", "--errors", "1")
    with capsys.disabled():
        print()
        check(report, 200)
        resumed = sum(seen["resumed"] for seen in report.values())
        assert resumed > 0, "no kill landed where there was something to go on with"
