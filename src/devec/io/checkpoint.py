"""Checkpoints: lazy named tensors in weight space, from a file, a Hugging Face folder, a state dict or a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from devec.core.contracts import TensorInfo
from devec.core.errors import InputError, UsageError
from devec.core.layout import Layout
from devec.io.dialect import (
    ADAPTER_FILES,
    CONFIG_FILE,
    INDEX_FILES,
    WEIGHT_SUFFIXES,
    WHOLE_FILES,
    TensorFile,
    dialect_of,
    open_file,
)
from devec.io.digests import TensorDigests
from devec.io.hub_id import HubFolder
from devec.io.quantised import refuse_quantised
from devec.io.shard_index import open_shards, read_json

_LOOKED_FOR = [name for pair in zip(WHOLE_FILES, INDEX_FILES, strict=True) for name in pair]

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_WEIGHT = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
"""The modules that these models build from transformers' Conv1D, which stores ``in x out``."""


class Checkpoint:
    """Named tensors of one model, read one at a time; implements ``core.contracts.TensorSource``.

    ``names`` lists each stored tensor once, in file-offset order. A tied name (another name for the same storage) is in
    ``ties`` instead, and ``get``, ``info`` and ``in`` accept it. ``reference`` is the path that it was opened at, or
    an id of the Hugging Face Hub; then ``hub`` says which commit of it lies where.
    """

    def __init__(
        self,
        reference: str,
        parts: Mapping[str, TensorFile | _Memory],
        *,
        ties: Mapping[str, str] | None = None,
        config: dict[str, Any] | None = None,
        folder: Path | None = None,
        conv1d: frozenset[str] = frozenset(),
    ) -> None:
        self.reference = reference
        self.hub: HubFolder | None = None
        self.config = config
        self.folder = folder
        self._parts = dict(parts)
        self._ties = dict(ties or {})
        self._conv1d = conv1d
        self._kept: dict[str, Tensor] | None = None
        self.digests = TensorDigests(self.info, self._rows)
        refuse_quantised(self, reference)

    def names(self) -> list[str]:
        return list(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._ties

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def ties(self) -> Mapping[str, str]:
        """alias -> the stored name whose storage it shares."""
        return self._ties

    def info(self, name: str) -> TensorInfo:
        return self._part(name).info(self._ties.get(name, name))

    def get(self, name: str) -> Tensor:
        """The tensor as stored: its own dtype and shape."""
        stored = self._ties.get(name, name)
        value = self._part(name).get(stored) if self._kept is None else self._whole(stored, self._kept)
        self.digests.feed(stored, 0, value.shape[0] if value.ndim else 1, value)
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` along the first dimension, as stored; a tensor without dimensions is one row."""
        stored = self._ties.get(name, name)
        value = self._rows(stored, start, stop)
        self.digests.feed(stored, start, stop, value)
        return value

    def _rows(self, stored: str, start: int, stop: int) -> Tensor:
        if self._kept is not None:
            value = self._whole(stored, self._kept)
            return value[start:stop] if value.ndim else value.reshape(1)
        return self._part(stored).rows(stored, start, stop)

    def keep(self, store: dict[str, Tensor] | None = None) -> None:
        """From now on a tensor that is read stays in memory, as stored: for what reads a model many times.

        ``store`` may be shared by several checkpoints over the same files. Nobody may write into what they give out.
        """
        self._kept = {} if store is None else store

    def _whole(self, stored: str, store: dict[str, Tensor]) -> Tensor:
        value = store.get(stored)
        if value is None:
            value = store[stored] = self._part(stored).get(stored)
        return value

    def place(self, name: str) -> tuple[int, int, int] | None:
        """(file descriptor, offset, bytes) of a tensor in its file, for read-ahead; ``None`` in memory."""
        return self._part(name).place(self._ties.get(name, name))

    def files(self) -> list[Path]:
        """The weight files that it reads from."""
        return list(dict.fromkeys(Path(p.path) for p in self._parts.values() if isinstance(p.path, Path)))

    def file_of(self, name: str) -> str:
        """The file that holds the tensor, or ``memory``."""
        return str(self._part(name).path)

    def layout(self, name: str) -> Layout:
        """How the tensor lies against the ``out x in`` matrix; Conv1D weights are stored transposed."""
        shape = self.info(name).shape
        return Layout(shape, transposed=len(shape) == 2 and self._is_conv1d(name))

    def fingerprint(self) -> str:
        """SHA-256 over the sorted names with their shapes, dtypes and hashes (reads what was not read yet)."""
        return self.digests.fingerprint(list(self._parts))

    def close(self) -> None:
        """Close the files behind it (they are closed anyway when it goes away)."""
        for part in {id(p): p for p in self._parts.values()}.values():
            part.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_conv1d(self, name: str) -> bool:
        if name in self._conv1d:
            return True
        model = (self.config or {}).get("model_type")
        return model in CONV1D_MODELS and CONV1D_WEIGHT.search(name) is not None

    def _part(self, name: str) -> TensorFile | _Memory:
        try:
            return self._parts[self._ties.get(name, name)]
        except KeyError:
            raise InputError("no such tensor", tensor=name, file=self.reference) from None


class _Memory:
    """Tensors of a state dict, behind the interface of a file."""

    path = "memory"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def info(self, name: str) -> TensorInfo:
        value = self._tensors[name]
        return TensorInfo(tuple(value.shape), value.dtype)

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        value = self._tensors[name].detach()
        return value[start:stop] if value.ndim else value.reshape(1)

    def place(self, name: str) -> None:
        return None

    def close(self) -> None:
        """Nothing to close."""


def open_checkpoint(path: str | Path, hub: HubFolder | None = None) -> Checkpoint:
    """Open a weight file of any kind, or a Hugging Face folder (one file, or shards with their index).

    ``hub`` tells of a folder of the Hub's cache which repository it is.

    Raises InputError (exit 3) for anything missing or broken, RefusedError (exit 5) for a quantised model, an unsafe
    pickle or an index that points outside its folder, UsageError (exit 2) for an adapter.
    """
    path = Path(path)
    if path.is_dir():
        found = _open_folder(path)
        if hub is not None:
            found.reference, found.hub = hub.reference, hub
        return found
    file = open_file(path)
    if dialect_of(file.names()) is not None:
        file.close()
        raise adapter_given(path)
    # a file of a model folder is read with that folder's configuration, which says what is stored transposed
    customary = path.name in WHOLE_FILES or re.fullmatch(r"(model|pytorch_model)-\d+-of-\d+\.\w+", path.name)
    config = _config(path.parent) if customary else None
    return Checkpoint(str(path), dict.fromkeys(file.names(), file), ties=file.ties, config=config)


def checkpoint_from_state_dict(
    tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None, *, reference: str = "memory"
) -> Checkpoint:
    """A checkpoint over tensors in memory. Names whose tensors are the same view of one storage are tied."""
    return _from_memory(tensors, config, reference, frozenset())


def checkpoint_from_module(
    module: nn.Module, config: dict[str, Any] | None = None, *, reference: str = "memory"
) -> Checkpoint:
    """A checkpoint over a module's parameters and persistent buffers.

    ``config`` defaults to ``module.config`` where that exists; Conv1D modules are recognised by their class.
    """
    own = getattr(module, "config", None)
    if config is None and own is not None and hasattr(own, "to_dict"):
        config = own.to_dict()
    conv1d = frozenset(
        f"{name}.weight".removeprefix(".") for name, part in module.named_modules() if type(part).__name__ == "Conv1D"
    )
    return _from_memory(module.state_dict(), config, reference, conv1d)


def _from_memory(
    tensors: Mapping[str, Tensor], config: dict[str, Any] | None, reference: str, conv1d: frozenset[str]
) -> Checkpoint:
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"a state dict holds tensors, not a {type(value).__name__}", tensor=name, file=reference)
        view = (value.data_ptr(), value.device, value.dtype, tuple(value.shape), value.stride())
        if value.numel() and not value.is_meta and view in first:
            ties[name] = first[view]
        else:
            first[view] = name
    memory = _Memory(tensors)
    parts = {name: memory for name in tensors if name not in ties}
    return Checkpoint(reference, parts, ties=ties, config=config, conv1d=conv1d)


def adapter_given(path: str | Path) -> UsageError:
    """The error for an adapter where a model is wanted."""
    return UsageError(
        "this is an adapter, where a whole checkpoint belongs",
        file=path,
        remedy="Give the model's own weights, or BASE+ADAPTER for the adapter applied to its base.",
    )


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else None


def _open_folder(folder: Path) -> Checkpoint:
    for whole, index in zip(WHOLE_FILES, INDEX_FILES, strict=True):
        if (folder / whole).is_file():
            file = open_file(folder / whole)
            return Checkpoint(
                str(folder), dict.fromkeys(file.names(), file), ties=file.ties, config=_config(folder), folder=folder
            )
        if (folder / index).is_file():
            parts, ties = open_shards(folder, folder / index)
            return Checkpoint(str(folder), parts, ties=ties, config=_config(folder), folder=folder)
    if (folder / CONFIG_FILE).is_file() or any((folder / name).is_file() for name in ADAPTER_FILES):
        raise adapter_given(folder)
    raise _nothing_in(folder)


def _nothing_in(folder: Path) -> InputError:
    suffixes = (*WEIGHT_SUFFIXES, ".gguf")
    try:
        weights = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes)
    except OSError as error:
        return InputError(f"the folder cannot be read: {error.strerror}", file=folder)
    if any(re.search(r"-\d+-of-\d+\.", name) for name in weights):
        remedy = "There are shards without their index; download the index too."
    elif weights:
        remedy = f"Give the file itself, e.g. {folder / weights[0]}."
    else:
        remedy = "Check the path."
    return InputError(
        "the folder holds no checkpoint", values={"looked for": ", ".join(_LOOKED_FOR)}, file=folder, remedy=remedy
    )
