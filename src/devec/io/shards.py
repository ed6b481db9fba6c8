"""Weights as one safetensors file or as numbered shards with an index, planned before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import DevecError, IncompatibleError
from devec.io.disk import write_file
from devec.io.journal import Finished, Journal
from devec.io.records import TensorRecord, dump_json
from devec.io.rounding import cast
from devec.io.writer import SafetensorsWriter, nbytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes: what most published checkpoints use, and small enough to be fetched again after a broken download."""


@dataclass(frozen=True)
class Shard:
    """One weight file and the tensors that go into it, in order."""

    filename: str
    entries: tuple[tuple[str, TensorInfo], ...]


def plan_shards(entries: Sequence[tuple[str, TensorInfo]], shard_size: int) -> list[Shard]:
    """Fill shards in the order given, none above ``shard_size`` bytes unless a single tensor is."""
    groups: list[list[tuple[str, TensorInfo]]] = [[]]
    filled = 0
    for name, info in entries:
        size = nbytes(info)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((name, info))
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(g)) for i, g in enumerate(groups, start=1)]


class ShardWriter:
    """Writes planned shards into ``folder``; each file is opened at its first tensor and closed when all is written.

    Tensors may come in any order and from any number of threads. With ``reopen`` files that an earlier run, or another
    process, has begun are gone on with: :meth:`recall` says which of their tensors are finished.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        metadata: Mapping[str, str] | None = None,
        *,
        hashes_in_header: bool = False,
        reopen: bool = False,
    ) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._metadata = metadata
        self._hashes_in_header, self._reopen = hashes_in_header, reopen
        self._shard_of = {name: shard for shard in shards for name, _ in shard.entries}
        self._infos = {name: info for shard in shards for name, info in shard.entries}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._lock = Lock()

    @property
    def names(self) -> list[str]:
        """Every planned tensor, in the order in which writing is cheapest."""
        return list(self._infos)

    def missing(self) -> list[str]:
        """Planned tensors that are not written yet, in the same order."""
        gone = {n for w in list(self._writers.values()) for n in w.tensor_hashes}
        return [n for n in self._infos if n not in gone]

    def seal(self, key: str, value: str) -> None:
        """Fill in a reserved entry of every file's metadata, before :meth:`close`."""
        for shard in self.shards:
            with self._lock:
                if shard.filename not in self._writers:
                    self._writers[shard.filename] = self._open(shard)
            self._writers[shard.filename].seal(key, value)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype under which a tensor is written."""
        return self._infos[name]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(info) for info in self._infos.values())

    def put(self, name: str, value: Tensor) -> Finished:
        """Round ``value`` to its planned dtype and write it."""
        info = self._infos.get(name)
        if info is not None and tuple(value.shape) != tuple(info.shape):
            raise IncompatibleError(
                "a tensor differs from what was announced", tensor=name,
                values={"announced": tuple(info.shape), "given": tuple(value.shape)}, file=self.folder,
            )
        return self.write(name, [value])

    def write(self, name: str, blocks: Iterable[Tensor]) -> Finished:
        """Round blocks of rows to the tensor's planned dtype and write them; they follow one another."""
        writer = self._writer(name)
        dtype = self._infos[name].dtype
        digest = writer.write(name, (cast(name, block, dtype, writer.path) for block in blocks), finite=True)
        return Finished(name, writer.path.name, digest, nbytes(self._infos[name]))

    def recall(self, finished: Finished) -> bool:
        """Take a tensor of an earlier run as written if its bytes are still what the record says."""
        shard = self._shard_of.get(finished.name)
        if shard is None or not (self.folder / shard.filename).is_file():
            return False
        writer = self._writer(finished.name)
        if writer.hash_of(finished.name) != finished.digest:
            return False
        writer.mark(finished.name, finished.digest)
        return True

    def mark(self, record: Finished) -> None:
        """Another process has written this tensor into the same file."""
        self._writer(record.name).mark(record.name, record.digest)

    def _writer(self, name: str) -> SafetensorsWriter:
        shard = self._shard_of.get(name)
        if shard is None:
            raise DevecError("a tensor that the output does not have", tensor=name)
        with self._lock:
            if shard.filename not in self._writers:
                self._writers[shard.filename] = self._open(shard)
            return self._writers[shard.filename]

    def _open(self, shard: Shard) -> SafetensorsWriter:
        return SafetensorsWriter(
            self.folder / shard.filename, shard.entries, self._metadata, hashes_in_header=self._hashes_in_header,
            reopen=self._reopen,
        )

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hash whole files in the background while their tensors are written."""
        stop = Event()

        def follow() -> None:
            while not stop.wait(0.02):
                for writer in list(self._writers.values()):
                    writer.follow()

        thread = Thread(target=follow, name="devec-hash", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        """Check that every tensor was written; write the index where there are several files."""
        for shard in self.shards:
            if shard.filename not in self._writers:
                if shard.entries:
                    raise DevecError(
                        f"{len(shard.entries)} tensors were never written",
                        tensor=shard.entries[0][0], file=self.folder / shard.filename,
                    )
                self._writers[shard.filename] = self._open(shard)  # a model of no tensors is still a file
            self._writers[shard.filename].close()
        if len(self.shards) > 1:
            weight_map = {name: shard.filename for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_file(self.folder / INDEX, dump_json(index))

    def release(self) -> None:
        """Close the files as they are, for whoever goes on with them."""
        for writer in self._writers.values():
            writer.release()

    def abort(self) -> None:
        """Close and remove whatever is unfinished."""
        for writer in self._writers.values():
            writer.abort()

    def journal(self) -> list[TensorRecord]:
        """One record a tensor, in file order, once closed."""
        return [
            TensorRecord(name, shard.filename, self._writers[shard.filename].tensor_hashes[name],
                         nbytes(self._infos[name]))
            for shard in self.shards
            for name in self._writers[shard.filename].order
        ]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file, once closed."""
        return {name: writer.sha256 for name, writer in self._writers.items()}


Fill = Callable[[ShardWriter, Journal | None], None]
"""Writes every tensor that is missing in the writer, and notes each in the journal if there is one."""


def put_all(tensors: Callable[[str], Tensor] | Iterable[tuple[str, Tensor]]) -> Fill:
    """Fill from a function of the name, called in writing order, or from (name, value) pairs in any order."""

    def fill(writer: ShardWriter, journal: Journal | None) -> None:
        pairs = ((n, tensors(n)) for n in writer.missing()) if callable(tensors) else tensors
        for name, value in pairs:
            record = writer.put(name, value)
            if journal is not None:
                journal.append(record)

    return fill
