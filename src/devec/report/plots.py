"""Pictures: spectra of overlaps, a heat map of pairs, accuracy per method.

matplotlib (extra ``plot``) is imported when a picture is drawn. Figures are drawn without its global state and written
without a date or version, so the same numbers give the same bytes. Colours are those of Okabe and Ito, which people
with any common form of colour blindness can tell apart; no meaning hangs on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal

from devec.core.errors import InputError, UsageError

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#767676", "#c9c9c9"
DPI = 144
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class SpectrumPanel:
    """One tensor: each pair's eigenvalues (cos^2, descending) and where chance ends (``edges``, per pair)."""

    title: str
    eigenvalues: Mapping[str, Sequence[float]]
    edges: Mapping[str, float] = field(default_factory=dict)


Kind = Literal["reference", "method", "control"]


@dataclass(frozen=True)
class Bar:
    """One method's mean score (0 to 1), its spread (a standard deviation), and the score of each task."""

    label: str
    mean: float
    spread: float | None = None
    tasks: Sequence[float] = ()
    kind: Kind = "method"


def plot_spectra(
    path: Path | str,
    panels: Sequence[SpectrumPanel],
    threshold: float | None = None,
    title: str = "Overlaps of column spaces",
    highlight: int = 3,
) -> None:
    """One panel per tensor: eigenvalues of every pair, the threshold, and the chance edge.

    The ``highlight`` pairs whose largest eigenvalue stands highest above its chance edge (or above 0, without edges),
    averaged over the panels, are drawn in colour and named; the others are thin grey lines. Where ranks differ between
    pairs, the chance edges are a band.
    """
    if not panels:
        raise UsageError("no tensor has a spectrum to draw")
    named = _foremost(panels, highlight)
    columns = min(3, len(panels))
    rows = ceil(len(panels) / columns)
    with _style():
        figure = _figure(3.1 * columns + 0.4, 2.5 * rows + 0.95)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for k, axes in enumerate(grid.flat):
            if k < len(panels):
                _spectrum(axes, panels[k], named, threshold)
            else:
                axes.set_axis_off()
            if k % columns == 0:
                axes.set_ylabel("eigenvalue  (cos² of the angle)")
        for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("direction, most alike first")
        _legend(figure, [grid.flat[k] for k in range(len(panels))])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        _save(figure, path)


def plot_heatmap(
    path: Path | str,
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
    label: str,
    signed: bool = False,
    digits: int = 2,
) -> None:
    """A symmetric matrix over pairs of vectors, numbers written in; the diagonal is left blank.

    ``signed`` draws zero in white with a diverging scale (cosines); otherwise darker is more, and the scale spans the
    values.
    """
    k = len(names)
    if k < 2 or len(values) != k or any(len(row) != k for row in values):
        raise UsageError(
            "a heat map of pairs needs a square matrix over two vectors or more",
            values={"vectors": k, "rows": len(values)},
        )
    shown = [[None if i == j else _finite(v) for j, v in enumerate(row)] for i, row in enumerate(values)]
    present = [v for row in shown for v in row if v is not None] or [0.0]
    top = max(abs(v) for v in present) if signed else max(present)
    low = -top if signed else min(present)
    if top == low:  # all alike: one pale colour
        low, top = top - 0.5, top + 1.5
    cells = [[float("nan") if v is None else v for v in row] for row in shown]
    with _style():
        figure = _figure(0.62 * k + 2.6, 0.52 * k + 1.9)
        axes = figure.subplots()
        image = axes.imshow(cells, cmap="PuOr" if signed else "Blues", vmin=low, vmax=top)
        axes.set_xticks(range(k), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(k), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for i, row in enumerate(shown):
            for j, v in enumerate(row):
                if v is not None:
                    light = abs(v) > 0.6 * top if signed else v - low > 0.6 * (top - low)
                    axes.text(j, i, _short(v, digits), ha="center", va="center", fontsize=7.5,
                              color="white" if light else INK)  # fmt: skip
        bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.03)
        bar.set_label(label)
        bar.outline.set_visible(False)
        axes.set_title(title, fontsize=11, fontweight="bold", pad=10)
        _save(figure, path)


def plot_scores(
    path: Path | str,
    bars: Sequence[Bar],
    title: str = "Accuracy on the test split",
    label: str = "accuracy, mean over tasks (%)",
) -> None:
    """Horizontal bars from 0 %, a whisker for the spread, a dot for every task.

    Dashed lines carry the means of the rows of kind ``reference`` down the picture, so that each method is read
    against them. Controls are hatched.
    """
    if not bars:
        raise UsageError("no method has a score to draw")
    colours = {"reference": PALE, "method": SKY, "control": "white"}
    with _style():
        figure = _figure(7.4, 0.33 * len(bars) + 1.5)
        axes = figure.subplots()
        for y, bar in enumerate(bars):
            mean = 100 * bar.mean
            axes.barh(
                y, mean, height=0.68, color=colours[bar.kind], zorder=1,
                edgecolor=GREY if bar.kind == "control" else "none", linewidth=0.6,
                hatch="////" if bar.kind == "control" else None,
            )  # fmt: skip
            if bar.tasks:
                axes.plot([100 * s for s in bar.tasks], [y] * len(bar.tasks), "o", ms=2.6, mfc=BLUE, mec="white",
                          mew=0.3, zorder=3)  # fmt: skip
            text = f"{mean:.1f}"
            if bar.spread is not None:
                axes.errorbar(mean, y, xerr=100 * bar.spread, color=INK, capsize=2.5, elinewidth=1.2, zorder=4)
                text += f" ± {100 * bar.spread:.1f}"
            axes.text(101.5, y, text, va="center", ha="left", fontsize=8.5)
        for bar in bars:
            if bar.kind == "reference":
                axes.axvline(100 * bar.mean, color=GREY, lw=0.9, ls=(0, (4, 3)), zorder=2)
        axes.set_yticks(range(len(bars)), [b.label for b in bars])
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=11, fontweight="bold", pad=8)
        _score_legend(figure, bars)
        _save(figure, path)


def _spectrum(axes: Any, panel: SpectrumPanel, named: Mapping[str, tuple[str, str]], threshold: float | None) -> None:
    longest = max((len(v) for v in panel.eigenvalues.values()), default=1)
    for pair, values in panel.eigenvalues.items():
        if pair not in named:
            axes.plot(range(1, len(values) + 1), values, color=PALE, lw=0.8, zorder=1, label="other pairs")
    for pair, (colour, marker) in named.items():
        values = panel.eigenvalues.get(pair, ())
        every = max(1, len(values) // 8)
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, ms=3.5, markevery=every, lw=1.4,
                  zorder=3, label=pair)  # fmt: skip
    if panel.edges:
        low, high = min(panel.edges.values()), max(panel.edges.values())
        if high - low > 0.01:
            axes.axhspan(low, high, color=SKY, alpha=0.25, lw=0, zorder=0, label="chance edges of the pairs")
        else:
            axes.axhline(high, color=SKY, lw=1.4, ls=":", zorder=2, label="chance edge")
    if threshold is not None:
        axes.axhline(threshold, color=INK, lw=1.0, ls="--", zorder=2, label=f"threshold {threshold:g}")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0.5 if longest < 10 else 0, longest + 0.5)
    axes.set_title(panel.title)


def _foremost(panels: Sequence[SpectrumPanel], count: int) -> dict[str, tuple[str, str]]:
    pairs = dict.fromkeys(p for panel in panels for p in panel.eigenvalues)
    lead = {
        p: sum(max(panel.eigenvalues.get(p, ()), default=0.0) - panel.edges.get(p, 0.0) for panel in panels)
        for p in pairs
    }
    marks = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D")]
    chosen = sorted(pairs, key=lambda p: -lead[p])[: min(count, len(marks))]
    return dict(zip(chosen, marks, strict=False))


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for a in axes:
        handles, labels = a.get_legend_handles_labels()
        entries.update({label: h for h, label in zip(handles, labels, strict=True) if label not in entries})
    last = ("other pairs", "chance", "threshold")
    order = sorted(entries, key=lambda label: label.startswith(last))
    figure.legend([entries[o] for o in order], order, loc="outside lower left", ncols=min(6, len(order)), frameon=False)


def _score_legend(figure: Any, bars: Sequence[Bar]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    kinds = {b.kind for b in bars}
    if "method" in kinds:
        handles.append(Patch(facecolor=SKY, label="method"))
    if "control" in kinds:
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch="////", label="control"))
    if "reference" in kinds:
        handles.append(Patch(facecolor=PALE, label="reference (dashed line)"))
    if any(b.tasks for b in bars):
        handles.append(Line2D([], [], marker="o", ls="", ms=4, mfc=BLUE, mec="white", label="one task"))
    if any(b.spread is not None for b in bars):
        handles.append(Line2D([], [], color=INK, lw=1.2, label="± one standard deviation"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)


def _short(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    if set(text) <= set("-.0"):
        return "0"
    return text.replace("-", "−").replace("0.", ".", 1) if abs(value) < 1 else text.replace("-", "−")


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _style() -> AbstractContextManager[Any]:
    try:
        from matplotlib import rc_context
    except ImportError:
        raise InputError(
            "pictures need matplotlib, which is not installed", remedy="Install it: pip install 'devec[plot]'."
        ) from None
    context: AbstractContextManager[Any] = rc_context(STYLE)
    return context


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path | str) -> None:
    figure.savefig(Path(path), format="png", dpi=DPI, metadata={"Software": None})
