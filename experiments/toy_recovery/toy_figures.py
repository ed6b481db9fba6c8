"""Pictures of the toy experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Config = dict[str, Any]
BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#e07b00", "#2a8f4f", "#c43c39", "#666666"


def draw(config: Config, results: dict[str, list[Any]], summary: dict[str, Any], folder: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False})
    for name, figure in (
        ("fig8a", eigenvalues(config, results, summary)),
        ("fig8b", recovery(config, summary)),
        ("fig7", angles(config, results)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)


def eigenvalues(config: Config, results: dict[str, list[Any]], summary: dict[str, Any]) -> plt.Figure:
    names = [name for name in results if name.startswith("clusters")]
    figure, axes = plt.subplots(
        2, (len(names) + 1) // 2, figsize=(8, 5), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    bins = np.linspace(0, 1, 51)
    for ax, name in zip(axes.flat, names, strict=False):
        s = summary[name]
        values = np.concatenate([r["eigenvalues"] for r in results[name]])
        height = np.histogram(np.clip(values, 0, 1), bins)[0] / len(results[name])
        above = bins[:-1] >= config["tau"] - 1e-9
        ax.bar(bins[:-1], height, width=0.02, align="edge", color=np.where(above, BLUE, "#b9c4cf"))
        ax.axvline(config["tau"], color=RED, lw=1)
        ax.axvline(s["private_edge"], color=GREY, lw=1, ls="--")
        by_chance = s["above_tau"] - s["at_one"]
        above_tau = f"{s['above_tau']:.0f} above the threshold"
        above_tau += f", {by_chance:.0f} of them by chance" if by_chance >= 0.5 else ""
        ax.set_title(f"n = {name.split()[1].replace('x', ', m = ')}\n{above_tau}", fontsize=9)
    axes[0, 0].plot([], [], color=RED, lw=1, label=f"threshold {config['tau']}")
    axes[0, 0].plot([], [], color=GREY, lw=1, ls="--", label="chance edge of the private columns")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
    )
    axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    for ax in axes[-1]:
        ax.set_xlabel(r"eigenvalue of $P_1P_2$ (squared cosine)")
    figure.supylabel("eigenvalues per run and bin (log scale)", fontsize=9)
    return figure


def recovery(config: Config, summary: dict[str, Any]) -> plt.Figure:
    names = [name for name in summary if name.split()[0] in ("noise", "mixed")]
    figure, axes = plt.subplots(
        2, len(names), figsize=(2.6 * len(names), 5.2), sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    q, tau = config["shared"], config["tau"]
    styles = {
        "first/top": (BLUE, "-", "o", f"first, top {q}"),
        "first/tau": (BLUE, "--", "s", f"first, above {tau}"),
        "bisector/top": (ORANGE, "-", "o", f"bisector, top {q}"),
        "bisector/tau": (ORANGE, "--", "s", f"bisector, above {tau}"),
    }
    for column, name in enumerate(names):
        kind, _, size = name.partition(" ")
        sigmas = np.array([float(s) for s in summary[name]])
        angle, recall = axes[0, column], axes[1, column]
        angle.axhline(30, color=RED, lw=1, label="30 degrees")
        angle.plot(sigmas, np.degrees(np.arctan(sigmas)), color=GREY, lw=1, ls=":", label="atan(sigma)")
        for rule, (colour, line, marker, label) in styles.items():
            rows = [v[rule] for v in summary[name].values()]
            y = [np.nan if r["angle"] is None else r["angle"] for r in rows]
            angle.plot(sigmas, y, color=colour, ls=line, marker=marker, ms=3.5, lw=1.4, label=label)
            recall.plot(sigmas, [100 * r["recall"] for r in rows], color=colour, ls=line, marker=marker, ms=3.5, lw=1.4)
        title = "n = " + size.replace("x", ", m = ")
        angle.set_title(title + ("\ncolumns mixed" if kind == "mixed" else ""), fontsize=9)
        recall.set_xlabel("noise sigma")
        recall.set_ylim(-3, 103)
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_ylabel("mean principal angle\nto the truth (degrees)")
    axes[1, 0].set_ylabel("recall: share of the\ntrue subspace found (%)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )
    return figure


def angles(config: Config, results: dict[str, list[Any]]) -> plt.Figure:
    """One line per comparison: all angles thin, the middle nine tenths thick, the median a dot."""
    names = [name for name in results if name.startswith("angles")]
    figure, axes = plt.subplots(
        1, len(names), figsize=(9, 3.8), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    rows = {
        "same": ("projection against QR vectors,\nboth in range($W_1$)", BLUE),
        "acos": ("the same, read as acos\nof the cosines", GREEN),
        "literal": ("eig vectors as returned,\nread as acos", RED),
        "other": ("$Z$ in range($W_1$) against\n$G$ in range($W_2$)", ORANGE),
    }
    zero = 1e-15  # exact zeros, acos of a cosine that was rounded to 1, stand here
    for ax, name in zip(axes[0], names, strict=True):
        for i, (key, (_, colour)) in enumerate(rows.items()):
            for dtype, shift, face in (("float32", -0.17, "white"), ("float64", 0.17, colour)):
                values = np.maximum(np.concatenate([r[f"{key}/{dtype}"] for r in results[name]]), zero)
                low, p5, middle, p95, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
                ax.plot([low, high], [i + shift] * 2, color=colour, lw=1)
                ax.plot([p5, p95], [i + shift] * 2, color=colour, lw=4, alpha=0.5, solid_capstyle="butt")
                ax.plot(middle, i + shift, "o", ms=5, mfc=face, mec=colour, zorder=3)
        ax.axvline(6, color=GREY, lw=1, ls=":")
        ax.set_xscale("log")
        ax.set_xlim(zero / 2, 300)
        ticks = [zero, 1e-12, 1e-9, 1e-6, 1e-3, 1]
        ax.set_xticks(ticks, ["0", "$10^{-12}$", "$10^{-9}$", "$10^{-6}$", "$10^{-3}$", "1"])
        ax.minorticks_off()
        ax.set_title("without noise" if name.endswith(" 0") else f"sigma = {name.split()[1]}", fontsize=9)
        ax.annotate("6°", (6, 1), xycoords=("data", "axes fraction"), xytext=(2, -9), textcoords="offset points",
                    color=GREY, fontsize=8)  # fmt: skip
    axes[0, 0].set_yticks(range(len(rows)), [label for label, _ in rows.values()])
    axes[0, 0].invert_yaxis()
    for ax in axes[0]:
        ax.set_xlabel("principal angle (degrees, log scale)")
    handles = [
        plt.Line2D([], [], marker="o", ls="", mfc="white", mec=GREY, label="float32, median"),
        plt.Line2D([], [], marker="o", ls="", mfc=GREY, mec=GREY, label="float64, median"),
        plt.Line2D([], [], color=GREY, lw=4, alpha=0.5, label="5 to 95 % of angles"),
        plt.Line2D([], [], color=GREY, lw=1, label="all angles"),
        plt.Line2D([], [], color=GREY, lw=1, ls=":", label="bound named in the paper"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
