"""Model Stock: from the base towards the mean, as far as the models agree."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Whole
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.entries import Alone, measured, one_of
from devec.methods.merge.gram import cosine, measure_gram
from devec.methods.merge.task_arithmetic import weighted_sum
from devec.methods.registry import register


def measure(whole: Whole, *, scope: str, **_: Any) -> list[list[float]]:
    """With scope=tensor, the inner products of the changes; nothing is read otherwise."""
    return measure_gram(whole) if scope == "tensor" else []


@register("merge", grain="elements", source="arXiv:2403.19522", keeps_rank=True, measure=measure,
          looks=lambda given: int(given["scope"] == "tensor"))
def model_stock(block: Block, scope: Literal["tensor", "row"] = "tensor") -> Delta:
    """The mean of fine-tuned models, drawn back to the base by the angle between them, tensor by tensor.

    Math        c = mean over pairs i < j of cos(Delta_i, Delta_j);  t = N c / (1 + (N - 1) c)
                W = W_0 + t * (1/N) sum_i Delta_i
    Symbols     N = number of models; scope=row: cosines and t of each row of the matrix out x in (a 1-D parameter is
                one row)
    Shapes      N deltas (n, m) -> one (n, m)
    Guarantees  equal models come back (c = 1, t = 1); orthogonal changes give the base (t = 0); 0 <= t <= 1;
                permutation up to rounding; factors stay factors (ranks add)
    Numerics    norms and inner products in float64 over the whole tensor (one more pass over the inputs)
    Differs     the mean over pairs for N > 2 is mergekit's choice, the paper leaves it open; c < 0 counts as 0 here,
                where mergekit goes beyond the base; a pair with a zero change counts as orthogonal. Made for several
                runs on one task: changes for different tasks are nearly orthogonal, and t near 0 gives the base back
    Raises      UsageError: fewer than two models, an unknown word. NaN comes out as NaN, and is refused on writing
    """
    count = len(block.deltas)
    if count < 2:
        raise UsageError(f"model-stock needs at least 2 models, got {count}", remedy="Name more models.")
    one_of("model-stock", "scope", scope, "tensor", "row")
    if scope == "row" and not block.layout.is_vector:
        return by_rows(weighted_sum(block, [1.0 / count] * count), ratio(row_cosines(block), count))
    gram = measured(block, measure, scope="tensor") if scope == "tensor" else measure_gram(Alone(block))
    pairs = [cosine(gram, i, j) or 0.0 for i, j in combinations(range(count), 2)]
    t = float(ratio(torch.tensor(sum(pairs) / len(pairs), dtype=torch.float64), count))
    return weighted_sum(block, [t / count] * count)


def ratio(cosines: Tensor, count: int) -> Tensor:
    """``t = N c / (1 + (N - 1) c)``, of c below 0 that of 0."""
    c = cosines.clamp(min=0.0)
    return count * c / (1.0 + (count - 1) * c)


def row_cosines(block: Block) -> Tensor:
    """The mean over pairs of the cosines of each row, ``(n,)`` float64; 0 where one of the two rows is zero."""
    entries = [None if d is None else d.dense().double() for d in block.deltas]
    found = torch.zeros(block.layout.matrix_shape[0], dtype=torch.float64)
    for a, b in combinations(entries, 2):
        if a is not None and b is not None:
            size = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
            found += torch.where(size > 0, (a * b).sum(1) / size, 0.0).clamp_(-1.0, 1.0)
    return found / (len(entries) * (len(entries) - 1) / 2)


def by_rows(delta: Delta, factors: Tensor) -> Delta:
    """Each row times its factor; factors of a product stay factors."""
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.B * factors[:, None].to(delta.dtype), delta.A)
    return DenseDelta(delta.dense() * factors[:, None].to(delta.dtype))
