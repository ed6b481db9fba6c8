"""Weights as one safetensors file or as numbered shards with an index, planned before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import DevecError
from devec.io.disk import write_file
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
    """Writes planned shards into ``folder``; each file is opened at its first tensor and closed after its last.

    Tensors may come in any order and from several threads only if those threads agree on one ``put`` at a time.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        metadata: Mapping[str, str] | None = None,
        *,
        hashes_in_header: bool = False,
    ) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._metadata = metadata
        self._hashes_in_header = hashes_in_header
        self._shard_of = {name: shard for shard in shards for name, _ in shard.entries}
        self._infos = {name: info for shard in shards for name, info in shard.entries}
        self._writers: dict[str, SafetensorsWriter] = {}

    @property
    def names(self) -> list[str]:
        """Every planned tensor, in the order in which writing is cheapest."""
        return list(self._infos)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(info) for info in self._infos.values())

    def put(self, name: str, value: Tensor) -> int:
        """Round ``value`` to its planned dtype, write it, and return its bytes."""
        shard = self._shard_of.get(name)
        if shard is None:
            raise DevecError("a tensor that the output does not have", tensor=name)
        writer = self._writers.get(shard.filename)
        if writer is None:
            writer = SafetensorsWriter(
                self.folder / shard.filename, shard.entries, self._metadata, hashes_in_header=self._hashes_in_header
            )
            self._writers[shard.filename] = writer
        writer.put(name, cast(name, value, self._infos[name].dtype, writer.path), finite=True)
        if not writer.missing:
            writer.close()
        return nbytes(self._infos[name])

    def close(self) -> None:
        """Check that every tensor was written; write the index where there are several files."""
        for shard in self.shards:
            if not shard.entries:  # a model of no tensors is still a file
                self._writers[shard.filename] = SafetensorsWriter(self.folder / shard.filename, (), self._metadata)
                self._writers[shard.filename].close()
            if shard.filename not in self._writers:
                raise DevecError(
                    f"{len(shard.entries)} tensors were never written",
                    tensor=shard.entries[0][0], file=self.folder / shard.filename,
                )
            self._writers[shard.filename].close()
        if len(self.shards) > 1:
            weight_map = {name: shard.filename for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_file(self.folder / INDEX, dump_json(index))

    def abort(self) -> None:
        """Close and remove whatever is unfinished."""
        for writer in self._writers.values():
            writer.abort()

    def journal(self) -> list[TensorRecord]:
        """One record a tensor, in file order, once closed."""
        return [
            TensorRecord(name, shard.filename, self._writers[shard.filename].tensor_sha256[name],
                         nbytes(self._infos[name]))
            for shard in self.shards
            for name in self._writers[shard.filename].order
        ]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file, once closed."""
        return {name: writer.sha256 for name, writer in self._writers.items()}
