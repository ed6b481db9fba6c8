"""The factoring of a pool, tensor by tensor, in memory or into files that outlive an interrupt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from devec.api.budget import factors_kept
from devec.api.gpu import factored_in_batches
from devec.api.jobs import Job, checkpoints_of, kept_of
from devec.api.needs import as_stored, factor_tensor, plan_needs
from devec.api.parts import as_part, into_parts
from devec.api.run import Engine, cluster, portable, stretch
from devec.core.errors import IncompatibleError
from devec.core.options import Factoring
from devec.core.results import LazyFactors, TensorFactors
from devec.core.vectors import Pool
from devec.engine.stream import Check, Unit, stream
from devec.engine.threads import Progress, silent
from devec.io.checkpoint import Checkpoint
from devec.io.folder import OutputFolder, Run
from devec.io.journal import Finished
from devec.io.parts import members_in, read_part


def tensor_names(pool: Pool, factoring: Factoring) -> list[str]:
    """Every tensor that takes part: matrices, and 1-D parameters if asked for."""
    names = [n for n in pool.tensors() if factoring.one_d or not pool.layout(n).is_vector]
    if not names:
        raise IncompatibleError(
            "there is no matrix to decompose", values={"tensors": len(pool.tensors())},
            remedy="1-D parameters are decomposed with --one-d only; check --include and --exclude.",
        )
    return names


def factor_all(
    pool: Pool, factoring: Factoring, names: Sequence[str], engine: Engine, device: torch.device,
    progress: Progress = silent,
) -> dict[str, TensorFactors]:
    """Every tensor's factors, in memory. Raises RefusedError where they may not all fit into ``--max-memory``."""
    found: dict[str, TensorFactors] = {}
    for name, factors in _factored(pool, factoring, names, engine, device):
        found[name] = factors
        progress(len(found), len(names), name)
    return {n: found[n] for n in names}


def _factored(
    pool: Pool, factoring: Factoring, names: Sequence[str], engine: Engine, device: torch.device
) -> Iterator[tuple[str, TensorFactors]]:
    if device.type != "cpu":
        for found in factored_in_batches(pool, names, factoring, device, workers=engine.workers):
            yield found.name, as_stored(found)
        return
    kept = factors_kept(pool, factoring, names) if engine.memory is not None else 0
    needs = plan_needs(pool, factoring, names, engine, kept)
    sources = checkpoints_of_pool(pool)

    def work(name: str, check: Check) -> TensorFactors:
        check()
        return needs.factors(name)

    units = [Unit(n, needs.of[n].memory, _ahead(sources, n)) for n in names]
    yield from stream(work, units, workers=needs.workers, memory=needs.room)


def checkpoints_of_pool(pool: Pool) -> list[Checkpoint]:
    """Every open checkpoint that the pool reads from, each once."""
    return list({id(c): c for v in pool for c in checkpoints_of(v)}.values())


def _ahead(sources: Sequence[Checkpoint], name: str) -> tuple[tuple[int, int, int], ...]:
    places = (source.place(name) for source in sources if name in source)
    return tuple(place for place in places if place is not None)


@dataclass(frozen=True)
class Factored:
    """The factoring of a pool into one file per tensor, in the temporary folder of an output."""

    pool: Pool
    factoring: Factoring
    names: Sequence[str]
    run: Run
    engine: Engine
    device: torch.device
    job: Job | None = None
    progress: Progress = silent

    def into(self, folder: OutputFolder) -> Mapping[str, TensorFactors]:
        """Factor what is not factored yet; returns factors that are read when asked for."""
        sources = checkpoints_of_pool(self.pool)

        def factor(names: Sequence[str], place: Mapping[str, Path]) -> Iterator[Finished]:
            return self._results(names, place, sources)

        place = into_parts(folder, self.names, self._mine(), sources, self.run, self.engine, factor, self.progress)
        if self.engine.shard is not None:
            return {}  # the other parts are not there yet
        return LazyFactors({n: members_in(place[n]) for n in self.names}, lambda name: read_part(place[name]))

    def _mine(self) -> list[str]:
        if self.engine.shard is None:
            return list(self.names)
        sizes = [self.pool.layout(n).matrix_shape[0] * self.pool.layout(n).matrix_shape[1] for n in self.names]
        return stretch(self.names, sizes, *self.engine.shard)

    def _results(
        self, names: Sequence[str], place: Mapping[str, Path], sources: Sequence[Checkpoint]
    ) -> Iterator[Finished]:
        if self.engine.executor == "ray":
            job = portable(self.job, self.run)
            with cluster(self.engine) as there:
                calls = [(job, self.factoring, name, place[name]) for name in names]
                yield from there.map(factor_elsewhere, calls)
            return
        if self.device.type != "cpu":
            pool, factoring, workers = self.pool, self.factoring, self.engine.workers
            for found in factored_in_batches(pool, names, factoring, self.device, workers=workers):
                yield as_part(place[found.name], as_stored(found), sources)
            return
        needs = plan_needs(self.pool, self.factoring, names, self.engine)

        def work(name: str, check: Check) -> Finished:
            check()
            factors = needs.factors(name)
            check()
            return as_part(place[name], factors, sources)

        units = [Unit(n, needs.of[n].memory, _ahead(sources, n)) for n in names]
        for _, record in stream(work, units, workers=needs.workers, memory=needs.room):
            yield record


def factor_elsewhere(job: Job, factoring: Factoring, name: str, path: Path) -> Finished:
    """Factor one tensor in a process that does not hold the pool."""
    pool: Pool = kept_of(job)
    sources = checkpoints_of_pool(pool)
    for source in sources:
        source.digests.watch()
    return as_part(path, factor_tensor(pool.block(name), factoring), sources)


def make_pool(factoring: Factoring, base: str | None, **arguments: object) -> Pool:
    """The pool of a :class:`~devec.api.jobs.Job`: as ``decompose`` makes it from references."""
    from devec.api.decompose import prepared
    from devec.api.references import load_pool

    pool, _ = load_pool(base=base, dtype=getattr(torch, factoring.dtype), **arguments)  # type: ignore[arg-type]
    return prepared(pool, factoring, base)[0]
