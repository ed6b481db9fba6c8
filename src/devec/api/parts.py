"""Factors into one file per tensor, in the temporary folder of an output, entered in its journal as they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from devec.api.run import Engine, learn
from devec.core.errors import RefusedError
from devec.core.results import TensorFactors
from devec.engine.threads import Progress, silent
from devec.io.checkpoint import Checkpoint
from devec.io.disk import refusing
from devec.io.folder import OutputFolder, Run
from devec.io.journal import Finished, check_unchanged
from devec.io.parts import is_sound, part_name, write_part

Factor = Callable[[Sequence[str], Mapping[str, Path]], Iterator[Finished]]
"""Factors the tensors named, each into its own file, in any order."""


def into_parts(
    folder: OutputFolder,
    names: Sequence[str],
    mine: Sequence[str],
    sources: Sequence[Checkpoint],
    run: Run,
    engine: Engine,
    factor: Factor,
    progress: Progress = silent,
) -> dict[str, Path]:
    """The file of every tensor in ``names``, once those that are ``mine`` are all there: made now, or by an earlier run
    whose bytes are still what it entered. ``sources`` are hashed on the way."""
    journal = folder.journal
    assert journal is not None
    parts = folder.kept / "parts"
    with refusing(folder.out):
        parts.mkdir(exist_ok=True)
    place = {n: parts / part_name(i) for i, n in enumerate(names)}
    for source in sources:
        source.digests.watch()
    learn(sources, journal.finished.values())
    journal.forget([n for n, r in journal.finished.items() if n in place and not is_sound(place[n], r.digest)])
    todo = [n for n in mine if n not in journal.finished]
    if engine.join and todo:
        raise RefusedError(
            f"{len(todo)} of {len(mine)} tensors are not factored yet", tensor=todo[0], file=folder.out,
            remedy="Run the shards that are missing, or stopped, with --resume.",
        )
    done = len(mine) - len(todo)
    for record in factor(todo, place):
        journal.append(record)
        learn(sources, [record])
        done += 1
        progress(done, len(mine), record.name)
    check_unchanged(run.identity.inputs, run.again)
    return place


def as_part(path: Path, factors: TensorFactors, sources: Sequence[Checkpoint]) -> Finished:
    """One tensor's factors in their file, with the hashes of inputs that were found on the way."""
    digest, size = write_part(path, factors)
    inputs = {str(i): found for i, source in enumerate(sources) if (found := source.digests.take())}
    return Finished(factors.name, path.name, digest, size, inputs)
