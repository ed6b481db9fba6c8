"""TALL masks: one task's model out of the sum of all."""

from __future__ import annotations

from devec.core.block import Block
from devec.core.delta import Delta
from devec.methods.merge.consensus import tall, thresholds
from devec.methods.merge.entries import index_of, merged, stack, total
from devec.methods.registry import register


@register("merge", grain="elements", source="arXiv:2405.07813", per_task=True)
def tall_masks(block: Block, task: str, threshold: list[float] | float = 0.4) -> Delta:
    """The sum of all tasks, masked for one: that task's model, rebuilt from the sum and one bit an entry.

    One model per task, and the task must be known when it is used: its scores are not comparable with those of a
    single merged model, but with storing T models.

    Math        m = [|Delta_t| > threshold_t |D - Delta_t|], D = sum_i Delta_i;  W_t = W_0 + m * D
    Symbols     t = task, the vector of that name (or its number from 1); threshold_t = lambda_t of the paper
    Shapes      T deltas (n, m) -> one (n, m)
    Guarantees  one vector alone comes back; where the others are zero the task's entries come back unchanged;
                every entry is that of the sum, or 0; permutation up to rounding
    Numerics    sums in float32 or wider in the order given; one pass
    Differs     the authors choose threshold of each task from 0.2 to 0.6 on validation data
    Raises      UsageError: no such task, a wrong number of thresholds, a negative threshold;
                InputError: NaN or infinity
    """
    one = index_of(block, task, "tall-masks")
    entries = stack(block)
    both = total(entries)
    mask = tall(entries[one : one + 1], both, thresholds(block, threshold, "tall-masks")[one : one + 1])[0]
    return merged(block, both * mask)
