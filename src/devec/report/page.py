"""One offline HTML page: style inside, pictures inside, no script, no link that leaves the page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from devec.core.errors import InputError
from devec.report.tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c63; --line: #d9d9de; --paper: #ffffff; --tint: #f5f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --soft: #a5a5af; --line: #3c3c44; --paper: #17171a; --tint: #222226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 44rem; }
nav { margin: 1rem 0; color: var(--soft); font-size: .9rem; }
nav a { color: inherit; margin-right: 1rem; }
figure { margin: 1.25rem 0; }
figure img { max-width: 100%; height: auto; display: block; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .5rem; }
figcaption, caption, .note { color: var(--soft); font-size: .88rem; }
figcaption { margin-top: .4rem; max-width: 44rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-weight: 600; color: var(--ink); }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; border-bottom-width: 2px; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--tint); }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .75rem; overflow-x: auto;
  font: .82rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
@media print { body { max-width: none; } h2, figure, table { break-inside: avoid; } }
""".strip()


@dataclass(frozen=True)
class Picture:
    """A PNG file, the words for those who cannot see it, and a caption."""

    path: Path | str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Text shown as it is."""

    text: str


Content = str | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. A ``str`` is a paragraph of plain text (no markup)."""

    heading: str
    contents: Sequence[Content]


def write_page(path: Path | str, title: str, sections: Sequence[Section], lead: str = "") -> None:
    """Write one self-contained page. All text is escaped; pictures are embedded.

    The same contents give the same bytes. Raises :class:`InputError` for a picture that is missing or no PNG.
    """
    Path(path).write_text(page_html(title, sections, lead), encoding="utf-8", newline="\n")


def page_html(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The page as text."""
    links = "".join(f'<a href="#s{i}">{escape(s.heading)}</a>' for i, s in enumerate(sections, 1))
    body = [f"<h1>{escape(title)}</h1>"]
    if lead:
        body.append(f"<p>{escape(lead)}</p>")
    if len(sections) > 1:
        body.append(f'<nav aria-label="Sections">{links}</nav>')
    for i, section in enumerate(sections, 1):
        body.append(f'<section id="s{i}">\n<h2>{escape(section.heading)}</h2>')
        body.extend(_html(c) for c in section.contents)
        body.append("</section>")
    content = "\n".join(body)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
{content}
</main>
</body>
</html>
"""


def _html(content: Content) -> str:
    if isinstance(content, str):
        return f"<p>{escape(content)}</p>"
    if isinstance(content, Code):
        return f"<pre>{escape(content.text)}</pre>"
    if isinstance(content, Picture):
        return _picture(content)
    return _table(content)


def _picture(picture: Picture) -> str:
    try:
        data = Path(picture.path).read_bytes()
    except OSError as error:
        raise InputError("a picture of the page cannot be read", file=picture.path,
                         values={"reason": error.strerror}) from None  # fmt: skip
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise InputError("a picture of the page is not a PNG", file=picture.path)
    caption = f"\n<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    source = b64encode(data).decode("ascii")
    # Drawn at 144 dots per inch for sharp screens; shown at the size it was designed for.
    width = round(int.from_bytes(data[16:20], "big") * 2 / 3)
    image = f'<img src="data:image/png;base64,{source}" alt="{escape(picture.alt)}" width="{width}">'
    return f"<figure>\n{image}{caption}\n</figure>"


def _table(table: Table) -> str:
    kinds = [' class="number"' if c.numeric(table.rows) else "" for c in table.columns]
    head = "".join(f'<th scope="col"{k}>{escape(c.label)}</th>' for k, c in zip(kinds, table.columns, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{k}>{escape(t)}</td>" for k, t in zip(kinds, row, strict=True)) + "</tr>"
        for row in table.texts()
    )
    caption = f"<caption>{escape(table.title)}</caption>\n" if table.title else ""
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll">\n<table>\n{caption}{head}\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>{note}'
