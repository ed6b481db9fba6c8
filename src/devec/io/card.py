"""The model card (README.md) of an output: machine-readable front matter and a few plain sentences.

The licence is not ours to state: it follows from the base and the data, and is left to the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Literal

from devec.core.provenance import Provenance, plain
from devec.io.hub_id import SCHEME, HubId
from devec.io.records import dump_yaml

Relation = Literal["merge", "adapter", "finetune"]


def model_card(
    provenance: Provenance,
    *,
    title: str,
    base_models: Sequence[str],
    relation: Relation,
    library: str,
    tags: Sequence[str] = (),
    text: str | None = None,
) -> str:
    """A card that says what was done, with no path of this machine in it.

    ``base_models`` are hub names, or paths of which the last part is kept; ``text`` is an optional paragraph of the
    caller's, e.g. measured facts.
    """
    names = list(dict.fromkeys(model for name in base_models for model in _models_of(name)))
    front: dict[str, object] = {
        "base_model": names,
        "base_model_relation": relation,
        "library_name": library,
        "tags": list(dict.fromkeys(["devec", *(["merge"] if relation == "merge" else []), *tags])),
    }
    if not names:
        del front["base_model"], front["base_model_relation"]
    what = "an adapter" if relation == "adapter" else "a checkpoint"
    lines = [f"# {title}", "", f"This is {what} written by `devec {provenance.command}`."]
    if text:
        lines += ["", text.strip()]
    if provenance.inputs:
        lines += ["", "## Inputs", ""]
        for record in provenance.inputs:
            revision = f" at `{record.revision}`" if record.revision else ""
            lines.append(f"- `{public_name(record.reference)}` ({record.kind}){revision}")
    if provenance.parameters:
        parameters = dump_yaml(_without_paths(plain(provenance.parameters))).decode().rstrip()
        lines += ["", "## Parameters", "", "```yaml", parameters, "```"]
    lines += [
        "",
        "## Provenance",
        "",
        "`.devec/recipe.yaml` is the recipe, `.devec/lock.json` names the inputs with their hashes and the library",
        "versions, and `devec verify` checks every file against `.devec/manifest.json`.",
    ]
    return "---\n" + dump_yaml(front).decode() + "---\n\n" + "\n".join(lines) + "\n"


def public_name(reference: str) -> str:
    """A reference as it may be published: hub names stay, of a path only the last part is kept.

    ``name=`` in front, ``+ADAPTER`` and ``#part`` behind are treated part by part.
    """
    for mark in ("=", "+"):
        if mark in reference:
            return mark.join(public_name(part) for part in reference.split(mark))
    place, mark, part = reference.removeprefix(SCHEME).partition("#")
    if HubId.parse(place) is None and _is_path(place):
        place = PurePath(PureWindowsPath(place).as_posix()).name.strip("~.") or "local"
    return place + mark + part


def _models_of(reference: str) -> list[str]:
    """The models of a reference as ``base_model`` names them: with neither ``name=`` nor a revision nor a part."""
    models = public_name(reference.partition("=")[2] or reference).split("+")
    return [hub.repo if (hub := HubId.parse(model)) is not None else model.partition("#")[0] for model in models]


def _is_path(text: str) -> bool:
    windows = PureWindowsPath(text)
    return text.startswith((".", "~", "/")) or bool(windows.drive) or "\\" in text or text.count("/") > 1


def _without_paths(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return public_name(value)
    return value
