"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta
from devec.methods.merge.entries import (
    Elect,
    elected,
    l1_factors,
    largest,
    measured,
    merged,
    of_the_elected,
    one_of,
    per_vector,
    rescaled,
    stack,
    weigh,
    weights_for,
    within,
)
from devec.methods.registry import register


def measure(
    whole: Whole, *, density: Sequence[float] | float, elect: Elect, zero: str, rescale: str,
    weights: Sequence[float] | None, **_: Any,
) -> dict[str, Any]:
    """Each vector's threshold and factor and, where exact ties go with the majority, the majority's sign."""
    cuts = largest(whole, density)
    factors = l1_factors(whole, lambda b: trimmed(b, cuts, [])) if rescale == "l1" else []
    if zero != "majority" or len(cuts) < 2:
        return {"cuts": cuts, "factors": factors, "majority": 0.0}

    def look(blocks: Iterable[Block]) -> float:
        return sum(
            float(elected(weigh(trimmed(b, cuts, factors), weights_for(b, weights, "ties")), elect).double().sum())
            for b in blocks
        )

    balance = sum(whole(look))
    return {"cuts": cuts, "factors": factors, "majority": float((balance > 0) - (balance < 0))}


@register("merge", grain="elements", source="arXiv:2306.01708", measure=measure,
          looks=lambda given: 2 + (given["zero"] == "majority") + (given["rescale"] == "l1"))
def ties(
    block: Block,
    density: list[float] | float = 0.2,
    scale: float = 1.0,
    weights: list[float] | None = None,
    scope: Literal["tensor", "model"] = "tensor",
    reduce: Literal["mean", "sum"] = "mean",
    elect: Literal["sum", "count"] = "sum",
    zero: Literal["majority", "plus", "none"] = "majority",
    rescale: Literal["none", "l1"] = "none",
) -> Delta:
    """Keep each vector's largest entries, elect a sign for every entry, and merge the values that agree with it.

    Math        t_i = k-th largest |Delta_i|, k = floor(density_i n);  D_i = w_i Delta_i [|Delta_i| >= t_i]
                g = sign(sum_i D_i);  W = W_0 + scale * sum_{i: D_i g > 0} D_i / sum_{i: D_i g > 0} |w_i|
    Symbols     n = entries of the tensor, or of the model (scope); w_i = weights[i], 1 each by default;
                elect=count: g = sign(sum_i sign(D_i)); reduce=sum: without the division;
                zero: g where sum_i D_i = 0 exactly: the sign that most entries of the scope elected, 1, or none;
                rescale=l1: D_i times |Delta_i|_1 over the same of what was kept, both over the scope
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  threshold: exactly the k-th largest magnitude of the whole scope, whatever the blocks; k >= 1;
                ties: entries equal to the threshold are all kept, so the order of entries decides nothing;
                agreement: no merged entry has a sign that was not elected; density 1 with one vector and scale 1 is
                that vector; odd: ties(-Delta) = -ties(Delta), unless zero=plus; permutation up to rounding
    Numerics    thresholds by radix selection on the bits, entries in float32 or wider; reads 2 times for the thresholds
                (float64: 4), once for rescale=l1, once for the majority, once to merge
    Differs     signs are elected after weighting, as in mergekit (PEFT elects before), and k follows both: the authors'
                code keeps one entry more. scope=tensor as in mergekit and PEFT; the authors trim the whole model.
                scale 0.3 with reduce=sum is the value published for eight vision tasks. mergekit and PEFT: zero=plus.
                A module that an adapter lacks counts as zeros
    Raises      UsageError: a wrong number of weights or densities, density outside (0, 1], an unknown word;
                InputError: NaN or infinity
    """
    for value in per_vector(block, density, "ties", "densities"):
        within("ties", "density", value, 0.0, 1.0, open_low=True)
    one_of("ties", "scope", scope, "tensor", "model")
    one_of("ties", "reduce", reduce, "mean", "sum")
    one_of("ties", "elect", elect, "sum", "count")
    one_of("ties", "zero", zero, "majority", "plus", "none")
    one_of("ties", "rescale", rescale, "none", "l1")
    w = weights_for(block, weights, "ties")
    found = measured(block, measure, density=density, elect=elect, zero=zero, rescale=rescale, weights=weights)
    entries = weigh(trimmed(block, found["cuts"], found["factors"]), w)
    signs = elected(entries, elect)
    default = {"majority": found["majority"], "plus": 1.0, "none": 0.0}[zero]
    if default:
        signs[signs == 0] = default
    return merged(block, of_the_elected(entries, signs, w, reduce).mul_(scale))


def trimmed(block: Block, cuts: Sequence[float], factors: Sequence[float]) -> Tensor:
    """Every vector's entries, zero where they are below its threshold, times its factor if there are factors."""
    entries = stack(block)
    for entry, cut in zip(entries, cuts, strict=False):  # an empty tensor has no thresholds
        entry *= entry.abs() >= cut  # a product: five times as fast as an assignment by mask
    return rescaled(entries, factors)
