"""Hashes of the tensors of a model, gathered while they are read for another purpose.

Recording what a result was made from would otherwise read every input twice. A tensor that is read from its first row
to its last by somebody is hashed on the way; the others are read when the hash is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import torch
from blake3 import blake3
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.lazy import row_blocks
from devec.io.hashing import tensor_hash


class TensorDigests:
    """BLAKE3 of each tensor's bytes as stored, by name. Nothing is hashed in passing before :meth:`watch`."""

    def __init__(self, info: Callable[[str], TensorInfo], rows: Callable[[str, int, int], Tensor]) -> None:
        self._info, self._rows = info, rows
        self._known: dict[str, str] = {}
        self._open: dict[str, tuple[int, blake3]] = {}
        self._new: dict[str, str] = {}
        self._watching = False
        self._lock = Lock()

    def watch(self) -> None:
        """Hash from now on what is read in order."""
        self._watching = True

    def feed(self, name: str, start: int, stop: int, rows: Tensor) -> None:
        """These rows were read. Whoever reads on from the row where the last reader stopped continues the hash."""
        if not self._watching or name in self._known:
            return
        with self._lock:
            at, digest = self._open.pop(name) if name in self._open else (0, tensor_hash())
            if at != start or name in self._known:
                if name not in self._known:
                    self._open[name] = (at, digest)
                return
        digest.update(bytes_of(rows))
        shape = self._info(name).shape
        with self._lock:
            if stop >= (shape[0] if shape else 1):
                self._known[name] = self._new[name] = digest.hexdigest()
            else:
                self._open[name] = (stop, digest)

    def get(self, name: str) -> str:
        """The hash of one tensor, which is read if it must be."""
        if name not in self._known:
            digest = tensor_hash()
            for start, stop in row_blocks(self._info(name).shape):
                digest.update(bytes_of(self._rows(name, start, stop)))
            with self._lock:
                self._known[name] = digest.hexdigest()
        return self._known[name]

    def take(self) -> dict[str, str]:
        """The hashes found in passing since the last call, for whoever writes them down."""
        with self._lock:
            new, self._new = self._new, {}
        return new

    def learn(self, found: Mapping[str, str]) -> None:
        """Hashes that another process, or an earlier run over the same files, has found."""
        with self._lock:
            self._known.update(found)

    def fingerprint(self, names: Sequence[str]) -> str:
        """SHA-256 over the sorted names with their shapes, dtypes and hashes: the same wherever the tensors lie."""
        digest = hashlib.sha256()
        for name in sorted(names):
            info = self._info(name)
            digest.update(json.dumps([name, list(info.shape), str(info.dtype), self.get(name)]).encode())
        return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
