"""Small multiples: seconds against vectors and against parameters, one column a mode."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.cost_report import in_parameters, in_pool
from benchmarks.cost_stages import MODES, Cost
from benchmarks.fits import Exponent

OUT = Path(__file__).parents[1] / "docs" / "img"
COLOURS = ("#c9a227", "#5b9a8b", "#33638d", "#2a1e47")
"""Light to dark, so that the order shows in grey and to colour-blind eyes; the marks say it once more."""
DASHES = (0, (3, 2))
MARKS = ("o", "s", "^", "D")
CAPTIONS = {
    "target": "target: one against all",
    "chain": "joint, chain",
    "consensus": "joint, consensus",
    "pairwise": "pairwise: every pair",
}
STYLE = {"svg.hashsalt": "devec", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.titlesize": 9.5, "figure.facecolor": "white"}  # fmt: skip


def draw(costs: list[Cost], kind: str, out: Path = OUT) -> Path:
    """``cost.svg`` (adapters) or ``cost-dense.svg``; solid: everything, dashed: the mode's own algebra."""
    sides, pools = sorted({c.side for c in costs}), sorted({c.pool for c in costs})
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 4, figsize=(10, 5.4), sharey=True, squeeze=False)
        for column, mode in enumerate(MODES):
            own = [c for c in costs if c.mode == mode]
            _panel(grid[0][column], [[c for c in own if c.side == s] for s in sides], "pool")
            _panel(grid[1][column], [[c for c in own if c.pool == k] for k in pools], "parameters")
            grid[0][column].set_title(CAPTIONS[mode], fontweight="bold")
            _exponents(grid[0][column], "k", *(in_pool(own, what) for what in ("total", "algebra")))
            _exponents(grid[1][column], "p", *(in_parameters(own, what) for what in ("total", "algebra")))
            grid[0][column].set_xlabel("vectors k")
            grid[1][column].set_xlabel("parameters p of a vector")
        for row in grid:
            row[0].set_ylabel("seconds, one thread")
        seconds = [x for c in costs for x in (c.total, c.seconds["algebra"])]
        # One scale for all eight, with room above the data for the exponents.
        grid[0][0].set_ylim(min(seconds) / 1.5, max(seconds) * (max(seconds) / min(seconds)) ** 0.28)
        _keys(grid[0][3], [f"{s} x {s}" for s in sides], "tensors")
        _keys(grid[1][3], [str(k) for k in pools], "vectors")
        figure.tight_layout(h_pad=1.2, w_pad=0.6)
        out.mkdir(parents=True, exist_ok=True)
        path = out / ("cost.svg" if kind == "low-rank" else f"cost-{kind}.svg")
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return path


def _panel(axes: Axes, curves: list[list[Cost]], across: str) -> None:
    for curve, colour, mark in zip(curves, COLOURS, MARKS, strict=False):
        x = [getattr(c, across) for c in curve]
        axes.plot(x, [c.total for c in curve], color=colour, marker=mark, markersize=4, linewidth=1.5)
        axes.plot(x, [c.seconds["algebra"] for c in curve], color=colour, marker=mark, markersize=2.5, linewidth=1,
                  linestyle=DASHES)  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.grid(which="major", color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    ticks = sorted({getattr(c, across) for curve in curves for c in curve})
    axes.set_xticks(ticks)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))


def _short(x: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.0f}"


def _exponents(axes: Axes, letter: str, total: Exponent, algebra: Exponent) -> None:
    for y, name, e in ((0.99, "total", total), (0.885, "algebra", algebra)):
        text = rf"{name} $\propto {letter}^{{\,{e.value:.2f} \pm {e.error:.2f}}}$"
        axes.text(0.03, y, text, transform=axes.transAxes, va="top", fontsize=9)


def _keys(axes: Axes, labels: list[str], title: str) -> None:
    handles = [
        Line2D([], [], color=colour, marker=mark, markersize=4, linewidth=1.5, label=label)
        for label, colour, mark in zip(labels, COLOURS, MARKS, strict=False)
    ]
    handles = handles[::-1]  # as the lines lie
    handles.append(Line2D([], [], color="black", linewidth=1.5, label="total"))
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle=DASHES, label="algebra"))
    axes.legend(handles=handles, title=title, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5,
                title_fontsize=8.5, frameon=False, handlelength=2.2, alignment="left")  # fmt: skip
