"""A safetensors writer that never holds a file in memory.

Shapes and dtypes are known before the first number is computed, so the header is written first and every tensor
goes straight to its place. Memory is one tensor, whatever the size of the file.

Format: 8 bytes header length (little endian), a JSON header padded with spaces to a multiple of 8, then the data
without gaps. Tensors lie by falling alignment and otherwise in the order announced, so that every tensor starts at
a multiple of its item size and a reader may map it in place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import DevecError, IncompatibleError, RefusedError
from devec.io.digests import bytes_of
from devec.io.disk import PIECE, refusing, start_writing_back, write_at
from devec.io.hashing import TENSOR_HASH, tensor_hash
from devec.io.rounding import is_finite, not_finite
from devec.io.safetensors_file import DTYPES, MAX_HEADER

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
"""What safetensors calls each dtype."""

TENSOR_HASHES = f"devec.{TENSOR_HASH}"
"""Metadata key: JSON object, tensor name -> BLAKE3 of the tensor's bytes as stored."""

_HASHED_AT_ONCE = 1 << 21
"""Bytes that are read back and hashed at once: they stay in the cache between the two."""


def nbytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file."""
    return prod(info.shape) * info.dtype.itemsize


class SafetensorsWriter:
    """One safetensors file, written tensor by tensor, or rows by rows, from any number of threads or processes.

    ``entries`` names every tensor with its shape and dtype; they may be written in any order (in the order given, the
    file's hash costs no second reading). Every byte follows from the entries, the metadata and the values: there is
    nothing else in the file. With ``hashes_in_header`` the metadata also holds the BLAKE3 hash of each tensor under
    :data:`TENSOR_HASHES`. With ``reopen`` the file may exist, begun with the same entries and metadata, and
    it outlives a failure (all but that of the last flush) so that it can be gone on with.

    As a context manager it closes on success and removes the file on failure.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[tuple[str, TensorInfo]],
        metadata: Mapping[str, str] | None = None,
        *,
        hashes_in_header: bool = False,
        reopen: bool = False,
    ) -> None:
        self.path = Path(path)
        self.tensor_hashes: dict[str, str] = {}
        self._infos = dict(entries)
        if len(self._infos) != len(entries):
            raise ValueError("a tensor name is announced twice")
        self._metadata = {"format": "pt", **(metadata or {})}
        self._hashes_in_header = hashes_in_header
        self._keep = reopen
        self._order = sorted(self._infos, key=lambda n: -self._infos[n].dtype.itemsize)
        self._offsets: dict[str, int] = {}
        at = 0
        for name in self._order:
            if name == "__metadata__" or self._infos[name].dtype not in DTYPE_NAMES:
                raise IncompatibleError(
                    "safetensors cannot hold this tensor", tensor=name,
                    values={"dtype": self._infos[name].dtype}, file=self.path, remedy="Leave it out with --exclude.",
                )
            self._offsets[name] = at
            at += nbytes(self._infos[name])
        header = self._header(dict.fromkeys(self._infos, "0" * 64))
        self._start = len(header)
        self.size = self._start + at
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes of the file, from its start, that the running hash has seen
        self._ready = 0  # tensors, in file order, that are written and not yet passed by
        self._digest: str | None = None
        self._lock, self._hashing = Lock(), Lock()
        self._begun: set[str] = set()
        with refusing(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if reopen else os.O_EXCL), 0o666)
            try:
                write_at(self._fd, memoryview(header), 0)
                if reopen and os.fstat(self._fd).st_size != self.size:
                    os.ftruncate(self._fd, self.size)
            except BaseException:
                self.abort()
                raise

    def _header(self, hashes: Mapping[str, str]) -> bytes:
        metadata = dict(self._metadata)
        if self._hashes_in_header:
            metadata[TENSOR_HASHES] = json.dumps({n: hashes[n] for n in sorted(hashes)}, separators=(",", ":"))
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        for name in self._order:
            info, start = self._infos[name], self._offsets[name]
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, start + nbytes(info)],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise RefusedError(
                "too many tensors for one safetensors file", values={"header bytes": len(text)}, file=self.path,
                remedy="Use a smaller --shard-size.",
            )
        return len(text).to_bytes(8, "little") + text

    def put(self, name: str, tensor: Tensor, *, finite: bool = False) -> None:
        """Write one tensor. Its shape and dtype must be those announced, and its values finite. Thread-safe.

        ``finite=True`` says that the values were looked at already (:func:`cast` does) and saves a pass.
        """
        info = self._infos.get(name)
        if info is not None and tuple(tensor.shape) != tuple(info.shape):
            raise self._unlike(name, tensor)
        self.write(name, [tensor], finite=finite)

    def write(self, name: str, blocks: Iterable[Tensor], *, finite: bool = False) -> str:
        """Write one tensor as blocks of rows that follow one another; returns the BLAKE3 hash of its bytes.

        Thread-safe, but nobody else may write the same tensor at the same time.
        """
        if name not in self._infos:
            raise ValueError(f"tensor {name} was not announced for {self.path.name}")
        with self._lock:
            if name in self._begun:
                raise ValueError(f"tensor {name} is written twice")
            self._begun.add(name)
        digest = tensor_hash()
        begin = at = self._start + self._offsets[name]
        end, flushed = begin + nbytes(self._infos[name]), begin
        for block in blocks:
            if block.dtype != self._infos[name].dtype or at + block.numel() * block.dtype.itemsize > end:
                raise self._unlike(name, block)
            if not finite and not is_finite(block):
                raise not_finite(name, self.path)
            data = bytes_of(block)
            with refusing(self.path):
                write_at(self._fd, data, at)
            digest.update(data)
            at += len(data)
            if at - flushed >= PIECE:
                start_writing_back(self._fd, flushed, at - flushed)
                flushed = at
        if at != end:
            raise DevecError(
                "a tensor was not written to its end", tensor=name,
                values={"bytes announced": end - begin, "bytes given": at - begin}, file=self.path,
            )
        start_writing_back(self._fd, flushed, at - flushed)
        self.mark(name, digest.hexdigest())
        return self.tensor_hashes[name]

    def _unlike(self, name: str, tensor: Tensor) -> IncompatibleError:
        info = self._infos[name]
        return IncompatibleError(
            "a tensor differs from what was announced", tensor=name,
            values={
                "announced": f"{tuple(info.shape)} {info.dtype}",
                "given": f"{tuple(tensor.shape)} {tensor.dtype}",
            },
            file=self.path,
        )

    def seal(self, key: str, value: str) -> None:
        """Fill in an entry of the metadata that was reserved with as many characters; it is written by :meth:`close`.

        Only with ``hashes_in_header``: otherwise the header is final from the start.
        """
        if not self._hashes_in_header or len(self._metadata.get(key, "")) != len(value):
            raise ValueError(f"metadata {key} was not reserved in {self.path.name}")
        self._metadata[key] = value

    def mark(self, name: str, digest: str) -> None:
        """A tensor is written (by this process or another), and its bytes have this hash."""
        with self._lock:
            self._begun.add(name)
            self.tensor_hashes[name] = digest

    def hash_of(self, name: str) -> str:
        """BLAKE3 hash of what the file holds at the tensor's place now."""
        digest, at = tensor_hash(), self._start + self._offsets[name]
        end = at + nbytes(self._infos[name])
        with refusing(self.path):
            while at < end and (piece := os.pread(self._fd, min(PIECE, end - at), at)):
                digest.update(piece)
                at += len(piece)
        return digest.hexdigest()

    def follow(self) -> None:
        """Hash the part of the file, from its start, that is finished by now. For a thread beside the writing."""
        if self._hashes_in_header:
            return  # the header is written last
        with self._lock:
            while self._ready < len(self._order) and self._order[self._ready] in self.tensor_hashes:
                self._ready += 1
            names = self._order[: self._ready]
        end = self._start + self._offsets[names[-1]] + nbytes(self._infos[names[-1]]) if names else self._start
        self._hash_until(end)

    def _hash_until(self, end: int) -> None:
        with self._hashing, refusing(self.path):
            while self._hashed < end:
                piece = os.pread(self._fd, min(_HASHED_AT_ONCE, end - self._hashed), self._hashed)
                if not piece:
                    raise OSError(0, f"the file has {self._hashed} bytes instead of {self.size}")
                self._hash.update(piece)
                self._hashed += len(piece)

    @property
    def missing(self) -> list[str]:
        """Tensors announced and not yet written."""
        return [n for n in self._infos if n not in self.tensor_hashes]

    def close(self, *, sync: bool = True) -> None:
        """Finish the file and flush it. A tensor announced and never written is an error, and the file is removed."""
        if self._fd < 0:
            return
        if self.missing:
            name = self.missing[0]
            self.abort()
            raise DevecError(f"{len(self.missing)} tensors were never written", tensor=name, file=self.path)
        try:
            with refusing(self.path):
                if self._hashes_in_header:
                    write_at(self._fd, memoryview(self._header(self.tensor_hashes)), 0)
                self._hash_until(self.size)
                if os.fstat(self._fd).st_size != self.size:
                    raise OSError(0, f"the file is not {self.size} bytes long")
                if sync:
                    self._flush()
        except BaseException:
            self.abort()
            raise
        self._digest = self._hash.hexdigest()
        self.release()

    def _flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError:
            self._keep = False  # in memory it may look whole, and a second flush say nothing
            raise

    def abort(self) -> None:
        """Close the unfinished file and remove it, unless it can be gone on with."""
        if self._fd >= 0:
            self.release()
            if not self._keep:
                self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Close the file as it is."""
        with self._hashing:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole file, once closed."""
        if self._digest is None:
            raise ValueError("the file is not closed yet")
        return self._digest

    @property
    def order(self) -> list[str]:
        """Tensor names in the order in which they lie in the file."""
        return list(self._order)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def save_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> SafetensorsWriter:
    """Write a mapping that is already in memory; returns the closed writer (hashes, size). Nothing is left on error."""
    entries = [(n, TensorInfo(tuple(t.shape), t.dtype)) for n, t in tensors.items()]
    with SafetensorsWriter(path, entries, metadata) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    return writer

