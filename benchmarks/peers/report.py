"""The figures as tables on the screen, as JSON, and as a section of RESULTS.md of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import in_words
from benchmarks.peers.session import Session, groups
from benchmarks.peers.tools import MERGEKIT_ALWAYS, MERGEKIT_SETTINGS
from benchmarks.report import duration, grid

MARKERS = ("<!-- peers: begin -->", "<!-- peers: end -->")

FASTER, MEMORY, COPY = 3.0, 1 / 3, {"warm": 4.0, "cold": 1.5}
"""Goals: mergekit's wall time over devec's, devec's peak memory over mergekit's, devec's wall time over the copy's."""

GROUP = ("size", "cache", "method")
RUNS = (
    *(*GROUP, "tool", "wall", "from - to", "without imports", "read", "peak memory", "of it anonymous"),
    *("processor", "flush after"),
)
GOALS = (*GROUP, "speed / mergekit", "peak / mergekit", "wall / copy", "without imports: speed", "copy")
CHECKS = (
    *("size", "method", "entries", "differ from mergekit", "by at most"),
    *("not nearest: devec", "mergekit", "off by at most"),
)


@dataclass(frozen=True)
class Figure:
    """Medians over the repeats of one tool in one group. Seconds and bytes."""

    size: str
    cache: str
    method: str
    tool: str
    wall: float
    fastest: float
    slowest: float
    work: float
    """``wall`` without the imports"""
    read: float
    """input bytes a second of ``wall``"""
    peak: int
    """the largest of the repeats"""
    anonymous: int
    cpu: float
    flush: float


@dataclass(frozen=True)
class Ratios:
    """The three ratios of one group; ``None`` where a tool did not run."""

    size: str
    cache: str
    method: str
    faster: float | None
    memory: float | None
    copy: float | None
    faster_work: float | None
    copy_work: float | None

    def met(self) -> dict[str, bool | None]:
        """Which goals are met."""
        return {
            "faster": None if self.faster is None else self.faster >= FASTER,
            "memory": None if self.memory is None else self.memory <= MEMORY,
            "copy": None if self.copy is None else self.copy <= COPY[self.cache],
        }


def figures(session: Session) -> list[Figure]:
    found = []
    for size, cache, method in groups(session):
        for tool in session.tools:
            runs = [
                r for r in session.records if (r.size, r.cache, r.method, r.tool) == (size, cache, method, tool)
            ]
            if not runs:
                continue
            walls = [r.wall for r in runs]
            inputs = 5 if method == "task-arithmetic" else 4
            found.append(
                Figure(
                    size, cache, method, tool, wall=median(walls), fastest=min(walls), slowest=max(walls),
                    work=median(walls) - session.imports[tool], read=inputs * session.bytes[size] / median(walls),
                    peak=max(r.peak for r in runs), anonymous=max(r.anonymous for r in runs),
                    cpu=median(r.cpu for r in runs), flush=median(r.flush for r in runs),
                )
            )  # fmt: skip
    return found


def ratios(session: Session) -> list[Ratios]:
    by = {(f.size, f.cache, f.method, f.tool): f for f in figures(session)}
    found = []
    for group in groups(session):
        ours, peer, copy = (by.get((*group, tool)) for tool in ("devec", "mergekit", "copy"))
        if ours is None:
            continue
        found.append(
            Ratios(
                *group,
                faster=peer.wall / ours.wall if peer else None,
                memory=ours.peak / peer.peak if peer else None,
                copy=ours.wall / copy.wall if copy else None,
                faster_work=peer.work / ours.work if peer else None,
                copy_work=ours.work / copy.work if copy else None,
            )
        )
    return found


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _ratio(value: float | None, met: bool | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + {None: "", True: " ok", False: " short"}[met]


def run_lines(session: Session) -> list[tuple[str, ...]]:
    return [
        (
            f.size, f.cache, f.method, f.tool, duration(f.wall), f"{f.fastest:.2f} - {f.slowest:.2f}",
            duration(f.work), f"{f.read / 1e9:.2f} GB/s", _gb(f.peak), _gb(f.anonymous), duration(f.cpu),
            duration(f.flush),
        )
        for f in figures(session)
    ]  # fmt: skip


def goal_lines(session: Session) -> list[tuple[str, ...]]:
    return [
        (
            r.size, r.cache, r.method, _ratio(r.faster, r.met()["faster"]), _ratio(r.memory, r.met()["memory"]),
            _ratio(r.copy, r.met()["copy"]), _ratio(r.faster_work), _ratio(r.copy_work),
        )
        for r in ratios(session)
    ]  # fmt: skip


def check_lines(session: Session) -> list[tuple[str, ...]]:
    lines = []
    for c in session.checks:
        ours, peer = c.accuracy.get("devec"), c.accuracy.get("mergekit")
        share = [f"{a.not_nearest / a.entries:.4%}" if a else "" for a in (ours, peer)]
        worst = ", ".join(f"{a.most_ulps:.3f}" for a in (ours, peer) if a)
        between = ("", "", "")
        if b := c.between:
            between = (f"{b.entries:,}", f"{b.differing / b.entries:.4%}", f"{b.most_ulps:.3g} ulp")
        lines.append((c.size, c.method, *between, *share, f"{worst} ulp" if worst else ""))
    return lines


def in_sentences(session: Session) -> list[str]:
    """What the tables do not say by themselves."""
    sizes = ", ".join(f"{label}: {_gb(count)}" for label, count in session.bytes.items())
    imports = ", ".join(f"{tool} {duration(seconds)}" for tool, seconds in session.imports.items())
    said = [f"One model's weights, bfloat16: {sizes}. Imports alone: {imports}."]
    if "mergekit" in session.tools:
        options = " ".join((*MERGEKIT_ALWAYS, *MERGEKIT_SETTINGS[session.settings]))
        tried = "; ".join(
            f"{name} {duration(run.wall)}, {_gb(run.peak)}" for name, run in session.trials.items()
        )
        said.append(f"mergekit's settings: {options}." + (f" Tried, warm: {tried}." if tried else ""))
    return said + session.notes


def print_session(console: Console, session: Session) -> None:
    for title, header, lines in (
        ("whole processes", RUNS, run_lines(session)),
        (f"goals: speed >= {FASTER:g}, peak <= {MEMORY:.2f}, wall <= {COPY['cold']:g} cold, {COPY['warm']:g} warm",
         GOALS, goal_lines(session)),
        ("outputs", CHECKS, check_lines(session)),
    ):  # fmt: skip
        table = Table(*header, title=title, box=box.SIMPLE_HEAD)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for sentence in in_sentences(session):
        console.print(sentence, style="dim")


def as_json(session: Session, machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Everything, single runs included; also what :func:`ratios` makes of them."""
    figures_of = asdict(session)
    for trial in figures_of["trials"].values():
        del trial["output"]
    document = {
        "machine": dict(machine),
        "mergekit": {name: versions[name] for name in ("python", "torch", "mergekit", "transformers", "safetensors")
                     if name in versions},
        **figures_of,
        "ratios": [asdict(r) | {"met": r.met()} for r in ratios(session)],
        "goals": {"faster": FASTER, "memory": MEMORY, "copy": COPY},
    }  # fmt: skip
    return json.dumps(document, indent=1) + "\n"


def markdown(session: Session, machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The section of RESULTS.md between the markers."""
    peer = ", ".join(f"{name} {versions[name]}" for name in ("mergekit", "torch", "transformers") if name in versions)
    return "\n".join(
        [
            f"Machine: {in_words(dict(machine))}." + (f" mergekit's environment: {peer}." if peer else "") + "\n",
            *(f"{sentence}\n" for sentence in in_sentences(session)),
            grid(GOALS, goal_lines(session)),
            grid(RUNS, run_lines(session)),
            grid(CHECKS, check_lines(session)),
        ]
    )
