"""Lazy reader of one safetensors file.

Requirements it answers:

* nothing is mapped: each tensor is one positioned read into fresh memory, so peak memory is what is asked for,
  and a file that another process truncates raises an error instead of a bus fault;
* the header is checked in full before any tensor is given out: the bytes after the header are covered exactly
  once, in order, by tensors whose sizes follow from shape and dtype;
* several threads may read at once (positioned reads share no file position).
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import InputError
from devec.io.pread import read_bytes, typed
from devec.io.sniff import GGUF, looks_like, open_regular, refuse_gguf

# The format's own bound on the header, so that a corrupt length cannot ask for gigabytes of text
MAX_HEADER = 100_000_000
# Sizes are unsigned 64-bit in the file and signed 64-bit in torch
_MAX_DIM = 2**63 - 1

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    start: int
    stop: int


class SafetensorsFile:
    """Named tensors of one ``.safetensors`` file, read on request.

    Raises InputError (exit code 3) for a file that is missing, empty, truncated, of another format, or whose
    header does not describe its bytes exactly.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd, size = open_regular(self.path)
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            text, self._data = self._header_text(size)
            self.metadata, self._entries = _parse(text, size - self._data, self.path)
        except BaseException:
            self._close()
            raise

    def names(self) -> list[str]:
        """Tensor names in file-offset order."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def info(self, name: str) -> TensorInfo:
        return self._entry(name).info

    def get(self, name: str) -> Tensor:
        """The tensor as stored, in memory of its own."""
        entry = self._entry(name)
        raw = read_bytes(self._fd, self._data + entry.start, entry.stop - entry.start, path=self.path, tensor=name)
        return typed(raw, entry.info.dtype, entry.info.shape, path=self.path, tensor=name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` along the first dimension: one positioned read of just their bytes."""
        entry = self._entry(name)
        shape, dtype = entry.info.shape, entry.info.dtype
        if not shape:
            return self.get(name).reshape(1)
        width = prod(shape[1:]) * dtype.itemsize
        at = self._data + entry.start + start * width
        raw = read_bytes(self._fd, at, (stop - start) * width, path=self.path, tensor=name)
        return typed(raw, dtype, (stop - start, *shape[1:]), path=self.path, tensor=name)

    def place(self, name: str) -> tuple[int, int, int]:
        """(file descriptor, offset, bytes) of a tensor, for read-ahead."""
        entry = self._entry(name)
        return self._fd, self._data + entry.start, entry.stop - entry.start

    @property
    def ties(self) -> Mapping[str, str]:
        """Empty: the format forbids two names for the same bytes."""
        return {}

    def close(self) -> None:
        """Close the file now (it is closed anyway when the object goes away)."""
        self._close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        if not self._close.alive:
            raise ValueError(f"{self.path} is closed")
        try:
            return self._entries[name]
        except KeyError:
            raise InputError("no such tensor", tensor=name, file=self.path) from None

    def _header_text(self, size: int) -> tuple[bytes, int]:
        head = os.pread(self._fd, 64, 0)
        kind = looks_like(head)
        if kind == GGUF:
            raise refuse_gguf(self.path)
        length = int.from_bytes(head[:8], "little")
        # A magic number read as a length is astronomically large, so a valid header is never mistaken for one
        if kind is not None and length > size:
            raise InputError(
                f"not a safetensors file: it looks like {kind}",
                file=self.path,
                remedy="Check the file's name, or download it again.",
            )
        if size < 8:
            raise InputError(
                "truncated: too short for a safetensors header length", values={"bytes": size}, file=self.path
            )
        if length > MAX_HEADER or length > size - 8:
            raise InputError(
                "the safetensors header is longer than the file or the format allows",
                values={"header bytes": length, "file bytes": size},
                file=self.path,
                remedy="The file is truncated or not safetensors; get it again.",
            )
        return os.pread(self._fd, length, 8), 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the name {key!r} appears twice")
        out[key] = value
    return out


def _parse(text: bytes, data_size: int, path: Path) -> tuple[dict[str, str], dict[str, _Entry]]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the safetensors header is not valid JSON: {error}", file=path) from None
    if not isinstance(header, dict):
        raise InputError("the safetensors header is not a JSON object", file=path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("__metadata__ of the safetensors header is not a map of text to text", file=path)
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop, item[0])))
    _check_cover(ordered, data_size, path)
    return metadata, ordered


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_DIM


def _entry(name: str, value: object, path: Path) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError("a header entry must have exactly dtype, shape and data_offsets", tensor=name, file=path)
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise InputError(
            "unknown or unsupported dtype",
            tensor=name,
            values={"dtype": repr(code), "known": " ".join(DTYPES)},
            file=path,
        )
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise InputError("shape is not a list of sizes", tensor=name, values={"shape": shape}, file=path)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise InputError(
            "data_offsets is not a pair of positions", tensor=name, values={"data_offsets": offsets}, file=path
        )
    dtype = DTYPES[code]
    want, have = prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if want != have:
        raise InputError(
            "shape and dtype do not fill the tensor's bytes",
            tensor=name,
            values={"shape": shape, "dtype": code, "bytes wanted": want, "bytes given": have},
            file=path,
        )
    return _Entry(TensorInfo(tuple(shape), dtype), offsets[0], offsets[1])


def _check_cover(entries: Mapping[str, _Entry], data_size: int, path: Path) -> None:
    """The tensors follow one another from byte 0 to the end of the file: no hole, no overlap, nothing after."""
    position, previous = 0, "the header"
    for name, entry in entries.items():
        if entry.stop > data_size:
            raise InputError(
                "a tensor lies beyond the end of the file",
                tensor=name,
                values={"ends at": entry.stop, "data bytes": data_size},
                file=path,
                remedy="The file is truncated; get it again.",
            )
        if entry.start != position:
            kind = "overlap" if entry.start < position else "leave a hole"
            raise InputError(
                f"two neighbours {kind}: {previous} and {name}",
                tensor=name,
                values={"starts at": entry.start, "expected": position},
                file=path,
            )
        position, previous = entry.stop, name
    if position != data_size:
        raise InputError(
            "bytes after the last tensor belong to none",
            values={"tensors end at": position, "data bytes": data_size},
            file=path,
        )
