"""``save``: whatever a verb returned, written to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from devec.api.coefficients import save_coefficients
from devec.api.decompose import save_decomposition
from devec.api.edit import Edited
from devec.api.merge import Merged, save_merged
from devec.api.mix import Mixed, save_mix
from devec.api.negate import Negated, save_negated
from devec.api.output import Saving, save_artifact, save_model, save_vector
from devec.core.coefficients import Coefficients
from devec.core.decomposition import Decomposition
from devec.core.errors import UsageError
from devec.core.vectors import TaskVector


def save(thing: Any, out: str | Path, *, overwrite: bool = False, out_dtype: torch.dtype | None = None) -> Path:
    """Write the result of a verb, whole or not at all; returns where.

    An edited, merged or negated model becomes a Hugging Face folder (or one ``.safetensors`` file), low-rank results an
    adapter in the dialect they came in, a decomposition or a dense task vector an artifact folder, learned coefficients
    a JSON file. ``out_dtype`` holds for float tensors and defaults to the base's own (float32 for adapters).
    """

    def saving(command: str) -> Saving:
        return Saving(command, overwrite=overwrite, out_dtype=out_dtype)

    if isinstance(thing, Edited):
        chosen = Saving("apply", overwrite=overwrite, out_dtype=out_dtype or thing.out_dtype)
        vectors = {id(v): v for terms in thing.terms.values() for _, v, *_ in terms}
        save_model(thing, out, chosen.for_inputs(vectors.values(), thing.base))
    elif isinstance(thing, Merged):
        save_merged(thing, out, saving("merge"))
    elif isinstance(thing, Mixed):
        save_mix(thing, out, saving("mix"))
    elif isinstance(thing, Negated):
        save_negated(thing, out, saving("negate"))
    elif isinstance(thing, Decomposition):
        save_decomposition(thing, out, overwrite=overwrite)
    elif isinstance(thing, Coefficients):
        save_coefficients(thing, out, overwrite=overwrite)
    elif isinstance(thing, TaskVector) and thing.is_low_rank():
        save_vector(thing, out, saving("export").for_inputs([thing]), heads=thing.heads)
    elif isinstance(thing, TaskVector):
        save_artifact(thing, out, saving("extract").for_inputs([thing]))
    else:
        raise UsageError(f"save cannot write a {type(thing).__name__}")
    return Path(out)
