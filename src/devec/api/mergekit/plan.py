"""mergekit's YAML files, read as merges of devec.

Every key and parameter is either carried over, or said to change no number, or named in one error: none is passed over.
What each becomes, and where the methods differ, is in docs/mergekit.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devec.api.mergekit.layout import Slice, check_layers, mapping, models_of, named, slices_of, text
from devec.api.mergekit.methods import METHODS, REQUIRED, Parameter, Reading
from devec.api.mergekit.tokens import same_tokens, strange_tokens, template_of
from devec.api.varying import has_gradient, is_cases
from devec.core.errors import UsageError
from devec.core.results import Finding

KEYS = frozenset({
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
})  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16")
BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Parts of the names of tensors before the first layer. mergekit gives them the parameters of the first slice."""


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
    if not isinstance(name, str) or name not in METHODS:
        raise UsageError(
            f"merge_method {name!r} is not carried over", file=file, remedy=f"Carried over: {', '.join(METHODS)}."
        )
    how = METHODS[name]
    strange = [str(key) for key in data if key not in KEYS]
    if ("models" in data) == ("slices" in data):
        raise UsageError("a file of mergekit has models or slices, one of the two", file=file)
    slices = models_of(data, strange) if "models" in data else slices_of(data, strange)
    scopes = [("parameters", mapping(data, "parameters"))]
    scopes += [(f"slices[{i}].parameters", one.parameters) for i, one in enumerate(slices)]
    strange += [f"{where}.{key}" for where, scope in scopes for key in scope if key not in how.parameters]
    own = [key for one in slices for source in one.sources for key in source.parameters]
    strange += [f"parameters.{key} of a model" for key in dict.fromkeys(own) if not _is_each(how, key)]
    strange += strange_tokens(data)
    if strange:
        raise UsageError(
            f"not carried over from mergekit: {', '.join(dict.fromkeys(strange))}", file=file,
            remedy="Take it out, if the merge means the same without.",
        )
    return _plan(name, how, data, slices, file)


def _is_each(how: Reading, key: str) -> bool:
    return key in how.parameters and how.parameters[key].each


def _plan(name: str, how: Reading, data: Mapping[str, Any], slices: Sequence[Slice], file: str | Path) -> Plan:
    base = data.get("base_model")
    if base is not None:
        base = text(base, "base_model")
    elif name != "linear":
        raise UsageError(f"{name} needs base_model", file=file)
    models = [source.model for source in slices[0].sources]
    if len(set(models)) != len(models):
        raise UsageError("a model is named twice", values={"models": ", ".join(models)}, file=file)
    models = _ordered(name, how, models, base, whole=slices[0].layers is None)
    if name == "slerp" and len(models) != 2:
        raise UsageError("slerp is between base_model and one other", values={"models": len(models)}, file=file)
    check_layers(slices, base or models[0], file)
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
        sources=named(models),
        parameters=parameters,
        dtype="float64" if dtype == "float64" else "float32",
        out_dtype=out or dtype,
        chat_template=template_of(data, models if base is None else [base, *models]),
        notes=(*_idle(name, how, data, slices), *same_tokens(data, models, base)),
    )


def _ordered(name: str, how: Reading, models: list[str], base: str | None, *, whole: bool) -> list[str]:
    """The vectors of the merge. mergekit adds a base that is not listed; here it comes first where it is a model."""
    others = [model for model in models if model != base]
    if how.base or base is None:
        if not others:
            raise UsageError(f"{name} has no model beside base_model")
        return others
    if base in models or whole or name == "slerp":
        return [base, *others]
    raise UsageError(f"base_model of {name} is none of the models of its slices", remedy="List it, or take it out.")


# Parameters: by source, then by slice, then for all, then the default


def _setting(
    name: str, key: str, parameter: Parameter, one: Slice, model: str | None, data: Mapping[str, Any]
) -> Any:
    scopes = [source.parameters for source in one.sources if source.model == model]
    entries: list[dict[str, Any]] = []
    for scope in (*scopes, one.parameters, mapping(data, "parameters")):
        if scope.get(key) is None:
            continue
        setting = scope[key]
        setting = [setting] if isinstance(setting, Mapping) else setting
        for entry in setting if is_cases(setting) else [{"value": setting}]:
            if set(entry) - {"filter", "value"}:
                raise UsageError(f"{name}: {key} has an entry that cannot be read: {dict(entry)}")
            fits = {} if entry.get("filter") in (None, "*") else {"filter": str(entry["filter"])}
            entries.append({**fits, "value": _carried(key, entry["value"], parameter)})
    if parameter.default is not REQUIRED:
        entries.append({"value": parameter.to(parameter.default)})
    last = next((i for i, entry in enumerate(entries) if "filter" not in entry), len(entries))
    entries = entries[: last + 1]
    if not entries:
        raise UsageError(f"{name} needs the parameter {key}", values={} if model is None else {"model": model})
    return entries[0]["value"] if "filter" not in entries[0] else entries


def _carried(key: str, value: Any, parameter: Parameter) -> Any:
    def one(given: Any) -> Any:
        try:
            return parameter.to(given)
        except (TypeError, ValueError, KeyError):
            raise UsageError(f"{key}: {given!r} does not fit") from None

    if not isinstance(value, list):
        return one(value)
    if not value:
        raise UsageError(f"{key} is an empty list")
    return {"gradient": [one(x) for x in value]}


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
            mapping(data, "parameters"), *(one.parameters for one in slices),
            *(source.parameters for one in slices for source in one.sources),
        )
        for key in scope
    }  # fmt: skip
    return [
        Finding("no-effect", f"{key} changes nothing in {name}, neither here nor in mergekit")
        for key, parameter in how.parameters.items() if parameter.idle and key in given
    ]  # fmt: skip


def _dtype(data: Mapping[str, Any], key: str) -> str | None:
    if data.get(key) is None:
        return None
    name = str(data[key]).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"{key} {data[key]!r} is not carried over", remedy=f"Carried over: {', '.join(DTYPES)}.")
    return name
