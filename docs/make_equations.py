"""Write docs/equations.md: which function carries which equation, and which tests hold it to that.

Nothing is listed by hand. Docstrings in ``devec.linalg``, ``devec.core`` and ``devec.methods`` name equations
(``Eq. (9)``, ``Eq. (6)-(13)``, ``Prop. 3.1``, ``Theorem 6.1``). A number belongs to the paper beside it (``arXiv:...``,
or ``of Name (year)``), else to the one arXiv identifier in the same docstring, else in the module's. Tests are found by
what they use.

    python docs/make_equations.py
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parent))

from find_tests import Test, read_tests, tests_of

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "equations.md"
PACKAGES = ("devec.linalg", "devec.core", "devec.methods")
PAPER = "2512.22511"

SAYS = {
    "Definition 3.1": "the projector onto a matrix's column space",
    "Eq. 1": "that projector, written with W",
    "Eq. 2": "the same, with W's singular value decomposition put in",
    "Eq. 3": "the same, right singular vectors cancelled",
    "Eq. 4": "the same: U U^T",
    "Prop. 3.1": "what two column spaces share: eigenvectors of P1 P2 with eigenvalue 1",
    "Eq. 5": "both projections leave a shared direction as it is",
    "Eq. 6": "singular value decomposition of each task vector",
    "Eq. 7": "each vector's projector",
    "Eq. 8": "the chain of projectors",
    "Eq. 9": "its eigenvalues and eigenvectors",
    "Eq. 10": "shared directions: eigenvalue above the threshold",
    "Eq. 11": "the projector onto the shared subspace",
    "Eq. 12": "the shared component",
    "Eq. 13": "the unique component",
    "Eq. 14": "one shared vector: mean weighted by Frobenius norms",
    "Section 4.3": "one vector against a pool, one after the other",
    "Theorem 6.1": "principal angles and vectors, the alternative decision",
    "Eq. 15": "dimensions that Theorem 6.1 asks for",
    "Eq. 16": "the recursion that defines principal angles",
    "Appendix 7": "recovery of planted shared directions",
}
"""The paper's statements in its own order. What no docstring cites is left out of the table."""

WORK = r"[A-Z][\w-]+(?:(?:,|\s+and)\s+[A-Z][\w-]+)*(?:\s+et\s+al\.)?\s+\(\d{4}\)"
"""A paper without an arXiv number: ``Bjorck and Golub (1973)``."""

NO_PAPER = "of no paper"
NUMBER = r"\(\d+\)"
CITATION = re.compile(
    # (9), (6)-(13), (8), (9) and (10); or bare: 9, 6-13. Bare lists only up to a closing bracket, as in "(Eq. 11, 12)".
    rf"\b(?:(?P<eq>Eqs?\.\s*(?:{NUMBER}(?:(?:\s*(?:,|and|-|to)\s*)+{NUMBER})*|\d+(?:\s*-\s*\d+)?(?:,\s*\d+(?=\)))*))"
    r"|(?P<prop>Prop(?:osition|\.)\s*\d+\.\d+)"
    r"|(?P<thm>Theorem\s*\d+\.\d+)"
    r"|(?P<def>Def(?:inition|\.)\s*\d+\.\d+)"
    r"|(?P<sec>[Ss]ec(?:tion|\.)\s*\d+\.\d+)"
    r"|(?P<app>[Aa]ppendix\s*\d+))"
)
NOUN = {"prop": "Prop.", "thm": "Theorem", "def": "Definition", "sec": "Section", "app": "Appendix"}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True, order=True)
class Citation:
    paper: str
    label: str
    where: str  # dotted name of the function, class or module


def labels(match: re.Match[str]) -> list[str]:
    """``Eq. (6)-(8)`` -> ``Eq. 6``, ``Eq. 7``, ``Eq. 8``; a proposition or theorem is itself."""
    kind = match.lastgroup or ""
    text = match.group()
    if kind != "eq":
        return [f"{NOUN[kind]} {re.search(r'[0-9.]+$', text).group()}"]  # type: ignore[union-attr]
    out: list[int] = []
    for first, last in re.findall(r"\(?(\d+)\)?(?:\s*(?:-|to)\s*\(?(\d+)\)?)?", text):
        out += range(int(first), int(last or first) + 1)
    return [f"Eq. {number}" for number in out]


def citations(where: str, doc: str, module_doc: str) -> Iterator[Citation]:
    for match in CITATION.finditer(doc):
        for label in labels(match):
            yield Citation(paper_of(match, doc, module_doc) or NO_PAPER, label, where)


def paper_of(match: re.Match[str], doc: str, module_doc: str) -> str | None:
    before = re.search(r"arXiv:(\d{4}\.\d{4,5})[\s,:()]*$", doc[: match.start()])
    after = re.match(r"[\s,(]*(?:of|in)?\s*arXiv:(\d{4}\.\d{4,5})", doc[match.end() :])
    work = re.match(rf"\s+of\s+({WORK})", doc[match.end() :])
    if found := after or work or before:
        return re.sub(r"\s+", " ", found.group(1))
    for text in (doc, module_doc):
        papers = set(ARXIV.findall(text))
        if len(papers) == 1:
            return papers.pop()
    return None


def modules() -> Iterator[ModuleType]:
    for name in PACKAGES:
        package = importlib.import_module(name)
        yield package
        for info in sorted(pkgutil.walk_packages(package.__path__, f"{name}."), key=lambda i: i.name):
            yield importlib.import_module(info.name)


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of the functions and classes that ``module`` defines, and of their methods."""
    for name, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield f"{module.__name__}.{name}", value.__doc__ or ""
            for member, raw in sorted(vars(value).items()):
                inner = getattr(raw, "fget", None) or getattr(raw, "func", None) or getattr(raw, "__func__", raw)
                if inspect.isfunction(inner):
                    yield f"{module.__name__}.{name}.{member}", inner.__doc__ or ""
        elif callable(value):
            yield f"{module.__name__}.{name}", getattr(value, "__doc__", None) or ""


def collect() -> list[Citation]:
    """Every citation. A module's own docstring counts only for numbers that nothing inside it claims.

    ValueError: a number stands without its paper.
    """
    found: set[Citation] = set()
    for module in modules():
        head = module.__doc__ or ""
        inside = {c for where, doc in documented(module) for c in citations(where, doc, head)}
        claimed = {(c.paper, c.label) for c in inside}
        found |= inside
        found |= {c for c in citations(module.__name__, head, head) if (c.paper, c.label) not in claimed}
    if astray := sorted({f"{c.label} in {c.where}" for c in found if c.paper == NO_PAPER}):
        raise ValueError(
            f"of which paper? Write arXiv:NUMBER or 'of Name (year)' beside these, or arXiv:NUMBER into the module's "
            f"docstring: {'; '.join(astray)}"
        )
    return sorted(found)


def position(label: str) -> tuple[int, list[float]]:
    order = list(SAYS)
    return (order.index(label) if label in SAYS else len(order), [float(n) for n in re.findall(r"[0-9.]+$", label)])


def table(rows: list[Citation], tests: list[Test], with_words: bool) -> Iterator[str]:
    yield "| Equation |" + (" Says |" if with_words else "") + " Function | Tests |"
    yield "|---|" + ("---|" if with_words else "") + "---|---|"
    groups: dict[str, list[Citation]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    for label in sorted(groups, key=position):
        for i, row in enumerate(groups[label]):
            held = tests_of(row.where, row.label, tests)
            cell = "<br>".join(f"`{t.path}::{t.name}`" for t in held[:2]) or "none"
            if len(held) > 2:
                cell += f"<br>and {len(held) - 2} more"
            words = f" {SAYS.get(label, '') if i == 0 else ''} |" if with_words else ""
            yield f"| {label if i == 0 else ''} |{words} `{row.where}` | {cell} |"


def render() -> str:
    """The whole page, the same on every machine."""
    tests = read_tests(ROOT / "tests")
    rows = collect()
    lines = [
        "# Equation, function, test",
        "",
        "Made by `make docs` from docstrings and tests; do not edit. Numbers without another source are those of",
        f"[arXiv:{PAPER}](https://arxiv.org/abs/{PAPER}). Where devec decides what that leaves open, the docstring",
        "says so; the literal recipe, written out in float64, stands in `tests/reference/`.",
        "",
        *table([r for r in rows if r.paper == PAPER], tests, with_words=True),
    ]
    for paper in sorted({r.paper for r in rows} - {PAPER}):
        number = re.fullmatch(r"[0-9.]+", paper)
        lines += ["", f"## [arXiv:{paper}](https://arxiv.org/abs/{paper})" if number else f"## {paper}", ""]
        lines += table([r for r in rows if r.paper == paper], tests, with_words=False)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
