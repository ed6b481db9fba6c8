"""Writing results: a task vector as an adapter or an artifact, an edited model as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.api.edit import Edited, check_finite
from devec.api.jobs import Job, checkpoints_of
from devec.api.records import input_record, source_paths
from devec.api.run import Engine, Filling
from devec.api.sources import hub_of, place_of, public_name
from devec.core.contracts import TensorSource
from devec.core.errors import DevecError, IncompatibleError, RefusedError, UsageError
from devec.core.provenance import InputRecord, Provenance
from devec.core.vectors import LazyMap, TaskVector, cost_of
from devec.engine.threads import Progress, silent
from devec.io import artifact, complete
from devec.io.adapters.write import write_adapter
from devec.io.folder import OutputFolder
from devec.io.model_folder import WrittenModel, plan_model, write_model_folder
from devec.io.records import installed_versions, write_records
from devec.io.shards import DEFAULT_SHARD_SIZE


@dataclass(frozen=True)
class Saving:
    """How an output is written, and what it says of itself."""

    command: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    vectors: tuple[TaskVector, ...] = ()
    base: TensorSource | None = None
    overwrite: bool = False
    strict: bool = False
    shard_size: int = DEFAULT_SHARD_SIZE
    seed: int = 0
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    card_text: str | None = None
    recipe: Mapping[str, Any] | None = None
    progress: Progress = silent
    engine: Engine = field(default_factory=Engine)
    companions: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the output in place of the base's (see ``io.tokenizer``)."""
    job: Job | None = None
    """How another process makes the model that is saved, if one can."""

    @property
    def kept(self) -> tuple[Path, ...]:
        """Input files and folders, which an output may not replace or lie in."""
        found = [p for v in self.vectors for p in source_paths(v)]
        return tuple(dict.fromkeys([*found, *([] if self.base is None else _places(self.base))]))

    def provenance(self, *, hashes: bool = True) -> Provenance:
        """What the output says of itself; hashes of inputs are those of what was read, and read what was not."""
        records: list[InputRecord] = []
        if self.base is not None:
            records = [base_record(self.base, hashes), *(input_record(v, hashes) for v in _added_to(self.base))]
        return Provenance(
            command=self.command,
            parameters=self.parameters,
            inputs=(*records, *(input_record(v, hashes) for v in self.vectors)),
            versions=installed_versions(),
            seed=self.seed,
            dtype=_name(self.dtype),
            out_dtype=None if self.out_dtype is None else _name(self.out_dtype),
            recipe=self.recipe,
        )

    def for_inputs(self, vectors: Iterable[TaskVector], base: TensorSource | None = None) -> Saving:
        return replace(self, vectors=tuple(vectors), base=base)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def base_record(base: TensorSource, hashes: bool = True) -> InputRecord:
    hub = hub_of(base)
    exists = hub is None and Path(base.reference).exists()
    stored = base
    while isinstance(stored, Edited):  # what is added to it has a record of its own
        stored = stored.base
    digest = stored.fingerprint() if hashes and hasattr(stored, "fingerprint") else None
    return InputRecord(
        reference=base.reference, path=base.reference if exists else None, sha256=digest, kind="base",
        revision=None if hub is None else hub.commit,
    )


def _places(base: TensorSource) -> list[Path]:
    """Where a base lies; of ``BASE+ADAPTER``, the adapter too."""
    found = [Path(place_of(base))] if Path(place_of(base)).exists() else []
    return found + [p for vector in _added_to(base) for p in source_paths(vector)]


def _added_to(base: TensorSource) -> list[TaskVector]:
    """Of ``BASE+ADAPTER``, the adapter."""
    if not isinstance(base, Edited):
        return []
    return list({id(vector): vector for terms in base.terms.values() for _, vector, *_ in terms}.values())


def save_model(model: TensorSource, out: str | Path, saving: Saving, base_models: Sequence[str] = ()) -> WrittenModel:
    """A checkpoint: a Hugging Face folder, or one file when ``out`` ends in ``.safetensors``."""
    before = saving.provenance(hashes=False)
    plan = plan_model(Path(out), model, before, out_dtype=saving.out_dtype, shard_size=saving.shard_size)
    run = saving.engine.run(before, plan.digest(), saving.kept)
    with naming_the_output(out, model):
        return write_model_folder(
            plan,
            model,  # type: ignore[arg-type]
            Filling(model, plan, run, saving.engine, saving.job, saving.progress),
            provenance=saving.provenance,
            run=run,
            out_dtype=saving.out_dtype,
            overwrite=saving.overwrite,
            strict=saving.strict,
            base_models=list(base_models) or [public_name(model)],
            summary=saving.summary,
            card_text=saving.card_text,
            inputs=saving.kept,
            companions=saving.companions,
        )


def written_model(model: TensorSource, out: str | Path, saving: Saving) -> WrittenModel:
    """What :func:`save_model` has written there before; RefusedError if that is not what stands there."""
    def provenance(hashes: bool) -> Provenance:
        return saving.provenance(hashes=hashes)

    plan = plan_model(
        Path(out), model, provenance(False), out_dtype=saving.out_dtype, shard_size=saving.shard_size
    )
    return complete.written_model(plan, provenance, getattr(model, "folder", None))


def written_vector(out: str | Path, saving: Saving, *, adapter: bool = True) -> WrittenModel:
    """What :func:`save_vector` (or, no ``adapter``, :func:`save_artifact`) has written there before."""
    def provenance(hashes: bool) -> Provenance:
        return saving.provenance(hashes=hashes)

    place = Path(out)
    if place.suffix == ".safetensors":
        return complete.written_file(place, provenance)
    return complete.written_folder(place, provenance, beside=["README.md"] if adapter else [])


@contextmanager
def naming_the_output(out: str | Path, source: TensorSource | TaskVector) -> Iterator[None]:
    """Errors name what the user gave: the input that is not finite, and never the temporary folder."""
    try:
        yield
    except DevecError as error:
        if isinstance(error, IncompatibleError) and error.tensor is not None:
            if isinstance(source, Edited):
                source.blame(error.tensor)
            elif isinstance(source, TaskVector) and error.tensor in source.deltas:
                check_finite(source.deltas[error.tensor].dense(), error.tensor, source.origin.file, source.name)
        if error.file is not None and ".partial-run" in error.file:
            error.file = str(out)
        raise


def save_vector(
    vector: TaskVector, out: str | Path, saving: Saving, *, heads: Mapping[str, Tensor] | None = None
) -> WrittenModel:
    """A vector whose deltas are all factored, as an adapter in the dialect that it came in (PEFT if in none)."""
    saving.engine.alone("an adapter")
    check_adapter_place(out, vector)
    with naming_the_output(out, vector):
        return write_adapter(
            Path(out),
            original_spelling(vector),
            provenance=saving.provenance(),
            heads=heads,
            dtype=saving.out_dtype or torch.float32,
            overwrite=saving.overwrite,
            strict=saving.strict,
            summary=saving.summary,
            card_text=saving.card_text,
            inputs=saving.kept,
        )


def check_adapter_place(out: str | Path, vector: TaskVector) -> None:
    """A PEFT adapter is weights and a configuration; only diffusers reads one file."""
    if Path(out).suffix == ".safetensors" and vector.origin.dialect != "diffusers":
        raise UsageError(
            "a PEFT adapter is a folder: its weights say nothing without adapter_config.json beside them", file=out,
            remedy="Give -o a folder's name, without .safetensors.",
        )


def original_spelling(vector: TaskVector) -> TaskVector:
    """Undo the renaming that let an adapter stand beside checkpoints (see ``references.rename``)."""
    back = vector.origin.config.get("devec_spelling")
    if not isinstance(back, Mapping):
        return vector
    there, here = _prefixes(back)
    if not all(n in back or n.startswith(there) for n in vector.deltas):
        return vector  # half in one spelling and half in another would be worse
    old = {back.get(n, here + n.removeprefix(there)): n for n in vector.deltas}
    return replace(
        vector,
        deltas=LazyMap(list(old), lambda n: vector.deltas[old[n]], lambda n: cost_of(vector.deltas)(old[n])),
        layouts={o: vector.layouts[n] for o, n in old.items()},
    )


def _prefixes(back: Mapping[str, str]) -> tuple[str, str]:
    """What the one renaming (see ``io.names.resolve_names``) took away from the new names to put before the old."""
    new, old = (name.split(".") for name in next(iter(back.items()), ("", "")))
    while new and old and new[-1] == old[-1]:
        new, old = new[:-1], old[:-1]
    return "".join(f"{x}." for x in new), "".join(f"{x}." for x in old)


def save_artifact(vector: TaskVector, out: str | Path, saving: Saving) -> Path:
    """A dense task vector as an artifact folder, its numbers in ``out_dtype`` (the compute dtype if none is given)."""
    if Path(out).suffix == ".safetensors":
        raise UsageError("a task vector is a folder, not one file", file=out, remedy="Give -o a folder's name.")
    place = OutputFolder(Path(out), overwrite=saving.overwrite, inputs=saving.kept)
    for source in checkpoints_of(vector):
        source.digests.watch()
    with naming_the_output(out, vector), place as folder:
        artifact.write_task_vector(folder.path, vector, saving.out_dtype or saving.dtype)
        write_records(folder.path, saving.provenance(), summary=saving.summary)
    return Path(out)


def require_low_rank(vector: TaskVector, what: str, remedy: str) -> None:
    dense = vector.first_dense()
    if dense is not None:
        raise UsageError(f"{what} is dense, which no adapter can hold", values={"tensor": dense}, remedy=remedy)


def heads_from(name: str | None, vectors: Sequence[TaskVector]) -> dict[str, Tensor]:
    """The heads of the vector named by ``--heads-from``; none by default."""
    if name is None:
        return {}
    for v in vectors:
        if v.name == name:
            if not v.heads:
                raise UsageError(f"--heads-from {name}: it has no heads")
            return dict(v.heads)
    raise UsageError(
        f"--heads-from {name!r} names no input", remedy=f"Inputs: {', '.join(v.name for v in vectors)}."
    )


def edited(
    base: TensorSource,
    terms: Sequence[tuple[float, TaskVector]],
    saving: Saving,
    heads: Mapping[str, Tensor] | None = None,
) -> Edited:
    model = Edited(base, terms, dtype=saving.dtype, out_dtype=saving.out_dtype, heads=heads)
    unknown = [n for n in model.heads if n not in set(base.names())]
    if unknown:
        raise RefusedError(
            "the base has no such head", tensor=unknown[0], file=base.reference,
            remedy="Use a base of the same class, or leave out --heads-from.",
        )
    return model
