"""Exponents and seconds of ``benchmarks.cost``: on the screen, as JSON, and as a section of RESULTS.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.cost_stages import MODES, STAGES, Cost
from benchmarks.fits import Exponent, exponent
from benchmarks.machine import in_words

BEGIN, END = "<!-- cost: begin -->", "<!-- cost: end -->"

NEEDED = ("factor", "algebra", "read")
"""What the mode itself needs; inner products and stored pairs serve warnings, cosines and other modes."""

K: dict[str, Callable[[int], float]] = {
    "k": lambda k: k,
    "k - 1": lambda k: k - 1,
    "k (k - 1) / 2": lambda k: k * (k - 1) / 2,
    "k^3": lambda k: k**3,
}
"""What a cost may grow like. On pools as small as these the power of ``k - 1`` is not yet 1: a fit is held against the
fit of the claim on the same pools."""

ALGEBRA = {"target": "k - 1", "chain": "k", "consensus": "k^3", "pairwise": "k (k - 1) / 2"}
"""Pairs of the target, links of the chain, an eigenproblem of size k r, pairs."""


def claim(mode: str, what: str) -> str:
    """What a joint decomposition stores beside its own spectrum is every pair."""
    return "k (k - 1) / 2" if (mode, what) == ("chain", "total") else ALGEBRA[mode]


WHAT = ("algebra", "needed", "total")
FITS = ("deltas", "mode", "what", "at most (its exponent)", "in k", "last step", "in parameters", "last step", "claim")
SECONDS = ("deltas", "mode", "vectors", "side", *STAGES, "total")


@dataclass(frozen=True)
class Figures:
    machine: dict[str, Any]
    costs: list[Cost]
    depth: list[Cost]
    seconds: float


def seconds_of(cost: Cost, what: str) -> float:
    if what == "needed":
        return sum(cost.seconds[stage] for stage in NEEDED)
    return cost.total if what == "total" else cost.seconds[what]


def in_pool(costs: list[Cost], what: str) -> Exponent:
    """Exponent in the number of vectors, one curve a size."""
    sides = sorted({c.side for c in costs})
    return exponent([[(c.pool, seconds_of(c, what)) for c in costs if c.side == side] for side in sides])


def in_parameters(costs: list[Cost], what: str) -> Exponent:
    """Exponent in the number of parameters of a vector, one curve a pool."""
    pools = sorted({c.pool for c in costs})
    return exponent([[(c.parameters, seconds_of(c, what)) for c in costs if c.pool == k] for k in pools])


def claimed_power(costs: list[Cost], label: str) -> float:
    pools = sorted({c.pool for c in costs})
    return exponent([[(k, K[label](k)) for k in pools]]).value


def exceeds(found: Exponent, power: float) -> bool:
    """A claim is an upper bound; an exponent contradicts it that exceeds it by two standard errors."""
    return found.value - 2 * found.error > power


def fit_lines(costs: list[Cost]) -> list[tuple[str, ...]]:
    lines = []
    for kind in dict.fromkeys(c.kind for c in costs):
        for mode in MODES:
            own = [c for c in costs if (c.kind, c.mode) == (kind, mode)]
            for what in WHAT:
                k, size, label = in_pool(own, what), in_parameters(own, what), claim(mode, what)
                power = claimed_power(own, label)
                verdict = "EXCEEDED" if exceeds(k, power) or exceeds(size, 1.0) else "holds"
                lines.append(
                    (kind, mode, what, f"{label} ({power:.2f})", str(k), f"{k.last:.2f}", str(size), f"{size.last:.2f}",
                     verdict)
                )  # fmt: skip
    return lines


def factor_line(costs: list[Cost], kind: str) -> str:
    own = [c for c in costs if (c.kind, c.mode) == (kind, MODES[0])]
    return f"{kind}: k^({in_pool(own, 'factor')}), parameters^({in_parameters(own, 'factor')})"


def depth_line(depth: list[Cost]) -> str:
    found = {mode: in_parameters([c for c in depth if c.mode == mode], "total") for mode in MODES}
    counts = ", ".join(str(t) for t in sorted({c.tensors for c in depth}))
    return (
        f"{counts} tensors of side {depth[0].side}, {depth[0].pool} vectors, total: "
        + ", ".join(f"{mode} parameters^({e})" for mode, e in found.items())
    )


def constant_line(costs: list[Cost], kind: str) -> str:
    """What one more vector and one more pair cost in pairwise mode, per tensor, at the largest size and pool. Parts of
    adapters take as long as the unions of their pairs, parts of matrices as long as the matrices."""
    own = [c for c in costs if (c.kind, c.mode) == (kind, "pairwise")]
    c = max(own, key=lambda c: (c.side, c.pool))
    count = {"vector": c.pool * c.tensors, "pair": c.pool * (c.pool - 1) / 2 * c.tensors}
    per = {"vector": ["factor"], "pair": ["products", "algebra"]}
    per["pair" if kind == "low-rank" else "vector"].append("read")
    return f"{kind}: " + "; ".join(
        f"a {unit} " + ", ".join(f"{name} {report.duration(c.seconds[name] / count[unit])}" for name in names)
        for unit, names in per.items()
    )


def second_lines(costs: list[Cost]) -> list[tuple[str, ...]]:
    """The largest size, every pool."""
    lines = []
    for kind in dict.fromkeys(c.kind for c in costs):
        side = max(c.side for c in costs if c.kind == kind)
        for mode in MODES:
            for c in costs:
                if (c.kind, c.mode, c.side) == (kind, mode, side):
                    times = [report.duration(x) if x else "" for x in (*c.seconds.values(), c.total)]
                    lines.append((kind, mode, str(c.pool), str(c.side), *times))
    return lines


def show(console: Console, figures: Figures) -> None:
    for title, header, lines in (
        ("seconds at the largest size", SECONDS, second_lines(figures.costs)),
        ("exponents", FITS, fit_lines(figures.costs)),
    ):
        table = Table(*header, title=title, box=box.SIMPLE_HEAD)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for text in _notes(figures):
        console.print(text)


def _notes(figures: Figures) -> list[str]:
    kinds = dict.fromkeys(c.kind for c in figures.costs)
    return [
        "Factoring alone, " + "; ".join(factor_line(figures.costs, kind) for kind in kinds) + ".",
        f"Pairwise, per tensor at side {max(c.side for c in figures.costs)} and the largest pool, "
        + "; ".join(constant_line(figures.costs, kind) for kind in kinds) + ".",
        f"Deeper instead of wider: {depth_line(figures.depth)}.",
        f"The whole run took {figures.seconds:.0f} s.",
    ]


def save(figures: Figures) -> None:
    out = report.HERE / "out"
    out.mkdir(exist_ok=True)
    (out / "cost.json").write_text(as_json(figures))


def as_json(figures: Figures) -> str:
    fits = [
        {"kind": kind, "mode": mode, "what": what, "claim": claim(mode, what),
         "pool": asdict(in_pool(own, what)), "parameters": asdict(in_parameters(own, what))}
        for kind in dict.fromkeys(c.kind for c in figures.costs)
        for mode in MODES
        for what in WHAT
        for own in [[c for c in figures.costs if (c.kind, c.mode) == (kind, mode)]]
    ]  # fmt: skip
    document = {
        "machine": figures.machine,
        "costs": [asdict(c) | {"total": c.total} for c in figures.costs],
        "depth": [asdict(c) | {"total": c.total} for c in figures.depth],
        "exponents": fits,
        "seconds": figures.seconds,
    }
    return json.dumps(document, indent=1) + "\n"


def markdown(figures: Figures) -> str:
    return "\n".join(
        [
            f"Machine: {in_words(figures.machine)}. 1 thread, processor time.\n",
            report.grid(FITS, fit_lines(figures.costs)),
            "\n\n".join(_notes(figures)) + "\n",
            "Seconds at the largest size:\n",
            report.grid(SECONDS, second_lines(figures.costs)),
        ]
    )


def write(figures: Figures) -> None:
    report.write_results(markdown(figures), markers=(BEGIN, END))
