"""Write docs/methods/: a page for every registered method from its docstring and signature, and their index.

    python docs/make_methods.py
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

sys.path.append(str(Path(__file__).parent))

from docstrings import Page, items, parse

from devec.methods import registry
from devec.methods.registry import Method

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "methods"

GROUPS = {
    "Entry by entry, from weights alone": "They look at single entries or at rows: [merging.md](../merging.md).",
    "Spectral, from weights alone": "They treat every matrix as a whole: "
    "[Spectral methods](../commands.md#spectral-methods).",
    "With data besides weights": "What they need stands on their pages.",
    "One model per task": "The task of every input must be known, and scores do not compare with those of methods that "
    "give one model for all.",
    "Decompositions": "They split vectors into parts: [ideas.md](../ideas.md).",
}

EXAMPLES = {"task": "law", "t": "0.3", "blocks": "2", "beta": "0.5"}
"""Values, in the example of a page, for parameters that have no default."""

GRAINS = {
    "elements": "single entries",
    "rows": "rows",
    "matrix": "whole matrices",
    "tensor": "whole tensors, with facts about the model",
}

TITLES = {
    "Math": "Mathematics",
    "Symbols": "Symbols",
    "Shapes": "Shapes",
    "Guarantees": "Guarantees",
    "Numerics": "Numerics",
    "Differs": "Where it differs",
    "Raises": "Errors",
}

LISTED = ("Symbols", "Guarantees", "Raises")
LEAD = re.compile(r"[a-z][a-z0-9 ]*(?=: )")
NAMES = re.compile(r"[\w', ]+?(?= = )|[\w=]+(?=: )")
SETTING = re.compile(r"(?<![\w`])[a-z]\w*=\S+")


# --- words ----------------------------------------------------------------------------------------------------------


def linked(text: str) -> str:
    """Numbers of arXiv as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def coded(match: re.Match[str]) -> str:
    """``key=value`` as code, without the punctuation that ends it."""
    word = match.group().rstrip(",;:.")
    while word.endswith(")") and word.count(")") > word.count("("):
        word = word[:-1]
    return f"`{word}`{match.group()[len(word) :]}"


def prose(text: str) -> str:
    """Docstring text as Markdown: settings as code, and nothing read as emphasis or as a tag."""
    parts = re.split(r"(`+[^`]+`+)", SETTING.sub(coded, re.sub(r"\s+", " ", text)))
    parts[::2] = [re.sub(r"([*<\\]|(?<!\w)_|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return linked("".join(parts))


def paragraph(text: str) -> str:
    """A section's running text: a capital in front, a full stop behind."""
    first = re.match(r"(?!mergekit)[a-z]{2,}\b(?!=)", text)  # a name, and key=value, stay as they are written
    return prose((text[0].upper() + text[1:] if first else text).rstrip().removesuffix(".") + ".")


def listed(section: str, item: str) -> str:
    """One entry of a list: what it is about stands out."""
    if section == "Guarantees":
        lead = LEAD.match(item)
        return f"**{lead.group()}**{prose(item[lead.end() :])}" if lead else prose(item)
    lead = NAMES.match(item)
    return f"`{lead.group()}`{prose(item[lead.end() :])}" if lead else prose(item)


def type_of(hint: Any) -> str:
    """A type in words."""
    plain = {float: "number", int: "whole number", str: "text", bool: "true or false"}
    if hint in plain:
        return plain[hint]
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is list:
        return f"one {type_of(*get_args(hint))} per vector"
    if get_origin(hint) in (Union, types.UnionType):
        # What has a value per vector is said last, as the exception; that None is allowed shows in the default.
        kinds = sorted((k for k in get_args(hint) if k is not type(None)), key=lambda k: get_origin(k) is list)
        return ", or ".join(type_of(kind) for kind in kinds)
    raise ValueError(f"no words for the type {hint}")


def default_of(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    if parameter.default is None:
        return "not set"
    if parameter.default == "":
        return "empty"
    return f"`{parameter.default:g}`" if isinstance(parameter.default, float) else f"`{parameter.default}`"


# --- pages ----------------------------------------------------------------------------------------------------------


def methods() -> list[Method]:
    """What devec itself registers. Raises ValueError: two methods share a name."""
    found = [m for m in registry.all_methods() if m.call.__module__ in registry.BUILT_IN]
    names = [m.name for m in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"methods of two kinds share a name, and so a page: {', '.join(twice)}")
    return found


def read(method: Method) -> Page:
    try:
        return parse(inspect.getdoc(method.call) or "")
    except ValueError as error:
        raise ValueError(f"{method.call.__module__}: docstring of {method.name}: {error}") from None


def facts(method: Method) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    yield f"| Source | {linked(method.source)} |"
    yield f"| Works on | {GRAINS[method.grain]} |"
    yield f"| Data besides weights | {', '.join(method.needs) or 'none'} |"
    yield f"| Base | {'needed for full checkpoints' if method.needs_base else 'not needed'} |"
    yield f"| Adapters | {'stay adapters' if method.keeps_rank else 'give `--base`, or `--rank` for the result'} |"
    result = "parts of every vector" if method.kind == "decompose" else "one model for all tasks"
    yield f"| Result | {'one model per task' if method.per_task else result} |"


def parameters(method: Method) -> Iterator[str]:
    yield "## Parameters"
    yield ""
    if method.kind == "decompose":
        yield "Options of `devec decompose`, each with its default and why: [defaults.md](../defaults.md)."
        return
    yield f"| {'Parameter' if method.needs else '`--set`'} | Type | Default |"
    yield "|---|---|---|"
    hints = inspect.get_annotations(method.call, eval_str=True)
    for name, parameter in method.parameters.items():
        yield f"| `{name}` | {type_of(hints[name])} | {default_of(parameter)} |"


SUITE = (
    "# suite.yaml",
    "model: {python: net.py:build}  # or {transformers: image-classification}",
    "select: {from: train}",
    "tasks: [{name: poetry, data: poetry.npz}, {name: law, data: law.npz}]",
)
"""What data-dependent methods take their statistics from, in the tests' workspace."""


def examples(method: Method) -> Iterator[str]:
    """Command lines, or Python where there is none, which the tests run. Raises ValueError: a required parameter has no
    example."""
    if method.needs:
        kind = method.needs[0]
        sources = '["tuned/poetry", "tuned/law"]'
        yield "import devec"
        yield ""
        yield f'found = devec.collect("{kind}", {sources}, "{kind}", base="base", suite="suite.yaml", examples=4)'
        yield f'merged = devec.merge("{method.name}", {sources}, base="base", statistics_of=found)'
        return
    base = "--base base " if method.needs_base else ""
    if method.kind == "decompose":
        yield f"devec decompose {base}tuned/poetry tuned/law -o parts"
        yield "devec decompose adapters/poetry adapters/law -o parts-of-adapters"
        return
    required = [name for name, p in method.parameters.items() if p.default is inspect.Parameter.empty]
    if strange := [name for name in required if name not in EXAMPLES]:
        raise ValueError(f"{method.name}: give {', '.join(strange)} a value in EXAMPLES of docs/make_methods.py")
    chosen = "".join(f"--set {name}={EXAMPLES[name]} " for name in required)
    yield f"devec merge --method {method.name} {chosen}{base}tuned/poetry tuned/law -o merged"
    if method.keeps_rank:
        yield f"devec merge --method {method.name} {chosen}adapters/poetry adapters/law -o merged-adapter"


def page_of(method: Method) -> str:
    page = read(method)
    lines = [f"# `{method.name}`", "", prose(page.summary), ""]
    for words in page.paragraphs:
        lines += [prose(words), ""]
    language, suite = ("python", ["", "```yaml", *SUITE, "```"]) if method.needs else ("sh", [])
    lines += [*facts(method), *suite, "", f"```{language}", *examples(method), "```", "", *parameters(method)]
    for section, text in page.sections.items():
        lines += ["", f"## {TITLES[section]}", ""]
        if section == "Math":
            lines += ["```text", *text.replace("``", "").split("\n"), "```"]
        elif section in LISTED:
            if section == "Symbols":
                lines += ["What all pages write alike: [notation](README.md#notation).", ""]
            lines += [f"- {listed(section, item)}" for item in items(text)]
        else:
            lines += [paragraph(text)]
    lines += ["", "[All methods](README.md). Made by `make docs` from the docstring; do not edit."]
    return "\n".join(lines) + "\n"


def group_of(method: Method) -> str:
    entry, spectral, data, task, decompositions = GROUPS
    if method.kind == "decompose":
        return decompositions
    if method.per_task:
        return task
    if method.needs:
        return data
    return entry if method.grain in ("elements", "rows") else spectral


def index(everything: list[Method]) -> str:
    lines = [
        "# Methods",
        "",
        "Made by `make docs` from docstrings and the registry; do not edit. `devec methods NAME` prints a page, and",
        "`devec merge --method NAME` runs a merge.",
    ]
    for group, words in GROUPS.items():
        rows = [m for m in everything if group_of(m) == group]
        if not rows:
            continue
        lines += ["", f"## {group}", "", words, ""]
        lines += ["| Method | Does | Base | Adapters | Source |", "|---|---|---|---|---|"]
        for m in rows:
            cells = (
                f"[`{m.name}`]({m.name}.md)",
                prose(read(m).summary),
                "needed" if m.needs_base else "not needed",
                "stay adapters" if m.keeps_rank else "give `--base` or `--rank`",
                linked(m.source),
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Notation",
        "",
        "- `W_0`: a tensor of the base; `W`: the same tensor of the result",
        "- `Delta_i`: what vector i adds to it; `T`: the number of vectors",
        "- `n`, `m`: rows and columns of a tensor as a matrix, outputs x inputs",
        "- `scale`: the coefficient of the merged change, a parameter of that name",
        "- `A * B`, `|A|` inside sums and comparisons, `[A > B]` (1 where true, else 0): entry by entry",
        "- `|A|_1`: sum of magnitudes; `|A|_F`: Frobenius norm; `<A, B>`: sum of products of entries",
        "- `U S V^T`: singular value decomposition, singular values falling",
    ]
    return "\n".join(lines) + "\n"


def render() -> dict[str, str]:
    """File name -> text of every page, the same on every machine."""
    everything = methods()
    return {"README.md": index(everything), **{f"{m.name}.md": page_of(m) for m in everything}}


if __name__ == "__main__":
    pages = render()
    TARGET.mkdir(exist_ok=True)
    for old in TARGET.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(pages)} pages to {TARGET.relative_to(ROOT)}")
