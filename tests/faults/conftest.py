"""Two worlds for the campaign, and its report at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from faults.client import Server
from faults.trial import PHASES, PROCESSES, Field, Tally
from faults.world import SMALL, TINY

KEY = "faults"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server() as running:
        assert running.threads == 1
        yield running


@pytest.fixture(scope="session")
def small(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Field:
    """49 tensors in 9 files on two workers: there is time to be killed in."""
    return Field(tmp_path_factory.mktemp("small"), server, SMALL, workers=2)


@pytest.fixture(scope="session")
def tiny(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Field:
    """5 tensors in 3 files on one worker: every call can have its turn."""
    return Field(tmp_path_factory.mktemp("tiny"), server, TINY, workers=1)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """What the test tries, for the report; it fails if any of it went wrong."""
    found = Tally()
    yield found
    request.node.user_properties.append((KEY, found.as_dict()))
    if found.problems:
        pytest.fail(f"{len(found.problems)} of {found.tried} trials:\n" + "\n".join(found.problems[:20]), pytrace=False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a test: what was tried, where kills landed, how many ended whole."""
    reports = [r for group in terminalreporter.stats.values() for r in group if hasattr(r, "user_properties")]
    rows = sorted((r.nodeid.partition("::")[2], v) for r in reports for k, v in r.user_properties if k == KEY)
    if not rows:
        return
    terminalreporter.section("fault campaign")
    total: Counter[str] = Counter()
    landed: Counter[str] = Counter()
    for name, row in rows:
        terminalreporter.write_line(f"{name}: {_line(row)}")
        total.update({k: v for k, v in row.items() if isinstance(v, int)}, problems=len(row["problems"]))
        landed.update(row["landed"])
    moments = {p: landed.pop(p, 0) for p in (*PHASES.values(), *PROCESSES)}
    terminalreporter.write_line("")
    terminalreporter.write_line(f"kills at random moments: {_listed(moments)}")
    terminalreporter.write_line(f"faults in single calls: {_listed(landed)}")
    at_random = sum(moments.values())
    terminalreporter.write_line(
        f"{total['tried']} trials, {total['killed']} of them killed ({total['kills']} kills, {at_random} at random "
        f"moments): {total['complete']} ended with the bytes of an undisturbed run, {total['resumed']} by going on; "
        f"corrupt, partial or stray: {total['problems']}"
    )


def _line(row: dict[str, Any]) -> str:
    return (
        f"tried {row['tried']}, kills {row['kills']} [{_listed(row['landed'])}], "
        f"whole in the end {row['complete']} (gone on with {row['resumed']}), corrupt {len(row['problems'])}"
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.items() if count) or "none"
