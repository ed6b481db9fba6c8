"""``kill -9`` at random moments: nothing is lost, and nothing unfinished stands under a final name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from random import Random

import pytest

from faults.trial import Field, Tally
from faults.world import CASES

MOMENTS = ("anywhere", "tensor", "finish", "anywhere", "sync", "open", "renamed", "anywhere", None)
"""Over the whole run, or after a mark for as long as it took to the next: every phase has its turn, however short."""

KILLS = 13
"""Killed runs for each command, and the runs that resume them beside."""

FEW = ("merge over", "decompose", "merge to a file", "export to a model", "mix")


def killed(field: Field, names: Sequence[str], count: int, tally: Tally) -> None:
    moments, turns = cycle(MOMENTS), cycle(names)
    for trial in range(4 * count):  # one that ended before its time is no kill
        if tally.killed >= count:
            break
        name = next(turns)
        field.kill(field.cases[name], Random(f"{name} {trial}"), tally, next(moments))
    assert tally.killed >= count, tally


def test_twenty_kills(small: Field, tally: Tally) -> None:
    killed(small, FEW, 20, tally)


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("resumed")])
def test_kills(name: str, small: Field, tally: Tally) -> None:
    killed(small, [name], KILLS, tally)
