"""``extract --rank``: a LoRA of a difference, its tensors factored on threads, each kept as soon as it is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from devec.api.extract import factored, lora_of, lora_rule
from devec.api.jobs import checkpoints_of
from devec.api.merge import Compression
from devec.api.needs import as_stored
from devec.api.output import Saving, check_adapter_place, naming_the_output, save_vector
from devec.api.parts import as_part, into_parts
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.core.vectors import LazyMap, TaskVector
from devec.engine.memory import fit_workers
from devec.engine.stream import Check, Unit, stream
from devec.io.adapters.adapter_folder import ROOM, fill_adapter_folder, raise_side_step
from devec.io.adapters.peft_write import peft_files
from devec.io.folder import OutputFolder
from devec.io.journal import Finished
from devec.io.model_folder import WrittenModel
from devec.io.parts import read_part
from devec.methods.decompose.costs import working_bytes


@dataclass(frozen=True)
class WrittenLora:
    """What was written, the rank of each matrix in it, and the relative Frobenius error made in each tensor (1 for 1-D
    tensors, which are left out)."""

    written: WrittenModel
    ranks: Mapping[str, int]
    errors: Mapping[str, float]


def save_lora(vector: TaskVector, out: str | Path, saving: Saving, compression: Compression) -> WrittenLora:
    """Factor every matrix of ``vector`` as ``to_lora`` does and write a PEFT folder; an interrupted run goes on with
    the tensors that it had factored. What is an adapter already is rewritten in one go, in its own dialect.

    Raises what writing an adapter raises, and RefusedError where it does not fit into ``--max-memory``.
    """
    saving.engine.alone("an adapter")
    check_adapter_place(out, vector)
    if vector.partial:
        rewritten, errors = compression.apply(vector)
        ranks = {n: delta.rank_bound for n, delta in rewritten.deltas.items()}
        return WrittenLora(save_vector(rewritten, out, saving), ranks, errors)
    names = [n for n in vector.deltas if not vector.layouts[n].is_vector]
    sources = checkpoints_of(vector)
    run = saving.engine.run(
        saving.provenance(hashes=False), hashlib.sha256(json.dumps(names).encode()).hexdigest(), saving.kept
    )
    rule = lora_rule(compression.rank, compression.energy, compression.error)

    def factor(todo: Sequence[str], place: Mapping[str, Path]) -> Iterator[Finished]:
        needs = lora_needs(vector, compression, todo)
        workers, memory = fit_workers(saving.engine.workers, saving.engine.memory, needs)

        def work(name: str, check: Check) -> Finished:
            check()
            svd = factored(vector, name, rule, exact=compression.rank is None)
            check()
            found = TensorFactors(name, vector.layouts[name], {0: svd})
            return as_part(place[name], as_stored(found), sources)

        units = [Unit(n, need) for n, need in zip(todo, needs, strict=True)]
        for _, record in stream(work, units, workers=workers, memory=memory):
            yield record

    place = OutputFolder(Path(out), overwrite=saving.overwrite, inputs=saving.kept, expected_bytes=ROOM, run=run)
    with naming_the_output(out, vector), place as folder:
        files = into_parts(folder, names, names, sources, run, saving.engine, factor, saving.progress)
        errors, ranks = dict.fromkeys(vector.deltas, 1.0), {}
        for n in names:
            svd = read_part(files[n]).svd[0]
            errors[n], ranks[n] = max(1.0 - svd.energy_kept, 0.0) ** 0.5, svd.rank
        deltas = LazyMap(names, lambda n: lora_of(read_part(files[n]).svd[0]))
        low = replace(vector, deltas=deltas, layouts={n: vector.layouts[n] for n in names}, partial=True)
        adapter = peft_files(low, dtype=saving.out_dtype or torch.float32)
        written, failed = fill_adapter_folder(
            folder.path, Path(out), adapter, saving.provenance(), strict=saving.strict, summary=saving.summary,
            card_text=saving.card_text,
        )
    raise_side_step(failed, Path(out))
    return WrittenLora(written, ranks, errors)


def lora_needs(vector: TaskVector, compression: Compression, names: Sequence[str]) -> list[int]:
    """Bytes that factoring each matrix takes, at most."""
    factoring = Factoring(rank=str(compression.rank or "none"), side="both", exact=compression.rank is None)
    return [working_bytes(vector.layouts[n].matrix_shape, factoring) for n in names]
