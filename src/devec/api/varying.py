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
from typing import Any

from devec.core.errors import UsageError

_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)??(?:\w*_)?(?:layers?|blocks?|resblocks|h))\.(?P<number>\d+)\.")
_CASE = frozenset({"filter", "layers", "value"})
NOTHING = object()


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


def split(value: Any, several: bool) -> Any:
    """``0,0.5,1`` as it is typed on a command line, of a parameter that takes one number."""
    if not several and isinstance(value, str) and "," in value and all(map(is_number, value.split(","))):
        return value.split(",")
    return value


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def is_cases(setting: Any) -> bool:
    """Whether it is a list of entries with values."""
    return isinstance(setting, list) and bool(setting) and all(isinstance(x, Mapping) and "value" in x for x in setting)


def varies(setting: Any, several: bool) -> bool:
    """Whether it is more than a value, or a list of one value per vector where there are ``several``."""
    if isinstance(setting, Mapping):
        return True
    if not isinstance(setting, list):
        return False
    return not several or any(isinstance(x, (Mapping, list)) for x in setting)


def check(label: str, setting: Any, several: bool) -> None:
    """Raises UsageError, which names ``label``, unless :func:`value_at` can read the setting."""

    def wrong(what: str) -> UsageError:
        return UsageError(
            f"{label} {what}",
            remedy="Write a number, a gradient as [0, 0.5, 1], or entries as [{filter: mlp, value: 1}, {value: 0}].",
        )

    if isinstance(setting, Mapping):
        if set(setting) == {"gradient"} and isinstance(setting["gradient"], list):
            return check(label, setting["gradient"], False)
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
            check(label, case["value"], several)
    elif several:
        for one in setting:
            check(label, one, False)
    elif not all(map(is_number, setting)):
        raise wrong(f"has a gradient of something else than numbers: {setting}")


def _check_range(layers: Any, wrong: Any) -> None:
    if layers is None:
        return
    if not (
        isinstance(layers, list) and len(layers) == 2 and all(type(x) is int for x in layers)
        and 0 <= layers[0] < layers[1]
    ):
        raise wrong(f"has layers that are not [FIRST, LAST + 1]: {layers}")


def value_at(setting: Any, place: Place, several: bool) -> Any:
    """What a setting comes to for one tensor; ``NOTHING`` where no entry fits. ``several``: one value per vector."""
    if isinstance(setting, Mapping):
        if "value" not in setting:
            return value_at(setting["gradient"], place, False)
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if is_cases(setting):
        for case in setting:
            inside = _fits(case, place)
            found = NOTHING if inside is None else value_at(case["value"], inside, several)
            if found is not NOTHING:
                return found
        return NOTHING
    if several:
        each = [value_at(one, place, False) for one in setting]
        return NOTHING if any(x is NOTHING for x in each) else each
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


def samples(setting: Any, several: bool) -> Iterator[Any]:
    """Every value that stands in the setting, as the parameter may be given it."""
    if isinstance(setting, Mapping):
        yield from samples(setting["value"] if "value" in setting else setting["gradient"], several)
    elif is_cases(setting) or (isinstance(setting, list) and (not several or varies(setting, several))):
        for one in setting:
            for value in samples(one, several if is_cases(setting) else False):
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


def ranges(setting: Any) -> Iterator[tuple[int, int]]:
    """Every ``layers`` in the setting."""
    if isinstance(setting, Mapping):
        if setting.get("layers") is not None:
            yield setting["layers"][0], setting["layers"][1]
        yield from ranges(setting.get("value", setting.get("gradient")))
    elif isinstance(setting, list):
        for one in setting:
            yield from ranges(one)
