"""How the work of a command is run: on how many threads or where else, in how much memory, gone on with or anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from devec.api.jobs import Job, checkpoints_of, working_bytes, write_tensor, write_tensor_elsewhere
from devec.api.references import pin
from devec.core.contracts import TensorSource
from devec.core.errors import RefusedError, UsageError
from devec.core.provenance import Provenance, plain
from devec.engine.memory import fit_workers
from devec.engine.stream import Check, Unit, stream
from devec.engine.threads import Progress, silent
from devec.io.folder import Run
from devec.io.journal import Finished, Identity, Journal, check_unchanged, stamp
from devec.io.model_folder import ModelPlan
from devec.io.shards import ShardWriter
from devec.io.writer import nbytes

if TYPE_CHECKING:
    from devec.engine.ray import Cluster

@dataclass(frozen=True)
class Engine:
    """Where and how work runs. None of it changes a byte of the output, but for budgets that need smaller pieces.

    ``workers``  threads, or with ``executor="ray"`` tasks at once (``None``: all cores)
    ``memory``   bytes of resident memory of the process and its children (``None``: no bound)
    ``resume``   go on where a run of the same command stopped
    ``shard``    (i, n): do the i-th of n parts, for ``join`` to finish
    ``address``  of a Ray cluster; ``None`` starts one on this machine
    ``words``    the command line that began the run, by which ``devec join`` finishes it
    """

    workers: int | None = None
    memory: int | None = None
    executor: Literal["threads", "ray"] = "threads"
    address: str | None = None
    resume: bool = False
    shard: tuple[int, int] | None = None
    join: bool = False
    words: tuple[str, ...] = ()

    @property
    def elsewhere(self) -> bool:
        """Whether other processes are to take part."""
        return self.executor == "ray" or self.shard is not None

    def alone(self, what: str) -> None:
        """Refuse other processes where there is nothing to divide."""
        if self.elsewhere:
            raise UsageError(
                f"{what} is the work of one process", remedy="Leave out --executor and --shard-of; they are for"
                " checkpoints and decompositions that are written.",
            )

    def run(self, provenance: Provenance, outputs: str, inputs: Sequence[Path]) -> Run:
        """What the temporary folder remembers of this run."""
        command = {**provenance.to_recipe(), "versions": dict(provenance.versions)}
        known: Any = plain(command)
        return Run(
            Identity(known, outputs, stamp(inputs), self.words, str(Path.cwd())), self.resume, self.shard, self.join
        )


@dataclass(frozen=True)
class Filling:
    """Everything that writes the tensors of one model."""

    model: TensorSource
    plan: ModelPlan
    run: Run
    engine: Engine = field(default_factory=Engine)
    job: Job | None = None
    progress: Progress = silent

    def __call__(self, writer: ShardWriter, journal: Journal | None) -> None:
        """The :data:`~devec.io.shards.Fill` of the plan."""
        assert journal is not None
        sources = checkpoints_of(self.model)
        for source in sources:
            source.digests.watch()
        learn(sources, journal.finished.values())
        names = [n for n in writer.names if n in self._mine(writer)]
        recall(writer, journal, names, self.engine.workers)
        missing = set(writer.missing())
        todo = [n for n in names if n in missing]
        if self.engine.join and todo:
            raise RefusedError(
                f"{len(todo)} of {len(names)} tensors are not written yet", tensor=todo[0], file=self.plan.out,
                remedy="Run the shards that are missing, or stopped, with --resume.",
            )
        done = len(names) - len(todo)
        for record in self._results(writer, todo):
            journal.append(record)
            learn(sources, [record])
            done += 1
            self.progress(done, len(names), record.name)
        check_unchanged(self.run.identity.inputs, self.run.again)

    def _mine(self, writer: ShardWriter) -> set[str]:
        """The tensors of this process's shard: one stretch of the output, by bytes; all of them without shards."""
        if self.engine.shard is None:
            return set(writer.names)
        index, count = self.engine.shard
        return set(stretch(writer.names, [nbytes(writer.info(n)) for n in writer.names], index, count))

    def _results(self, writer: ShardWriter, names: Sequence[str]) -> Iterator[Finished]:
        if self.engine.executor == "ray":
            job, folder = portable(self.job, self.run), str(writer.folder.absolute())
            with cluster(self.engine) as there:
                calls = [(job, self.plan, Path(folder), name) for name in names]
                for record in there.map(write_tensor_elsewhere, calls):
                    writer.mark(record)
                    yield record
            return
        needs = [working_bytes(self.model, n) for n in names]
        workers, memory = fit_workers(self.engine.workers, self.engine.memory, needs)
        units = [Unit(n, need, read_ahead(self.model, n)) for n, need in zip(names, needs, strict=True)]

        def work(name: str, check: Check) -> Finished:
            return write_tensor(self.model, writer, name, check)

        for _, record in stream(work, units, workers=workers, memory=memory):
            yield record


def stretch(names: Sequence[str], sizes: Sequence[int], index: int, count: int) -> list[str]:
    """Part ``index`` (from 1) of ``count``: neighbours in the output, about as many bytes in each part."""
    total, before, mine = sum(sizes), 0, []
    for name, size in zip(names, sizes, strict=True):
        if min(count * (2 * before + size) // max(2 * total, 1), count - 1) == index - 1:
            mine.append(name)
        before += size
    return mine


def recall(writer: ShardWriter, journal: Journal, names: Sequence[str], workers: int | None = None) -> None:
    """Take over what an earlier run finished, after reading it again; what is not as it was is forgotten."""
    known = [journal.finished[n] for n in names if n in journal.finished]

    def look(record: Finished, _check: Check) -> bool:
        return writer.recall(record)

    lost = [record.name for record, sound in stream(look, [Unit(r) for r in known], workers=workers) if not sound]
    journal.forget(lost)


def learn(sources: Sequence[Any], records: Any) -> None:
    """Input hashes that earlier records hold need not be found again."""
    for record in records:
        for number, found in record.inputs.items():
            if int(number) < len(sources):
                sources[int(number)].digests.learn(found)


def read_ahead(model: TensorSource, name: str) -> tuple[tuple[int, int, int], ...]:
    """Where the inputs of one tensor of the output lie, as far as they have its name."""
    places = (source.place(name) for source in checkpoints_of(model) if name in source)
    return tuple(place for place in places if place is not None)


def portable(job: Job | None, run: Run) -> Job:
    """The job of this run, ids of the Hub at the commits that this process read; an error where there is none."""
    if job is None:
        raise UsageError(
            "this cannot be made from files alone in other processes",
            remedy="Decompose to a folder first and apply its parts, or leave out --executor.",
        )
    pinned = {k: _pinned(v) if k in REFERENCES else v for k, v in job.arguments.items()}
    return replace(job, arguments=pinned, place=run.identity.place, inputs=run.identity.inputs)


REFERENCES = frozenset({"base", "sources", "terms", "references"})
"""Arguments of a job that hold references, alone or in lists."""


def _pinned(value: Any) -> Any:
    if isinstance(value, str):
        return pin(value)
    return type(value)(map(_pinned, value)) if isinstance(value, (list, tuple)) else value


def cluster(engine: Engine) -> Cluster:
    from devec.engine.ray import Cluster

    return Cluster(engine.address, engine.workers)

