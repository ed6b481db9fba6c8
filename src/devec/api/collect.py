"""``collect``: what the merge methods that need data want of it, one fine-tuned model at a time, on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import torch

from devec.api.coefficients import records, selection_of, view_of
from devec.api.edit import edit
from devec.api.eval import network_of, tasks_of
from devec.api.references import ViewLike, load_pool, open_model
from devec.api.statistics import FILE, Statistics, file_of, names_in
from devec.core.contracts import TensorSource
from devec.core.errors import IncompatibleError, UsageError
from devec.core.vectors import TaskVector
from devec.engine.threads import Progress, silent
from devec.evaluate.network import Network
from devec.evaluate.statistics import fisher, moments, sample, stored_in_by_out
from devec.evaluate.suite import Suite, read_suite
from devec.io.disk import sha256_of, write_file
from devec.io.folder import OutputFolder
from devec.io.names import Selection
from devec.io.records import dump_json
from devec.io.writer import save_file

EXAMPLES = 256
"""Rows a task: what FusionBench's configurations of both methods take."""


def collect(
    kind: str,
    sources: Sequence[str | Path | TaskVector],
    out: str | Path,
    *,
    base: Any,
    suite: str | Path | Suite,
    examples: int = EXAMPLES,
    seed: int = 0,
    selection: Selection | None = None,
    view: ViewLike = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Statistics:
    """Statistics of every fine-tune ``W_0 + Delta_i`` on rows of the task of its name, for ``merge(statistics_of=)``.

    ``kind``      ``fisher``: the diagonal Fisher (arXiv:2111.09832); ``moments``: ``X^T X / N`` of each linear layer's
                  inputs (arXiv:2212.09849). See :mod:`devec.evaluate.statistics`
    ``examples``  rows of the selection split, drawn by ``seed``; never of the test split. No label is looked at
    ``out``       a folder, written whole or not at all: one safetensors file a vector and ``statistics.json``

    One network and one vector's statistics are in memory at a time. The network runs in ``dtype``; statistics are
    float32.

    Raises UsageError (exit 2) where a vector has no task of its name, for a suite without a selection split, and for
    numbers below 1; InputError and IncompatibleError as ``eval`` does; RefusedError if ``out`` exists.
    """
    if kind not in ("fisher", "moments"):
        raise UsageError(f"no statistics are called {kind!r}", remedy="There is: fisher, moments.")
    if examples < 1:
        raise UsageError(f"examples wants a whole number from 1 on, got {examples}")
    found = suite if isinstance(suite, Suite) else read_suite(suite)
    under = open_model(base)
    pool, _ = load_pool(sources, base=under, dtype=dtype, selection=selection, view=view)
    check_tasks(found, pool.names)
    wanted = names_in(pool, under)
    transposed = {n for own, n in wanted.items() if pool.layout(own).transposed}
    norms, rows_of, data = [], {}, {}
    with OutputFolder(Path(out), overwrite=overwrite) as place:
        for i, vector in enumerate(pool):
            source = edit(under, [(1.0, vector)], dtype=dtype)
            network = network_of(found, source, dtype)
            (task,) = tasks_of(found, network, source, [vector.name])
            rows = sample(task, examples, seed)
            if kind == "moments":
                _check_orientation(network, set(wanted.values()), transposed, under)
                values = moments(network, task, rows, set(wanted.values()), progress)
            else:
                values = fisher(network, task, rows, set(wanted.values()), seed, progress)
            save_file(place.path / file_of(i), values)
            norms.append(sqrt(fsum(float(v.double().square().sum()) for v in values.values())))
            rows_of[task.name], data[task.name] = rows.words, sha256_of(task.data.file)
        inputs, under_record = records(pool, under)
        record = {
            "suite": suite_record(suite), "split": "select", "examples": examples, "seed": seed, "rows": rows_of,
            "data": data, "dtype": str(dtype).removeprefix("torch."), "inputs": list(inputs), "base": under_record,
            "view": view_of(view), "selection": selection_of(selection),
        }  # fmt: skip
        whole = {"schema": 1, "kind": kind, "vectors": list(pool.names), "norms": norms, "record": record}
        write_file(place.path / FILE, dump_json(whole))
    return Statistics(kind, pool.names, tuple(norms), record, Path(out))


def check_tasks(suite: Suite, vectors: Collection[str]) -> None:
    """Raises UsageError where a vector has no task of its name."""
    known = [t.name for t in suite.tasks]
    for name in vectors:
        if name not in known:
            raise UsageError(
                f"the suite has no task for the vector {name!r}", values={"tasks": ", ".join(known)},
                remedy="Name sources after their tasks: TASK=PATH.",
            )


def suite_record(suite: str | Path | Suite) -> dict[str, str] | None:
    """The suite's file name and hash; None for one made in Python."""
    return None if isinstance(suite, Suite) else {"file": Path(suite).name, "sha256": sha256_of(Path(suite))}


def _check_orientation(network: Network, wanted: Collection[str], transposed: set[str], base: TensorSource) -> None:
    """A square Conv1D read as out x in would be multiplied with moments of the wrong side."""
    stored = stored_in_by_out(network) & set(wanted)
    for name in sorted(stored ^ (transposed & set(network.tensors))):
        raise IncompatibleError(
            "the network and the checkpoint's configuration disagree on how a weight lies", tensor=name,
            values={"network": "in x out" if name in stored else "out x in",
                    "checkpoint": "in x out" if name in transposed else "out x in"},
            file=base.file_of(name), remedy="Does the model's config.json name its architecture?",
        )
