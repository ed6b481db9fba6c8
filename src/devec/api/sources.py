"""Where a source lies: a path on this machine, or a repository of the Hugging Face Hub."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from devec.core.contracts import TensorSource
from devec.core.errors import InputError
from devec.io.dialect import WEIGHT_SUFFIXES
from devec.io.hub import cached_folder, fetch, fetched
from devec.io.hub_id import SCHEME, HubFolder, HubId


def hub_id(text: str) -> HubId | None:
    """The id of the Hub that ``text`` means, or ``None`` for a path.

    A path that exists is a path, and so is one whose parent folder exists: a misspelt name there must not be looked for
    on the network. ``hf://`` in front always means the Hub.
    """
    found = HubId.parse(text)
    if found is None or text.startswith(SCHEME):
        return found
    owner = Path(found.repo.partition("/")[0])
    here = Path(text).exists() or owner.is_dir() or text.endswith((*WEIGHT_SUFFIXES, ".gguf"))
    return None if here else found


def is_source(text: str) -> bool:
    """Whether ``text`` is a path that exists or an id of the Hub."""
    return Path(text).exists() or hub_id(text) is not None


def locate(path: str, text: str, *, model: bool = False) -> tuple[Path, HubFolder | None]:
    """The path that exists, or the downloaded files of a Hub id and which commit they are of.

    Raises InputError (exit 3), with the nearest names that do exist, and whatever :func:`devec.io.hub.fetch` raises.
    """
    found = Path(path)
    if found.exists():
        return found, None
    wanted = hub_id(path)
    if wanted is not None:
        hub = fetch(wanted, model=model)
        return hub.folder, hub
    raise _missing(path, text)


def pinned(path: str) -> str:
    """``path``, or the commit that a Hub id stood for when this process read it, so that others read the same."""
    wanted = hub_id(path)
    hub = None if wanted is None else fetched(wanted)
    return path if hub is None else hub.pinned


def _missing(path: str, text: str) -> InputError:
    found = Path(path)
    near: list[str] = []
    if found.parent.is_dir():
        near = get_close_matches(found.name, [p.name for p in found.parent.iterdir()], n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(str(found.parent / n) for n in near)}?" if near else "Check the path."
    if HubId.parse(path) is not None and not near:
        hint = f"Check the path; where a folder {found.parts[0]} exists, the Hugging Face Hub's is {SCHEME}{path}."
    return InputError(f"there is no {text!r}", remedy=hint)


def places(path: str) -> list[Path]:
    """What of ``path`` is on this machine already: itself, or what the Hub's cache holds of it."""
    if Path(path).exists():
        return [Path(path)]
    wanted = hub_id(path)
    cached = None if wanted is None else cached_folder(wanted)
    return [] if cached is None else [cached]


def hub_of(source: TensorSource) -> HubFolder | None:
    """The repository of the Hugging Face Hub that a model was read from, if it was."""
    found: HubFolder | None = getattr(source, "hub", None)
    return found


def place_of(source: TensorSource) -> str:
    """Where a model lies on this machine."""
    hub = hub_of(source)
    return source.reference if hub is None else str(hub.folder)


def public_name(source: TensorSource) -> str:
    """What adapters and model cards call a base: its repository without a revision, or its reference."""
    hub = hub_of(source)
    return source.reference if hub is None else hub.id.repo
