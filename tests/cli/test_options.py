"""Words of the command line that are more than a number: sizes, parts of several, and what join leaves out."""

from __future__ import annotations

from fractions import Fraction

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devec.cli.options import ShardOf, Size
from devec.cli.vectors import without_shard

UNITS = {"": 1, "B": 1, "kB": 1000, "MB": 10**6, "gb": 10**9, "KiB": 1 << 10, "MIB": 1 << 20, "GiB": 1 << 30}


def size(text: object) -> int:
    return Size().convert(text, None, None)


@given(st.integers(0, 10**12), st.integers(0, 999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit(whole: int, thousandths: int, unit: str, space: str) -> None:
    exact = (Fraction(whole) + Fraction(thousandths, 1000)) * UNITS[unit]
    text = f"{space}{whole}.{thousandths:03d}{space}{unit}"
    if exact < 1:
        with pytest.raises(click.BadParameter, match="at least one byte"):
            size(text)
    else:
        assert size(text) == int(exact)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("5GB", 5 * 10**9), ("1.5GiB", 3 << 29), (".5KB", 500), ("7.", 7), (4096, 4096), ("9007199254740993", 2**53 + 1)],
)
def test_sizes(text: object, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "GB", ".", "1.2.3GB", "-1GB", "1e3MB", "5 G B", "5TBs", "0", "0.1", "nan", "٣GB"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter):
        size(text)


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_part_i_of_n(index: int, more: int) -> None:
    assert ShardOf().convert(f"{index}/{index + more}", None, None) == (index, index + more)
    assert ShardOf().convert((index, index + more), None, None) == (index, index + more)


@pytest.mark.parametrize("text", ["", "/", "2", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "a/b", "1.0/2", "²/3", " 1/2"])
def test_what_is_no_part_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter, match="no part like 2/4"):
        ShardOf().convert(text, None, None)


@pytest.mark.parametrize("spelled", [["--shard-of", "2/3"], ["--shard-of=2/3"]])
def test_join_gives_the_command_without_its_part(spelled: list[str]) -> None:
    before, after = ["merge", "--method", "average", "a", "b"], ["-o", "out", "--resume"]
    assert without_shard([*before, *spelled, *after]) == [*before, *after]
    assert without_shard([*before, *after]) == [*before, *after]
    assert without_shard([*before, *after, *spelled]) == [*before, *after]
