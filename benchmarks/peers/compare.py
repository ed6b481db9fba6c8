"""Are the outputs right? devec's against mergekit's entry by entry, and both against float64 on a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.peers.models import weight_files
from benchmarks.peers.tools import WEIGHTS, Case

PIECE = 1 << 22
"""Elements held at once."""

SAMPLE = 8
"""Tensors of which the first PIECE elements are set against float64."""


class Folder:
    """Tensors of a model folder by rows, read with the safetensors library and nothing of devec."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = [stack.enter_context(safe_open(file, "pt")) for file in weight_files(folder)]
        self._files: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self.names = sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        value: Tensor = self._files[name].get_slice(name)[start:stop]
        return value


@dataclass(frozen=True)
class Agreement:
    """Two outputs: entries compared, how many differ, and by how many units in the last place at most (``_unit``)."""

    entries: int
    differing: int
    most_ulps: float


@dataclass(frozen=True)
class Accuracy:
    """An output against float64 on a sample: entries, how many are not the nearest bfloat16 number, and the largest
    distance in units in the last place (0.5 where every entry is the nearest)."""

    entries: int
    not_nearest: int
    most_ulps: float


def agreement(one: Path, other: Path) -> Agreement:
    """Every entry of two bfloat16 outputs. Raises ValueError unless names and shapes are the same."""
    entries = differing = 0
    most = 0.0
    with ExitStack() as stack:
        a, b = Folder(one, stack), Folder(other, stack)
        if {n: a.shape(n) for n in a.names} != {n: b.shape(n) for n in b.names}:
            raise ValueError(f"{one.name} and {other.name} hold other tensors")
        for name in a.names:
            for start, stop in pieces(a.shape(name)):
                x, y = _rows(a, name, start, stop), _rows(b, name, start, stop)
                apart = (x - y).abs()
                entries += apart.numel()
                differing += int((apart > 0).sum())
                most = max(most, float((apart / _unit(torch.maximum(x.abs(), y.abs()))).max()))
    return Agreement(entries, differing, most)


def accuracy(out: Path, case: Case) -> Accuracy:
    """An output against ``W_0 + sum w_i (W_i - W_0)``, or ``sum w_i W_i / sum w_i``, in float64 from the inputs."""
    entries = wrong = 0
    most = 0.0
    with ExitStack() as stack:
        made = Folder(out, stack)
        models = [Folder(model, stack) for model in case.models]
        base = Folder(case.base, stack) if case.base else None
        for name in _sample(made.names):
            start, stop = next(pieces(made.shape(name)))
            parts = [model.rows(name, start, stop).double() for model in models]
            under = base.rows(name, start, stop).double() if base else None
            wanted = truth(parts, under)
            ulps = (_rows(made, name, start, stop) - wanted).abs() / _unit(wanted)
            entries += ulps.numel()
            wrong += int((ulps > 0.5).sum())
            most = max(most, float(ulps.max()))
    return Accuracy(entries, wrong, most)


def truth(models: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """The merge in float64, term by term."""
    weighted = [w * (model if base is None else model - base) for w, model in zip(WEIGHTS, models, strict=True)]
    total = torch.stack(weighted).sum(0)
    return total / sum(WEIGHTS) if base is None else base + total


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of about PIECE elements."""
    rows = shape[0]
    step = max(PIECE // max(torch.Size(shape).numel() // max(rows, 1), 1), 1)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _sample(names: Sequence[str]) -> list[str]:
    count = min(SAMPLE, len(names))
    return [names[i * (len(names) - 1) // max(count - 1, 1)] for i in range(count)]


def _rows(folder: Folder, name: str, start: int, stop: int) -> Tensor:
    """Rows of an output in float64, after checking that it was written in bfloat16."""
    value = folder.rows(name, start, stop)
    if value.dtype != torch.bfloat16:
        raise ValueError(f"{name} of the output is {value.dtype}, not bfloat16")
    return value.double()


def _unit(x: Tensor) -> Tensor:
    """The unit in the last place of a bfloat16 number as large as each entry, or as 1/256 of the root mean square where
    that is larger: where terms of the usual size cancel to almost nothing, float32 keeps no place of what is left."""
    floor = float(x.square().mean().sqrt()) / 256
    exponent = torch.frexp(x.abs().clamp(min=floor)).exponent  # of a significand in [1/2, 1), with 8 bits in bfloat16
    return torch.exp2((exponent - 8).double())
