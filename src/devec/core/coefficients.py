"""Coefficients of a linear merge: one number per vector, or per vector and layer, or per vector and tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal

from devec.core.delta import Delta
from devec.core.errors import IncompatibleError, InputError
from devec.core.vectors import Pool

CoefficientGrain = Literal["vector", "layer", "tensor"]
GRAINS: tuple[CoefficientGrain, ...] = ("vector", "layer", "tensor")
SCHEMA = 1

_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


def layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number (``vit.layers.3``); of a tensor outside the
    numbered blocks, its module (``vit.embeddings``)."""
    block = _BLOCK.match(tensor)
    return block.group() if block else tensor.rpartition(".")[0]


def group_of(grain: CoefficientGrain) -> Callable[[str], str]:
    """tensor name -> the name of the coefficient that it takes."""
    return {"vector": lambda _: "", "layer": layer_of, "tensor": lambda n: n}[grain]


@dataclass(frozen=True)
class Coefficients:
    """``W = W_0 + sum_t c_t Delta_t`` with ``c_t`` per vector, per vector and layer, or per vector and tensor.

    ``vectors`` names in order; ``values[name][group]`` the number, where the group is ``""`` (grain vector), a layer
    (:func:`layer_of`) or a tensor. ``inputs`` and ``base`` are the records of what they were learned on (with hashes),
    ``learned`` says how: objective, split, ``transductive``, seed, schedule, history.
    """

    grain: CoefficientGrain
    values: Mapping[str, Mapping[str, float]]
    inputs: tuple[Mapping[str, Any], ...] = ()
    base: Mapping[str, Any] | None = None
    learned: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vectors(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def transductive(self) -> bool:
        """Whether test inputs were used."""
        return bool(self.learned.get("transductive"))

    def of(self, vector: str, tensor: str) -> float:
        """The coefficient of one vector in one tensor (by its name in the base).

        Raises IncompatibleError (exit 4) for a tensor that took no part in learning.
        """
        group = group_of(self.grain)(tensor)
        if group not in self.values[vector]:
            raise IncompatibleError(
                f"{vector} has no coefficient for this tensor: it took no part in learning", tensor=tensor,
                values={"per": self.grain, "known": next(iter(self.values[vector]), "none")},
                remedy="Merge with the recipe that they were learned with, and with --base.",
            )
        return float(self.values[vector][group])

    def scaled(self, pool: Pool) -> Pool:
        """Every vector times its coefficients, lazily: their plain sum is the merge.

        Raises IncompatibleError (exit 4) unless the pool has the vectors of these coefficients, in their order.
        """
        check_names(self.vectors, pool.names)

        def of_one(name: str) -> Callable[[str, Delta], Delta]:
            return lambda tensor, delta: delta.scale(self.of(name, tensor))

        return replace(pool, vectors=tuple(v.map(of_one(v.name)) for v in pool))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same every time."""
        plain = {v: dict(row) if self.grain != "vector" else row[""] for v, row in self.values.items()}
        return {
            "schema": SCHEMA, "kind": "coefficients", "grain": self.grain, "values": plain,
            "inputs": [dict(i) for i in self.inputs], "base": None if self.base is None else dict(self.base),
            "learned": dict(self.learned),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: object, file: str) -> Coefficients:
        """The inverse of :meth:`to_dict`. Raises InputError (exit 3) for anything else."""
        if not isinstance(data, dict) or data.get("kind") != "coefficients" or data.get("schema") != SCHEMA:
            raise InputError("not a file of coefficients", file=file, remedy="devec learn -o writes one.")
        grain, values = data.get("grain"), data.get("values")
        if grain not in GRAINS or not isinstance(values, dict) or not values:
            raise InputError("coefficients without a grain or values", values={"grain": grain}, file=file)
        rows = {v: {"": row} if grain == "vector" else row for v, row in values.items()}
        for vector, row in rows.items():
            if not isinstance(row, dict):
                raise InputError(f"the coefficients of {vector} are not per {grain}", file=file)
            for group, value in row.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                    raise InputError(
                        f"a coefficient of {vector} is no finite number", values={group or "value": value}, file=file
                    )
        return cls(grain, rows, tuple(data.get("inputs") or ()), data.get("base"), data.get("learned") or {})


def check_names(wanted: Sequence[str], given: Sequence[str]) -> None:
    """Raises IncompatibleError (exit 4) where coefficients belong to other vectors, or to these in another order."""
    for i in range(max(len(wanted), len(given))):
        one = wanted[i] if i < len(wanted) else "none"
        other = given[i] if i < len(given) else "none"
        if one != other:
            raise IncompatibleError(
                f"the coefficients are of other vectors: number {i + 1} differs",
                values={"learned for": one, "given": other},
                remedy="Give the sources of the recipe that they were learned with, in its order.",
            )
