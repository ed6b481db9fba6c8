"""docs/defaults.md names every choice of a decomposition with the default that the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from devec.core.options import Factoring, View

PAGE = (Path(__file__).parents[2] / "docs" / "defaults.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `--([a-z-]+)` \| `?([^|`]+?)`? \|", PAGE, flags=re.MULTILINE))
WITHOUT_A_DEFAULT = {"target"}  # it names one of the user's own vectors


@pytest.mark.parametrize("choice", [f for kind in (Factoring, View) for f in fields(kind)], ids=lambda f: f.name)
def test_every_choice_and_its_default(choice: object) -> None:
    name, default = choice.name, choice.default  # type: ignore[attr-defined]
    if name in WITHOUT_A_DEFAULT:
        assert default is None
        return
    stated = ROWS[name.replace("_", "-")]
    assert stated == ("off" if default is False else f"{default:g}" if isinstance(default, float) else str(default))


def test_nothing_else_is_listed() -> None:
    known = {f.name.replace("_", "-") for kind in (Factoring, View) for f in fields(kind)}
    assert set(ROWS) <= known
