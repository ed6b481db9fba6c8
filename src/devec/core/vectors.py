"""Task vectors and pools of them.

A task vector is a set of named deltas against one base. Its deltas are a mapping, which may compute each one only
when asked (``LazyMap``): arithmetic on task vectors builds no copy of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt

from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import TensorSource
from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import IncompatibleError, UsageError
from devec.core.layout import Layout


class LazyMap(Mapping[str, Delta]):
    """A mapping whose values are made on request, each time anew; nothing is kept.

    ``cost`` says how many bytes making a value takes besides rows that are read block by block (0 if not given).
    """

    def __init__(
        self, names: Sequence[str], make: Callable[[str], Delta], cost: Callable[[str], int] | None = None
    ) -> None:
        self._names = dict.fromkeys(names)
        self._make = make
        self._cost = cost

    def cost(self, name: str) -> int:
        return 0 if self._cost is None else self._cost(name)

    def __getitem__(self, name: str) -> Delta:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True)
class Origin:
    """Where a task vector came from, for errors, cards and provenance."""

    reference: str = "memory"  # what the user typed, or "memory"
    revision: str | None = None  # the commit that a reference to the Hugging Face Hub was resolved to
    file: str | None = None  # the weight file
    dialect: str = "memory"  # "peft" | "diffusers" | "checkpoint" | "artifact" | "memory"
    base_name: str | None = None  # what the adapter says its base is
    base_fingerprint: str | None = None  # hash of the base's tensor names, shapes and dtypes, and of its bytes
    config: Mapping[str, object] = field(default_factory=dict)  # the adapter's own configuration
    model: TensorSource | None = field(default=None, compare=False, repr=False)  # what was read, still open
    base: TensorSource | None = field(default=None, compare=False, repr=False)  # what it was taken against, still open
    others: tuple[TensorSource, ...] = field(default=(), compare=False, repr=False)  # what else a sum of vectors reads

    def sources(self) -> list[TensorSource]:
        """Every open model that the vector reads from, each once."""
        found = [s for s in (self.model, *self.others, self.base) if s is not None]
        return list({id(s): s for s in found}.values())

    def base_hash(self) -> str | None:
        """The base's fingerprint, which reads the base where it is open and was not read whole before."""
        if self.base_fingerprint is None and self.base is not None and hasattr(self.base, "fingerprint"):
            found: str = self.base.fingerprint()
            return found
        return self.base_fingerprint

    def has_base(self) -> bool:
        return self.base_fingerprint is not None or (self.base is not None and hasattr(self.base, "fingerprint"))

    def same_base(self, other: Origin) -> bool:
        """False only where both are known and differ; the same open base is not read to see that it is the same."""
        if not self.has_base() or not other.has_base() or (self.base is not None and self.base is other.base):
            return True
        return self.base_hash() == other.base_hash()


@dataclass(frozen=True)
class TaskVector:
    """Named deltas against one base.

    ``deltas``  canonical tensor name -> :class:`Delta` (``out x in``)
    ``layouts`` canonical tensor name -> how the base stores that tensor
    ``heads``   tensors that are whole replacements (task heads, ``modules_to_save``), never mixed or compared
    ``space``   "standard", or "tangent" for linearised fine-tuning; the two do not mix
    ``partial`` True for an adapter: a module that it lacks is unchanged rather than missing
    """

    name: str
    deltas: Mapping[str, Delta]
    layouts: Mapping[str, Layout]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    space: str = "standard"
    partial: bool = True

    def names(self) -> list[str]:
        return list(self.deltas)

    def named(self, name: str) -> TaskVector:
        return replace(self, name=name)

    def is_low_rank(self) -> bool:
        """True if every matrix is factored (the vector can be written as a LoRA as it is; its biases ride along)."""
        return self.first_dense() is None

    def first_dense(self) -> str | None:
        """The first tensor that no LoRA can hold as it is: a dense matrix, or a 1-D change without any matrix."""
        matrices = [n for n in self.deltas if not self.layouts[n].is_vector]
        return next((n for n in matrices or self.deltas if not isinstance(self.deltas[n], LowRankDelta)), None)

    def matrices(self) -> TaskVector:
        """The vector without its 1-D parameters."""
        names = [n for n in self.deltas if not self.layouts[n].is_vector]
        return self._with(names, lambda n: self.deltas[n], self.name)

    def where(self, pattern: str) -> TaskVector:
        """The part of the vector whose tensor names match ``pattern`` (``re.search``)."""
        rx = re.compile(pattern)
        keep = [n for n in self.deltas if rx.search(n)]
        return self._with(keep, lambda n: self.deltas[n], self.name)

    def map(self, f: Callable[[str, Delta], Delta], name: str | None = None) -> TaskVector:
        """Apply ``f(tensor name, delta)`` to every delta, lazily."""
        return self._with(self.names(), lambda n: f(n, self.deltas[n]), name or self.name)

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self.map(lambda _n, d: d.scale(float(factor)), f"{factor:g}*{self.name}")

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        check_pair(self, other)
        names = self.names() + [n for n in other.names() if n not in self.deltas]

        def total(n: str) -> Delta:
            if n not in other.deltas:
                return self.deltas[n]
            if n not in self.deltas:
                return other.deltas[n]
            return self.deltas[n].add(other.deltas[n])

        origin = replace(self.origin, others=(*self.origin.others, *other.origin.sources()))
        merged = replace(self, layouts={**other.layouts, **self.layouts}, heads={}, origin=origin)
        return merged._with(names, total, f"{self.name}+{other.name}")

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return (self + (-other)).named(f"{self.name}-{other.name}")

    def inner(self, other: TaskVector) -> float:
        """Sum over common tensors of ``<Delta_a, Delta_b>``, in float64."""
        check_pair(self, other)
        return sum(self.deltas[n].inner(other.deltas[n]) for n in self.deltas if n in other.deltas)

    def norm(self) -> float:
        return sqrt(sum(self.deltas[n].norm() ** 2 for n in self.deltas))

    def cosine(self, other: TaskVector) -> float:
        """``<a, b> / (|a| |b|)`` over all tensors of each; 0 if either vector is zero."""
        scale = self.norm() * other.norm()
        return self.inner(other) / scale if scale > 0 else 0.0

    def to_lowrank(self, rank: int) -> TaskVector:
        """The best rank-``rank`` approximation of every matrix (truncated SVD)."""
        from devec.linalg.lowrank import svd_of_dense

        def cut(_n: str, d: Delta) -> Delta:
            if isinstance(d, LowRankDelta):
                return d.recompress(rank)
            svd = svd_of_dense(d.dense(), rank)
            return LowRankDelta(svd.U * svd.S.to(svd.U.dtype), svd.V.T)

        return self.map(cut)

    def _with(self, names: Sequence[str], make: Callable[[str], Delta], name: str) -> TaskVector:
        return replace(
            self, name=name, deltas=LazyMap(names, make, cost_of(self.deltas)),
            layouts={n: self.layouts[n] for n in names},
        )


def cost_of(deltas: Mapping[str, Delta]) -> Callable[[str], int]:
    """What making each delta takes (see :class:`LazyMap`); nothing for those that stand in memory."""
    return deltas.cost if isinstance(deltas, LazyMap) else lambda _name: 0


def analogy(a: TaskVector, b: TaskVector, c: TaskVector) -> TaskVector:
    """"a is to b as c is to ...": ``c + (b - a)`` (task analogies, Ilharco et al., arXiv:2212.04089)."""
    return (c + (b - a)).named(f"{c.name}+({b.name}-{a.name})")


def check_pair(a: TaskVector, b: TaskVector) -> None:
    """Refuse two vectors that cannot be added: another space, another base, or a tensor of unlike shape."""
    _check_space(a, b)
    _check_base(a, b)
    for n in a.deltas:
        if n in b.layouts:
            _check_shape(a, b, n)


def check_all(vectors: Sequence[TaskVector]) -> None:
    """:func:`check_pair` of all pairs at a cost linear in the vectors: being alike is transitive, so each is held
    against the first that has what is compared."""
    first_with_base: TaskVector | None = None
    first_with: dict[str, TaskVector] = {}
    for v in vectors:
        _check_space(vectors[0], v)
        if first_with_base is not None:
            _check_base(first_with_base, v)
        elif v.origin.has_base():
            first_with_base = v
        for n in v.layouts:
            if n in first_with:
                _check_shape(first_with[n], v, n)
        for n in v.deltas:
            first_with.setdefault(n, v)


def _check_space(a: TaskVector, b: TaskVector) -> None:
    if a.space != b.space:
        raise IncompatibleError(
            "vectors live in different spaces",
            values={a.name: a.space, b.name: b.space},
            remedy="Use vectors of one kind of fine-tuning.",
        )


def _check_base(a: TaskVector, b: TaskVector) -> None:
    if not a.origin.same_base(b.origin):
        raise IncompatibleError(
            "vectors were taken against different bases",
            values={v.name: f"base {str(v.origin.base_hash())[:12]}" for v in (a, b)},
            file=b.origin.file,
            remedy="Extract both against the same base.",
        )


def _check_shape(a: TaskVector, b: TaskVector, tensor: str) -> None:
    if a.layouts[tensor].matrix_shape != b.layouts[tensor].matrix_shape:
        raise IncompatibleError(
            "a common tensor has unlike shapes",
            tensor=tensor,
            values={a.name: a.layouts[tensor].matrix_shape, b.name: b.layouts[tensor].matrix_shape},
            file=b.origin.file,
            remedy="Leave it out with --exclude, or use vectors of one architecture.",
        )


@dataclass(frozen=True)
class Pool:
    """Task vectors that share a base, in the order given (order never decides a default result)."""

    vectors: tuple[TaskVector, ...]

    def __post_init__(self) -> None:
        seen: dict[str, TaskVector] = {}
        for v in self.vectors:
            if v.name in seen:
                raise UsageError(
                    f"two vectors are called {v.name!r}",
                    values={"first": seen[v.name].origin.reference, "second": v.origin.reference},
                    remedy="Name them: one=PATH two=PATH.",
                )
            if re.search(r"[+#,\s]", v.name) or not v.name:
                raise UsageError(
                    f"{v.name!r} cannot name a vector: +, #, comma and space have a meaning in references",
                    remedy="Give it a name: name=PATH.",
                )
            seen[v.name] = v
        check_all(self.vectors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(v.name for v in self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def __iter__(self) -> Iterator[TaskVector]:
        return iter(self.vectors)

    def __getitem__(self, key: int | str) -> TaskVector:
        if isinstance(key, int):
            return self.vectors[key]
        for v in self.vectors:
            if v.name == key:
                return v
        raise UsageError(
            f"no vector is called {key!r}", values={"vectors": ", ".join(self.names)}, remedy="Use one of these."
        )

    def tensors(self) -> list[str]:
        """Every tensor name, in the order of the first vector that has it."""
        return list(dict.fromkeys(n for v in self.vectors for n in v.deltas))

    def layout(self, name: str) -> Layout:
        for v in self.vectors:
            if name in v.layouts:
                return v.layouts[name]
        raise KeyError(name)

    def block(self, name: str) -> Block:
        """One tensor of every vector; ``None`` where an adapter lacks it."""
        return Block(
            name=name,
            layout=self.layout(name),
            vectors=self.names,
            # Not ``get``: it would take a KeyError raised while a delta is made for a tensor that is missing.
            deltas=tuple(v.deltas[name] if name in v.deltas else None for v in self.vectors),  # noqa: SIM401
        )

    def blocks(self) -> Iterator[Block]:
        for name in self.tensors():
            yield self.block(name)
