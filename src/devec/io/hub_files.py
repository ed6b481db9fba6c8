"""Which files of a Hugging Face repository are needed, decided from their names as the readers of a folder would."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from devec.core.errors import DevecError, InputError, UsageError
from devec.io.artifact import DELTAS, FACTORS, MANIFEST
from devec.io.checkpoint import adapter_given
from devec.io.dialect import ADAPTER_FILES, CONFIG_FILE, INDEX_FILES, WEIGHT_SUFFIXES, WHOLE_FILES
from devec.io.model_folder import is_companion

CONFIG = "config.json"


@dataclass(frozen=True)
class Needed:
    """``small`` files come first, so that a folder with weights is a whole one; ``index`` names further weights."""

    kind: Literal["artifact", "adapter", "model"]
    small: tuple[str, ...]
    weights: tuple[str, ...] = ()
    index: str | None = None


def needed(names: Collection[str], where: str, *, model: bool = False) -> Needed:
    """What to fetch of a repository that holds ``names``: an artifact, an adapter or a model, in this order.

    ``model`` says that a whole model is wanted, as a base is. Among the weight files the first one that
    ``io.dialect`` lists wins, as it would in a folder on disk; a lone file of another name is taken for an adapter.

    Raises InputError (exit 3) when there is nothing that devec reads, UsageError (exit 2) when ``model`` is wanted and
    only an adapter or an artifact is there. ``where`` is what messages call the repository.
    """
    artifact = next((n for n in (FACTORS, DELTAS) if MANIFEST in names and n in names), None)
    adapter = next((n for n in ADAPTER_FILES if n in names), None)
    whole = next((n for pair in zip(WHOLE_FILES, INDEX_FILES, strict=True) for n in pair if n in names), None)
    if artifact is not None:
        if model:
            raise UsageError("an artifact is no model", file=where, remedy="Use devec apply with --base.")
        return Needed("artifact", (MANIFEST,), (artifact,))
    if adapter is not None and not (model and whole):
        if model:
            raise adapter_given(where)
        return Needed("adapter", _present(names, CONFIG_FILE), (adapter,))
    if whole is not None:
        small = (*_present(names, CONFIG), *sorted(n for n in names if is_companion(n)))
        if whole in INDEX_FILES:
            return Needed("model", (*small, whole), index=whole)
        return Needed("model", small, (whole,))
    lone = [n for n in names if "/" not in n and PurePosixPath(n).suffix in WEIGHT_SUFFIXES]
    if len(lone) == 1 and CONFIG_FILE not in names:
        return Needed("adapter", (), (lone[0],))
    raise _nothing(names, where)


def _present(names: Collection[str], name: str) -> tuple[str, ...]:
    return (name,) if name in names else ()


def _nothing(names: Collection[str], where: str) -> DevecError:
    weights = sorted(n for n in names if PurePosixPath(n).suffix in (*WEIGHT_SUFFIXES, ".gguf"))
    listed = ", ".join(weights[:3]) + (f" and {len(weights) - 3} more" if len(weights) > 3 else "")
    return InputError(
        "the repository holds no checkpoint and no adapter that devec reads",
        values={
            "looked for": ", ".join((WHOLE_FILES[0], INDEX_FILES[0], ADAPTER_FILES[0])),
            "weight files there": listed or "none",
        },
        file=where,
        remedy="Download the file or folder that you mean, and give its path." if weights else "Check the id.",
    )
