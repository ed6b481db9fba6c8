"""The rows of a task: read by a loader, split by a hash of the row, and made into what a network takes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from devec.core.errors import InputError, UsageError
from devec.evaluate.suite import InputSpec, SelectSpec

Split = Literal["select", "test"]
SPLITS: tuple[Split, ...] = ("select", "test")
Arrays = Mapping[str, NDArray[Any]]
Loader = Callable[[Path], Arrays]

_loaders: dict[str, Loader] = {}


def loader(suffix: str) -> Callable[[Loader], Loader]:
    """Decorator: enter a function that reads ``x_test, y_test`` (and ``x_train, y_train``) from files of a suffix."""

    def enter(function: Loader) -> Loader:
        _loaders[suffix] = function
        return function

    return enter


@loader(".npz")
def read_npz(path: Path) -> Arrays:
    """An archive of numpy arrays; pickled ones are refused."""
    with np.load(path, allow_pickle=False) as archive:
        wanted = [k for k in ("x_train", "y_train", "x_test", "y_test") if k in archive.files]
        return {k: archive[k] for k in wanted}


@dataclass(frozen=True)
class Rows:
    """Rows of one split as stored, their labels, and in words which they are."""

    x: Tensor
    y: Tensor
    words: str

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class TaskData:
    """One task's rows, in splits. ``select`` is missing where the suite names none."""

    name: str
    file: Path
    test: Rows
    select: Rows | None = None
    input: InputSpec = field(default_factory=InputSpec)

    def split(self, name: Split) -> Rows:
        """Raises UsageError (exit 2) for a selection split that the suite does not have."""
        if name == "test":
            return self.test
        if self.select is None:
            raise UsageError(
                f"the suite names no selection split, which {self.name} needs",
                remedy="Write select: {from: train} or select: {from: test} in the suite.",
            )
        return self.select

    def inputs(self, x: Tensor) -> Tensor:
        """What the network takes: token ids as they are, pictures as normalised ``(rows, channels, h, w)`` floats."""
        if x.dtype != torch.uint8:
            return x.long()
        spec = self.input
        pictures = x.float().div_(255.0)
        pictures = pictures.unsqueeze(1) if pictures.ndim == 3 else pictures.permute(0, 3, 1, 2)
        if spec.channels is not None and pictures.shape[1] == 1 and spec.channels > 1:
            pictures = pictures.expand(-1, spec.channels, -1, -1)
        if spec.size is not None and pictures.shape[-2:] != (spec.size, spec.size):
            pictures = F.interpolate(
                pictures, size=(spec.size, spec.size), mode="bilinear", align_corners=False, antialias=True
            )
        channels = pictures.shape[1]
        mean, std = (_per_channel(v, channels, self, k) for k, v in (("mean", spec.mean), ("std", spec.std)))
        return ((pictures - mean) / std).contiguous()


def _per_channel(values: list[float], channels: int, task: TaskData, what: str) -> Tensor:
    if len(values) not in (1, channels):
        raise UsageError(
            f"the {what} of task {task.name} does not fit its pictures", values={what: values, "channels": channels}
        )
    return torch.tensor(values).reshape(1, -1, 1, 1)


def read_task(
    name: str, file: Path, spec: InputSpec, select: SelectSpec | None = None, seed: int = 0
) -> TaskData:
    """Read and split one task's rows.

    Raises InputError (exit 3) for a file that is missing, of a kind that no loader reads, or without the arrays that
    the splits need; labels are whole numbers from 0 on, one a row.
    """
    if not file.is_file():
        raise InputError(f"the data of task {name} are missing", file=file)
    if file.suffix not in _loaders:
        raise InputError(
            f"no loader reads the data of task {name}", values={"suffix": file.suffix or "none"}, file=file,
            remedy=f"There is one for {', '.join(sorted(_loaders))}; devec.evaluate.data.loader adds others.",
        )
    try:
        arrays = _loaders[file.suffix](file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the data of task {name}: {error}", file=file) from None
    x, y = _pair(arrays, "test", name, file)
    if select is None:
        return TaskData(name, file, Rows(x, y, f"all {len(y)} test rows"), None, spec)
    if select.source == "train":
        x_train, y_train = _pair(arrays, "train", name, file)
        chosen, _ = _chosen(x_train, select, seed)
        rows = Rows(x_train[chosen], y_train[chosen], f"{len(chosen)} of {len(y_train)} train rows")
        return TaskData(name, file, Rows(x, y, f"all {len(y)} test rows"), _some(rows, name, file), spec)
    chosen, rest = _chosen(x, select, seed)
    rows = Rows(x[chosen], y[chosen], f"{len(chosen)} of {len(y)} test rows, not reported on")
    kept = Rows(x[rest], y[rest], f"{len(rest)} of {len(y)} test rows, by row hash")
    return TaskData(name, file, _some(kept, name, file), _some(rows, name, file), spec)


def _some(rows: Rows, name: str, file: Path) -> Rows:
    if not len(rows):
        raise InputError(f"a split of task {name} has no rows", values={"split": rows.words}, file=file)
    return rows


def _pair(arrays: Arrays, split: str, name: str, file: Path) -> tuple[Tensor, Tensor]:
    for key in (f"x_{split}", f"y_{split}"):
        if key not in arrays:
            raise InputError(
                f"the data of task {name} lack {key}", values={"found": ", ".join(arrays) or "nothing"}, file=file,
                remedy="Add the array, or take the selection split from the other split." if split == "train" else None,
            )
    x, y = np.asarray(arrays[f"x_{split}"]), np.asarray(arrays[f"y_{split}"])
    pictures, tokens = x.dtype == np.uint8 and x.ndim in (3, 4), x.dtype.kind in "iu" and x.ndim == 2
    if not (pictures or (tokens and x.dtype != np.uint8)):
        raise InputError(
            f"x_{split} of task {name} is neither uint8 pictures (rows x h x w, or x channels) nor token ids",
            values={"dtype": x.dtype, "shape": x.shape}, file=file,
        )
    if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu" or (len(y) and int(y.min()) < 0):
        raise InputError(
            f"y_{split} of task {name} is not one label from 0 on for each row",
            values={"labels": y.shape, "rows": len(x), "least": y.min() if y.size else "none"}, file=file,
        )
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))


def _chosen(x: Tensor, select: SelectSpec, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the selection split and the others, each in stored order. Equal rows have equal hashes: a picture that
    occurs twice is never on both sides (``rows`` then takes the lowest hashes of the selection)."""
    u = row_hashes(x, seed)
    inside = u < select.share
    rest = torch.from_numpy((~inside).nonzero()[0])
    chosen = inside.nonzero()[0]
    if select.rows is not None and len(chosen) > select.rows:
        chosen = np.sort(chosen[np.argsort(u[chosen], kind="stable")[: select.rows]])
    return torch.from_numpy(chosen), rest


def row_hashes(x: Tensor, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each row: of its bytes and the seed, not of its place."""
    key = str(seed).encode()
    values = x.contiguous().numpy()
    found = [int.from_bytes(blake2b(row.tobytes(), digest_size=8, key=key).digest(), "big") for row in values]
    return np.array(found, dtype=np.uint64).astype(np.float64) / 2.0**64
