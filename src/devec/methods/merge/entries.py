"""What elementwise merges have in common: the entries of all vectors, elections of signs, and checks of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Measure, Whole
from devec.core.delta import DenseDelta
from devec.core.errors import InputError, UsageError
from devec.linalg.numerics import NonFiniteError, compute_dtype, peak
from devec.linalg.select import BINS, descend, digits, float_of, histogram

L = TypeVar("L")
Elect = Literal["sum", "count"]
Then = Literal["task-arithmetic", "ties"]
Reduce = Literal["sum", "mean"]


@dataclass(frozen=True)
class Alone:
    """A block that was given whole: the :class:`~devec.core.contracts.Whole` of a method that is called by hand."""

    block: Block

    @property
    def dtype(self) -> torch.dtype:
        return self.block.dtype

    def __call__(self, look: Callable[[Iterable[Block]], L]) -> Iterator[L]:
        yield look([self.block])


def measured(block: Block, measure: Measure, **parameters: Any) -> Any:
    """What the first pass found; a block that comes without is the whole, and is measured here."""
    return block.stats["measured"] if "measured" in block.stats else measure(Alone(block), **parameters)


def stack(block: Block) -> Tensor:
    """``(T, n, m)``: the entries of every vector in float32 or wider, zeros where one lacks the tensor; a copy.

    Raises InputError for NaN or infinity: comparisons and masks would drop it in silence.
    """
    dtype = compute_dtype(block.dtype)
    out = torch.zeros(len(block.deltas), *block.layout.matrix_shape, dtype=dtype)
    for i, delta in enumerate(block.deltas):
        if delta is None:
            continue
        out[i] = delta.dense()
        try:
            peak(out[i])
        except NonFiniteError as error:
            raise InputError(
                f"NaN or infinity in {block.vectors[i]}", tensor=block.name, values={"bad entries": error.reason},
                remedy="Repair the file, or leave the tensor out with --exclude.",
            ) from None
    return out


def merged(block: Block, value: Tensor) -> DenseDelta:
    """The result in the dtype of the deltas."""
    return DenseDelta(value.to(block.dtype))


def total(entries: Tensor) -> Tensor:
    """The sum over vectors, added one by one: no bit depends on how many entries stand beside another."""
    out = entries[0].clone()
    for more in entries[1:]:
        out += more
    return out


def weigh(entries: Tensor, weights: Sequence[float]) -> Tensor:
    """Each vector times its weight, in place."""
    for entry, weight in zip(entries, weights, strict=True):
        if weight != 1.0:
            entry *= weight
    return entries


def order_statistics(
    whole: Whole, values: Callable[[Block], Tensor], ranks: Callable[[int, int], Sequence[int]],
    dtype: torch.dtype | None = None,
) -> list[list[float]]:
    """Of each vector, the entries of the given ranks (0 the smallest) among ``values(block)``, ``(T, n, m)``, exactly.

    ``ranks(n, i)`` says which are wanted of the n entries of vector i, as many of each vector; an empty whole has none.
    ``dtype`` is that of the values (by default that of the entries). Every pass reads everything once: 2 for float32,
    4 for float64.
    """
    dtype = dtype or compute_dtype(whole.dtype)
    prefixes: list[list[int | None]] = []
    rests: list[list[int]] = []
    for step in range(digits(dtype)):

        def look(
            blocks: Iterable[Block], step: int = step, prefixes: Sequence[Sequence[int | None]] = prefixes
        ) -> Tensor | None:
            counts: Tensor | None = None
            for block in blocks:
                entries = values(block).to(dtype)
                wanted = prefixes or [[None]] * len(entries)
                found = torch.stack([histogram(x, w, step) for x, w in zip(entries, wanted, strict=True)])
                counts = found if counts is None else counts.add_(found)
            return counts

        sums: Tensor | None = None
        for counts in whole(look):
            if counts is not None:
                sums = counts.clone() if sums is None else sums.add_(counts)
        if sums is None or not int(sums[0, 0].sum()):
            return []
        if step == 0:
            rests = [list(ranks(int(row.sum()), i)) for i, row in enumerate(sums[:, 0])]
            prefixes = [[None] * len(rest) for rest in rests]
            sums = sums.expand(-1, len(rests[0]), BINS)
        for vector, rest in enumerate(rests):
            for n, rank in enumerate(rest):
                prefixes[vector][n], rest[n] = descend(sums[vector, n], rank, prefixes[vector][n])
    return [[float_of(int(p), dtype) for p in row if p is not None] for row in prefixes]


def largest(whole: Whole, density: Sequence[float] | float) -> list[float]:
    """Of each vector, the k-th largest magnitude, ``k = floor(density n)`` and at least 1; [] of an empty whole."""
    found = order_statistics(whole, lambda block: stack(block).abs_(), lambda n, i: [n - kept(of(density, i), n)])
    return [cut for (cut,) in found]


def kept(density: float, n: int) -> int:
    return max(int(density * n), 1)


def elected(entries: Tensor, by: Elect = "sum") -> Tensor:
    """-1, 0 or 1 an entry: the sign of the sum of all vectors, or of the sum of their signs."""
    return total(entries.sign() if by == "count" else entries).sign_()


def of_the_elected(
    entries: Tensor, signs: Tensor, weights: Sequence[float], how: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Sum of the (weighted) entries that have the elected sign; ``mean`` divides by the sum of their ``|w|``."""
    out, shares = torch.zeros_like(signs), torch.zeros_like(signs)
    for entry, weight in zip(entries, weights, strict=True):
        ahead = (entry * signs).clamp_(min=0.0)
        out += ahead
        if how == "mean":
            shares += (ahead > 0) * abs(weight)
    return (quotient(out, shares) if how == "mean" else out).mul_(signs)


def quotient(values: Tensor, shares: Tensor) -> Tensor:
    """``values / shares``, 0 for 0/0."""
    return (values / shares).nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf"))


def l1_factors(whole: Whole, thin: Callable[[Block], Tensor]) -> list[float]:
    """``|Delta_i|_1 / |thinned|_1`` of each vector over the whole; 0 where nothing is left."""

    def look(blocks: Iterable[Block]) -> Tensor | None:
        sums = [torch.stack([_l1(stack(b)), _l1(thin(b))]) for b in blocks]
        return sum(sums[1:], sums[0]) if sums else None

    found = [sums for sums in whole(look) if sums is not None]
    if not found:
        return []
    before, after = sum(found[1:], found[0])
    return torch.where(after > 0, before / after, 0.0).tolist()


def _l1(entries: Tensor) -> Tensor:
    return torch.stack([entry.abs().double().sum() for entry in entries])


def rescaled(entries: Tensor, factors: Sequence[float]) -> Tensor:
    """Each vector times its factor, in place; an empty tensor has none."""
    for entry, factor in zip(entries, factors, strict=False):
        entry *= factor
    return entries


def joined(method: str, entries: Tensor, weights: list[float], then: str, reduce: Reduce | None = None) -> Tensor:
    """The sum of what is left, or of what has the elected sign; its mean with ``reduce="mean"``, the default of ties.

    A mean divides by the sum of the weights: of all, or of ``|w|`` of those that agree.
    """
    one_of(method, "then", then, "task-arithmetic", "ties")
    if reduce is not None:
        one_of(method, "reduce", reduce, "sum", "mean")
    if then == "ties":
        return of_the_elected(entries, elected(entries), weights, reduce or "mean")
    return total(entries).div_(sum_of(weights, method)) if reduce == "mean" else total(entries)


def sum_of(weights: Sequence[float], method: str) -> float:
    """Raises UsageError if it is zero."""
    found = sum(weights)
    if found == 0.0:
        raise UsageError(f"{method}: the weights sum to zero")
    return found


def of(values: Sequence[float] | float, vector: int) -> float:
    """A parameter's value for one vector."""
    return values[vector] if isinstance(values, Sequence) else values


def per_vector(block: Block, values: Sequence[float] | float, method: str, name: str) -> list[float]:
    """One a vector. Raises UsageError if there are more or fewer."""
    found = list(values) if isinstance(values, Sequence) else [values] * len(block.deltas)
    if len(found) != len(block.deltas):
        raise UsageError(f"{method} got {len(found)} {name} for {len(block.deltas)} vectors")
    return found


def weights_for(block: Block, weights: Sequence[float] | None, method: str) -> list[float]:
    if weights is not None and len(weights) != len(block.deltas):
        raise UsageError(f"{method} got {len(weights)} weights for {len(block.deltas)} vectors")
    return [1.0] * len(block.deltas) if weights is None else list(weights)


def index_of(block: Block, task: str, method: str) -> int:
    """The vector of this name, or of this number counted from 1."""
    if task in block.vectors:
        return block.vectors.index(task)
    if task.isdecimal() and 1 <= int(task) <= len(block.vectors):
        return int(task) - 1
    raise UsageError(
        f"{method}: task={task!r} is no vector", values={"vectors": ", ".join(block.vectors)},
        remedy="Give the name of one, or its number.",
    )


def within(method: str, name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises UsageError unless ``low <= value <= high`` (``low < value`` with ``open_low``)."""
    if not (low < value if open_low else low <= value) or not value <= high:
        raise UsageError(f"{method}: {name}={value:g} is not in {'(' if open_low else '['}{low:g}, {high:g}]")


def one_of(method: str, name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UsageError(f"{method}: {name}={value!r} is not one of {', '.join(allowed)}")
