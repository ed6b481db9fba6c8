"""A decomposition as plain data: the JSON that ``devec decompose --json`` prints and ``spectra.json`` holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from devec.core.decomposition import Decomposition
from devec.core.findings import decomposition_findings, pool_findings
from devec.core.results import Finding, Spectrum
from devec.core.spectra import Pair, draw_nulls, sides_of

SCHEMA = 1


def pair_label(d: Decomposition, pair: tuple[int, int] | None) -> str:
    return "joint" if pair is None else f"{d.vectors[pair[0]]}+{d.vectors[pair[1]]}"


def all_findings(d: Decomposition) -> list[Finding]:
    return [*pool_findings(d.pool), *decomposition_findings(d)]


def as_dict(d: Decomposition, findings: Sequence[Finding] | None = None) -> dict[str, Any]:
    """Schema 1 of docs/commands.md. Per tensor and in total: rank, energy kept, edge, eigenvalues, p-values, directions
    and energy called shared. ``threshold`` is the pairwise cos^2 asked for, ``applied_threshold`` the mapped one."""
    draw_nulls(d.spectra)
    pairs: dict[str, dict[Pair | None, None]] = {name: {} for name in d.tensors}
    for name, _side, pair in d.spectra:
        pairs[name][pair] = None
    tensors = {name: _tensor(d, name, pairs[name]) for name in d.tensors}
    return {
        "schema": SCHEMA,
        "vectors": list(d.vectors),
        "mode": d.factoring.mode,
        "target": d.factoring.target,
        "threshold": d.view.threshold,
        "fdr": d.view.fdr if d.view.threshold == "chance" else None,
        "side": d.factoring.side,
        "rank": d.factoring.rank,
        "pair_basis": d.view.pair_basis,
        "joint": d.view.joint if d.factoring.mode == "joint" else None,
        "target_rule": d.view.target_rule,
        "angles": d.view.angles,
        "paper": d.view.paper,
        "order_dependent": order_dependent(d),
        "tensors": tensors,
        "totals": _totals(d, tensors),
        "warnings": [f.as_dict() for f in (all_findings(d) if findings is None else findings)],
    }


def order_dependent(d: Decomposition) -> list[str]:
    """Which choices make the result depend on the order of the vectors."""
    out = []
    if d.view.pair_basis == "first":
        out.append("pair-basis first")
    if d.factoring.mode == "joint" and d.view.joint == "chain":
        out.append("joint chain")
    if d.factoring.mode != "joint" and d.view.target_rule == "sequence" and len(d.pool) > 2:
        out.append("target-rule sequence")
    return out


def _tensor(d: Decomposition, name: str, pairs: Iterable[Pair | None]) -> dict[str, Any]:
    t = d.tensors[name]
    entry: dict[str, Any] = {
        "shape": list(t.layout.matrix_shape),
        "rank": {d.vectors[i]: t.svd[i].rank for i in t.members},
        "energy_kept": {d.vectors[i]: round(t.svd[i].energy_kept, 9) for i in t.members},
    }
    sides = sides_of(d.factoring.side)
    fields = ("eigenvalues", "applied_threshold", "edge", "p_value", "shared_directions")
    for label in fields:
        entry[label] = {}
    for pair in pairs:
        per_side = {s: d.spectra[name, s, pair] for s in sides if (name, s, pair) in d.spectra}
        for label in fields:
            values = {s: _field(spectrum, label) for s, spectrum in per_side.items()}
            entry[label][pair_label(d, pair)] = values if d.factoring.side == "both" else next(iter(values.values()))
    wanted = t.members if d.target is None else tuple(i for i in t.members if i == d.target)
    entry["shared_energy"] = {d.vectors[i]: round(d.shared_energy(name, i), 9) for i in wanted}
    return entry


def _field(s: Spectrum, label: str) -> Any:
    if label == "eigenvalues":
        return [float(x) for x in s.eigenvalues]
    if label == "p_value":
        return [float(x) for x in s.p_values]
    if label == "applied_threshold":
        return s.applied
    return s.edge if label == "edge" else s.count


def _totals(d: Decomposition, tensors: dict[str, Any]) -> dict[str, Any]:
    joint = d.factoring.mode == "joint"
    decided = [s for key, s in d.spectra.items() if (key[2] is None) == joint]
    energy: dict[str, float] = {}
    for i, name in enumerate(d.vectors):
        if d.target is not None and i != d.target:
            continue
        total = shared = 0.0
        for tensor, t in d.tensors.items():
            square = t.norms.get(i, 0.0) ** 2
            total += square
            shared += square * float(tensors[tensor]["shared_energy"].get(name, 0.0))
        energy[name] = round(shared / total, 9) if total else 0.0
    return {
        "tensors": len(d.tensors),
        "shared_directions": sum(s.count for s in decided),
        "directions": sum(int(s.eigenvalues.numel()) for s in decided),
        "above_chance": sum(int((s.p_values < 0.01).sum()) for s in decided),
        "largest_eigenvalue": max((float(s.eigenvalues[0]) for s in decided if s.eigenvalues.numel()), default=0.0),
        "shared_energy": energy,
    }
