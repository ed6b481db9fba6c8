"""Lazy reader of one PyTorch checkpoint (``.bin``, ``.pt``, ``.pth``, ``.th``) that runs nothing in it.

Two containers are read: the zip archive of torch >= 1.6 and the older stream (magic number, pickles, then storages).
In both, the pickle is interpreted by ``devec.io.unpickle`` and tensors are read from their place in the file when
asked for. A device recorded in the file is ignored: everything is read to the CPU.
"""

from __future__ import annotations

import io
import os
import struct
import weakref
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import InputError, RefusedError
from devec.io import unpickle
from devec.io.pickle_tree import state_dict_of
from devec.io.pread import read_bytes, typed
from devec.io.sniff import GGUF, PICKLE, ZIP, looks_like, open_regular, refuse_gguf
from devec.io.unpickle_globals import Storage, TensorView

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class PickleFile:
    """Named tensors of one PyTorch checkpoint file, read on request; the interface of ``SafetensorsFile``.

    Wrappers (``state_dict``, ``model``, ``ema``, ...) are opened when only one holds tensors, whole pickled modules are
    walked, a ``module.`` before every name is dropped, and what is not a tensor is left out.

    Raises RefusedError (exit code 5) for a pickle that asks for anything but tensors, containers and the inert names
    of model libraries; InputError (exit code 3) for a file that is missing, truncated, corrupt or without tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._fd, self._size = open_regular(self.path)
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            kind = looks_like(os.pread(self._fd, 64, 0))
            if kind == GGUF:
                raise refuse_gguf(self.path)
            if kind not in (ZIP, PICKLE):
                raise InputError(
                    f"not a PyTorch checkpoint: it looks like {kind or 'something else'}",
                    file=self.path,
                    remedy="Check the file's name, or download it again.",
                )
            self._places: dict[str, tuple[int, int]] = {}
            value = self._read_zip() if kind == ZIP else self._read_stream()
            self._views, self._ties = self._arrange(state_dict_of(value, self.path))
        except BaseException:
            self._close()
            raise

    def names(self) -> list[str]:
        """Tensor names in file-offset order; a name whose view equals an earlier one's is in ``ties`` instead."""
        return list(self._views)

    def info(self, name: str) -> TensorInfo:
        view = self._view(name)
        return TensorInfo(view.shape, view.dtype)

    def get(self, name: str) -> Tensor:
        """The tensor as stored, contiguous, in memory of its own."""
        return self._strided(name, self._view(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` along the first dimension: one read from the first of their elements to the last."""
        view = self._view(name)
        if not view.shape:
            return self.get(name).reshape(1)
        shape, first = (stop - start, *view.shape[1:]), view.offset + start * view.stride[0]
        return self._strided(name, replace(view, shape=shape, offset=first))

    def place(self, name: str) -> tuple[int, int, int]:
        """(file descriptor, offset, bytes) of a tensor, for read-ahead."""
        view = self._view(name)
        size = view.dtype.itemsize
        return self._fd, self._places[view.storage.key][0] + view.offset * size, view.extent * size

    def _strided(self, name: str, view: TensorView) -> Tensor:
        size = view.dtype.itemsize
        start = self._places[view.storage.key][0] + view.offset * size
        raw = read_bytes(self._fd, start, view.extent * size, path=self.path, tensor=name)
        flat = typed(raw, view.dtype, (view.extent,), path=self.path, tensor=name)
        if view.extent == 0:
            return torch.empty(view.shape, dtype=view.dtype)
        return flat.as_strided(view.shape, view.stride).contiguous()

    @property
    def ties(self) -> Mapping[str, str]:
        """alias -> the listed name that is the same view of the same storage."""
        return self._ties

    def close(self) -> None:
        """Close the file now (it is closed anyway when the object goes away)."""
        self._close()

    def __enter__(self) -> PickleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _view(self, name: str) -> TensorView:
        if not self._close.alive:
            raise ValueError(f"{self.path} is closed")
        try:
            return self._views[self._ties.get(name, name)]
        except KeyError:
            raise InputError("no such tensor", tensor=name, file=self.path) from None

    def _broken(self, why: str) -> InputError:
        return InputError(
            f"truncated or corrupt PyTorch checkpoint: {why}", file=self.path, remedy="Get the file again."
        )

    def _arrange(self, views: Mapping[str, TensorView]) -> tuple[dict[str, TensorView], dict[str, str]]:
        """Order by place in the file, and set aside names that repeat a view."""
        first: dict[TensorView, str] = {}
        ties: dict[str, str] = {}
        for name, view in views.items():
            place = self._places.get(view.storage.key)
            if place is None:
                raise self._broken(f"storage {view.storage.key!r} of {name} is missing")
            if view.storage.bytes > place[1]:
                raise self._broken(f"storage of {name} has {place[1]} of {view.storage.bytes} bytes")
            if view.extent and view in first:
                ties[name] = first[view]
            else:
                first[view] = name
        kept = [name for name in views if name not in ties]
        kept.sort(key=lambda n: (self._places[views[n].storage.key][0], views[n].offset))
        return {name: views[name] for name in kept}, ties

    # the zip archive

    def _read_zip(self) -> Any:
        try:
            with os.fdopen(os.dup(self._fd), "rb") as file, zipfile.ZipFile(file) as archive:
                entries = {item.filename: item for item in archive.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError) as error:
            raise self._broken(str(error)) from None
        pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError("a zip archive, but not one that torch.save wrote", file=self.path)
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise RefusedError(
                "a TorchScript archive, which holds a program",
                file=self.path,
                remedy="Load it in a program you trust and save its state dict as safetensors.",
            )
        for name, item in entries.items():
            key = name.removeprefix(f"{root}data/")
            if name.startswith(f"{root}data/") and "/" not in key:
                self._places[key] = (self._data_start(item), item.file_size)
        order = entries.get(f"{root}byteorder")
        if order is not None and self._bytes(self._data_start(order), order.file_size, 64) != b"little":
            raise InputError("the checkpoint was written on a big-endian machine", file=self.path)
        item = entries[pickles[0]]
        data = self._bytes(self._data_start(item), item.file_size, self._size)
        return unpickle.load(io.BytesIO(data), unpickle.storage_of, self.path)

    def _data_start(self, item: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: after its local header, whose extra field may differ from the directory's."""
        if item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1:
            raise InputError(
                "an entry of the archive is compressed or encrypted; torch.save stores it plainly",
                values={"entry": item.filename},
                file=self.path,
            )
        head = os.pread(self._fd, _LOCAL_HEADER.size, item.header_offset) if item.header_offset >= 0 else b""
        if len(head) < _LOCAL_HEADER.size or head[:4] != b"PK\x03\x04":
            raise self._broken(f"no entry where {item.filename} should be")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(head)
        start = item.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + item.file_size > self._size:
            raise self._broken(f"{item.filename} reaches beyond the end of the file")
        return int(start)

    def _bytes(self, start: int, count: int, limit: int) -> bytes:
        if count > limit:
            raise self._broken("an entry is larger than it can be")
        return bytes(read_bytes(self._fd, start, count, path=self.path, tensor="(header)").numpy())

    # the older stream

    def _read_stream(self) -> Any:
        stream = _Window(self._fd, self._size)
        storages: dict[str, Storage] = {}

        def storage(pid: tuple[Any, ...]) -> object:
            if pid[:1] == ("module",) and len(pid) == 4:
                return pid[1]  # very old pickles attach a module's source text to its class
            if len(pid) > 5 and pid[5] is not None:
                raise ValueError("a storage that is a view of another")
            found = unpickle.storage_of(pid)
            return storages.setdefault(found.key, found)

        magic = unpickle.load(stream, storage, self.path)
        if magic != _MAGIC_NUMBER:
            raise InputError(
                "a plain pickle, not a checkpoint that torch.save wrote",
                file=self.path,
                remedy="Save the weights with safetensors or torch.save.",
            )
        if unpickle.load(stream, storage, self.path) != _PROTOCOL:
            raise InputError("an unknown version of the old PyTorch format", file=self.path)
        system = unpickle.load(stream, storage, self.path)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise InputError("the checkpoint was written on a big-endian machine", file=self.path)
        value = unpickle.load(stream, storage, self.path)
        keys = unpickle.load(stream, storage, self.path)
        self._place_storages(keys, storages, stream.tell())
        return value

    def _place_storages(self, keys: Any, storages: Mapping[str, Storage], position: int) -> None:
        """After the pickles: for each key, an int64 count of elements and then the elements."""
        if not isinstance(keys, list):
            raise self._broken("no list of storages")
        for key in map(str, keys):
            head = os.pread(self._fd, 8, position)
            known = storages.get(key)
            if len(head) < 8 or known is None:
                raise self._broken("the storages end early or are not those of the pickle")
            length = int.from_bytes(head, "little", signed=True) * known.dtype.itemsize
            position += 8
            if length != known.bytes or position + length > self._size:
                raise self._broken(f"storage {key} does not fit the file")
            self._places[key] = (position, length)
            position += length


class _Window:
    """The file as a stream with its own position, whose reads never ask for more than is there."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size, self._at = fd, size, 0
        self._chunk, self._chunk_at = b"", 0

    def read(self, count: int, /) -> bytes:
        left = self._size - self._at
        count = min(max(count, 0), left)
        inside = self._at - self._chunk_at
        if not 0 <= inside <= inside + count <= len(self._chunk):
            self._chunk = os.pread(self._fd, max(count, 1 << 16), self._at)
            self._chunk_at, inside = self._at, 0
        out = self._chunk[inside : inside + count]
        self._at += len(out)
        return out

    def readline(self) -> bytes:
        # long enough for any global or number; a line beyond it is no pickle's
        start = self._at
        text = self.read(1 << 16)
        end = text.find(b"\n")
        self._at = start + (end + 1 if end >= 0 else len(text))
        return text[: self._at - start]

    def tell(self) -> int:
        return self._at
