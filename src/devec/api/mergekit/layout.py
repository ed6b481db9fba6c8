"""Models and slices of a file of mergekit: which models, over which layers, with which parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devec.api.references import open_model
from devec.api.varying import places
from devec.core.errors import UsageError


@dataclass(frozen=True)
class Source:
    model: str
    parameters: Mapping[str, Any]
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Models over a range of layers (``None``: the whole model) and the parameters that hold there."""

    sources: tuple[Source, ...]
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


def models_of(data: Mapping[str, Any], strange: list[str]) -> list[Slice]:
    return [Slice(tuple(_source(item, f"models[{i}]", strange) for i, item in enumerate(_list(data, "models"))))]


def slices_of(data: Mapping[str, Any], strange: list[str]) -> list[Slice]:
    found = []
    for i, item in enumerate(_list(data, "slices")):
        where = f"slices[{i}]"
        strange += [f"{where}.{key}" for key in item if key not in ("sources", "parameters", "base_model")]
        if item.get("base_model", data.get("base_model")) != data.get("base_model"):
            strange.append(f"{where}.base_model")
        sources = tuple(_source(x, f"{where}.sources[{j}]", strange) for j, x in enumerate(_list(item, "sources")))
        ranges = {source.layers for source in sources}
        if len(ranges) > 1:
            raise UsageError(
                f"{where} merges layers of different numbers, which is not carried over",
                values={source.model: source.layers for source in sources},
            )
        found.append(Slice(sources, sources[0].layers or (0, 0), mapping(item, "parameters", f"{where}.")))
    if any({s.model for s in one.sources} != {s.model for s in found[0].sources} for one in found):
        raise UsageError("slices of different models are not carried over", remedy="Name every model in every slice.")
    return found


def _list(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = data.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        raise UsageError(f"{key} is no list of mappings")
    return items


def _source(item: Mapping[str, Any], where: str, strange: list[str]) -> Source:
    strange += [f"{where}.{key}" for key in item if key not in ("model", "parameters", "layer_range")]
    layers = item.get("layer_range")
    if layers is not None and not (
        isinstance(layers, list) and len(layers) == 2 and all(type(x) is int for x in layers) and layers[0] < layers[1]
    ):
        raise UsageError(f"{where}.layer_range is not [FIRST, LAST + 1]: {layers}")
    return Source(
        text(item.get("model"), f"{where}.model"), mapping(item, "parameters", f"{where}."),
        None if layers is None else (layers[0], layers[1]),
    )


def mapping(data: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    """``data[key]``, empty where it is not given."""
    found = data.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise UsageError(f"{where}{key} is no mapping: {found!r}")
    return found or {}


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where} is no reference to a model: {value!r}")
    return value


def check_layers(slices: Sequence[Slice], model: str, file: str | Path) -> None:
    """Slices must be all layers in their order: devec merges whole models."""
    if slices[0].layers is None:
        return
    depth = max((place.stop for place in places(open_model(model).names()).values()), default=0)
    ranges = [one.layers or (0, 0) for one in slices]
    ends = [0, *(stop for _, stop in ranges)]
    if [start for start, _ in ranges] != ends[:-1] or ends[-1] != depth:
        raise UsageError(
            "slices that repeat, leave out or move layers are not carried over: devec keeps the layers of the model",
            values={"slices": ", ".join(f"[{a}, {b}]" for a, b in ranges), "layers": depth}, file=file,
        )


def named(models: Sequence[str]) -> tuple[str, ...]:
    """References, under names of their own where the usual ones would clash."""
    labels = [re.sub(r"[+#,=\s]", "-", Path(model.rpartition("+")[2].partition("@")[0]).stem) for model in models]
    if len(set(labels)) == len(labels):
        return tuple(models)
    return tuple(f"{label}-{i}={model}" for i, (label, model) in enumerate(zip(labels, models, strict=True), 1))
