"""``eval``: a model's scores on the tasks of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from devec.api.edit import edit
from devec.api.merge import Merged
from devec.api.records import recipe_of
from devec.api.references import open_model
from devec.core.contracts import TensorSource
from devec.core.errors import UsageError
from devec.engine.threads import Progress, silent
from devec.evaluate.data import SPLITS, Split, read_task
from devec.evaluate.metrics import Metric, get_metric
from devec.evaluate.network import Network, from_python, from_transformers
from devec.evaluate.scoring import Head, Scores, Task, score
from devec.evaluate.suite import InputSpec, NetworkSpec, Suite, TaskSpec, read_suite
from devec.io.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model, and whether its coefficients were learned on the inputs of the test split."""

    model: str
    scores: Scores
    metrics: tuple[Metric, ...]
    transductive: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"schema": 1, "model": self.model, "transductive": self.transductive, **self.scores.as_dict()}


def evaluate(
    model: Any,
    suite: str | Path | Suite,
    *,
    split: Split = "test",
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> Evaluation:
    """Score ``model`` (a path, a reference, a state dict, a module, what ``apply`` and ``merge`` return) on a suite.

    ``split`` is ``test`` or ``select``; ``tasks`` and ``metrics`` narrow or replace the suite's own. On one BLAS
    thread, so that the numbers do not depend on the machine's cores. ``transductive`` of the result is read from what a
    merge with learned coefficients records. For many models of one architecture see :class:`Evaluator`.

    Raises UsageError for a suite, split, task or metric that does not exist, InputError for files that are missing,
    IncompatibleError where weights, heads, labels and data do not fit one another.
    """
    return Evaluator(model, suite, tasks=tasks, dtype=dtype)(model, split, metrics, progress)


class Evaluator:
    """A suite with its network, rows and heads read once, for models that are as ``like``."""

    def __init__(
        self,
        like: Any,
        suite: str | Path | Suite,
        *,
        tasks: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.suite = suite if isinstance(suite, Suite) else read_suite(suite)
        source = source_of(like)
        self.network = network_of(self.suite, source, dtype)
        self.tasks = tasks_of(self.suite, self.network, source, tasks)
        self._loaded, self._source = like, source

    def __call__(
        self,
        model: Any,
        split: Split = "test",
        metrics: Sequence[str] | None = None,
        progress: Progress = silent,
    ) -> Evaluation:
        """Scores of one model; heads that lie in a model itself are those of ``like``."""
        if split not in SPLITS:
            raise UsageError(f"no split is called {split!r}", remedy=f"There is: {', '.join(SPLITS)}.")
        wanted = tuple(get_metric(m) for m in metrics or self.suite.metrics)
        if model is not self._loaded:
            self._source = source_of(model)
            self.network.load(self._source)
            self._loaded = model
        scores = score(self.network, self.tasks, wanted, split, progress)
        return Evaluation(self._source.reference, scores, wanted, is_transductive(model, self._source))


def source_of(model: Any) -> TensorSource:
    """The weights of a model, or of a merge that stands on a base."""
    if not isinstance(model, Merged):
        return open_model(model)
    if model.base is None:
        raise UsageError("a merge of adapters without a base is no model", remedy="Give merge a base.")
    return edit(model.base, [(1.0, model.vector)])


def is_transductive(model: Any, source: TensorSource) -> bool:
    """Whether the model's coefficients are known to have been learned on the inputs of a test split."""
    if isinstance(model, Merged):
        return model.coefficients is not None and model.coefficients.transductive
    learned = recipe_of(source).get("parameters", {}).get("coefficients") or {}
    return bool(learned.get("transductive"))


def network_of(suite: Suite, source: TensorSource, dtype: torch.dtype = torch.float32) -> Network:
    """The suite's network with the weights of ``source``."""
    config = getattr(source, "config", None)
    spec: NetworkSpec = suite.model
    if spec.transformers is not None:
        return from_transformers(spec.transformers, config, source, dtype)
    assert spec.python is not None
    return from_python(spec.python, suite.folder, source, config, dtype)


def tasks_of(
    suite: Suite, network: Network, source: TensorSource, names: Sequence[str] | None = None
) -> list[Task]:
    """The suite's tasks (or those named) with their rows and heads."""
    known = {t.name: t for t in suite.tasks}
    for name in names or ():
        if name not in known:
            raise UsageError(f"the suite has no task {name!r}", remedy=f"There is: {', '.join(known)}.")
    return [_task(suite, known[n], network, source) for n in (names or known)]


def _task(suite: Suite, spec: TaskSpec, network: Network, source: TensorSource) -> Task:
    data = read_task(
        spec.name, suite.path(spec.data), _input_of(spec.input or suite.input, network), suite.select, suite.seed
    )
    return Task(data, _head(suite, spec, source), spec.batch or suite.batch)


def _input_of(spec: InputSpec, network: Network) -> InputSpec:
    channels, size = network.image or (None, None)
    return spec.model_copy(update={"channels": spec.channels or channels, "size": spec.size or size})


def _head(suite: Suite, spec: TaskSpec, source: TensorSource) -> Head | None:
    head = spec.head
    if head is None:
        return None
    held = source if head.file is None else open_checkpoint(suite.path(head.file))
    known = {*held.names(), *held.ties}
    for name in (head.weight, *([] if head.bias is None else [head.bias])):
        if name not in known:
            raise UsageError(
                f"the head of task {spec.name} names a tensor that is not there", values={"tensor": name},
                file=held.reference, remedy=f"There is: {', '.join(sorted(known)[:6])}.",
            )
    bias = None if head.bias is None else held.get(head.bias).float()
    return replace(Head(held.get(head.weight).float(), bias), cosine=head.cosine, scale=head.scale)
