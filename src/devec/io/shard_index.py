"""Sharded checkpoints: an index file and the weight files that it names, all inside one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from devec.core.errors import InputError, RefusedError
from devec.io.dialect import TensorFile, open_file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is missing, broken or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", file=path) from None
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", file=path)
    return value


def weight_map(index: Path) -> dict[str, str]:
    """tensor name -> file name, as an index says. Raises InputError (exit 3) for an index that does not say it."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise InputError("the index has no weight_map from tensor names to files", file=index)
    return where


def open_shards(folder: Path, index: Path) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """The reader of each tensor that an index lists, in the order of the shards, and the shards' ties.

    Raises InputError (exit 3) when index and shards disagree or a shard is missing, RefusedError (exit 5) when the
    index points outside its folder.
    """
    where = weight_map(index)
    shards: dict[str, TensorFile] = {}
    parts: dict[str, TensorFile] = {}
    ties: dict[str, str] = {}
    for shard in sorted(set(where.values())):
        shards[shard] = file = open_file(_inside(folder, shard, index))
        listed = set(file.names())
        for name in file.names():
            if where.get(name, shard) != shard:
                continue
            if name in parts:
                raise InputError(
                    "a tensor that the index does not list lies in two shards",
                    tensor=name,
                    values={"first": parts[name].path.name, "second": shard},
                    file=index,
                )
            parts[name] = file
        ties.update({alias: name for alias, name in file.ties.items() if name in listed})
    for name, shard in where.items():
        if name not in parts and name not in ties:
            raise InputError(
                "the index names a tensor that its shard does not hold",
                tensor=name,
                values={"shard": shard},
                file=index,
                remedy="Index and shards are of different downloads; get them again.",
            )
    return parts, ties


def _inside(folder: Path, shard: str, index: Path) -> Path:
    """The shard's path, which must lie in the folder. A link is followed only as far as a hub cache links itself."""
    target = folder / shard
    if Path(shard).is_absolute() or ".." in Path(shard).parts or "\x00" in shard or "\\" in shard:
        raise _escapes(shard, index)
    if not target.exists():
        raise InputError(
            "the index names a file that is missing",
            values={"shard": shard},
            file=index,
            remedy="Download the missing shard.",
        )
    resolved, home = target.resolve(), folder.resolve()
    if not resolved.is_relative_to(home) and not _in_hub_cache(resolved, home):
        raise _escapes(shard, index)
    return target


def _in_hub_cache(target: Path, home: Path) -> bool:
    """The two links outside that are ordinary, from ``CACHE/models--x/snapshots/<sha>/file``.

    They lead to ``CACHE/models--x/blobs/<hash>``, and from there perhaps on to ``CACHE/blobs/<two digits>/<hash>``,
    which all repositories share.
    """
    repository = home.parent.parent
    shared = repository.parent / "blobs"
    return home.parent.name == "snapshots" and (
        target.parent == repository / "blobs" or target.parent.parent == shared
    )


def _escapes(shard: str, index: Path) -> RefusedError:
    return RefusedError(
        "the index points outside its folder",
        values={"file named": repr(shard)},
        file=index,
        remedy="Put the shards beside their index, and name them there by file name alone.",
    )
