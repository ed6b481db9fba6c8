"""What was collected of data for the merge methods that need it, read from disk tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from devec.api.coefficients import check_inputs, check_reading
from devec.api.references import ViewLike
from devec.core.block import Block
from devec.core.contracts import TensorSource
from devec.core.errors import IncompatibleError, InputError, UsageError
from devec.core.layout import Layout
from devec.core.lazy import once
from devec.core.vectors import Pool
from devec.io.checkpoint import Checkpoint, open_checkpoint
from devec.io.names import Selection, resolve_names
from devec.methods import registry

FILE = "statistics.json"


@dataclass(frozen=True)
class Statistics:
    """Statistics of ``kind`` ("fisher", "moments") of each vector: a file each below ``folder``, read tensor by tensor.

    ``norms`` are Frobenius norms over all tensors; ``record`` says of which rows, inputs and base they are.
    """

    kind: str
    vectors: tuple[str, ...]
    norms: tuple[float, ...]
    record: Mapping[str, Any]
    folder: Path

    @cached_property
    def _files(self) -> tuple[Checkpoint, ...]:
        return tuple(open_checkpoint(self.folder / file_of(i)) for i in range(len(self.vectors)))

    @property
    def description(self) -> dict[str, Any]:
        """What the output of a merge says of them."""
        return {"kind": self.kind, **{k: self.record[k] for k in ("suite", "split", "examples", "seed")}}

    def of(self, name: str, layout: Layout) -> dict[str, object]:
        """``Block.stats`` of a tensor by its name in the base; values are read from the files when they are asked for.
        """
        return {self.kind: _OfTensor(self, name, layout.transposed), f"{self.kind}_norm": self.norms}

    def read(self, i: int, name: str, transposed: bool) -> Tensor | None:
        """One vector's value, as the matrix that the methods see; None where it has none."""
        file = self._files[i]
        if name not in file.names():
            return None
        value = file.get(name)
        return value if self.kind == "moments" else Layout(tuple(value.shape), transposed).to_matrix(value)

    def check(self, method: registry.Method, pool: Pool, base: TensorSource | None) -> None:
        """Raises UsageError for statistics of another kind, IncompatibleError for other vectors or another base."""
        if self.kind not in method.needs:
            raise UsageError(
                f"{method.name} does not use these statistics",
                values={"there": self.kind, "wanted": ", ".join(method.needs) or "none"},
            )
        if self.vectors != pool.names:
            raise IncompatibleError(
                "the statistics are of other vectors, or in another order",
                values={"then": ", ".join(self.vectors), "now": ", ".join(pool.names)},
            )
        check_inputs("statistics were collected", self.record["inputs"], self.record["base"], pool, base)


class _OfTensor(Sequence[Any]):
    """The values of one tensor, one per vector, none of them held."""

    def __init__(self, statistics: Statistics, name: str, transposed: bool) -> None:
        self.statistics, self.name, self.transposed = statistics, name, transposed

    def __len__(self) -> int:
        return len(self.statistics.vectors)

    def __getitem__(self, i: Any) -> Any:
        return self.statistics.read(range(len(self))[i], self.name, self.transposed)


def read_statistics(folder: str | Path) -> Statistics:
    """What :func:`collect` wrote. Raises InputError (exit 3) for anything else."""
    file = Path(folder) / FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Statistics(
            data["kind"], tuple(data["vectors"]), tuple(map(float, data["norms"])), data["record"], Path(folder)
        )
    except OSError as error:
        raise InputError(f"cannot read the statistics: {error.strerror}", file=file) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"these are no statistics: {type(error).__name__}: {error}", file=file) from None


def names_in(pool: Pool, base: TensorSource) -> dict[str, str]:
    """The pool's tensors -> their names in the base."""
    found = resolve_names(pool.tensors(), [*base.names(), *base.ties])
    return {own: base.ties.get(n, n) for own, n in found.items()}


def checked(
    statistics: Statistics, method: registry.Method, pool: Pool, base: TensorSource | None, view: ViewLike,
    selection: Selection | None,
) -> Statistics:
    """The statistics, where they are of this merge (see :meth:`Statistics.check`)."""
    statistics.check(method, pool, base)
    check_reading("statistics were collected", statistics.record, view, selection)
    return statistics


def once_known(
    given: str | Path | Statistics | Callable[[], Statistics], check: Callable[[Statistics], Statistics]
) -> Callable[[], Statistics]:
    """What was collected, checked: now where it is there, else when it is first asked for."""
    if callable(given):
        return once(lambda: check(given()))
    known = check(given if isinstance(given, Statistics) else read_statistics(given))
    return lambda: known


def stats_of(get: Callable[[], Statistics], names: Mapping[str, str]) -> Callable[[Block], Mapping[str, object]]:
    """``Block.stats`` of a block, whose name in the base ``names`` knows."""
    return lambda block: get().of(names[block.name], block.layout)


def file_of(i: int) -> str:
    return f"{i}.safetensors"
