"""``learn``: coefficients of a linear merge, from unlabelled or labelled rows of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from devec.api.coefficients import records, selection_of, view_of
from devec.api.edit import Edited
from devec.api.eval import network_of, tasks_of
from devec.api.jobs import checkpoints_of
from devec.api.references import ViewLike, load_pool, open_model
from devec.api.trim import agreeing
from devec.core.coefficients import GRAINS, CoefficientGrain, Coefficients
from devec.core.contracts import Objective, TensorSource
from devec.core.errors import UsageError
from devec.core.findings import pool_findings
from devec.core.lazy import in_file
from devec.core.vectors import Pool, TaskVector
from devec.engine.threads import Progress, default_workers, ordered_map, silent
from devec.evaluate.learning import FEW_SHOT_RATE, SCHEDULES, Learned, Schedule
from devec.evaluate.learning import learn as minimise
from devec.evaluate.least_squares import fit_outputs
from devec.evaluate.linear_model import Held, LinearModel
from devec.evaluate.objectives import Kind, Sampling, SuiteObjective
from devec.evaluate.search import SIGMA
from devec.evaluate.search import search as search_for
from devec.evaluate.suite import Suite, read_suite
from devec.io.checkpoint import Checkpoint
from devec.io.disk import sha256_of
from devec.io.names import Selection

BATCH = {"entropy": 32, "ce": 16, "outputs": 128}
"""Rows a task and step: AdaMerging's two batches of 16; aTLAS's 128 over eight data sets."""


def learn(
    sources: Sequence[str | Path | TaskVector],
    *,
    base: Any,
    suite: str | Path | Suite,
    objective: Literal["entropy", "ce", "outputs"] = "entropy",
    grain: CoefficientGrain = "vector",
    transductive: bool = False,
    shots: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    trim: float | None = None,
    search: Literal["adam", "cma"] = "adam",
    tasks: Sequence[str] | None = None,
    selection: Selection | None = None,
    view: ViewLike = None,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    progress: Progress = silent,
    **schedule: Any,
) -> Coefficients:
    """Coefficients ``c`` of ``W_0 + sum_t c_t Delta_t`` that minimise a loss on the selection split of a suite.

    ``objective``    ``entropy``: mean softmax entropy of unlabelled rows, AdaMerging (arXiv:2310.02575);
                     ``ce``: cross-entropy of labelled rows, aTLAS (arXiv:2407.02880);
                     ``outputs``: least squares to the outputs of each task's own fine-tune (the vector of its name)
    ``grain``        one number per vector (task-wise), per vector and layer, or per vector and tensor (what AdaMerging
                     calls layer-wise)
    ``transductive`` learn on the inputs of the test split, as AdaMerging published; marked in every result
    ``shots``        with ``ce``, so many labelled rows a class
    ``trim``         learn on what :func:`~devec.api.trim.agreeing` leaves of the vectors (0.2: AdaMerging++)
    ``search``       ``cma``: without gradients, by CMA-ES (an extra); steps are generations, lr is the first deviation
    ``schedule``     fields of :class:`~devec.evaluate.learning.Schedule` in place of the objective's published ones

    ``sources`` are any vectors or parts that ``merge`` takes. Originals are held once, in their stored dtype; parts
    stay factors. Deterministic: the same inputs and seed give the same coefficients on any number of ``workers``.

    Raises UsageError, InputError and IncompatibleError as ``merge`` and ``eval`` do.
    """
    found = suite if isinstance(suite, Suite) else read_suite(suite)
    plan, sampling = choose(objective, grain, search, transductive, shots, batch, seed, schedule)
    under = open_model(base)
    pool, notes = load_pool(sources, base=under, dtype=dtype, selection=selection, view=view)
    count = workers or default_workers()
    model = linear_model(under, pool if trim is None else agreeing(pool, trim), dtype, count)
    network = network_of(found, under, dtype)
    kind: Kind = "ce" if objective == "ce" else "entropy"
    loss = SuiteObjective(network, tasks_of(found, network, under, tasks), kind, sampling, model.names)
    run: dict[str, Any] = {"grain": grain, "workers": count, "report": progress}
    how: dict[str, Any] = {}
    if objective == "outputs":
        teachers = {name: t for t, name in enumerate(pool.names)}
        result = fit_outputs(loss, model, teachers, plan, **run)
    elif search == "cma":
        how = {"sigma": SIGMA if schedule.get("lr") is None else plan.lr, "seed": seed}
        result = search_for(loss, model, plan, **run, **how)
    else:
        result = minimise(loss, model, plan, **run)
    inputs, record = records(pool, under)
    learned = {
        "objective": objective, "split": sampling.split, "transductive": transductive,
        "suite": None if isinstance(suite, Suite) else {"file": Path(suite).name, "sha256": sha256_of(Path(suite))},
        "rows": {t.name: rows.words for t, rows in zip(loss.tasks, loss.rows, strict=True)},
        "data": {t.name: sha256_of(t.data.file) for t in loss.tasks},
        "batch": sampling.batch, "shots": shots, "seed": seed, "trim": trim, "search": search,
        "schedule": vars(plan) | how,
        "view": view_of(view), "selection": selection_of(selection), "dtype": str(dtype).removeprefix("torch."),
        "history": list(result.history), "warnings": [f.as_dict() for f in (*notes, *pool_findings(pool))],
    }  # fmt: skip
    return Coefficients(grain, values_of(result, model, pool), inputs, record, learned)


def choose(
    objective: str,
    grain: str,
    search: str,
    transductive: bool,
    shots: int | None,
    batch: int | None,
    seed: int,
    changes: dict[str, Any],
) -> tuple[Schedule, Sampling]:
    """The objective's published schedule with changes (``None`` changes nothing), and the rows that it sees."""
    if search not in ("adam", "cma"):
        raise UsageError(f"no search is called {search!r}", remedy="There is: adam, cma.")
    if objective not in SCHEDULES:
        raise UsageError(f"no objective is called {objective!r}", remedy=f"There is: {', '.join(SCHEDULES)}.")
    if grain not in GRAINS:
        raise UsageError(f"no grain is called {grain!r}", remedy=f"There is: {', '.join(GRAINS)}.")
    if objective == "outputs" and search != "adam":
        raise UsageError("least squares are solved, not searched", remedy="Leave out --search.")
    if objective == "ce" and transductive:
        raise UsageError(
            "labels of the test split are not for learning",
            remedy="Use --objective entropy, or leave --transductive out.",
        )
    if shots is not None and objective != "ce":
        raise UsageError(
            f"shots are labelled rows, which {objective} does not look at", remedy="Use --objective ce, or --batch."
        )
    given = {k: v for k, v in changes.items() if v is not None}
    if isinstance(given.get("init"), Sequence):
        start = tuple(map(float, given["init"]))
        given["init"] = start[0] if len(start) == 1 else start
    if shots is not None:
        given = {"lr": FEW_SHOT_RATE, **given}
    try:
        schedule = replace(SCHEDULES[objective], **given)
    except TypeError:
        unknown = sorted(set(given) - set(Schedule.__dataclass_fields__))
        raise UsageError(
            f"a schedule has no {unknown[0]!r}", remedy=f"It has: {', '.join(Schedule.__dataclass_fields__)}."
        ) from None
    size = BATCH[objective] if batch is None else batch
    return schedule, Sampling("test" if transductive else "select", size, shots, seed)


def learn_on(
    objective: Objective,
    pool: Pool,
    base: Any,
    schedule: Schedule | None = None,
    *,
    grain: CoefficientGrain = "vector",
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    progress: Progress = silent,
) -> Coefficients:
    """:func:`learn` on an objective of the user's own (see :class:`~devec.evaluate.objectives.FunctionObjective`)."""
    under, count = open_model(base), workers or default_workers()
    model = linear_model(under, pool, dtype, count)
    result = minimise(objective, model, schedule or Schedule(), grain=grain, workers=count, report=progress)
    return Coefficients(grain, values_of(result, model, pool), learned={"history": list(result.history)})


def linear_model(base: TensorSource, pool: Pool, dtype: torch.dtype, workers: int) -> LinearModel:
    """``W(c)`` over a pool: parts are made once and stay factors, what is dense is held as it is stored.

    Raises IncompatibleError where a vector does not fit the base.
    """
    terms = Edited(base, [(1.0, v) for v in pool], dtype=dtype).terms
    index = {id(v): t for t, v in enumerate(pool)}

    def made(name: str) -> Held:
        deltas = [(index[id(v)], in_file(v.deltas[own], layout.transposed)) for _, v, own, layout in terms[name]]
        return Held.of(deltas, dtype)

    held = dict(zip(terms, ordered_map(made, list(terms), workers=workers), strict=True))
    dense = {t for one in held.values() for t, _ in one.dense}
    hold([base, *(pool[t] for t in sorted(dense))])
    return LinearModel(base, held, len(pool), dtype)


def hold(sources: Sequence[TensorSource | TaskVector]) -> None:
    """Keep what these read in memory, each file once, in its stored dtype: every step reads all of it."""
    stores: dict[tuple[Path, ...], dict[str, Tensor]] = {}
    for checkpoint in (c for s in sources for c in checkpoints_of(s)):
        assert isinstance(checkpoint, Checkpoint)
        if files := tuple(f.resolve() for f in checkpoint.files()):
            checkpoint.keep(stores.setdefault(files, {}))


def values_of(result: Learned, model: LinearModel, pool: Pool) -> dict[str, dict[str, float]]:
    """Rows and columns of what was learned, by name; a vector has no number for a group that it does not touch."""
    touched = [{result.groups[result.column[n]] for n in model.names if t in model.owners(n)} for t in range(len(pool))]
    return {
        name: {group: float(result.values[t, g]) for g, group in enumerate(result.groups) if group in touched[t]}
        for t, name in enumerate(pool.names)
    }
