"""Layers of the shapes of Llama-2-7B with planted task vectors, made on the device one layer at a time."""

from __future__ import annotations

from math import cos, radians, sqrt

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.layout import Layout
from devec.linalg.numerics import generator

LAYERS = 32
LINEARS = (
    *((name, 4096, 4096) for name in ("q", "k", "v", "o")),
    ("gate", 11008, 4096),
    ("up", 11008, 4096),
    ("down", 4096, 11008),
)
SIGNAL = 64
"""Planted directions of a dense delta, with singular values j^-1/2; a quarter of them shared at 10 degrees."""

NOISE = 0.5
"""Norm of the white noise over the smallest planted singular value, before rounding adds its own."""

BASE_RMS = 0.02


def shapes(scale: int = 1) -> list[tuple[str, int, int]]:
    """Names and shapes of a layer's linears, every side divided by ``scale``."""
    return [(name, rows // scale, columns // scale) for name, rows, columns in LINEARS]


def planted_rank(scale: int = 1) -> int:
    return max(SIGNAL // scale, 2)


def dense_layer(layer: int, pool: int, scale: int, device: torch.device) -> list[Block]:
    """Differences of bfloat16 checkpoints: ``bf16(W_0 + signal + noise) - W_0``, kept in bfloat16."""
    blocks = []
    rank = planted_rank(scale)
    values = torch.arange(1, rank + 1, device=device) ** -0.5
    # Shared directions spread over the whole spectrum.
    values = torch.cat([values[::4], values[torch.arange(rank, device=device) % 4 != 0]])
    for name, n, m in shapes(scale):
        base = (_normal((n, m), device, "base", layer, name) * BASE_RMS).bfloat16()
        deltas = []
        for i in range(pool):
            U = _column_space(n, rank, len(values[::4]), device, layer, name, i)
            W = (U * values) @ (_normal((rank, m), device, "right", layer, name, i) / sqrt(m))
            level = NOISE * rank**-0.5 / (sqrt(n) + sqrt(m))
            W += level * _normal((n, m), device, "noise", layer, name, i)
            deltas.append(DenseDelta((base.float() + W).bfloat16() - base))
        blocks.append(_block(layer, name, n, m, deltas))
    return blocks


def adapter_layer(layer: int, pool: int, rank: int, scale: int, device: torch.device) -> list[Block]:
    """Adapters of one rank whose column spaces share a quarter of their directions at 10 degrees."""
    blocks = []
    for name, n, m in shapes(scale):
        deltas = []
        for i in range(pool):
            B = _column_space(n, rank, max(rank // 4, 1), device, layer, name, i)
            deltas.append(LowRankDelta(B, _normal((rank, m), device, "A", layer, name, i) / sqrt(m)))
        blocks.append(_block(layer, name, n, m, deltas))
    return blocks


def _block(layer: int, name: str, n: int, m: int, deltas: list[Delta]) -> Block:
    vectors = tuple(f"vector{i}" for i in range(len(deltas)))
    return Block(f"layers.{layer}.{name}.weight", Layout((n, m)), vectors, tuple(deltas))


def _column_space(n: int, rank: int, shared: int, device: torch.device, layer: int, name: str, i: int) -> Tensor:
    """Columns of length about 1; the first ``shared`` stand at 10 degrees to those of any other vector."""
    U = _normal((n, rank), device, "own", layer, name, i)
    inside = sqrt(cos(radians(10)))
    common = _normal((n, shared), device, "common", layer, name)
    U[:, :shared] = common * inside + U[:, :shared] * sqrt(1 - inside**2)
    return U / sqrt(n)


def _normal(shape: tuple[int, int], device: torch.device, *key: object) -> Tensor:
    seed = generator("benchmark", "gpu", *key).initial_seed()
    gen = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=gen, device=device)
