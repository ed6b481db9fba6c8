"""EMR: elect one vector, mask and rescale it for each task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.methods.merge.entries import elected, index_of, measured, merged, stack
from devec.methods.registry import register


def measure(whole: Whole, **_: Any) -> list[float]:
    """Every task's rescaler: sum over tensors of mean ``|Delta_t|``, over that of mean ``|m_t * u|``."""

    def look(blocks: Iterable[Block]) -> Tensor | None:
        sums, count = torch.zeros(1), 0
        for block in blocks:
            entries = stack(block)
            one = unified(entries)
            sums = sums + torch.stack([torch.stack([_l1(e), _l1(one * agrees(e, one))]) for e in entries])
            count += one.numel()
        return sums / count if count else None

    found = [means for means in whole(look) if means is not None]
    if not found:
        return []
    own, masked = sum(found[1:], found[0]).T
    return torch.where(masked > 0, own / masked, 0.0).tolist()


@register("merge", grain="elements", source="arXiv:2405.17461", measure=measure, whole="model", looks=lambda _: 1,
          per_task=True)
def emr(block: Block, task: str) -> Delta:
    """The elected vector, masked to one task's signs and rescaled to its size: that task's model.

    One model per task, and the task must be known when it is used: its scores are not comparable with those of a
    single merged model, but with storing one vector and T masks.

    Math        g = sign(sum_i Delta_i);  u = g * max_{i: Delta_i g > 0} |Delta_i|;  m_t = [Delta_t u > 0]
                W_t = W_0 + s_t m_t * u,  s_t = sum_l mean|Delta_t^l| / sum_l mean|m_t^l * u^l|
    Symbols     t = task, the vector of that name (or its number from 1); l = every tensor of the model
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  one vector alone comes back; no entry has another sign than the task's; size: the means over tensors of
                |W_t - W_0| and of |Delta_t| have the same sum, and s_t <= 1 where all signs agree; permutation up to
                rounding
    Numerics    means in float64 over the whole model (one more pass over all inputs); called on a block by hand, the
                block is the model
    Differs     s_t adds means over tensors, as the authors' code does; where signs cancel exactly u is 0
    Raises      UsageError: no such task; InputError: NaN or infinity
    """
    one = index_of(block, task, "emr")
    found = measured(block, measure)
    entries = stack(block)
    shared = unified(entries)
    return merged(block, (shared * agrees(entries[one], shared)).mul_(found[one] if found else 0.0))


def unified(entries: Tensor) -> Tensor:
    """Of every entry the largest magnitude among the vectors that have the elected sign, with that sign."""
    signs = elected(entries)
    out = torch.zeros_like(signs)
    for entry in entries:
        out = torch.maximum(out, entry * signs)
    return out.mul_(signs)


def agrees(entry: Tensor, shared: Tensor) -> Tensor:
    return entry * shared > 0


def _l1(entry: Tensor) -> Tensor:
    return entry.abs().double().sum()
