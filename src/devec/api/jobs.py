"""What workers run: top-level functions that are given paths and names, never tensors.

A thread calls them on the model that stands in its process. A worker of a cluster, which is sent the same call by its
dotted name, opens the files anew from the :class:`Job` and keeps what it has opened for the next call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from devec.api.edit import Edited
from devec.core.contracts import TensorSource
from devec.core.errors import InputError
from devec.core.lazy import BLOCK, row_blocks
from devec.core.vectors import TaskVector, cost_of
from devec.engine.stream import Check
from devec.io.checkpoint import Checkpoint
from devec.io.journal import Finished
from devec.io.model_folder import ModelPlan
from devec.io.shards import ShardWriter


@dataclass(frozen=True)
class Job:
    """How another process makes the same result: a top-level function by its dotted name, and its arguments.

    Arguments are what a user typed (references, numbers, names) and frozen choices; a result that was made from
    tensors in memory has no job, and its work stays in its own process. ``place`` is the folder that references are
    relative to, ``inputs`` the files with their sizes and times: a worker that lives on opens changed files anew.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    inputs: Mapping[str, list[int]] = field(default_factory=dict)

    def key(self) -> str:
        return repr((self.function, sorted(self.arguments.items()), self.place, sorted(self.inputs.items())))

    def make(self) -> Any:
        """Raises InputError where this machine does not have ``place``."""
        module, _, name = self.function.rpartition(".")
        if self.place and not Path(self.place).is_dir():
            raise InputError(
                "a worker does not see the folder that the command was given in", file=self.place,
                remedy="Give the machines of the cluster one file system, or use --executor threads.",
            )
        with chdir(self.place or "."):
            return getattr(import_module(module), name)(**self.arguments)


def no_check() -> None:
    """For work that nobody stops."""


def write_tensor(model: TensorSource, writer: ShardWriter, name: str, check: Check = no_check) -> Finished:
    """Compute one tensor of the output block of rows by block of rows, and write it."""
    gathered = [source.digests for source in checkpoints_of(model)]
    record = writer.write(name, _blocks(model, name, check))
    inputs = {str(i): found for i, digests in enumerate(gathered) if (found := digests.take())}
    return replace(record, inputs=inputs)


def _blocks(model: TensorSource, name: str, check: Check) -> Iterator[Tensor]:
    read = model.values(name) if isinstance(model, Edited) else lambda a, b: model.rows(name, a, b)
    for start, stop in row_blocks(model.info(name).shape):
        check()
        yield read(start, stop)


def write_tensor_elsewhere(job: Job, plan: ModelPlan, folder: Path, name: str) -> Finished:
    """:func:`write_tensor` in a process that holds neither the model nor the output's files."""
    model: TensorSource = kept_of(job)
    for source in checkpoints_of(model):
        source.digests.watch()
    writer = plan.writer(folder)
    try:
        return write_tensor(model, writer, name)
    finally:
        writer.release()


@lru_cache(maxsize=1)
def _kept(key: str) -> list[Any]:
    return []


def kept_of(job: Job) -> Any:
    """What ``job`` makes, opened once a process."""
    kept = _kept(job.key())
    if not kept:
        kept.append(job.make())
    return kept[0]


def sources_of(model: object) -> list[TensorSource]:
    """Every open model that a model or vector reads from, each once, in an order that the command decides: checkpoints,
    and whatever else gives tensors by name."""
    found: dict[int, TensorSource] = {}

    def look(source: object) -> None:
        if isinstance(source, Checkpoint):  # first: the question whether it has a protocol's methods takes long
            found.setdefault(id(source), source)
        elif isinstance(source, Edited):
            look(source.base)
            for vector in source.vectors:
                look(vector)
        elif isinstance(source, TaskVector):
            for each in source.origin.sources():
                look(each)
        elif hasattr(source, "like"):  # a base of zeros in the shapes of a model
            look(source.like)
        elif isinstance(source, TensorSource):
            found.setdefault(id(source), source)

    look(model)
    return list(found.values())


def checkpoints_of(model: object) -> list[Checkpoint]:
    """Those of :func:`sources_of` that are checkpoints: they hash what is read of them."""
    return [source for source in sources_of(model) if isinstance(source, Checkpoint)]


def working_bytes(model: TensorSource, name: str) -> int:
    """Bytes that one tensor of the output needs while it is computed: blocks of rows, and what exists only whole.

    Of every operand there is a block as stored and one widened, and a handful of blocks for sums and rounding.
    """
    info = model.info(name)
    elements = min(prod(info.shape), max(BLOCK, prod(info.shape[1:])))
    if not isinstance(model, Edited):
        return 2 * elements * info.dtype.itemsize
    terms = model.terms.get(name, [])
    operands = 1 + sum(max(len(vector.origin.sources()), 1) for _, vector, *_ in terms)
    whole = sum(cost_of(vector.deltas)(own) for _, vector, own, _ in terms)
    return elements * (8 * 4 + operands * (info.dtype.itemsize + 4)) + whole
