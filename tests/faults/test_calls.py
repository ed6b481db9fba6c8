"""Every call that changes the disk fails once, or is the last: a clear error, and the next run ends well."""

from __future__ import annotations

import pytest

from faults.trial import Field, Tally, faults_of, tree
from faults.world import CASES

THOROUGH = {"merge over": 3, "decompose over": 3, "merge over a file": 1}
"""Cases in which the process also dies at every call and the disk stays full, in so many tests, to be shared out."""

PARTS = [(name, part) for name in CASES for part in range(THOROUGH.get(name, 1))]


@pytest.mark.faults
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_every_call(name: str, part: int, tiny: Field, tally: Tally) -> None:
    case = tiny.cases[name]
    known = set() if case.like is None else set(tiny.whole(tiny.cases[case.like]).calls)
    thorough = name in THOROUGH or case.like is not None
    trials = [
        (call, kind)
        for call in tiny.whole(case).calls
        if call not in known
        for kind in faults_of(call, thorough)
    ]
    assert case.like is not None or len(trials) > 20
    for call, kind in trials[part :: THOROUGH.get(name, 1)]:
        tiny.inject(case, call, kind, tally)


FEW = ("merge over", "decompose resumed", "export LoRA")


@pytest.mark.parametrize("name", FEW)
def test_some_calls(name: str, tiny: Field, tally: Tally) -> None:
    """A sample of the above, small enough for every day."""
    case = tiny.cases[name]
    for call in tiny.whole(case).calls[1::9]:
        tiny.inject(case, call, faults_of(call, thorough=False)[0], tally)


@pytest.mark.parametrize("name", ["merge over", "merge to a file", "decompose", "mix to a file"])
def test_writes_that_write_half(name: str, tiny: Field) -> None:
    """A call may write less than it was asked to, and says so; the rest must follow."""
    case = tiny.cases[name]
    folder = tiny.folder(case)
    ended = tiny.run(case, folder, short=True, counting=True)
    assert ended.code == 0, ended.said
    assert tree(folder / case.out) == tiny.whole(case).tree
    assert len(ended.calls) > len(tiny.whole(case).calls)


@pytest.mark.parametrize("name", ["merge", "merge over a file", "decompose", "extract"])
def test_a_file_that_the_system_lets_grow_no_further(name: str, small: Field) -> None:
    """The system's own refusal (a quota, a file system's limit) in place of a simulated one."""
    case = small.cases[name]
    folder = small.folder(case)
    ended = small.run(case, folder, limit=100_000)
    assert ended.code == 5 and "File too large" in ended.line
    assert small.after_an_error(case, folder, ended) == []
    assert small.goes_on(case, folder) == (True, [])
