"""Model Stock: from the base towards the mean, as far as the models agree."""

from __future__ import annotations

from itertools import combinations

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods.merge.entries import measured
from devec.methods.merge.gram import cosine, measure_gram
from devec.methods.merge.task_arithmetic import weighted_sum
from devec.methods.registry import register


@register("merge", grain="elements", source="arXiv:2403.19522", keeps_rank=True, measure=measure_gram)
def model_stock(block: Block) -> Delta:
    """The mean of fine-tuned models, drawn back to the base by the angle between them, tensor by tensor.

    Math        c = mean over pairs i < j of cos(Delta_i, Delta_j);  t = N c / (1 + (N - 1) c)
                W = W_0 + t * (1/N) sum_i Delta_i
    Symbols     N = number of models
    Shapes      N deltas (n, m) -> one (n, m)
    Guarantees  equal models come back (c = 1, t = 1); orthogonal changes give the base (t = 0); 0 <= t <= 1;
                permutation up to rounding; factors stay factors (ranks add)
    Numerics    norms and inner products in float64 over the whole tensor (one more pass over the inputs)
    Differs     the mean over pairs for N > 2 is mergekit's choice, the paper leaves it open; c < 0 counts as 0 here,
                where mergekit goes beyond the base; a pair with a zero change counts as orthogonal. Made for several
                runs on one task: changes for different tasks are nearly orthogonal, and t near 0 gives the base back
    Raises      UsageError: fewer than two models. NaN comes out as NaN, and is refused on writing
    """
    count = len(block.deltas)
    if count < 2:
        raise UsageError(f"model-stock needs at least 2 models, got {count}", remedy="Name more models.")
    gram = measured(block, measure_gram)
    pairs = [cosine(gram, i, j) or 0.0 for i, j in combinations(range(count), 2)]
    c = max(sum(pairs) / len(pairs), 0.0)
    t = count * c / (1.0 + (count - 1) * c)
    return weighted_sum(block, [t / count] * count)
