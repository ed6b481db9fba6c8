"""mergekit's YAML files, read as merges of devec.

Every key and parameter is either carried over, or said to change no number, or named in one error: none is passed over.
What each becomes, and where the methods differ, is in docs/mergekit.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devec.api.references import open_model
from devec.api.settings import has_gradient, is_cases, places
from devec.core.errors import IncompatibleError, UsageError
from devec.core.results import Finding
from devec.io.tokenizer import chat_template, vocabulary

REQUIRED = object()
KEYS = frozenset({
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
})  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16")
BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Parts of the names of tensors before the first layer. mergekit gives them the parameters of the first slice."""


def number(value: Any) -> float:
    if isinstance(value, bool):
        return float(value)
    return float(value)


def flag(value: Any) -> bool:
    words = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    return words[value.lower() if isinstance(value, str) else value]


@dataclass(frozen=True)
class Parameter:
    """One of mergekit's parameters: its name here (``None``: it changes no number), and what its values become.

    ``each``  every model has its own
    ``idle``  mergekit takes it for this method and does nothing with it, which is worth saying
    """

    ours: str | None
    default: Any = REQUIRED
    to: Callable[[Any], Any] = number
    each: bool = False
    idle: bool = False


@dataclass(frozen=True)
class Reading:
    """How a method of mergekit is called here. ``base``: its base model is what changes are taken against."""

    method: str
    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True


WEIGHT = Parameter("weights", each=True)
NOTHING = {"int8_mask": Parameter(None, False, flag)}


def reduce(normalize: bool) -> Parameter:
    return Parameter("reduce", normalize, lambda value: "mean" if flag(value) else "sum")


def sums(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    """What all methods that add changes have in common, with their defaults."""
    return {
        "weight": WEIGHT,
        "lambda": Parameter("scale", 1.0),
        "normalize": reduce(normalize),
        "rescale": Parameter("rescale", rescale, lambda value: "l1" if flag(value) else "none"),
        **NOTHING,
        **more,
    }


def each(ours: str, default: float, to: Callable[[Any], Any] = number) -> Parameter:
    return Parameter(ours, default, to, each=True)


KEPT, DROPPED = each("density", 1.0), each("p", 1.0, lambda value: 1.0 - number(value))
MIDDLE = {"density": each("beta", 1.0), "gamma": each("gamma", 0.01)}
LIKELY = {"density": KEPT, "epsilon": each("epsilon", 0.15)}
ADD, ELECT = {"then": "task-arithmetic"}, {"then": "ties"}
METHODS: Mapping[str, Reading] = {
    "linear": Reading("average", {"weight": WEIGHT, "normalize": reduce(True)}, base=False),
    "slerp": Reading("slerp", {"t": Parameter("t")}, base=False),
    "task_arithmetic": Reading("task-arithmetic", {
        **sums(False, False), "rescale": Parameter(None, False, flag, idle=True),
        "density": Parameter(None, 1.0, number, each=True, idle=True),
    }),
    "ties": Reading("ties", sums(True, False, density=KEPT), {"zero": "plus"}),
    "dare_linear": Reading("dare", sums(False, True, density=DROPPED), ADD),
    "dare_ties": Reading("dare", sums(False, True, density=DROPPED), ELECT),
    "breadcrumbs": Reading("breadcrumbs", sums(False, False, **MIDDLE), {**ADD, "scope": "tensor"}),
    "breadcrumbs_ties": Reading("breadcrumbs", sums(False, False, **MIDDLE), {**ELECT, "scope": "tensor"}),
    "della": Reading("della", sums(True, True, **LIKELY), ELECT),
    "della_linear": Reading("della", sums(False, True, **LIKELY), ADD),
    "model_stock": Reading("model-stock", {
        "filter_wise": Parameter("scope", False, lambda value: "row" if flag(value) else "tensor"),
    }),
}  # fmt: skip


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


@dataclass(frozen=True)
class Plan:
    """A merge of devec that a file of mergekit asks for."""

    method: str
    base: str | None
    sources: tuple[str, ...]
    parameters: Mapping[str, Any]
    dtype: str = "float32"
    out_dtype: str | None = None
    chat_template: str | None = None
    notes: tuple[Finding, ...] = ()


def is_mergekit(data: Mapping[str, Any]) -> bool:
    return "merge_method" in data


def read(data: Mapping[str, Any], file: str | Path) -> Plan:
    """The merge that ``data``, a file of mergekit, describes.

    Raises UsageError (exit 2): one that names every key and parameter that is not carried over; a missing or malformed
    value; slices that repeat, leave out or move layers.
    """
    name = data["merge_method"]
    if name not in METHODS:
        raise UsageError(
            f"merge_method {name!r} is not carried over", file=file, remedy=f"Carried over: {', '.join(METHODS)}."
        )
    how = METHODS[name]
    strange = [str(key) for key in data if key not in KEYS]
    if ("models" in data) == ("slices" in data):
        raise UsageError("a file of mergekit has models or slices, one of the two", file=file)
    slices = _models(data, strange) if "models" in data else _slices(data, strange)
    scopes = [("parameters", data.get("parameters") or {})]
    scopes += [(f"slices[{i}].parameters", one.parameters) for i, one in enumerate(slices)]
    strange += [f"{where}.{key}" for where, scope in scopes for key in scope if key not in how.parameters]
    own = [key for one in slices for source in one.sources for key in source.parameters]
    strange += [f"parameters.{key} of a model" for key in dict.fromkeys(own) if not _is_each(how, key)]
    strange += _tokens(data)
    if strange:
        raise UsageError(
            f"not carried over from mergekit: {', '.join(dict.fromkeys(strange))}", file=file,
            remedy="Take it out, if the merge means the same without.",
        )
    try:
        return _plan(name, how, data, slices, file)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"a value of the file does not fit: {error}", file=file) from None


def _is_each(how: Reading, key: str) -> bool:
    return key in how.parameters and how.parameters[key].each


def _plan(name: str, how: Reading, data: Mapping[str, Any], slices: Sequence[Slice], file: str | Path) -> Plan:
    base = data.get("base_model")
    if base is not None:
        base = _text(base, "base_model")
    elif name != "linear":
        raise UsageError(f"{name} needs base_model", file=file)
    models = [source.model for source in slices[0].sources]
    if len(set(models)) != len(models):
        raise UsageError("a model is named twice", values={"models": ", ".join(models)}, file=file)
    models = _ordered(name, how, models, base, whole=slices[0].layers is None)
    if name == "slerp" and len(models) != 2:
        raise UsageError("slerp is between base_model and one other", values={"models": len(models)}, file=file)
    _check_layers(slices, base or models[0], file)
    parameters = dict(how.fixed)
    for key, parameter in how.parameters.items():
        if parameter.ours is None:
            continue
        found = [
            [(one.layers, _setting(name, key, parameter, one, model, data)) for one in slices]
            for model in (models if parameter.each else [None])
        ]
        settings = [_layered(of_slices) for of_slices in found]
        parameters[parameter.ours] = settings if parameter.each else settings[0]
    dtype, out = _dtype(data, "dtype"), _dtype(data, "out_dtype")
    return Plan(
        method=how.method,
        base=base if how.base else None,
        sources=_named(models),
        parameters=parameters,
        dtype="float64" if dtype == "float64" else "float32",
        out_dtype=out or dtype,
        chat_template=_template(data, models if base is None else [base, *models]),
        notes=(*_idle(name, how, data, slices), *_same_tokens(data, models, base)),
    )


def _ordered(name: str, how: Reading, models: list[str], base: str | None, *, whole: bool) -> list[str]:
    """The vectors of the merge. mergekit adds a base that is not listed; here it comes first where it is a model."""
    others = [model for model in models if model != base]
    if how.base or base is None:
        if not others:
            raise UsageError(f"{name} has no model beside base_model")
        return others
    return [base, *others] if base in models or whole or name == "slerp" else others


# Parameters: by source, then by slice, then for all, then the default


def _setting(
    name: str, key: str, parameter: Parameter, one: Slice, model: str | None, data: Mapping[str, Any]
) -> Any:
    scopes = [source.parameters for source in one.sources if source.model == model]
    entries: list[dict[str, Any]] = []
    for scope in (*scopes, one.parameters, data.get("parameters") or {}):
        if scope.get(key) is None:
            continue
        setting = scope[key]
        setting = [setting] if isinstance(setting, Mapping) else setting
        for entry in setting if is_cases(setting) else [{"value": setting}]:
            if set(entry) - {"filter", "value"}:
                raise UsageError(f"{name}: {key} has an entry that cannot be read: {dict(entry)}")
            fits = {} if entry.get("filter") in (None, "*") else {"filter": str(entry["filter"])}
            entries.append({**fits, "value": _carried(entry["value"], parameter)})
    if parameter.default is not REQUIRED:
        entries.append({"value": parameter.to(parameter.default)})
    last = next((i for i, entry in enumerate(entries) if "filter" not in entry), len(entries))
    entries = entries[: last + 1]
    if not entries:
        raise UsageError(f"{name} needs the parameter {key}", values={} if model is None else {"model": model})
    return entries[0]["value"] if "filter" not in entries[0] else entries


def _carried(value: Any, parameter: Parameter) -> Any:
    if not isinstance(value, list):
        return parameter.to(value)
    if not value:
        raise ValueError("an empty list")
    return {"gradient": [parameter.to(x) for x in value]}


def _layered(of_slices: Sequence[tuple[tuple[int, int] | None, Any]]) -> Any:
    """One setting for the model of one for each slice; gradients run over the layers of their slice."""
    first, last = of_slices[0][1], of_slices[-1][1]
    if len(of_slices) == 1 or (all(setting == first for _, setting in of_slices) and not has_gradient(first, False)):
        return first
    entries: list[dict[str, Any]] = [{"layers": list(layers or ()), "value": value} for layers, value in of_slices]
    if first != last:
        entries += [{"filter": part, "value": first} for part in BEFORE_LAYERS]
    return [*entries, {"value": last}]


def _idle(name: str, how: Reading, data: Mapping[str, Any], slices: Sequence[Slice]) -> list[Finding]:
    given: AbstractSet[str] = {
        key
        for scope in (
            data.get("parameters") or {}, *(one.parameters for one in slices),
            *(source.parameters for one in slices for source in one.sources),
        )
        for key in scope
    }  # fmt: skip
    return [
        Finding("no-effect", f"{key} changes nothing in {name}, neither here nor in mergekit")
        for key, parameter in how.parameters.items() if parameter.idle and key in given
    ]  # fmt: skip


# Models and slices


def _models(data: Mapping[str, Any], strange: list[str]) -> list[Slice]:
    return [Slice(tuple(_source(item, f"models[{i}]", strange) for i, item in enumerate(_list(data, "models"))))]


def _slices(data: Mapping[str, Any], strange: list[str]) -> list[Slice]:
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
        found.append(Slice(sources, sources[0].layers or (0, 0), item.get("parameters") or {}))
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
        _text(item.get("model"), f"{where}.model"), item.get("parameters") or {},
        None if layers is None else (layers[0], layers[1]),
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where} is no reference to a model: {value!r}")
    return value


def _check_layers(slices: Sequence[Slice], model: str, file: str | Path) -> None:
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


def _named(models: Sequence[str]) -> tuple[str, ...]:
    """References, under names of their own where the usual ones would clash."""
    labels = [re.sub(r"[+#,=\s]", "-", Path(model.rpartition("+")[2].partition("@")[0]).stem) for model in models]
    if len(set(labels)) == len(labels):
        return tuple(models)
    return tuple(f"{label}-{i}={model}" for i, (label, model) in enumerate(zip(labels, models, strict=True), 1))


# Tokenizers and dtypes


def _template(data: Mapping[str, Any], models: Sequence[str]) -> str | None:
    """The template that the output is to have; ``None`` for the first model's own."""
    wanted: str | None = data.get("chat_template")
    if wanted != "auto":
        return wanted
    own = [None if folder is None else chat_template(folder) for folder in map(_folder, dict.fromkeys(models))]
    templates = Counter(text.strip() for text in own if text)
    if not templates:
        return None
    chosen = templates.most_common(1)[0][0]
    return None if own[0] is not None and own[0].strip() == chosen else chosen


def _folder(model: str) -> Path | None:
    found: Path | None = getattr(open_model(model), "folder", None)
    return found


def _same_tokens(data: Mapping[str, Any], models: Sequence[str], base: str | None) -> list[Finding]:
    """mergekit moves rows of embeddings to where the base's tokenizer has their tokens; here all must have them there.

    Raises IncompatibleError for a model whose tokenizer has not.
    """
    if base is None or (data.get("tokenizer_source") is None and data.get("tokenizer") is None):
        return []
    known = {m: None if (f := _folder(m)) is None else vocabulary(f) for m in dict.fromkeys([base, *models])}
    for model, tokens in known.items():
        if tokens is not None and known[base] is not None and tokens != known[base]:
            raise IncompatibleError(
                "the tokenizers differ, and no rows of embeddings are moved from token to token",
                values={base: f"{len(known[base] or ())} tokens", model: f"{len(tokens)} tokens"},
                remedy="Take tokenizer_source (or tokenizer) out if the rows mean the same tokens.",
            )
    unknown = [model for model, tokens in known.items() if tokens is None]
    if unknown:
        return [Finding("tokenizer-unknown", f"no tokenizer.json in {unknown[0]}: tokens were not compared")]
    return []


def _dtype(data: Mapping[str, Any], key: str) -> str | None:
    if data.get(key) is None:
        return None
    name = str(data[key]).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"{key} {data[key]!r} is not carried over", remedy=f"Carried over: {', '.join(DTYPES)}.")
    return name


def _tokens(data: Mapping[str, Any]) -> list[str]:
    """What the file asks of tokenizers that is more than the base's own."""
    strange = []
    template = data.get("chat_template")
    if template not in (None, "auto") and not (isinstance(template, str) and "{" in template):
        strange.append(f"chat_template: {template}")
    source, tokenizer = data.get("tokenizer_source"), data.get("tokenizer")
    if source not in (None, "base", data.get("base_model")):
        strange.append(f"tokenizer_source: {source}")
    if tokenizer is not None:
        more = dict(tokenizer) if isinstance(tokenizer, Mapping) else {"source": tokenizer}
        if more.pop("source", "union") not in ("base", data.get("base_model")):
            strange.append(f"tokenizer.source: {dict(tokenizer).get('source', 'union')}")
        strange += [f"tokenizer.{key}" for key, value in more.items() if value]
    return strange
