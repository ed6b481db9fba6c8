"""Spherical interpolation of two models."""

from __future__ import annotations

from math import acos, sin

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods.merge.entries import measured, within
from devec.methods.merge.gram import cosine, measure_gram
from devec.methods.merge.task_arithmetic import weighted_sum
from devec.methods.registry import register

PARALLEL = 0.9995
"""Cosines beyond this make ``sin(phi)`` a small divisor: the two directions are interpolated on a line."""


@register("merge", grain="elements", source="Shoemake (1985)", needs_base=False, keeps_rank=True, measure=measure_gram,
          looks=lambda _: 1)
def slerp(block: Block, t: float) -> Delta:
    """Go from the first model to the second along the arc between their directions, tensor by tensor.

    Math        cos(phi) = <A, B> / (|A| |B|);  D = (sin((1 - t) phi) A + sin(t phi) B) / sin(phi)
                |cos(phi)| > 0.9995, or one of them zero: D = (1 - t) A + t B
    Symbols     A, B = the weights of the two models without a base, their changes with one (W = W_0 + D then);
                t = 0 gives the first, 1 the second; there is no default
    Shapes      2 deltas (n, m) -> one (n, m)
    Guarantees  ends: t = 0 and t = 1 give A and B; symmetry: slerp(A, B, t) = slerp(B, A, 1 - t);
                norm: for |A| = |B| every D has that norm, unless the two are nearly parallel;
                factors stay factors (ranks add)
    Numerics    norms and the inner product in float64 over the whole tensor (one more pass over the inputs)
    Differs     with a base the changes are interpolated, as in mergekit's nuslerp; without one it is mergekit's slerp
    Raises      UsageError: not two models, t outside [0, 1]. NaN comes out as NaN, and is refused on writing
    """
    if len(block.deltas) != 2:
        raise UsageError(f"slerp is between 2 models, got {len(block.deltas)}", remedy="Name two.")
    within("slerp", "t", t, 0.0, 1.0)
    c = cosine(measured(block, measure_gram), 0, 1)
    if c is None or abs(c) > PARALLEL:
        return weighted_sum(block, [1.0 - t, t])
    phi = acos(c)
    return weighted_sum(block, [sin((1.0 - t) * phi) / sin(phi), sin(t * phi) / sin(phi)])
