"""From what a pickle holds to a flat state dict: wrappers opened, modules walked, everything but tensors left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from devec.core.errors import InputError
from devec.io.unpickle_globals import Inert, TensorView

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "ema", "module", "net", "network", "params", "params_ema",
    "model_ema", "weights",
)  # fmt: skip
"""Top-level keys under which training scripts put the weights."""
_TRAINING_STATE = ("optimizer", "scheduler", "scaler", "loss", "callbacks", "rng", "history", "states", "updates")
_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
# Shared references can make a small pickle describe an astronomically large tree
_MAX_NODES = 1_000_000


def state_dict_of(value: Any, path: Path) -> dict[str, TensorView]:
    """The tensors of a checkpoint by name, in the pickle's order.

    Raises InputError when there are none, or when it is not clear which of several sets is meant.
    """
    found = _open(value, path, depth=0)
    if not found:
        raise InputError("the file holds no tensors", file=path, remedy="Give the file with the weights.")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): view for name, view in found.items()}
    return found


def _open(value: Any, path: Path, depth: int) -> dict[str, TensorView]:
    if isinstance(value, Inert):
        return _walk_module(value, path)
    if not isinstance(value, Mapping) or depth > 3:
        return {}
    direct = {key: item for key, item in value.items() if isinstance(item, TensorView)}
    nested = {key: item for key, item in value.items() if isinstance(item, (Mapping, Inert)) and _has_tensor(item)}
    if direct:
        _refuse_mixture(nested, path)
        return {_text(key, path): view for key, view in direct.items()}
    candidates = [key for key in nested if key in WRAPPERS]
    if not candidates:
        candidates = [key for key in nested if not _is_training_state(key)]
    if len(candidates) > 1:
        raise InputError(
            "it is not clear which of several sets of weights is meant",
            values={"sets": ", ".join(map(str, candidates))},
            file=path,
            remedy="Save the one that you mean by itself.",
        )
    return _open(nested[candidates[0]], path, depth + 1) if candidates else {}


def _refuse_mixture(nested: Mapping[Any, Any], path: Path) -> None:
    for key in nested:
        if not _is_training_state(key):
            raise InputError(
                "tensors lie both at the top and in a nested part; a state dict is flat",
                values={"nested part": str(key)},
                file=path,
                remedy="Save a flat state dict.",
            )


def _is_training_state(key: object) -> bool:
    return isinstance(key, str) and any(word in key.lower() for word in _TRAINING_STATE)


def _text(key: object, path: Path) -> str:
    if not isinstance(key, str) or not key:
        raise InputError("a tensor's name is not text", values={"name": repr(key)}, file=path)
    return key


def _walk_module(root: Inert, path: Path) -> dict[str, TensorView]:
    """``_parameters``, persistent ``_buffers`` and ``_modules`` of a pickled module, named as in its ``state_dict``."""
    out: dict[str, TensorView] = {}
    trail: list[int] = []
    nodes = 0

    def walk(module: Inert, prefix: str) -> None:
        nonlocal nodes
        nodes += 1
        if id(module) in trail or nodes > _MAX_NODES or len(trail) > 200:
            raise InputError("the pickled module contains itself or is too deep", tensor=prefix, file=path)
        trail.append(id(module))
        skip = module.state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers"):
            for key, item in _mapping(module.state.get(part)).items():
                if isinstance(item, TensorView) and not (part == "_buffers" and key in skip):
                    out[prefix + _text(key, path)] = item
        for key, item in _mapping(module.state.get("_modules")).items():
            if isinstance(item, Inert):
                walk(item, f"{prefix}{_text(key, path)}.")
        trail.pop()

    walk(root, "")
    return out


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _has_tensor(value: Any) -> bool:
    """Whether a tensor lies anywhere below, each object looked at once."""
    return any(isinstance(item, TensorView) for item in _below(value))


def _below(value: Any) -> Iterator[Any]:
    seen: set[int] = set()
    queue = [value]
    while queue:
        item = queue.pop()
        if isinstance(item, TensorView):
            yield item
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            queue.extend(item.values())
        elif isinstance(item, Inert):
            queue.extend(_mapping(item.state).values())
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
