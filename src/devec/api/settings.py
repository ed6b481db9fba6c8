"""Parameters of a merge that vary over the model: by depth, by tensor name, by layer, by vector.

A parameter is given as plain data, in the syntax of mergekit's ``parameters``:

    0.5                                   the same everywhere
    [0, 0.5, 1]                           a gradient: linear in the layer's number, the first value in the first layer
    [{filter: mlp, value: ...}, ...]      of the first entry that fits; ``filter`` is a part of the tensor's name
    [{layers: [8, 16], value: ...}, ...]  the same by layers 8 to 15; a gradient inside runs over these alone
    {gradient: [0, 1]}                    a gradient where a list has another meaning

A parameter that has a value per vector (``weights``) takes a list with one of these for each. An entry without
``filter`` and ``layers`` fits every tensor. A tensor that belongs to no layer stands at the start of every gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from devec.core.errors import UsageError
from devec.methods import registry
from devec.methods.registry import Method

_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)??(?:\w*_)?(?:layers?|blocks?|resblocks|h))\.(?P<number>\d+)\.")
_CASE = frozenset({"filter", "layers", "value"})
_NOTHING = object()


@dataclass(frozen=True)
class Place:
    """A tensor's name and, if it belongs to one, its layer; gradients run over the layers ``first`` to ``stop - 1``."""

    name: str
    layer: int | None = None
    first: int = 0
    stop: int = 0

    @property
    def depth(self) -> float:
        """0 in the first layer, 1 in the last and in the only one; 0 outside layers."""
        if self.layer is None:
            return 0.0
        return (self.layer - self.first) / (self.stop - 1 - self.first) if self.stop - self.first > 1 else 1.0


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where every tensor of a model stands: the first ``layers.N``, ``h.N``, ``blocks.N`` or the like in its name.

    What comes before the number names a stack of layers; an encoder and a decoder are two, each of its own depth.
    """
    found = {name: _LAYER.match(name) for name in names}
    depth: dict[str, int] = {}
    for match in found.values():
        if match is not None:
            depth[match["stack"]] = max(depth.get(match["stack"], 0), int(match["number"]) + 1)
    return {
        name: Place(name) if match is None else Place(name, int(match["number"]), 0, depth[match["stack"]])
        for name, match in found.items()
    }


@dataclass(frozen=True)
class Settings:
    """A method's parameters: ``fixed`` ones, bound, and ``varying`` ones as they were given."""

    method: Method
    fixed: Mapping[str, Any]
    varying: Mapping[str, Any]

    def at(self, place: Place) -> dict[str, Any]:
        """Every parameter that was given, for one tensor. Raises UsageError if none of the entries fits it."""
        found = dict(self.fixed)
        for name, setting in self.varying.items():
            value = _value(setting, place, self.method.takes_list(name))
            if value is _NOTHING:
                raise UsageError(
                    f"{self.method.name}: no entry of {name} fits this tensor", tensor=place.name,
                    remedy="Add a last entry that has only a value.",
                )
            found[name] = registry.convert(self.method, self.method.parameters[name], value)
        return found

    def over(self, tensors: Mapping[str, str], model: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The parameters of every tensor, under its own name.

        ``tensors`` maps each to its name in the model, which filters see; ``model`` has all names of the model.
        """
        if not self.varying:
            fixed = dict(self.fixed)
            return dict.fromkeys(tensors, fixed)
        where = places(dict.fromkeys([*model, *tensors.values()]))
        deepest = max((place.stop for place in where.values()), default=0)
        for name, setting in self.varying.items():
            if not deepest and has_gradient(setting, self.method.takes_list(name)):
                raise UsageError(
                    f"{self.method.name}: {name} has a gradient, and no tensor's name tells its layer",
                    values={"first": next(iter(where), "no tensor")},
                    remedy="Write entries with filters: [{filter: NAME, value: 1}, {value: 0}].",
                )
            for _, stop in _ranges(setting):
                if stop > deepest:
                    raise UsageError(
                        f"{self.method.name}: {name} names a layer that the model does not have",
                        values={"layers": f"up to {stop - 1}", "model": f"{deepest} layers"},
                    )
        same: dict[str, dict[str, Any]] = {}
        found = {own: self.at(where[name]) for own, name in tensors.items()}
        return {own: same.setdefault(repr(values), values) for own, values in found.items()}

    def whole(self) -> dict[str, Any]:
        """The parameters of a first pass over the whole model, or over no more than a tensor.

        Raises UsageError if the pass is over the whole model and one that it needs varies.
        """
        needed = set() if self.method.measure is None else {"scope", *signature(self.method.measure).parameters}
        if self.method.measure is not None and "scope" in self.varying:
            raise UsageError(f"{self.method.name}: scope cannot vary over the model")
        varying = sorted(needed & set(self.varying))
        if varying and self.method.measures_model(self.fixed):
            raise UsageError(
                f"{self.method.name} looks at the whole model before it merges a tensor, so {varying[0]} cannot vary",
                remedy="Give one value, or scope: tensor where the method has it.",
            )
        return dict(self.fixed)


def bind(method: Method, values: Mapping[str, Any]) -> Settings:
    """Check names, shapes and types of what was given, whatever tensor it is for.

    Raises UsageError for an unknown parameter, an entry that cannot be read, or a value of the wrong type.
    """
    values = {registry.parameter_of(method, key).name: value for key, value in values.items()}
    varying = {}
    for name, value in values.items():
        several = method.takes_list(name)
        value = _split(value, several)
        if _varies(value, several):
            _check(method, name, value, several)
            varying[name] = value
    sample = {
        name: next(_samples(varying[name], method.takes_list(name))) if name in varying else value
        for name, value in values.items()
    }
    bound = registry.bind(method, sample)
    for name, setting in varying.items():
        for value in _samples(setting, method.takes_list(name)):
            registry.convert(method, method.parameters[name], value)
    return Settings(method, {name: value for name, value in bound.items() if name not in varying}, varying)


def of_sources(
    method: Method, parameters: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Parameters with those of single sources put in: one setting per vector, the common one where it has none.

    A source may have its own of each parameter that takes one value per vector, also in the singular (``weight``).
    """
    out = dict(parameters)
    names = {key: _of_one(method, key) for settings in own for key in settings}
    for key, name in names.items():
        common = out.get(name, method.parameters[name].default)
        common = 1.0 if common is None else common
        each = common if isinstance(common, list) and not is_cases(common) else [common] * len(own)
        if len(each) != len(own):
            raise UsageError(f"{method.name} got {len(each)} {name} for {len(own)} sources")
        out[name] = [
            first_of(settings[key], other) if key in settings else other
            for settings, other in zip(own, each, strict=True)
        ]
    return out


def first_of(setting: Any, otherwise: Any) -> Any:
    """One vector's setting, and what holds where no entry of it fits. A list is a gradient here."""
    if isinstance(setting, Mapping) and "value" in setting:
        setting = [setting]
    if is_cases(setting):
        return [*setting, {"value": otherwise}]
    return {"gradient": setting} if isinstance(setting, list) else setting


def _of_one(method: Method, key: str) -> str:
    for name in (key, f"{key}s"):
        if name in method.parameters and method.takes_list(name):
            return name
    several = [name for name in method.parameters if method.takes_list(name)]
    raise UsageError(
        f"{method.name} has no parameter {key!r} that each source has its own of",
        remedy=f"There is: {', '.join(several) or 'none'}.",
    )


def _split(value: Any, several: bool) -> Any:
    """``0,0.5,1`` as it is typed on a command line, of a parameter that takes one number."""
    if not several and isinstance(value, str) and "," in value and all(map(_is_number, value.split(","))):
        return value.split(",")
    return value


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def is_cases(setting: Any) -> bool:
    return isinstance(setting, list) and bool(setting) and all(isinstance(x, Mapping) and "value" in x for x in setting)


def _varies(setting: Any, several: bool) -> bool:
    if isinstance(setting, Mapping):
        return True
    if not isinstance(setting, list):
        return False
    return not several or any(isinstance(x, (Mapping, list)) for x in setting)


def _check(method: Method, name: str, setting: Any, several: bool) -> None:
    """Raises UsageError unless :func:`_value` can read the setting."""

    def wrong(what: str) -> UsageError:
        return UsageError(
            f"{method.name}: {name} {what}",
            remedy="Write a number, a gradient as [0, 0.5, 1], or entries as [{filter: mlp, value: 1}, {value: 0}].",
        )

    if isinstance(setting, Mapping):
        if set(setting) == {"gradient"} and isinstance(setting["gradient"], list):
            return _check(method, name, setting["gradient"], False)
        if "value" not in setting:
            raise wrong(f"has an entry that cannot be read: {setting}")
        setting = [setting]
    if not isinstance(setting, list):
        return
    if not setting:
        raise wrong("is an empty list")
    if is_cases(setting) or (not several and any(isinstance(x, Mapping) for x in setting)):
        for case in setting:
            if not isinstance(case, Mapping) or "value" not in case or set(case) - _CASE:
                raise wrong(f"has an entry that cannot be read: {case}")
            if not isinstance(case.get("filter", ""), (str, type(None))):
                raise wrong(f"has a filter that is no text: {case['filter']}")
            _check_range(case.get("layers"), wrong)
            _check(method, name, case["value"], several)
    elif several:
        for one in setting:
            _check(method, name, one, False)
    elif not all(map(_is_number, setting)):
        raise wrong(f"has a gradient of something else than numbers: {setting}")


def _check_range(layers: Any, wrong: Any) -> None:
    if layers is None:
        return
    if not (
        isinstance(layers, list) and len(layers) == 2 and all(type(x) is int for x in layers)
        and 0 <= layers[0] < layers[1]
    ):
        raise wrong(f"has layers that are not [FIRST, LAST + 1]: {layers}")


def _value(setting: Any, place: Place, several: bool) -> Any:
    if isinstance(setting, Mapping):
        if "value" not in setting:
            return _value(setting["gradient"], place, False)
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if is_cases(setting):
        for case in setting:
            inside = _fits(case, place)
            found = _NOTHING if inside is None else _value(case["value"], inside, several)
            if found is not _NOTHING:
                return found
        return _NOTHING
    if several:
        each = [_value(one, place, False) for one in setting]
        return _NOTHING if any(x is _NOTHING for x in each) else each
    return _between([float(x) for x in setting], place.depth)


def _fits(case: Mapping[str, Any], place: Place) -> Place | None:
    """The place as the entry's value sees it, or ``None``."""
    wanted, layers = case.get("filter"), case.get("layers")
    if wanted not in (None, "*") and wanted not in place.name:
        return None
    if layers is None:
        return place
    if place.layer is None or not layers[0] <= place.layer < layers[1]:
        return None
    return replace(place, first=layers[0], stop=layers[1])


def _between(values: Sequence[float], depth: float) -> float:
    """Linear between neighbours; the values are evenly spaced from depth 0 to 1."""
    scaled = depth * (len(values) - 1)
    low = int(scaled)
    high = min(low + 1, len(values) - 1)
    return (1 - (scaled - low)) * values[low] + (scaled - low) * values[high]


def _samples(setting: Any, several: bool) -> Iterator[Any]:
    """Every value that stands in the setting, as the parameter may be given it."""
    if isinstance(setting, Mapping):
        yield from _samples(setting["value"] if "value" in setting else setting["gradient"], several)
    elif is_cases(setting) or (isinstance(setting, list) and (not several or _varies(setting, several))):
        for one in setting:
            for value in _samples(one, several if is_cases(setting) else False):
                yield [value] if several and not isinstance(value, list) else value
    else:
        yield setting


def has_gradient(setting: Any, several: bool) -> bool:
    """Whether the setting depends on depth."""
    if isinstance(setting, Mapping):
        return "gradient" in setting or has_gradient(setting["value"], several)
    if not isinstance(setting, list):
        return False
    if is_cases(setting):
        return any(has_gradient(case["value"], several) for case in setting)
    return not several or any(has_gradient(one, False) for one in setting)


def _ranges(setting: Any) -> Iterator[tuple[int, int]]:
    if isinstance(setting, Mapping):
        if setting.get("layers") is not None:
            yield setting["layers"][0], setting["layers"][1]
        yield from _ranges(setting.get("value", setting.get("gradient")))
    elif isinstance(setting, list):
        for one in setting:
            yield from _ranges(one)
