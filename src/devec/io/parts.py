"""Factors of single tensors in files of their own: what a decomposition has finished before it is one artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import InputError
from devec.core.layout import Layout
from devec.core.results import TensorFactors
from devec.io.disk import refusing, sha256_of
from devec.io.safetensors_file import SafetensorsFile
from devec.io.writer import SafetensorsWriter
from devec.linalg.lowrank import ThinSVD

_ROW = "devec.row"


def part_name(index: int) -> str:
    """The file of the ``index``-th tensor."""
    return f"{index:06d}.safetensors"


def write_part(path: Path, factors: TensorFactors) -> tuple[str, int]:
    """Write the factors of one tensor; returns the file's SHA-256 and size. What stood there is replaced."""
    tensors, row = tensors_of(factors), row_of(factors)
    with refusing(path):
        path.unlink(missing_ok=True)
    entries = [(n, TensorInfo(tuple(t.shape), t.dtype)) for n, t in tensors.items()]
    writer = SafetensorsWriter(path, entries, {_ROW: json.dumps(row)})
    try:
        for name, value in tensors.items():
            writer.put(name, value)
        writer.close(sync=False)  # a part that a power cut loses is found by its hash and made again
    except BaseException:
        writer.abort()
        raise
    return writer.sha256, writer.size


def read_part(path: Path) -> TensorFactors:
    """The factors that :func:`write_part` wrote."""
    with SafetensorsFile(path) as file:
        try:
            return factors_from(json.loads(file.metadata[_ROW]), {n: file.get(n) for n in file.names()})
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"not a part of a decomposition: {error!r}", file=path) from None


def members_in(path: Path) -> int:
    """How many vectors have a nonzero delta in a part, from its header."""
    with SafetensorsFile(path) as file:
        return sum(name.endswith(".S") for name in file.names())


def is_sound(path: Path, sha256: str) -> bool:
    """Whether a part is there and has not changed."""
    return path.is_file() and sha256_of(path) == sha256


def tensors_of(factors: TensorFactors) -> dict[str, Tensor]:
    """``v0.U``, ``v0.S`` and, where it is kept, ``v0.V`` of each vector that has the tensor."""
    out: dict[str, Tensor] = {}
    for i, svd in factors.svd.items():
        out[f"v{i}.U"], out[f"v{i}.S"] = svd.U, svd.S
        if svd.V.shape[1] == svd.rank:
            out[f"v{i}.V"] = svd.V
    return out


def row_of(factors: TensorFactors) -> dict[str, Any]:
    """Everything about the factors but their numbers, as plain data."""
    return {
        "name": factors.name,
        "layout": layout_out(factors.layout),
        "members": list(factors.svd),
        "totals": [svd.total for svd in factors.svd.values()],
        "norms": {str(i): x for i, x in factors.norms.items()},
        "gram": [[i, j, x] for (i, j), x in factors.gram.items()],
        "low_rank": sorted(factors.low_rank),
    }


def factors_from(row: dict[str, Any], tensors: dict[str, Tensor]) -> TensorFactors:
    """The inverse of :func:`tensors_of` and :func:`row_of`."""
    layout = layout_in(row["layout"])
    svd: dict[int, ThinSVD] = {}
    for i, total in zip(row["members"], row["totals"], strict=True):
        U, V = tensors[f"v{i}.U"], tensors.get(f"v{i}.V")
        if V is None:
            V = torch.zeros(layout.matrix_shape[1], 0, dtype=U.dtype)
        svd[i] = ThinSVD(U, tensors[f"v{i}.S"], V, total)
    return TensorFactors(
        name=row["name"],
        layout=layout,
        svd=svd,
        norms={int(i): x for i, x in row["norms"].items()},
        gram={(i, j): x for i, j, x in row["gram"]},
        low_rank=frozenset(row["low_rank"]),
    )


def layout_out(layout: Layout) -> dict[str, Any]:
    """A layout as plain data."""
    known = {} if layout.embedding is None else {"embedding": layout.embedding}
    return {"shape": list(layout.shape), "transposed": layout.transposed, **known}


def layout_in(value: dict[str, Any]) -> Layout:
    """The inverse of :func:`layout_out`."""
    return Layout(tuple(value["shape"]), bool(value["transposed"]), value.get("embedding"))
