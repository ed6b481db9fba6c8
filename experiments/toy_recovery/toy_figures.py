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
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
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
        two = s["private_edge"] < config["tau"]
        ax.set_title(
            f"n = {name.split()[1].replace('x', ', m = ')}: {s['above_tau']:.0f} above the threshold"
            + ("" if two else ", no gap"),
            fontsize=9,
        )
    axes[0, 0].plot([], [], color=RED, lw=1, label=f"threshold {config['tau']}")
    axes[0, 0].plot([], [], color=GREY, lw=1, ls="--", label="chance edge of\nthe private columns")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper center")
    axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    figure.supxlabel(r"eigenvalue of $P_1P_2$ (squared cosine)", fontsize=9)
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
            recall.plot(
                sigmas, [100 * r["recall"] for r in rows], color=colour, ls=line, marker=marker, ms=3.5, lw=1.4
            )
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
    names = [name for name in results if name.startswith("angles")]
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 5.4), sharex=True, layout="constrained", squeeze=False)
    series = {
        "same/float64": (BLUE, "-", "same subspace, float64"),
        "same/float32": (BLUE, "--", "same subspace, float32"),
        "acos/float64": (GREEN, "-", "acos read-out, float64"),
        "acos/float32": (GREEN, "--", "acos read-out, float32"),
        "literal/float64": (RED, "-", "literal eig vectors, float64"),
        "other/float64": (ORANGE, "-", r"$Z$ against $G$ in range($W_2$)"),
    }
    # Exact zeros (acos of a cosine rounded to 1) stand in the lowest bin.
    low = 1e-15
    bins = np.logspace(np.log10(low), 2, 103)
    for ax, name in zip(axes[:, 0], names, strict=True):
        for key, (colour, line, label) in series.items():
            values = np.concatenate([r[key] for r in results[name]])
            weights = np.full(values.size, 100 / values.size)
            ax.hist(
                np.clip(values, low, 99), bins, weights=weights, histtype="step", color=colour, ls=line, lw=1.4,
                label=label,
            )  # fmt: skip
        ax.axvline(6, color=GREY, lw=1, ls=":")
        ax.text(7, ax.get_ylim()[1] * 0.97, "6°", color=GREY, va="top", fontsize=8)
        ax.set_xscale("log")
        ax.set_title(f"sigma = {name.split()[1]}", fontsize=9, loc="left")
        ax.set_ylabel("% of angles per bin")
    axes[-1, 0].set_xlabel("principal angle between the two shared subspaces (degrees, log scale; zeros at the left)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure
