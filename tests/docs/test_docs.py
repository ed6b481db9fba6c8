"""The documents say what is true: pages are fresh, snippets run, commands and links exist."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import snippets
import workspace

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("experiments/*/README.md"))
)
RUNNABLE = [name for name in DOCUMENTS if not name.startswith("experiments/")]


@pytest.fixture(scope="module")
def cli() -> click.Group:
    from devec.cli.main import cli

    return cli


@pytest.fixture(scope="module")
def equations() -> ModuleType:
    sys.path.append(str(ROOT / "docs"))
    return importlib.import_module("make_equations")


# --- equations.md ---------------------------------------------------------------------------------------------------


def test_equations_page_is_fresh(equations: ModuleType) -> None:
    written = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    assert written == equations.render(), "run `make docs`"


def test_every_equation_of_the_method_has_a_function_and_a_test(equations: ModuleType) -> None:
    tests = equations.read_tests(ROOT / "tests")
    held: dict[str, int] = {}
    for row in equations.collect():
        if row.paper == equations.PAPER:
            held[row.label] = held.get(row.label, 0) + len(equations.tests_of(row.where, row.label, tests))
    method = [f"Eq. {n}" for n in range(6, 15)] + ["Prop. 3.1", "Theorem 6.1"]
    assert [label for label in method if label not in held] == [], "no docstring cites these"
    assert [label for label in method if not held[label]] == [], "no test uses what cites these"


@pytest.mark.parametrize(
    ("doc", "labels"),
    [
        ("Eq. (9) alone", ["Eq. 9"]),
        ("see Eq. (6)-(8).", ["Eq. 6", "Eq. 7", "Eq. 8"]),
        ("Eq. (8), (9) for two vectors", ["Eq. 8", "Eq. 9"]),
        ("(Eq. 11, 12), in O(n)", ["Eq. 11", "Eq. 12"]),
        ("Eq. 9, 3 directions", ["Eq. 9"]),
        ("Proposition 3.1 and Theorem 6.1", ["Prop. 3.1", "Theorem 6.1"]),
    ],
)
def test_citations_are_read(equations: ModuleType, doc: str, labels: list[str]) -> None:
    found = list(equations.citations("here", doc, f"of arXiv:{equations.PAPER}"))
    assert [row.label for row in found] == labels
    assert {row.paper for row in found} == {equations.PAPER}


def test_a_citation_belongs_to_the_paper_beside_it(equations: ModuleType) -> None:
    doc = "arXiv:1305.5870, Eq. (11); Eq. (10) of arXiv:2512.22511; Eq. (2) of Bjorck\n    and Golub (1973)."
    assert {(row.paper, row.label) for row in equations.citations("here", doc, "")} == {
        ("1305.5870", "Eq. 11"),
        ("Bjorck and Golub (1973)", "Eq. 2"),
        ("2512.22511", "Eq. 10"),
    }
    assert [row.paper for row in equations.citations("here", "Eq. (11)", "")] == [equations.NO_PAPER]


# --- snippets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    workspace.build(folder)
    return folder


@pytest.mark.parametrize("document", RUNNABLE)
def test_snippets_run(
    document: str, small_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: click.Group
) -> None:
    for part in small_files.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in snippets.blocks_of((ROOT / document).read_text(encoding="utf-8")):
        snippets.run_block(block, names, cli, document)


def test_readme_has_a_quick_start_of_each_kind() -> None:
    found = snippets.blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(block.language == "python" for block in found)
    lines = [line for block in found if block.language in snippets.SHELL for line in snippets.command_lines(block.body)]
    assert len(lines) >= 3


def test_blocks_and_command_lines_are_found() -> None:
    text = "a\n```sh\n$ devec one \\\n  two\nmake x\ndevec three  # exit 4\n```\n- b\n  ```python\n  x = 1\n  ```\n"
    shell, python = snippets.blocks_of(text)
    assert [line.split() for line in snippets.command_lines(shell.body)] == [
        ["devec", "one", "two"],
        ["devec", "three", "#", "exit", "4"],
    ]
    assert (python.language, python.body, python.line) == ("python", "x = 1", 10)


# --- commands.md ----------------------------------------------------------------------------------------------------

HEADING = re.compile(r"^(#{2,6}) (.+)$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def sections() -> dict[str, str]:
    """Text under each heading of docs/commands.md, without code blocks; headings as ``devec merge`` or plain words."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    text = snippets.FENCE.sub("", text)
    heads = list(HEADING.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {
        head.group(2).replace("`", "").strip(): text[head.end() : end] for head, end in zip(heads, ends, strict=True)
    }


def commands(cli: click.Group) -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None and not command.hidden}


def options_of(command: click.Command) -> set[str]:
    return {
        spelling
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for spelling in (*parameter.opts, *parameter.secondary_opts)
        if spelling.startswith("--")
    } - {"--help"}


def documented_commands() -> dict[str, str]:
    found = {title: text for title, text in sections().items() if title.startswith("devec ")}
    return {title.split()[1]: text for title, text in found.items()}


def common_text() -> str:
    """Sections whose title speaks of options: what several commands take, described once."""
    return "\n".join(text for title, text in sections().items() if "option" in title.lower())


def test_every_command_has_a_section_and_every_section_a_command(cli: click.Group) -> None:
    assert set(documented_commands()) == set(commands(cli))


def test_every_option_is_documented(cli: click.Group) -> None:
    common = set(OPTION.findall(common_text()))
    missing = {
        name: sorted(options_of(command) - common - set(OPTION.findall(documented_commands()[name])))
        for name, command in commands(cli).items()
    }
    assert {name: options for name, options in missing.items() if options} == {}
    whole = "\n".join(sections().values())
    assert options_of(cli) <= set(OPTION.findall(whole))


def test_every_documented_option_exists(cli: click.Group) -> None:
    """A section may name another command's option only together with that command: ``devec merge --method``."""
    known = commands(cli)
    everything = set().union(*(options_of(command) for command in known.values())) | options_of(cli) | {"--help"}
    assert set(OPTION.findall(common_text())) <= everything
    for name, text in documented_commands().items():
        own = options_of(known[name]) | options_of(cli) | {"--help"}
        for span in re.findall(r"`([^`]+)`", text):
            words = span.split()
            other = known.get(words[1]) if words[0] == "devec" and len(words) > 1 else None
            allowed = own if other is None else options_of(other) | {"--help"}
            strange = set(OPTION.findall(span)) - allowed
            assert not strange, f"docs/commands.md, devec {name}: {sorted(strange)} in `{span}`"


# --- links and targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named - targets == set()
