"""A base with weighted task vectors added: the one way from delta space back to weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo, TensorSource
from devec.core.errors import IncompatibleError
from devec.core.layout import Layout
from devec.core.vectors import TaskVector
from devec.io.names import resolve_names

Term = tuple[float, TaskVector]


class Edited:
    """``W = W_0 + sum_t c_t Delta_t``, tensor by tensor, on request. A ``TensorSource`` like any checkpoint.

    Sums are taken in ``dtype`` (float32 or wider) and cast last: to ``out_dtype``, or to the dtype of the base's tensor.
    """

    def __init__(
        self,
        base: TensorSource,
        terms: Sequence[Term],
        *,
        dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
        heads: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.base, self.dtype, self.out_dtype = base, dtype, out_dtype
        self.terms: dict[str, list[tuple[float, TaskVector, str]]] = {}
        available = list(base.names()) + list(base.ties)
        for coefficient, vector in terms:
            _check_base(base, vector)
            for own, there in resolve_names(vector.deltas, available).items():
                name = base.ties.get(there, there)
                _check_shape(base, vector, own, name)
                self.terms.setdefault(name, []).append((coefficient, vector, own))
        self.heads = dict(heads or {})

    @property
    def reference(self) -> str:
        return self.base.reference

    @property
    def ties(self) -> Mapping[str, str]:
        return self.base.ties

    @property
    def config(self) -> dict[str, Any] | None:
        return getattr(self.base, "config", None)

    @property
    def folder(self) -> Path | None:
        return getattr(self.base, "folder", None)

    def names(self) -> Sequence[str]:
        return self.base.names()

    def file_of(self, name: str) -> str:
        return self.base.file_of(name)

    def layout(self, name: str) -> Layout:
        from devec.api.extract import layout_of

        return layout_of(self.base, name)

    def info(self, name: str) -> TensorInfo:
        info = self.base.info(name)
        if name in self.heads:
            shape = tuple(self.heads[name].shape)
            return TensorInfo(shape, self._target(info.dtype))
        return TensorInfo(info.shape, self._target(info.dtype))

    def _target(self, stored: torch.dtype) -> torch.dtype:
        return stored if self.out_dtype is None or not stored.is_floating_point else self.out_dtype

    def get(self, name: str) -> Tensor:
        value = self.base.get(name)
        target = self._target(value.dtype)
        if name in self.heads:
            return self.heads[name].to(target)
        if name not in self.terms:
            return value.to(target)
        total = value.to(self.dtype)
        for coefficient, vector, own in self.terms[name]:
            delta = vector.deltas[own].to(self.dtype)
            total = total + coefficient * vector.layouts[own].to_stored(delta.dense())
        return total.to(target)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor in memory, tied names included."""
        out = {n: self.get(n) for n in self.names()}
        return {**out, **{alias: out[name] for alias, name in self.ties.items()}}


def edit(base: TensorSource, terms: Sequence[Term], **options: Any) -> Edited:
    """See :class:`Edited`."""
    return Edited(base, terms, **options)


def _check_base(base: TensorSource, vector: TaskVector) -> None:
    recorded = vector.origin.base_fingerprint
    if recorded is None or not hasattr(base, "fingerprint"):
        return
    now = base.fingerprint()
    if now != recorded:
        raise IncompatibleError(
            f"{vector.name} was taken against another base",
            values={"recorded": recorded[:16], "given": now[:16]},
            file=base.reference,
            remedy="Give the base that it was extracted against.",
        )


def _check_shape(base: TensorSource, vector: TaskVector, own: str, name: str) -> None:
    stored = tuple(base.info(name).shape)
    layout = vector.layouts[own]
    if stored == layout.shape:
        return
    raise IncompatibleError(
        f"a delta of {vector.name} does not fit the base",
        tensor=name,
        values={"base": stored, vector.name: layout.shape},
        file=base.file_of(name),
        remedy="Use the base that the vector was made for.",
    )
