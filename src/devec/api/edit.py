"""A base with weighted task vectors added: the one way from delta space back to weight space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.api.extract import is_zero, layout_of, widened_rows
from devec.api.sources import hub_of
from devec.core.contracts import TensorInfo, TensorSource
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import IncompatibleError, InputError
from devec.core.layout import Layout
from devec.core.lazy import LazyDelta, in_file, row_blocks
from devec.core.vectors import TaskVector
from devec.io.checkpoint import checkpoint_from_state_dict
from devec.io.hub_id import HubFolder
from devec.io.names import resolve_names
from devec.io.rounding import cast

Term = tuple[float, TaskVector]


class Edited:
    """``W = W_0 + sum_t c_t Delta_t``, tensor by tensor, on request. A ``TensorSource`` like any checkpoint.

    Sums are taken in ``dtype`` (float32 or wider) and cast last: to ``out_dtype``, or to the dtype that the base has.
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
        self.terms: dict[str, list[tuple[float, TaskVector, str, Layout]]] = {}
        available = list(base.names()) + list(base.ties)
        for coefficient, vector in terms:
            _check_base(base, vector)
            for own, there in resolve_names(vector.deltas, available).items():
                name = base.ties.get(there, there)
                if vector.partial:
                    _check_tie(base, vector, own, there)
                layout = _stored_layout(base, vector, own, name)
                self.terms.setdefault(name, []).append((coefficient, vector, own, layout))
        self.vectors = list({id(v): v for of_tensor in self.terms.values() for _, v, *_ in of_tensor}.values())
        self.heads = dict(heads or {})
        self._fingerprint: str | None = None

    @property
    def reference(self) -> str:
        return self.base.reference

    @property
    def hub(self) -> HubFolder | None:
        return hub_of(self.base)

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
        """The tensor, rounded last. Raises RefusedError for a value too large for its dtype."""
        return cast(name, self.value(name), self.info(name).dtype, self.base.file_of(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the tensor, rounded last."""
        return cast(name, self.values(name)(start, stop), self.info(name).dtype, self.base.file_of(name))

    def values(self, name: str) -> Callable[[int, int], Tensor]:
        """Rows of the tensor before it is rounded: sums in the compute dtype; heads and untouched tensors as stored.

        Rows are asked for in the blocks of ``core.lazy.row_blocks``, so that the same numbers come out whoever asks.
        """
        if name in self.heads:
            head = self.heads[name]
            return lambda start, stop: head[start:stop] if head.ndim else head.reshape(1)
        if name not in self.terms:
            return lambda start, stop: self.base.rows(name, start, stop)
        stored = self.base.info(name)
        dtype = torch.promote_types(self.dtype, stored.dtype)
        terms: list[tuple[float, Delta]] = []
        for coefficient, vector, own, layout in self.terms[name]:
            delta = vector.deltas[own]
            dtype = torch.promote_types(dtype, delta.dtype)
            by_rows = isinstance(delta, (DenseDelta, LazyDelta, LowRankDelta))
            terms.append((coefficient, in_file(delta if by_rows else DenseDelta(delta.dense()), layout.transposed)))

        empty = bool(terms) and is_zero(self.base, name)

        def read(start: int, stop: int) -> Tensor:
            total = None if empty else widened_rows(self.base, name, start, stop, dtype)
            own = False  # whether nobody else holds the total
            for coefficient, delta in terms:
                rows = delta.rows(start, stop).dense().to(dtype).reshape(stop - start, *stored.shape[1:])
                rows = rows if coefficient == 1.0 else rows * coefficient
                if total is None:
                    total = rows
                elif own:
                    total.add_(rows)
                else:
                    total, own = total + rows, True
            assert total is not None
            return total

        return read

    def value(self, name: str) -> Tensor:
        """The whole tensor before it is rounded (see :meth:`values`)."""
        read, shape = self.values(name), self.info(name).shape
        blocks = [read(start, stop) for start, stop in row_blocks(shape)]
        if not blocks:
            return self.base.get(name) if name not in self.heads else self.heads[name]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).reshape(shape)

    def fingerprint(self) -> str:
        """SHA-256 over what it holds, tensor by tensor, so that vectors taken against it are known again."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name in sorted(self.names()):
                one = checkpoint_from_state_dict({name: self.get(name)})
                digest.update(one.fingerprint().encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def blame(self, name: str) -> None:
        """After ``get(name)`` was not finite: raise InputError for the input that is not, if one is."""
        check_finite(self.base.get(name), name, self.base.file_of(name), "the base")
        for _, vector, own, _ in self.terms.get(name, []):
            check_finite(vector.deltas[own].dense(), own, vector.origin.file, vector.name)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor in memory, tied names included."""
        out = {n: self.get(n) for n in self.names()}
        return {**out, **{alias: out[name] for alias, name in self.ties.items()}}


def check_finite(value: Tensor, name: str, file: str | None, what: str) -> None:
    """Raises InputError (exit 3) for NaN or infinity in ``value``, a tensor of ``what``."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(
            f"NaN or infinity in {what}", tensor=name,
            values={"bad entries": f"{int((~torch.isfinite(value)).sum())} of {value.numel()}"}, file=file,
            remedy="Repair the file, or use another one.",
        )


def edit(base: TensorSource, terms: Sequence[Term], **options: Any) -> Edited:
    """See :class:`Edited`."""
    return Edited(base, terms, **options)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEADED = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def _check_tie(base: TensorSource, vector: TaskVector, own: str, name: str) -> None:
    """An adapter changes one module; where the base ties its weight to another's, writing it would change both.

    Ties are known from shared storage, or from ``tie_word_embeddings`` in the configuration of a model with a head.
    """
    tied = [base.ties[name]] if name in base.ties else [a for a, stored in base.ties.items() if stored == name]
    config = getattr(base, "config", None) or {}
    headed = any(str(c).endswith(HEADED) for c in config.get("architectures") or [])
    if not tied and config.get("tie_word_embeddings") and headed and name.endswith(EMBEDDINGS):
        tied = [n for n in ("lm_head.weight",) if n not in set(base.names())]
    if tied:
        raise IncompatibleError(
            f"{vector.name} changes one of two tied weights",
            tensor=own,
            values={"base ties": f"{name} and {tied[0]}"},
            file=base.reference,
            remedy="Leave the tensor out with --exclude, or untie the base first (save both tensors).",
        )


def _check_base(base: TensorSource, vector: TaskVector) -> None:
    if vector.origin.base is base or not vector.origin.has_base() or not hasattr(base, "fingerprint"):
        return
    recorded, now = str(vector.origin.base_hash()), base.fingerprint()
    if now != recorded:
        raise IncompatibleError(
            f"{vector.name} was taken against another base",
            values={"recorded": recorded[:16], "given": now[:16]},
            file=base.reference,
            remedy="Give the base that it was extracted against.",
        )


def _stored_layout(base: TensorSource, vector: TaskVector, own: str, name: str) -> Layout:
    """How the vector's matrix lies in the base's tensor.

    A difference of checkpoints knows. An adapter's matrix is ``out x in`` for certain, and how its module is stored
    only a guess unless it was read with a base; a base that has a configuration knows better.
    """
    there, guess = layout_of(base, name), vector.layouts[own]
    known = there.transposed or getattr(base, "config", None) is not None
    if vector.partial and known and there.matrix_shape == guess.matrix_shape:
        return there
    if there.shape == guess.shape:
        return guess
    if vector.partial and there.matrix_shape == guess.matrix_shape:
        return there
    raise IncompatibleError(
        f"a delta of {vector.name} does not fit the base",
        tensor=name,
        values={"base": there.shape, vector.name: guess.shape},
        file=base.file_of(name),
        remedy="Use the base that the vector was made for.",
    )
