"""PCB: parameters compete within their task and between tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.methods.merge.entries import measured, merged, one_of, order_statistics, quotient, stack, total, within
from devec.methods.registry import register

EDGE = 0.0001
"""Fraction of magnitudes at either end that is drawn in to its neighbour."""


def measure(whole: Whole, *, ratio: float, **_: Any) -> dict[str, list[list[float]]]:
    """Of every vector, (lowest, highest) magnitude without the edges, and (threshold, highest) of its scores."""
    sizes = order_statistics(
        whole, lambda b: stack(b).abs_(),
        lambda n, _: [_inside(int(n * EDGE), n), _inside(int(n * (1.0 - EDGE) - 1.0), n)],
    )
    if not sizes:  # an empty whole
        return {"sizes": [], "scores": []}
    scores = order_statistics(
        whole, lambda b: scored(stack(b), sizes), lambda n, _: [_inside(int(n * (1.0 - ratio)), n), n - 1],
        torch.float64,
    )
    return {"sizes": sizes, "scores": scores}


def _inside(rank: int, n: int) -> int:
    return min(max(rank, 0), n - 1)


@register("merge", grain="elements", source="arXiv:2410.02396", measure=measure, looks=lambda _: 6)
def pcb(
    block: Block, ratio: float = 0.1, scale: float = 1.0, scope: Literal["model", "tensor"] = "model"
) -> Delta:
    """Weigh every entry by how large it is in its task and how the tasks agree on it; drop the low scores.

    Math        a_i = |Delta_i| drawn in to [low_i, high_i];  b_i = ((a_i - low_i) / (high_i - low_i))^2
                score_i = exp(T b_i) tanh(Delta_i sum_j Delta_j)
                h_i = max(score_i, cut_i), scaled linearly to [0, 1];  W = W_0 + scale * sum_i h_i D_i / sum_i h_i
    Symbols     D_i = sign(Delta_i) a_i; low_i, high_i = quantiles 0.0001 and 0.9999 of |Delta_i|; cut_i = quantile
                1 - ratio of score_i: what is below has weight 0; all over the scope
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  quantiles: exact order statistics of the whole scope, whatever the blocks; dropped: an entry whose score
                is above the cut in no task stays the base's; between: a merged entry lies between the smallest and the
                largest D_i of its place (times scale), or is 0; permutation up to rounding
    Numerics    scores in float64: a weight is a small difference of scores near the cut, which float32 would blur; two
                selections (6 passes over float32 inputs, 8 over float64) and one pass to merge; called on a block by
                hand, the block is the model
    Differs     as the authors' code; exp(T (b - 1)) in place of exp(T b) overflows for no T and changes no weight. A
                vector whose scores are all equal has weight 0. A module that an adapter lacks counts as zeros.
                scope=tensor is not published: scores are then compared within tensors only
    Raises      UsageError: ratio outside (0, 1], an unknown word; InputError: NaN or infinity
    """
    within("pcb", "ratio", ratio, 0.0, 1.0, open_low=True)
    one_of("pcb", "scope", scope, "model", "tensor")
    found = measured(block, measure, ratio=ratio)
    entries = stack(block)
    out, shares = torch.zeros(2, *entries.shape[1:], dtype=torch.float64)
    if entries.numel():
        scores = scored(entries, found["sizes"])
        for entry, score, (low, high), (cut, top) in zip(
            entries, scores, found["sizes"], found["scores"], strict=True
        ):
            share = (score.clamp_(min=cut) - cut) / (top - cut) if top > cut else torch.zeros_like(score)
            out += share * entry.sign() * entry.abs().clamp_(low, high)
            shares += share
    return merged(block, quotient(out, shares).mul_(scale))


def scored(entries: Tensor, sizes: Sequence[Sequence[float]]) -> Tensor:
    """``exp(T (b_i - 1)) tanh(Delta_i sum_j Delta_j)`` of every vector, in float64."""
    entries = entries.double()
    both = total(entries)
    out = torch.empty_like(entries)
    for score, entry, (low, high) in zip(out, entries, sizes, strict=True):
        own = (entry.abs().clamp_(low, high) - low) / (high - low) if high > low else torch.zeros_like(entry)
        score.copy_(torch.exp((own.square_() - 1.0) * len(entries)) * torch.tanh(entry * both))
    return out
