"""``Decomposition.subspace``: the directions that a vector's unique part lacks, as an operator."""

from __future__ import annotations

import torch

import devec
from devec.core.layout import Layout


def vectors() -> list[devec.TaskVector]:
    g = torch.Generator().manual_seed(3)
    common = torch.randn(24, 2, generator=g)
    layout = Layout((24, 16))
    out = []
    for name in "ab":
        B = torch.cat([common, torch.randn(24, 2, generator=g)], dim=1)
        out.append(
            devec.TaskVector(
                name, {"w": devec.LowRankDelta(B, torch.randn(4, 16, generator=g))}, {"w": layout}
            )
        )
    return out


def test_projecting_is_the_shared_part_and_the_residual_is_the_unique_part() -> None:
    d = devec.decompose(devec.Pool(tuple(vectors())))
    space = d.subspace("w", "a")
    assert space.dimension == 2
    W = d.original("a").deltas["w"].dense()
    torch.testing.assert_close(space.project(W), d.shared("a").deltas["w"].dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(space.residual(W), d.unique("a").deltas["w"].dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(2), atol=1e-6, rtol=0)


def test_nothing_shared_is_a_subspace_of_dimension_zero() -> None:
    a, _ = vectors()
    other = devec.TaskVector(
        "c", {"w": devec.LowRankDelta(torch.randn(24, 1), torch.randn(1, 16))}, {"w": Layout((24, 16))}
    )
    space = devec.decompose(devec.Pool((a, other)), threshold=1.0).subspace("w", "a")
    assert space.dimension == 0
    assert float(space.project(torch.ones(24, 3)).abs().max()) == 0.0
