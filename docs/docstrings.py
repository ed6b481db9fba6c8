"""Read the docstring of a method: a summary, perhaps a few paragraphs, and seven sections.

    Summary in one line.

    Math        W = W_0 + ...
                continued at the column where the text of sections starts
    Symbols     ...

Strict, so that a page never loses a line: what does not fit is a ValueError that quotes the line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = ("Math", "Symbols", "Shapes", "Guarantees", "Numerics", "Differs", "Raises")
"""Every method has all of them, in this order."""

COLUMN = 12
"""Where the text of a section starts, counted from the margin of the docstring."""

HEAD = re.compile(r"(\w+) {2,}(?=\S)")


@dataclass(frozen=True)
class Page:
    """``sections`` keep their lines, without the margin."""

    summary: str
    paragraphs: tuple[str, ...]
    sections: dict[str, str]


def parse(doc: str) -> Page:
    """``doc`` as ``inspect.getdoc`` gives it: without the margin.

    Raises ValueError: no summary; a section that is unknown, missing, empty, there twice or out of order; a line that
    belongs to none.
    """
    lines = doc.rstrip().split("\n")
    first = next((i for i, line in enumerate(lines) if HEAD.match(line)), len(lines))
    opening = [part.strip() for part in "\n".join(lines[:first]).split("\n\n") if part.strip()]
    if not opening or "\n" in opening[0]:
        raise ValueError(f"the summary is one line, followed by an empty one: {lines[0]!r}")
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines[first:]:
        if head := HEAD.match(line):
            name = head.group(1)
            if name not in SECTIONS:
                raise ValueError(f"unknown section {name!r}, there is: {', '.join(SECTIONS)}: {line!r}")
            if name in found:
                raise ValueError(f"section {name} is there twice: {line!r}")
            if head.end() != COLUMN:
                raise ValueError(f"the text of a section starts at column {COLUMN}: {line!r}")
            found[name] = [line[COLUMN:]]
        elif line[:COLUMN].strip() or not line.strip():
            raise ValueError(f"neither a section nor the next line of {name}: {line!r}")
        else:
            found[name].append(line[COLUMN:])
    if missing := [name for name in SECTIONS if name not in found]:
        raise ValueError(f"no section {', '.join(missing)}")
    if list(found) != list(SECTIONS):
        raise ValueError(f"sections are in the order {', '.join(SECTIONS)}, not {', '.join(found)}")
    paragraphs = tuple(" ".join(part.split()) for part in opening[1:])
    return Page(opening[0], paragraphs, {name: "\n".join(rows) for name, rows in found.items()})


def items(text: str) -> list[str]:
    """What semicolons separate, outside brackets, each in one line."""
    out, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == ";" and depth <= 0:
            out.append(text[start:i])
            start = i + 1
    return [" ".join(item.split()) for item in (*out, text[start:]) if item.strip()]
