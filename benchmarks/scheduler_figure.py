"""What each station alone would need, and how long the simulated cluster took: the highest line is what saturates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.cost_figure import OUT, STYLE
from benchmarks.events import LONGEST, MEMORY
from benchmarks.scheduler import SWEEP_NODES, Curve

LOOKS = {
    "coordinator": ("#000000", ":"), "shared read": ("#0072b2", "-"), "node read": ("#56b4e9", "--"),
    "cpu": ("#d55e00", "-"), "gpu": ("#009e73", "-"), "shared write": ("#cc79a7", "-"), "node write": ("#cc79a7", "--"),
    LONGEST: ("#7f7f7f", "-."),
}  # fmt: skip
"""Okabe and Ito's colours, which colour-blind eyes tell apart, and dashes besides."""
TICKS = (0.1, 1, 10, 60, 600, 3600, 36_000, 360_000)
FLOOR = 3e-3
"""Lines below this share of the time are not drawn: nothing waits for them."""


def draw(curves: Sequence[Curve], out: Path = OUT) -> Path:
    """``scheduler.svg``: one panel a curve, as many rows as axes."""
    axes_names = list(dict.fromkeys(c.axis for c in curves))
    rows = [[c for c in curves if c.axis == axis] for axis in axes_names]
    width = max(map(len, rows))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(rows), width, figsize=(10, 3.1 * len(rows) + 0.5), squeeze=False)
        for row, panels in zip(rows, grid, strict=True):
            for curve, axes in zip(row, panels, strict=False):
                _panel(axes, curve)
            panels[0].set_ylabel("time")
        used = {line.get_label(): line for panel in grid.flat for line in panel.get_lines()}
        order = [name for name in ("simulated", *LOOKS) if name in used]
        figure.tight_layout(h_pad=1.4, w_pad=1.0, rect=(0, 0.055, 1, 1))
        figure.legend([used[name] for name in order], order, loc="lower center", ncols=len(order), frameon=False,
                      fontsize=8.5, handlelength=2.2, columnspacing=1.2)  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        path = out / "scheduler.svg"
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return path


def _panel(axes: Axes, curve: Curve) -> None:
    times = [r.outcome.makespan for r in curve.runs]
    lines = {
        name: [r.outcome.longest if name == LONGEST else r.outcome.bound(name) for r in curve.runs]
        for name in LOOKS
        if name == LONGEST or all(name in r.outcome.busy for r in curve.runs)
    }
    for name, values in lines.items():
        if any(v > FLOOR * t for v, t in zip(values, times, strict=True)):
            colour, dashes = LOOKS[name]
            axes.plot(curve.x, values, color=colour, linestyle=dashes, linewidth=1.4, label=name)
    axes.plot(curve.x, times, color="black", marker="o", markersize=4.5, linestyle="none", zorder=5, label="simulated")
    axes.set(xscale="log", yscale="log", title=curve.title, xlabel=_label(curve))
    low, high = min(FLOOR * max(times), 0.4 * min(times)), max(times) * 3
    axes.set_ylim(low, high)
    axes.set_yticks([t for t in TICKS if low <= t <= high])
    axes.set_xticks(curve.x)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.title.set_fontsize(9)
    axes.title.set_fontweight("bold")
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    _waits(axes, curve)


def _waits(axes: Axes, curve: Curve) -> None:
    """Above the first point and wherever it changes: what is waited for."""
    before = None
    for x, r in zip(curve.x, curve.runs, strict=True):
        now = r.outcome.bottleneck
        if now != before:
            last = x == curve.x[-1]
            axes.annotate(
                now, (x, r.outcome.makespan), xytext=(4 if last else -4, 7), textcoords="offset points", fontsize=8,
                ha="right" if last else "left", color="#404040" if now in (MEMORY, LONGEST) else LOOKS[now][0],
                fontweight="bold", zorder=3, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
        before = now


def _label(curve: Curve) -> str:
    return "nodes of one H200" if curve.axis == "nodes" else f"vectors, on {SWEEP_NODES} nodes"


def _tick(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
