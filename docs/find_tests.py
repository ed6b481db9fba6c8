"""Which tests use a function: read from the tests' syntax trees, nothing is run.

A test uses a function if its own body, or a helper or fixture of its file that it reaches, names it. A method's name
alone says little (``apply`` is everywhere), so its class, or its module's name, must occur in the file too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Test:
    path: str  # from the repository's root
    name: str
    words: frozenset[str]  # identifiers that the test or its helpers use
    text: str  # its name and docstring, where an equation may be cited
    file_words: frozenset[str]


def words_of(node: ast.AST) -> set[str]:
    out: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            out.add(part.id)
        elif isinstance(part, ast.Attribute):
            out.add(part.attr)
        elif isinstance(part, ast.arg):
            out.add(part.arg)
        elif isinstance(part, ast.alias):
            out.update(part.name.split("."))
        elif isinstance(part, ast.ImportFrom) and part.module:
            out.update(part.module.split("."))
    return out


def read_tests(folder: Path) -> list[Test]:
    out: list[Test] = []
    for path in sorted(folder.rglob("test_*.py")):
        if path.parent.name == "docs":  # they run the documents, not a function
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(folder.parent).as_posix()
        out += tests_in(name, tree)
    return out


def tests_in(path: str, tree: ast.Module) -> Iterator[Test]:
    functions: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            functions |= {f"{node.name}::{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
    used = {name: words_of(node) for name, node in functions.items()}
    everything = frozenset(words_of(tree))
    for name, node in functions.items():
        if name.split("::")[-1].startswith("test"):
            yield Test(path, name, frozenset(reach(name, used)), cited_text(node), everything)


def reach(name: str, used: dict[str, set[str]]) -> set[str]:
    """Words of a function and of every function of its file that it names, directly or not."""
    seen, queue = {name}, [name]
    words: set[str] = set()
    while queue:
        words |= used[queue.pop()]
        fresh = (words & used.keys()) - seen
        seen |= fresh
        queue += sorted(fresh)
    return words


def cited_text(node: ast.AST) -> str:
    assert isinstance(node, ast.FunctionDef)
    return f"{node.name} {ast.get_docstring(node) or ''}".replace("(", "").replace(")", "")


def tests_of(where: str, label: str, tests: list[Test]) -> list[Test]:
    """Tests of the object called ``where``: those that cite ``label`` first, then those of its mirror file."""
    parts = where.split(".")
    is_method = len(parts) > 2 and parts[-2][:1].isupper()
    module = parts[-3] if is_method else parts[-2]

    def uses(test: Test) -> bool:
        if parts[-1] not in test.words:
            return False
        return not is_method or parts[-2] in test.file_words or module in test.file_words

    def order(test: Test) -> tuple[bool, bool, str, str]:
        cites = f"{label} " in f"{test.text} ".replace(",", " ").replace(":", " ").replace("\n", " ")
        return (not cites, Path(test.path).stem != f"test_{module}", test.path, test.name)

    return sorted(filter(uses, tests), key=order)
