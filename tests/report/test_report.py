"""Tables, pictures and the page: nothing lost, nothing rounded behind the reader's back, same bytes twice."""

from __future__ import annotations

import builtins
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from devec.core.errors import InputError, UsageError
from devec.report.page import Code, Picture, Section, page_html, write_page
from devec.report.plots import Bar, SpectrumPanel, plot_heatmap, plot_scores, plot_spectra
from devec.report.tables import Column, Table, score_table

TASKS = ["digits", "photo"]
ROWS = [
    {"method": "zero-shot", "scores": {"digits": 0.5, "photo": 0.25}},
    {"method": "random [draws]", "scores": {"digits": 0.75, "photo": 0.5}, "spreads": {"digits": 0.01},
     "mean_spread": 0.0061, "select": 0.6, "detail": "a|b"},
    {"method": "unfinished", "scores": {"digits": 0.9}},
]  # fmt: skip


def printed(table: Table, width: int) -> str:
    out = io.StringIO()
    table.print(Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_means_and_spreads() -> None:
    table = score_table("Scores", ROWS, TASKS)
    texts = table.texts()
    assert [c.key for c in table.columns] == ["method", "mean", "select", "digits", "photo", "detail"]
    assert texts[0][1:5] == ["37.5", "–", "50.0", "25.0"]
    assert texts[1][1:5] == ["62.5 ± 0.6", "60.0", "75.0 ± 1.0", "50.0"]
    assert texts[2][1] == "–"  # no mean over tasks of which one is missing
    plain = json.loads(json.dumps(table.dicts()))
    assert plain[1]["mean"] == 0.625 and plain[1]["mean_spread"] == 0.0061  # unrounded


def test_markdown_has_one_cell_per_column() -> None:
    text = score_table("Scores", ROWS, TASKS, note="One seed.").markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | --- |"
    assert text.startswith("**Scores**") and text.endswith("One seed.\n")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_shows_every_cell_at_any_width(width: int) -> None:
    tasks = [f"task{i}" for i in range(9)]
    rows = [{"method": f"method [{j}]", "scores": {t: (10 * j + i) / 100 for i, t in enumerate(tasks)}} for j in (1, 2)]
    shown = printed(score_table("Wide", rows, tasks, note="Note."), width)
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown and "Wide" in shown and "Note." in shown
    for word in [*tasks, "method [1]", *(f"{10 * j + i}.0" for j in (1, 2) for i in range(9))]:
        assert word in shown


def test_odd_numbers_are_shown_as_they_are() -> None:
    column = Column("x", "x", digits=2)
    shown = [column.text({"x": v}) for v in (float("nan"), float("inf"), None, 3, True, -0.005, 1e-9)]
    assert shown == ["nan", "inf", "–", "3", "True", "-0.01", "0.00"]


# -- pictures --------------------------------------------------------------------------------------------------------


def draw_all(folder: Path) -> list[Path]:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    folder.mkdir()
    spectra = {"a+b": [0.9, 0.5, 0.1], "a+c": [0.4], "b+c": []}
    panels = [
        SpectrumPanel("blocks.0.fc1", spectra, {"a+b": 0.3, "a+c": 0.1}),
        SpectrumPanel("blocks.0.fc2", {"a+b": [0.2, 0.1]}, {"a+b": 0.3}),
        SpectrumPanel("blocks.1.fc1", spectra),
        SpectrumPanel("blocks.1.fc2", {}),
    ]
    plot_spectra(folder / "spectra.png", panels, 0.85)
    plot_heatmap(folder / "cosines.png", ["a", "b"], [[1.0, -0.031], [-0.031, 1.0]], "Cosines", "cosine", signed=True)
    plot_heatmap(folder / "alike.png", ["a", "b"], [[None, 0.5], [0.5, None]], "Overlaps", "mean overlap")
    bars = [Bar("zero-shot", 0.5, kind="reference"), Bar("shared", 0.7, 0.02, [0.6, 0.8]),
            Bar("random", 0.6, kind="control")]  # fmt: skip
    plot_scores(folder / "bars.png", bars)
    return sorted(folder.iterdir())


def test_pictures_are_the_same_bytes_twice_and_carry_no_date(tmp_path: Path) -> None:
    first, second = draw_all(tmp_path / "one"), draw_all(tmp_path / "two")
    assert [p.name for p in first] == ["alike.png", "bars.png", "cosines.png", "spectra.png"]
    for a, b in zip(first, second, strict=True):
        data = a.read_bytes()
        assert data == b.read_bytes() and data.startswith(b"\x89PNG")
        assert b"tEXt" not in data and b"tIME" not in data


def test_colours_change_with_the_numbers(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="pictures need matplotlib")
    for name, value in (("low", 0.2), ("high", 0.9)):
        matrix = [[None, value, 0.2], [value, None, 0.9], [0.2, 0.9, None]]
        plot_heatmap(tmp_path / f"{name}.png", list("abc"), matrix, "Overlaps", "overlap")
    low, high = (image.imread(tmp_path / f"{n}.png") for n in ("low", "high"))
    assert low.shape == high.shape
    assert low[..., :3].mean() > high[..., :3].mean() + 0.01  # more is darker


def test_pictures_leave_the_callers_matplotlib_alone(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    before = dict(matplotlib.rcParams)
    draw_all(tmp_path / "x")
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tensor"):
        plot_spectra(tmp_path / "x.png", [])
    with pytest.raises(UsageError, match="no method"):
        plot_scores(tmp_path / "x.png", [])
    with pytest.raises(UsageError, match="square"):
        plot_heatmap(tmp_path / "x.png", ["a", "b"], [[0.0, 1.0]], "t", "l")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"pip install 'devec\[plot\]'"):
        plot_scores(tmp_path / "x.png", [Bar("a", 0.5)])


# -- page ------------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Collects outward references and checks that every element is closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.references += [v for k, v in attrs if k in ("href", "src") and v]
        self.ids |= {v for v in [found.get("id")] if v}
        if tag == "img":
            assert found["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_offline_and_escaped(tmp_path: Path) -> None:
    pictures = draw_all(tmp_path / "pictures")
    table = score_table("Scores <i>", ROWS, TASKS, note="a & b")
    sections = [
        Section("Scores", ["<script>alert(1)</script>", table, Code("x < y")]),
        Section("Pictures", [Picture(p, f'what "{p.stem}" shows', "A caption.") for p in pictures]),
    ]
    write_page(tmp_path / "page.html", 'A "title" & more', sections, lead="The lead.")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert not checker.tags & {"script", "link", "iframe", "object", "i"}
    assert {r.split(",")[0] for r in checker.references} == {"#s1", "#s2", "data:image/png;base64"}
    assert {"s1", "s2"} <= checker.ids
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "62.5 ± 0.6" in text and "prefers-color-scheme: dark" in text and "&lt;script&gt;" in text
    assert text == page_html('A "title" & more', sections, lead="The lead.")


def test_page_refuses_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    for name, reason in (("x.png", "not a PNG"), ("none.png", "cannot be read")):
        with pytest.raises(InputError, match=reason):
            write_page(tmp_path / "p.html", "t", [Section("s", [Picture(tmp_path / name, "x")])])
    assert not (tmp_path / "p.html").exists()
