"""What a user must be told: the warnings of a pool and of a decomposition, each with its code.

A threshold that finds nothing makes every edit a no-op; a projector near the identity makes every vector "shared". Both
look like success from outside, so they are said loudly.
"""

from __future__ import annotations

from collections import defaultdict
from math import sqrt
from statistics import median

from devec.core.decomposition import Decomposition
from devec.core.results import Finding
from devec.core.spectra import wanted_pairs
from devec.core.vectors import Pool

NEAR_DUPLICATE = 0.95
"""Cosine above which two vectors are copies of one another (different tasks of one base: below 0.15)."""

OUTLIER = 20.0
"""Norm of a vector against the pool's median (real adapters of one base spread over about a factor of 10)."""

SEED_OVERLAP = 0.9
"""Input-side eigenvalue that only a common random start of lora_A gives (.97-1.00 seen, against .5 otherwise)."""

MEAN_BASE = 0.01
"""|sum of vectors| / sum of |vector| under which the base can only be their mean."""


def pool_findings(pool: Pool) -> list[Finding]:
    """What can be said from names and layouts alone."""
    out: list[Finding] = []
    # Differences of checkpoints know their base itself, by its bytes: a path is no name that could differ.
    bases = {v.name: v.origin.base_name for v in pool if v.origin.base_name and v.partial}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{v} says {b}" for v, b in bases.items())
        out.append(Finding("base-name-differs", f"the adapters name different bases: {listed}"))
    for n in pool.tensors():
        lacking = [v.name for v in pool if n not in v.deltas]
        if lacking:
            out.append(Finding("missing-module", ", ".join(lacking), (n,)))
    out = _gathered_missing(out, len(pool))
    with_heads = [v for v in pool if v.heads]
    if with_heads:
        listed = ", ".join(f"{v.name} ({len(v.heads)})" for v in with_heads)
        names = tuple(f"{v.name}:{n}" for v in with_heads for n in v.heads)
        out.append(Finding("head-kept-apart", f"whole tensors (heads) take no part: {listed}", names))
    return out


def _gathered_missing(findings: list[Finding], k: int) -> list[Finding]:
    """One finding per set of vectors that lack modules, instead of one per tensor."""
    groups: dict[str, list[str]] = defaultdict(list)
    rest = []
    for f in findings:
        if f.code == "missing-module":
            groups[f.message].extend(f.tensors)
        else:
            rest.append(f)
    return rest + [
        Finding("missing-module", f"{len(names)} tensors are left out for {who}, which lack them", tuple(names))
        for who, names in groups.items()
    ]


def decomposition_findings(d: Decomposition) -> list[Finding]:
    """Everything that the factors, Grams and spectra say, under the present view."""
    return [
        *d.notes,
        *_zero_and_outlier(d),
        *_cosines(d),
        *_mean_base(d),
        *_shared_seed(d),
        *_edges(d),
        *_everything_or_nothing(d),
    ]


def total_gram(d: Decomposition) -> dict[tuple[int, int], float]:
    """``<tau_i, tau_j>`` over all decomposed tensors; in mode target of the pairs that hold the target."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    for t in d.tensors.values():
        for pair, value in t.gram.items():
            total[pair] += value
    return dict(total)


def _whole_gram(d: Decomposition) -> dict[tuple[int, int], float]:
    """:func:`total_gram` of all pairs, from the deltas themselves."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    for n in d.tensors:
        deltas = [(i, v.deltas[n]) for i, v in enumerate(d.pool) if n in v.deltas]
        for a, (i, first) in enumerate(deltas):
            for j, second in deltas[a:]:
                total[i, j] += first.inner(second)
    return total


def _norms(d: Decomposition) -> list[float]:
    gram = total_gram(d)
    return [sqrt(max(gram.get((i, i), 0.0), 0.0)) for i in range(len(d.pool))]


def _zero_and_outlier(d: Decomposition) -> list[Finding]:
    out = []
    norms = _norms(d)
    alive = [x for x in norms if x > 0]
    middle = median(alive) if alive else 0.0
    for i, name in enumerate(d.vectors):
        zero = tuple(n for n, t in d.tensors.items() if i in t.norms and t.norms[i] == 0.0)
        if norms[i] == 0.0:
            out.append(Finding("zero-vector", f"{name} is zero everywhere and takes no part", zero))
        elif zero:
            out.append(Finding("zero-vector", f"{name} is zero in {len(zero)} tensors and takes no part there", zero))
        if len(alive) > 2 and norms[i] > OUTLIER * middle:
            out.append(
                Finding(
                    "norm-outlier", f"{name} has norm {norms[i]:.3g}, {norms[i] / middle:.0f} times the pool's median"
                )
            )
        large = _outlying_tensors(d, i)
        if large:
            out.append(Finding("norm-outlier", f"{name} has {len(large)} tensors of outlying norm", large))
    return out


def _outlying_tensors(d: Decomposition, i: int) -> tuple[str, ...]:
    """Tensors whose norm stands far out among this vector's tensors of the same shape."""
    by_shape: dict[tuple[int, int], list[tuple[str, float]]] = defaultdict(list)
    for n, t in d.tensors.items():
        if t.norms.get(i, 0.0) > 0:
            by_shape[t.layout.matrix_shape].append((n, t.norms[i]))
    return tuple(
        n
        for group in by_shape.values()
        if len(group) >= 4
        for n, x in group
        if x > OUTLIER * median(y for _, y in group)
    )


def _cosines(d: Decomposition) -> list[Finding]:
    out = []
    gram, norms = total_gram(d), _norms(d)
    for (i, j), value in gram.items():
        if i == j or norms[i] * norms[j] == 0.0:
            continue
        cosine = value / (norms[i] * norms[j])
        pair = f"{d.vectors[i]} and {d.vectors[j]}"
        if cosine > NEAR_DUPLICATE:
            out.append(Finding("near-duplicate", f"{pair} have cosine {cosine:.3f}: nearly the same vector"))
        elif cosine < -0.5:
            out.append(
                Finding("negative-overlap", f"{pair} have cosine {cosine:.3f}: their common shared vector cancels")
            )
    return out


def _mean_base(d: Decomposition) -> list[Finding]:
    gram, norms = total_gram(d), _norms(d)
    if len(norms) < 2 or sum(norms) == 0.0:
        return []
    if d.target is not None and len(norms) > 2:
        # Where the vectors sum to zero, so do their inner products with the target: only then is the rest worth making.
        row = sum(v for pair, v in gram.items() if d.target in pair)
        if abs(row) > norms[d.target] * min(MEAN_BASE * sum(norms), norms[d.target] / 4):
            return []
        gram = _whole_gram(d)
    square = sum(v if i == j else 2 * v for (i, j), v in gram.items())
    if sqrt(max(square, 0.0)) > MEAN_BASE * sum(norms):
        return []
    return [
        Finding(
            "base-is-mean",
            "the vectors sum to zero, so the base is only their mean: that invents sharing, and the chance edge and "
            "p-values do not hold",
        )
    ]


def _shared_seed(d: Decomposition) -> list[Finding]:
    """Input sides nearly equal while output sides are not: lora_A started from one random draw."""
    from devec.linalg.subspace import pair_spectrum

    by_pair: dict[tuple[int, int], list[tuple[str, float, float]]] = defaultdict(list)
    for n, t in d.tensors.items():
        for i, j in wanted_pairs([i for i in t.members if i in t.low_rank and t.svd[i].rank], d.target):
            M = t.svd[i].V.T @ t.svd[j].V
            if float((M * M).sum()) <= SEED_OVERLAP:  # the sum of all eigenvalues
                continue
            right = float(pair_spectrum(M).eigenvalues[0])
            if right > SEED_OVERLAP:
                left = float(pair_spectrum(t.svd[i].U.T @ t.svd[j].U).eigenvalues[0])
                by_pair[i, j].append((n, right, left))
    flagged: dict[tuple[int, int], list[tuple[str, float, float]]] = {}
    for (i, j), rows in by_pair.items():
        common = sum(1 for t in d.tensors.values() if {i, j} <= (set(t.svd) & t.low_rank))
        if len(rows) * 2 >= common and median(left for _, _, left in rows) < 0.5:
            flagged[i, j] = rows
    if not flagged:
        return []
    names = sorted({n for rows in flagged.values() for n, _, _ in rows})
    vectors = sorted({d.vectors[i] for pair in flagged for i in pair})
    low = min(right for rows in flagged.values() for _, right, _ in rows)
    return [
        Finding(
            "shared-seed",
            f"the input sides of {', '.join(vectors)} agree (cos^2 from {low:.2f} to 1) while their output sides do "
            "not: lora_A started from the same random draw. This is no shared knowledge; side left is not affected",
            tuple(names),
        )
    ]


def _edges(d: Decomposition) -> list[Finding]:
    edges: dict[str, float] = {}
    ties: dict[str, None] = {}
    for (name, _side, _pair), s in d.spectra.items():
        if d.view.threshold != "chance" and s.edge > float(d.view.threshold):
            edges[name] = max(s.edge, edges.get(name, 0.0))
        if s.ties:
            ties[name] = None
    out = []
    if edges:
        worst = max(edges, key=lambda n: edges[n])
        n, m = d.tensors[worst].layout.matrix_shape
        longer = " or use the longer side" if n != m and d.factoring.side != "both" else ""
        out.append(
            Finding(
                "edge-above-threshold",
                f"in {len(edges)} tensors independent vectors overlap beyond the threshold by chance (edge "
                f"{edges[worst]:.2f} in {worst}): lower the rank{longer}",
                tuple(edges),
            )
        )
    if ties:
        out.append(
            Finding("threshold-tie", f"{len(ties)} tensors have eigenvalues at the threshold itself", tuple(ties))
        )
    return out


def _everything_or_nothing(d: Decomposition) -> list[Finding]:
    joint = d.factoring.mode == "joint"
    counts = [s.count for key, s in d.spectra.items() if (key[2] is None) == joint]
    if not any(counts):
        at = d.view.threshold if isinstance(d.view.threshold, str) else f"{d.view.threshold:g}"
        emptied = tuple(n for n, t in d.tensors.items() if any(x > 0 and i not in t.svd for i, x in t.norms.items()))
        why = (
            f"; in {len(emptied)} tensors the rank rule {d.factoring.rank} takes a whole delta for noise"
            if emptied
            else ""
        )
        return [
            Finding(
                "nothing-shared",
                f"nothing is shared at threshold {at}: every unique part equals its original, and an edit with it is "
                f"the plain one{why}",
                emptied,
            )
        ]
    full: dict[str, None] = {}
    for (name, _side, pair), s in d.spectra.items():
        if pair is not None and s.count >= min(d.tensors[name].svd[i].rank for i in pair) > 1:
            full[name] = None
    if not full:
        return []
    return [
        Finding(
            "everything-shared",
            f"in {len(full)} tensors every direction of a vector is called shared: the projector acts as the identity "
            "on it, and its unique part is empty or rounding",
            tuple(full),
        )
    ]
