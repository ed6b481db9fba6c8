"""LiNeS: the result of a merge method, scaled up with depth."""

from __future__ import annotations

import re
from collections.abc import Mapping

from devec.core.block import Block
from devec.core.delta import Delta
from devec.core.errors import UsageError
from devec.methods import registry
from devec.methods.registry import register

NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def memory(shape: tuple[int, int], tasks: int, parameters: Mapping[str, object]) -> int:
    """What the inner method takes, and its result once more."""
    method = registry.get("merge", str(parameters.get("inner", "task-arithmetic")))
    return method.working_bytes(shape, tasks, {}) + 8 * shape[0] * shape[1]


@register("merge", grain="matrix", source="arXiv:2410.17146", keeps_rank=True, memory=memory)
def lines(block: Block, blocks: int, beta: float, alpha: float | None = None, inner: str = "task-arithmetic") -> Delta:
    """LiNeS: an inner method's result, its coefficient growing linearly from the first residual block to the last.

    Math        W = W_0 + lambda_l M, M the inner method's result at scale 1
                lambda_l = alpha + beta (l - 1) / (L - 1) in residual block l = 1 .. L; alpha outside the blocks
    Symbols     L = blocks: how many residual blocks the model has; T vectors of the pool
    Shapes      as the inner method
    Guarantees  first block alpha, last block alpha + beta, every tensor of a block alike; linear in alpha and beta;
                beta 0: the inner method with scale alpha; rank, permutation: as the inner method
    Numerics    one multiplication of the inner method's result
    Differs     the paper tunes beta in (0, 1] on validation data: there is no default. alpha is 1 / T for
                task-arithmetic, the paper's rule (|sum of task vectors| / |merged vector| / T) for the sum; for other
                inner methods it needs norms over the whole model and must be given. A block's number is the first
                number between dots in a tensor's name, counted from 0; the authors' code takes the smallest number
                anywhere in the name, which is an expert's or sublayer's in some models. Encoder and decoder of one
                model count from 0 each. The inner method runs with its defaults, whole matrices at a time
    Raises      UsageError: blocks below 2, a name with a number from ``blocks`` on, alpha missing, an inner method that
                is unknown, needs parameters, or is lines
    """
    if blocks < 2:
        raise UsageError(f"lines wants blocks from 2 on, got {blocks}")
    if inner.replace("_", "-") == "lines":
        raise UsageError("lines cannot be its own inner method")
    method = registry.get("merge", inner)
    if alpha is None:
        if method.name != "task-arithmetic":
            raise UsageError(
                f"lines needs alpha for {method.name}", remedy="Give --set alpha=A, the coefficient of the first block."
            )
        alpha = 1.0 / max(len(block.deltas), 1)
    settings = registry.bind(method, {"scale": 1.0} if "scale" in method.parameters else {})
    merged: Delta = method.call(block, **settings)
    return merged.scale(alpha + beta * depth(block.name, blocks))


def depth(name: str, blocks: int) -> float:
    """``(l - 1) / (L - 1)`` of the residual block that a tensor lies in; 0 outside the blocks."""
    found = NUMBER.search(name)
    if found is None:
        return 0.0
    index = int(found[1])
    if index >= blocks:
        raise UsageError(
            "the tensor lies deeper than the blocks counted", tensor=name,
            values={"number in its name": index, "blocks": blocks}, remedy="Give --set blocks=L, the model's blocks.",
        )
    return index / (blocks - 1)
