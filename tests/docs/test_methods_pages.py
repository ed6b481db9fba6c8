"""docs/methods: every method of devec has a page, which says what its docstring and its signature say."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import snippets

from devec.methods import registry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "methods"
OWN = [m for m in registry.all_methods() if m.call.__module__.startswith("devec.")]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

WHOLE = """Summary.

Why it is there,
in two lines.

Math        y = a x
              + b
Symbols     a = slope; b = offset (at 0; not 1)
Shapes      one
Guarantees  linear
Numerics    none
Differs     nothing
Raises      UsageError: x; InputError: y
"""


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    sys.path.append(str(ROOT / "docs"))
    return importlib.import_module("make_methods")


@pytest.fixture(scope="module")
def docstrings(maker: ModuleType) -> ModuleType:
    return importlib.import_module("docstrings")


# --- pages ----------------------------------------------------------------------------------------------------------


def test_pages_are_fresh(maker: ModuleType) -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    assert written == maker.render(), "run `make docs`"


def test_every_method_has_a_page_and_stands_once_in_the_index() -> None:
    names = [m.name for m in OWN]
    assert sorted(path.stem for path in FOLDER.glob("*.md") if path.name != "README.md") == sorted(names)
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[`([\w-]+)`\]\(\1\.md\)", index, flags=re.MULTILINE)) == sorted(names)


@pytest.mark.parametrize("method", OWN, ids=lambda m: m.name)
def test_examples_name_the_method_and_parameters_that_it_takes(method: registry.Method) -> None:
    blocks = snippets.blocks_of((FOLDER / f"{method.name}.md").read_text(encoding="utf-8"))
    if method.needs:  # Python, which test_docs runs
        assert any(block.language == "python" and f'devec.merge("{method.name}"' in block.body for block in blocks)
        return
    lines = [line for block in blocks if block.language == "sh" for line in snippets.command_lines(block.body)]
    assert lines
    for words in map(shlex.split, lines):
        if method.kind == "decompose":
            assert words[:2] == ["devec", "decompose"]
            continue
        assert words[:4] == ["devec", "merge", "--method", method.name]
        pairs = [words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--set"]
        registry.bind(method, dict(pairs))


@pytest.mark.parametrize("method", [m for m in OWN if m.kind == "merge"], ids=lambda m: m.name)
def test_parameters_and_defaults_are_those_of_the_signature(method: registry.Method) -> None:
    text = (FOLDER / f"{method.name}.md").read_text(encoding="utf-8")
    table = text.split("## Parameters")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, flags=re.MULTILINE))
    assert list(rows) == list(method.parameters)
    for name, parameter in method.parameters.items():
        stated = rows[name]
        if stated == "required":
            assert parameter.default is parameter.empty
        elif stated in ("not set", "empty"):
            assert parameter.default == {"not set": None, "empty": ""}[stated]
        else:
            assert registry.convert(method, parameter, stated.strip("`")) == parameter.default


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda p: p.stem)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for file, heading in re.findall(r"\]\(([^)\s:#]*)#([^)\s]+)\)", text):
        target = (page.parent / file if file else page).read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.+)$", FENCED.sub("", target), flags=re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


# --- docstrings -----------------------------------------------------------------------------------------------------


def test_a_docstring_is_read_whole(docstrings: ModuleType) -> None:
    page = docstrings.parse(WHOLE)
    assert (page.summary, page.paragraphs) == ("Summary.", ("Why it is there, in two lines.",))
    assert tuple(page.sections) == docstrings.SECTIONS
    assert page.sections["Math"] == "y = a x\n  + b"
    assert docstrings.items(page.sections["Symbols"]) == ["a = slope", "b = offset (at 0; not 1)"]
    assert docstrings.items(page.sections["Raises"]) == ["UsageError: x", "InputError: y"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Differs ", "Remarks ", "unknown section 'Remarks'"),
        ("Differs     nothing\n", "", "no section Differs"),
        ("Numerics    none\nDiffers     nothing\n", "Differs     nothing\nNumerics    none\n", "in the order"),
        ("Shapes      one\n", "Shapes      one\nShapes      two\n", "section Shapes is there twice"),
        ("Shapes      one\n", "Shapes  one\n", "starts at column 12"),
        ("Shapes      one\n", "Shapes      one\n\n", "next line of Shapes"),
        ("              + b", "  + b", "next line of Math"),
        ("Summary.\n\n", "Summary,\nand more.\n\n", "the summary is one line"),
        (WHOLE, "", "the summary is one line"),
    ],
)
def test_what_does_not_fit_is_an_error(docstrings: ModuleType, old: str, new: str, message: str) -> None:
    assert old in WHOLE
    with pytest.raises(ValueError, match=message):
        docstrings.parse(WHOLE.replace(old, new))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a * b <= c", r"a \* b \<= c"),
        ("w_i and |w_i|_1 stay", r"w_i and |w_i|\_1 stay"),
        ("(then=ties, or k=1) only", "(`then=ties`, or `k=1`) only"),
        ("matrices=^(?!.*text), conv=other.", "`matrices=^(?!.*text)`, `conv=other`."),
        ("``a * b`` of arXiv:2306.01708", "``a * b`` of [arXiv:2306.01708](https://arxiv.org/abs/2306.01708)"),
    ],
)
def test_words_keep_their_meaning_in_markdown(maker: ModuleType, text: str, shown: str) -> None:
    assert maker.prose(text) == shown


def test_a_required_parameter_wants_an_example(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(maker.EXAMPLES, "t")
    with pytest.raises(ValueError, match=r"slerp: give t a value in EXAMPLES"):
        list(maker.examples(registry.get("merge", "slerp")))
