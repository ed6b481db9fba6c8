"""Vectors made in memory in half precision are computed in float32, as if they had come from a file."""

from __future__ import annotations

import torch

import devec
from devec.core.layout import Layout


def halves() -> devec.Pool:
    g = torch.Generator().manual_seed(5)
    common = torch.randn(32, 1, generator=g)
    out = []
    for name in "ab":
        B = torch.cat([common, torch.randn(32, 2, generator=g)], dim=1).bfloat16()
        delta = devec.LowRankDelta(B, torch.randn(3, 20, generator=g).bfloat16())
        out.append(devec.TaskVector(name, {"w": delta}, {"w": Layout((32, 20))}))
    return devec.Pool(tuple(out))


def test_parts_of_half_precision_vectors_add_up_in_float32() -> None:
    pool = halves()
    d = devec.decompose(pool)
    unique, shared = d.unique("a").deltas["w"], d.shared("a").deltas["w"]
    whole = pool["a"].deltas["w"]
    exact = whole.B.double() @ whole.A.double()  # type: ignore[attr-defined]
    assert unique.dtype == shared.dtype == torch.float32
    error = (unique.dense().double() + shared.dense().double() - exact).norm() / exact.norm()
    assert float(error) < 1e-6
