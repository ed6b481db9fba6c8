"""Draw the pictures of docs/ideas.md into docs/img/. Every number in them is computed here, from seeded data.

python docs/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OUT = Path(__file__).parent / "img"
BLUE, ORANGE, GREEN, GREY = "#3465a4", "#d9822b", "#2f855a", "#8a8f98"
TAU = 0.85
plt.rcParams.update(
    {
        "svg.hashsalt": "devec",  # element names in the file do not change from run to run
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "figure.facecolor": "white",
    }
)


def save(figure: Figure, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote docs/img/{name}.svg")


def basis(matrix: np.ndarray) -> np.ndarray:
    """Orthonormal columns with the span of the matrix's columns (which are independent here)."""
    return np.linalg.qr(matrix)[0]


def eigenvalues(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Nonzero eigenvalues of P1 P2: squared singular values of the overlap of the two bases, at most 1."""
    return np.minimum(np.linalg.svd(basis(one).T @ basis(two), compute_uv=False), 1.0) ** 2


def planes() -> None:
    """Two planes through the origin of three-dimensional space: principal angles 0 and 60 degrees."""
    angle = np.radians(60)
    line, across, up = np.eye(3)
    tilted = np.cos(angle) * across + np.sin(angle) * up
    found = eigenvalues(np.stack([line, across], 1), np.stack([line, tilted], 1))
    view = np.array([[1.0, -0.18], [0.55, 0.42], [0.0, 1.0]])  # parallel projection of the three axes

    figure, axes = plt.subplots(figsize=(5.6, 3.3))

    def sheet(second: np.ndarray, low: float, high: float, colour: str) -> None:
        corners = np.array([1.3 * a * line + b * second for a, b in ((-1, low), (1, low), (1, high), (-1, high))])
        axes.fill(*(corners @ view).T, facecolor=colour, edgecolor=colour, alpha=0.3)

    # Painted from back to front: below the first plane, that plane, above it.
    sheet(tilted, -0.7, 0, ORANGE)
    sheet(across, -1, 1, BLUE)
    sheet(tilted, 0, 1, ORANGE)
    for to, colour in ((1.25 * line, GREEN), (0.85 * across, BLUE), (0.85 * tilted, ORANGE)):
        axes.annotate("", to @ view, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
    sweep = np.linspace(0, angle, 30)
    arc = 0.5 * (np.cos(sweep)[:, None] * across + np.sin(sweep)[:, None] * up) @ view
    axes.plot(*arc.T, color="black", linewidth=1)
    axes.text(*arc[12] + [0.05, 0.0], rf"$\theta_2 = 60^\circ$, $\lambda_2 = {found[1]:.2f}$")
    shared = rf"shared: $\theta_1 = 0^\circ$, $\lambda_1 = {found[0]:.2f}$"
    axes.text(*(1.32 * line @ view), shared, color=GREEN, va="top")
    axes.text(*((-1.2 * line - 0.9 * across) @ view), "$U_1$", color=BLUE, fontsize=13)
    axes.text(*((-1.2 * line + 0.82 * tilted) @ view), "$U_2$", color=ORANGE, fontsize=13)
    axes.set(xlim=(-2, 2.6))
    axes.set_aspect("equal")
    axes.set_axis_off()
    save(figure, "planes")


def split() -> None:
    """A column of each of two vectors, split along the shared direction that a pair basis picks."""
    theta = np.radians(18)
    f = np.array([1.0, 0.0])
    g = np.array([np.cos(theta), np.sin(theta)])
    choices = (
        ("first: z = f", f, "A keeps everything, B is cut short"),
        ("bisector: z = (f + g) / |f + g|", (f + g) / np.linalg.norm(f + g), "both lose the same little"),
    )
    figure, panels = plt.subplots(1, 2, figsize=(8.2, 2.5), sharey=True)
    for axes, (title, z, remark) in zip(panels, choices, strict=True):
        axes.plot([0, 1.2 * z[0]], [0, 1.2 * z[1]], color=GREEN, linestyle=":", linewidth=1.5)
        axes.annotate("z", 1.22 * z, color=GREEN)
        for w, colour, name, side in ((f, BLUE, "f (from A)", -1), (g, ORANGE, "g (from B)", 1)):
            inside = z * (z @ w)
            axes.annotate("", w, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8})
            axes.plot(*np.stack([inside, w], 1), color=colour, linestyle="--", linewidth=1.2)
            kept = (z @ w) ** 2
            offset = 0.07 if side > 0 else -0.1
            axes.text(w[0] - 0.3, w[1] + offset, f"{name}: {kept:.1%} shared", color=colour)
        axes.set(title=title, xlim=(-0.03, 1.32), ylim=(-0.2, 0.5), xlabel=remark, xticks=[], yticks=[])
        axes.set_aspect("equal")
        for spine in axes.spines.values():
            spine.set_visible(False)
    save(figure, "split")


def histogram(axes: Axes, values: np.ndarray, title: str) -> None:
    above = values > TAU
    bins = np.linspace(0, 1, 41)
    axes.hist(values[~above], bins=bins, color=GREY)
    axes.hist(values[above], bins=bins, color=GREEN)
    axes.axvline(TAU, color="black", linewidth=1, linestyle="--")
    axes.set(title=title, xlabel=r"eigenvalue $\lambda = \cos^2\theta$", xlim=(0, 1.02))
    axes.text(0.4, 0.78, f"{above.sum()} of {values.size}\nabove {TAU}", transform=axes.transAxes, color=GREEN)


def clusters() -> None:
    """100 planted common columns of 200, without noise, and with noise; and full-rank matrices that share nothing."""
    rng = np.random.default_rng(0)
    n, m, common, sigma = 1000, 200, 100, 0.2
    shared = rng.standard_normal((n, common))

    def one(noise: float) -> np.ndarray:
        return np.hstack([shared, rng.standard_normal((n, m - common))]) + noise * rng.standard_normal((n, m))

    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.6), layout="constrained")
    histogram(panels[0], eigenvalues(one(0.0), one(0.0)), "100 of 200 columns in common")
    histogram(panels[1], eigenvalues(one(sigma), one(sigma)), f"the same, noise {sigma} on every entry")
    unrelated = eigenvalues(rng.standard_normal((200, 200)), rng.standard_normal((200, 200)))
    histogram(panels[2], unrelated, "unrelated, but of full rank")
    panels[0].set_ylabel("directions")
    save(figure, "clusters")


def chance() -> None:
    """Largest eigenvalue of independent subspaces against their dimension, with the edge 4 rho (1 - rho)."""
    rng = np.random.default_rng(0)
    n = 400
    ranks = np.arange(4, 241, 8)
    largest = [eigenvalues(rng.standard_normal((n, r)), rng.standard_normal((n, r))).max() for r in ranks]
    rho = np.linspace(0, 0.5, 200)
    figure, axes = plt.subplots(figsize=(5.4, 2.9), layout="constrained")
    edge = 4 * rho * (1 - rho)
    axes.plot(np.append(rho, 0.62), np.append(edge, 1.0), color=BLUE, label=r"edge $4\rho(1-\rho)$, then 1")
    axes.plot(ranks / n, largest, "o", color=GREY, markersize=3.5, label=f"largest of one unrelated pair, n = {n}")
    axes.axhline(TAU, color="black", linewidth=1, linestyle="--")
    axes.axvline(0.25, color=GREEN, linewidth=1)
    axes.text(0.255, 0.05, "cap of --rank auto:\na quarter of the rows", color=GREEN)
    axes.text(0.005, TAU + 0.02, f"threshold {TAU}")
    axes.set(xlabel=r"rank over rows, $\rho = r/n$", ylabel=r"eigenvalue $\lambda$", xlim=(0, 0.62), ylim=(0, 1.05))
    axes.legend(loc="center right", frameon=False)
    save(figure, "chance")


if __name__ == "__main__":
    for draw in (planes, split, clusters, chance):
        draw()
