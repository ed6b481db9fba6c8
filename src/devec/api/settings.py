"""Parameters of a merge method, checked, and what each tensor is given of those that vary (see ``api.varying``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from devec.api.varying import (
    NOTHING,
    Place,
    check,
    has_gradient,
    is_cases,
    places,
    ranges,
    samples,
    split,
    value_at,
    varies,
)
from devec.core.errors import UsageError
from devec.methods import registry
from devec.methods.registry import Method


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
            value = value_at(setting, place, self.method.takes_list(name))
            if value is NOTHING:
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
            for _, stop in ranges(setting):
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
        value = split(value, several)
        if varies(value, several):
            check(f"{method.name}: {name}", value, several)
            varying[name] = value
    sample = {
        name: next(samples(varying[name], method.takes_list(name))) if name in varying else value
        for name, value in values.items()
    }
    bound = registry.bind(method, sample)
    for name, setting in varying.items():
        for value in samples(setting, method.takes_list(name)):
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
