"""Pictures of a comparison: spectra of overlaps and how alike the vectors are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from devec.core.decomposition import Decomposition
from devec.io.folder import output_file
from devec.report.plots import SpectrumPanel, plot_heatmap, plot_spectra

PANELS = 9


def spectrum_panels(d: Decomposition, count: int = PANELS) -> list[SpectrumPanel]:
    """The tensors whose largest eigenvalue stands highest, in the order of the model."""
    tops: dict[str, float] = {}
    for (name, _side, pair), s in d.spectra.items():
        if pair is not None and s.eigenvalues.numel():
            tops[name] = max(tops.get(name, 0.0), float(s.eigenvalues[0]))
    chosen = set(sorted(tops, key=lambda n: -tops[n])[:count])
    side = "right" if d.factoring.side == "right" else "left"
    panels = []
    for name in [n for n in tops if n in chosen]:
        own = {k[2]: s for k, s in d.spectra.items() if k[0] == name and k[1] == side and k[2] is not None}
        labels = {pair: f"{d.vectors[pair[0]]}+{d.vectors[pair[1]]}" for pair in own if pair is not None}
        panels.append(
            SpectrumPanel(
                title=name,
                eigenvalues={labels[p]: [float(x) for x in s.eigenvalues] for p, s in own.items() if p is not None},
                edges={labels[p]: s.edge for p, s in own.items() if p is not None},
            )
        )
    return panels


def overlap_matrix(d: Decomposition) -> list[list[float | None]]:
    """Median over tensors of each pair's largest eigenvalue; ``None`` on the diagonal and where nothing is common."""
    k = len(d.vectors)
    tops: dict[tuple[int, int], list[float]] = {}
    for (_name, _side, pair), s in d.spectra.items():
        if pair is not None and s.eigenvalues.numel():
            tops.setdefault(pair, []).append(float(s.eigenvalues[0]))
    return [
        [median(tops[min(i, j), max(i, j)]) if (min(i, j), max(i, j)) in tops and i != j else None for j in range(k)]
        for i in range(k)
    ]


def cosine_matrix(result: Mapping[str, Any]) -> list[list[float | None]]:
    """Cosines of a comparison (see ``devec.compare``)."""
    gram, norms = result["gram"], result["norms"]
    k = len(norms)
    return [
        [None if i == j or not norms[i] * norms[j] else gram[i][j] / (norms[i] * norms[j]) for j in range(k)]
        for i in range(k)
    ]


def plot_comparison(d: Decomposition, result: Mapping[str, Any], out: str | Path, *, overwrite: bool = False) -> None:
    """Spectra of the most alike tensors to ``out``, and the pairs' overlaps beside it as ``NAME-pairs.SUFFIX``."""
    place = Path(out)
    pairs = place.with_name(f"{place.stem}-pairs{place.suffix}")
    threshold = d.view.threshold if isinstance(d.view.threshold, float) else None
    with output_file(place, overwrite=overwrite) as partial:
        picture = partial.with_name(f"{partial.name}{place.suffix}")
        plot_spectra(picture, spectrum_panels(d), threshold)
        picture.rename(partial)
    with output_file(pairs, overwrite=overwrite) as partial:
        picture = partial.with_name(f"{partial.name}{place.suffix}")
        plot_heatmap(
            picture, d.vectors, overlap_matrix(d), "How alike the vectors are", "largest cos², median over tensors"
        )
        picture.rename(partial)
