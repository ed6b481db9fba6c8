"""Model Breadcrumbs: without the largest and without the smallest entries."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.methods.merge.entries import (
    measured,
    merged,
    one_of,
    order_statistics,
    stack,
    total,
    weigh,
    weights_for,
    within,
)
from devec.methods.registry import register


def measure(whole: Whole, *, scope: str, beta: float, gamma: float, **_: Any) -> list[list[float]]:
    """With scope=tensor, the smallest and the largest magnitude that each vector keeps; nothing is read otherwise."""
    if scope != "tensor":
        return []
    return order_statistics(whole, lambda block: stack(block).abs_(), lambda n: borders(n, beta, gamma))


@register("merge", grain="rows", source="arXiv:2312.06795", measure=measure)
def breadcrumbs(
    block: Block,
    beta: float = 0.2,
    gamma: float = 0.1,
    scale: float = 0.4,
    weights: list[float] | None = None,
    scope: Literal["row", "tensor"] = "row",
) -> Delta:
    """Drop the largest entries of every row, keep the largest of the rest, and sum.

    Math        of the n entries of a row by falling magnitude, m_i keeps places g + 1 to g + k,
                g = floor(gamma n), k = floor(beta n);  W = W_0 + scale * sum_i w_i m_i * Delta_i
    Symbols     gamma = the fraction that is dropped as too large; beta = the fraction of all that is kept;
                w_i = weights[i], 1 each by default; scope=tensor: the n entries are those of the tensor
    Shapes      T deltas (n, m) -> one (n, m); a row is one of the matrix out x in, a 1-D parameter is one row
    Guarantees  borders: exact order statistics, k >= 1 and g + k <= n;
                ties: an entry equal to one that is kept is kept, so the order of entries decides nothing;
                beta 1 and gamma 0 is task arithmetic; linear in scale and weights; permutation up to rounding
    Numerics    sorts rows, or selects on the bits (scope=tensor: two more passes); sums in the order given
    Differs     defaults are those of the authors' example (beta, gamma) and of their program (scale). Convolutions: the
                authors take rows along the last dimension, here out x (in k k). mergekit: scope=tensor, where its mask
                is empty if gamma n < 1; here nothing is dropped then
    Raises      UsageError: number of weights, beta outside (0, 1], gamma outside [0, 1), beta + gamma above 1, an
                unknown word; InputError: NaN or infinity
    """
    within("breadcrumbs", "beta", beta, 0.0, 1.0, open_low=True)
    within("breadcrumbs", "gamma", gamma, 0.0, 1.0)
    within("breadcrumbs", "beta + gamma", beta + gamma, 0.0, 1.0 + 1e-12)
    one_of("breadcrumbs", "scope", scope, "row", "tensor")
    w = weights_for(block, weights, "breadcrumbs")
    found = measured(block, measure, scope=scope, beta=beta, gamma=gamma)
    entries = stack(block)
    if entries.numel():
        if scope == "tensor":
            low, high = torch.tensor(found, dtype=entries.dtype).T[:, :, None, None]
        else:
            low, high = row_borders(as_rows(block, entries), beta, gamma)
        size = entries.abs()
        entries *= (size >= low) & (size <= high)
    return merged(block, total(weigh(entries, w)).mul_(scale))


def borders(n: int, beta: float, gamma: float) -> list[int]:
    """Ranks (0 the smallest) of the smallest and the largest entry that is kept, of n."""
    g = int(gamma * n)
    k = min(max(int(beta * n), 1), n - g)
    return [n - g - k, n - g - 1]


def row_borders(entries: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    low, high = borders(entries.shape[-1], beta, gamma)
    ordered = torch.from_numpy(np.sort(entries.abs().numpy(), axis=-1))  # ten times as fast as torch
    return ordered[..., low, None], ordered[..., high, None]


def as_rows(block: Block, entries: Tensor) -> Tensor:
    """The entries with a 1-D parameter, which is a column, as one row."""
    return entries.transpose(-1, -2) if block.layout.is_vector else entries
