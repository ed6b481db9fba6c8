"""One table, four forms: for a terminal, for Markdown, for a page, and as plain dictionaries for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

Cell = str | float | int | None
Row = Mapping[str, Cell]
BLANK = "–"


@dataclass(frozen=True)
class Column:
    """``key`` in each row. Numbers are shown times ``scale`` with ``digits`` decimals; ``spread`` names the key of a
    second number, shown as ``mean ± spread`` where a row has it."""

    key: str
    label: str
    digits: int = 1
    scale: float = 1.0
    spread: str | None = None

    def text(self, row: Row) -> str:
        """The cell as it is shown: a dash where there is nothing, the words ``nan`` and ``inf`` as they are."""
        shown = self._number(row.get(self.key))
        spread = row.get(self.spread) if self.spread is not None else None
        return shown if spread is None else f"{shown} ± {self._number(spread)}"

    def numeric(self, rows: Sequence[Row]) -> bool:
        """True if no row has words here: numbers stand on the right."""
        return not any(isinstance(row.get(self.key), str) for row in rows)

    def _number(self, value: Cell) -> str:
        if value is None:
            return BLANK
        if isinstance(value, (str, bool)):
            return str(value)
        if isinstance(value, int) and self.scale == 1.0:
            return str(value)
        return f"{value * self.scale:.{self.digits}f}" if isfinite(value) else str(value)


@dataclass(frozen=True)
class Table:
    """Rows in the order given. A key that no column names is carried into :meth:`dicts` and not shown."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def texts(self) -> list[list[str]]:
        return [[c.text(row) for c in self.columns] for row in self.rows]

    def dicts(self) -> list[dict[str, Cell]]:
        """The rows as they came, unrounded."""
        return [dict(row) for row in self.rows]

    def markdown(self) -> str:
        """A pipe table, with its title above and its note below. Ends with a newline."""
        rule = ["---:" if c.numeric(self.rows) else "---" for c in self.columns]
        cells = [[c.label for c in self.columns], rule, *self.texts()]
        lines = ["| " + " | ".join(_escape(t) for t in row) + " |" for row in cells]
        head = [f"**{self.title}**", ""] if self.title else []
        foot = ["", self.note] if self.note else []
        return "\n".join([*head, *lines, *foot]) + "\n"

    def rich(self, columns: Sequence[int] | None = None) -> RichTable:
        """For a rich console; ``columns`` are the indices to show, all by default."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = list(range(len(self.columns))) if columns is None else list(columns)
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        # Everything goes in as Text: names and paths may hold brackets, which are not markup here.
        for i in shown:
            c = self.columns[i]
            table.add_column(Text(c.label), justify="right" if c.numeric(self.rows) else "left", overflow="fold")
        for row in self.texts():
            table.add_row(*[Text(row[i]) for i in shown])
        return table

    def print(self, console: Console | None = None) -> None:
        """To the terminal (stdout unless a console is given). A table too wide for it goes on below, first column
        repeated: nothing is cut off."""
        from rich.console import Console
        from rich.text import Text

        out = console or Console()
        if self.title:
            out.print(Text(self.title, style="bold"))
        for columns in self._pages(out.width):
            out.print(self.rich(columns))
        if self.note:
            out.print(Text(self.note))

    def _pages(self, width: int) -> list[list[int]]:
        """Column indices of each piece that fits into ``width`` characters."""
        from rich.cells import cell_len

        texts = [[c.label for c in self.columns], *self.texts()]
        wide = [max(cell_len(row[i]) for row in texts) + 3 for i in range(len(self.columns))]
        pages: list[list[int]] = [[0]]
        for i in range(1, len(wide)):
            if len(pages[-1]) > 1 and sum(wide[j] for j in pages[-1]) + wide[i] > width:
                pages.append([0])
            pages[-1].append(i)
        return pages


def score_table(
    title: str,
    rows: Sequence[Mapping[str, object]],
    tasks: Sequence[str],
    note: str = "",
    scale: float = 100.0,
    digits: int = 1,
) -> Table:
    """A table of methods against tasks.

    Each row has ``method``, ``scores`` (task -> score), and may have ``spreads`` (task -> spread), ``mean_spread``,
    ``select`` (the mean score on the selection split) and ``detail`` (words: the coefficient, the draws). The mean
    over ``tasks`` is computed here; a task that a row lacks leaves its mean blank.
    """
    flat: list[dict[str, Cell]] = []
    for row in rows:
        scores, spreads = _numbers(row.get("scores")), _numbers(row.get("spreads"))
        out: dict[str, Cell] = {"method": str(row["method"])}
        out.update({t: scores.get(t) for t in tasks})
        out.update({f"{t}_spread": spreads[t] for t in tasks if t in spreads})
        whole = bool(tasks) and all(t in scores for t in tasks)
        out["mean"] = sum(scores[t] for t in tasks) / len(tasks) if whole else None
        for key in ("mean_spread", "select"):
            value = row.get(key)
            if isinstance(value, (int, float)):
                out[key] = float(value)
        if row.get("detail"):
            out["detail"] = str(row["detail"])
        flat.append(out)
    columns = [Column("method", "method"), Column("mean", "mean", digits, scale, "mean_spread")]
    if any("select" in r for r in flat):
        columns.append(Column("select", "selection", digits, scale))
    columns += [Column(t, t, digits, scale, f"{t}_spread") for t in tasks]
    if any("detail" in r for r in flat):
        columns.append(Column("detail", "detail"))
    return Table(title, tuple(columns), tuple(flat), note)


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {str(k): float(v) for k, v in value.items()}


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
