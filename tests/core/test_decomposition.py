"""Decompositions against the literal transcription: eigenvalues, subspaces, parts, for every mode, side and view."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devec.core.delta import DenseDelta, LowRankDelta
from devec.core.options import View
from pools import Value, decomposed, dense, pool, rank_of
from reference import literal
from reference.planted import (
    bases_at_common_angle,
    factors_on,
    generator,
    matrix_on,
    pair_at_angles,
    projector_distance,
)

TAU = 0.85
EIGENVALUE = {"float64": 1e-10, "float32": 1e-5}
PROJECTOR = {"float64": 1e-6, "float32": 1e-4}
PART = {"float64": 1e-9, "float32": 2e-5}
N, M = 48, 40
# Pairwise cos^2 of the planted directions: 1, .98, .94 | .50, .25: at least .09 from .85, for chains of 5 too.
DEGREES = [0.0, 4.0, 8.0, 45.0, 60.0]


def made(bases: list[Tensor], kind: str, dtype: str, seed: int, side: str = "left") -> list[Value]:
    """Deltas whose ``side`` spans the given bases; the other side is random (all of R^m for k large)."""
    out: list[Value] = []
    for i, U in enumerate(bases):
        m = M if side == "left" else N
        if kind == "dense":
            W = matrix_on(U, m, seed + i)
            out.append((W if side == "left" else W.T).to(getattr(torch, dtype)).contiguous())
        else:
            B, A = factors_on(U, m, seed + i)
            B, A = (B, A) if side == "left" else (A.T, B.T)
            out.append((B.to(getattr(torch, dtype)), A.to(getattr(torch, dtype))))
    return out


def as_matrix(value: Value) -> Tensor:
    assert not isinstance(value, (DenseDelta, LowRankDelta))
    return value.double() if isinstance(value, Tensor) else value[0].double() @ value[1].double()


def seen_from(W: Tensor, side: str) -> Tensor:
    return W if side == "left" else W.T


# --- two vectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["dense", "factors"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(3))
def test_the_papers_pair(dtype: str, kind: str, side: str, seed: int) -> None:
    """Eq. (6)-(14) word for word, Z = U_1 A, one Z for both vectors."""
    U1, U2 = pair_at_angles(N if side == "left" else M, DEGREES, 3, seed)
    values = made([U1, U2], kind, dtype, seed, side)
    d = decomposed(pool(*values), View.of_paper(), rank="none", dtype=dtype, side=side)
    matrices = [seen_from(as_matrix(v), side) for v in values]
    rtol = 1e-10 if dtype == "float64" else 1e-5
    P = literal.chain([literal.projector(literal.column_basis(W, rtol=rtol)) for W in matrices])
    eigenvalues, _ = literal.eigen(P)
    found = d.spectra["w", side, (0, 1)]
    r = found.eigenvalues.numel()
    assert float((found.eigenvalues - eigenvalues.real[:r]).abs().max()) < EIGENVALUE[dtype]
    assert found.applied == TAU and found.count == 3
    Z = literal.shared_repaired(P, TAU)
    assert projector_distance(d.pair_subspace("w", side, (0, 1)), Z) < PROJECTOR[dtype]
    shared = [literal.shared_part(Z, W) for W in matrices]
    for name, W, S in zip("AB", matrices, shared, strict=True):
        scale = float(torch.linalg.norm(W))
        assert float(torch.linalg.norm(seen_from(dense(d.shared(name)), side) - S)) < PART[dtype] * scale
        unique = literal.unique_part(Z, W)
        assert float(torch.linalg.norm(seen_from(dense(d.unique(name)), side) - unique)) < PART[dtype] * scale
    average = literal.weighted_average(shared)
    both = d.shared("A", "B")
    assert float(torch.linalg.norm(seen_from(dense(both), side) - average)) < PART[dtype] * float(average.norm())
    assert rank_of(both) == 3
    assert isinstance(both.deltas["w"], LowRankDelta) and both.deltas["w"].rank_bound == 3


@pytest.mark.parametrize("basis", ["bisector", "first", "own"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equation_14_of_a_pair_for_every_basis(basis: str, side: str) -> None:
    U1, U2 = pair_at_angles(N if side == "left" else M, DEGREES, 3, 3)
    values = made([U1, U2], "factors", "float64", 3, side)
    d = decomposed(pool(*values), View(pair_basis=basis), dtype="float64", side=side)  # type: ignore[arg-type]
    c, cut = torch.cos(torch.deg2rad(torch.tensor(DEGREES[:3], dtype=torch.float64))), 3
    F, G = U1[:, :cut], U2[:, :cut]
    bases = {"first": (F, F), "own": (F, G), "bisector": ((F + G) / (2 * (1 + c)).sqrt(),) * 2}[basis]
    parts = [literal.shared_part(Z, seen_from(as_matrix(v), side)) for Z, v in zip(bases, values, strict=True)]
    expected = literal.weighted_average(parts)
    assert torch.allclose(seen_from(dense(d.shared("A", "B")), side), expected, atol=1e-10)
    assert torch.allclose(dense(d.shared("B", "A")), dense(d.shared("A", "B")), atol=0), "a pair has no order"
    assert rank_of(d.shared("A", "B")) == (5 if basis == "own" else 3), "direction 0 is the same in both"


def test_both_sides_project_from_left_and_right() -> None:
    U1, U2 = pair_at_angles(N, DEGREES, 1, 4)
    V1, V2 = pair_at_angles(M, DEGREES, 1, 5)
    values: list[Value] = []
    for i, (U, V) in enumerate(((U1, V1), (U2, V2))):
        core = torch.randn(6, 6, generator=generator(i), dtype=torch.float64)
        values.append((U @ core, V.T.contiguous()))
    d = decomposed(pool(*values), dtype="float64", side="both")
    for i, name in enumerate("AB"):
        U, V = ((U1, V1), (U2, V2))[i]
        W = as_matrix(values[i])
        PL, PR = literal.projector(U[:, :3]), literal.projector(V[:, :3])
        assert torch.allclose(dense(d.shared(name)), PL @ W @ PR, atol=1e-10)
        assert torch.allclose(dense(d.unique(name)), W - PL @ W @ PR, atol=1e-10)
        assert isinstance(d.unique(name).deltas["w"], LowRankDelta)
        assert d.unique(name).deltas["w"].rank_bound == rank_of(d.unique(name), rtol=1e-9), "recompressed"
        energy = float(torch.linalg.norm(PL @ W @ PR) ** 2 / torch.linalg.norm(W) ** 2)
        assert d.shared_energy("w", i) == pytest.approx(energy, rel=1e-9)
    c = torch.cos(torch.deg2rad(torch.tensor(DEGREES[:3], dtype=torch.float64)))
    Z = [(X[:, :3] + Y[:, :3]) / (2 * (1 + c)).sqrt() for X, Y in ((U1, U2), (V1, V2))]
    parts = [literal.projector(Z[0]) @ as_matrix(v) @ literal.projector(Z[1]) for v in values]
    assert torch.allclose(dense(d.shared("A", "B")), literal.weighted_average(parts), atol=1e-10)


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.0, 30.0) | st.floats(0.0, 15.0) | st.floats(32.0, 90.0), min_size=1, max_size=5),
    st.integers(0, 3), st.integers(0, 10_000), st.booleans(), st.sampled_from([0.5, 0.85, 0.95]),
)
def test_planted_pairs_of_any_angle(
    degrees: list[float], extra: int, seed: int, factored: bool, tau: float
) -> None:
    cosines = torch.cos(torch.deg2rad(torch.tensor(degrees, dtype=torch.float64)))
    if bool(((cosines**2 - tau).abs() < 0.04).any()):
        degrees = [0.0 for _ in degrees]
        cosines = torch.ones(len(degrees), dtype=torch.float64)
    U1, U2 = pair_at_angles(N, degrees, extra, seed)
    values = made([U1, U2], "factors" if factored else "dense", "float64", seed)
    d = decomposed(pool(*values), View.of_paper(threshold=tau), rank="none", dtype="float64")
    planted = torch.cat([cosines**2, torch.zeros(extra, dtype=torch.float64)]).sort(descending=True).values
    s = d.spectra["w", "left", (0, 1)]
    assert torch.allclose(s.eigenvalues, planted, atol=1e-10)
    assert s.count == int((planted > tau).sum())
    P = literal.chain([literal.projector(U1), literal.projector(U2)])
    Z = literal.shared_repaired(P, tau)
    assert projector_distance(d.pair_subspace("w", "left", (0, 1)), Z) < 1e-6
    for name, value in zip("AB", values, strict=True):
        assert torch.allclose(dense(d.unique(name)), literal.unique_part(Z, as_matrix(value)), atol=1e-8)


# --- more than two ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["dense", "factors"])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("joint", ["chain", "consensus"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_joint_decompositions(dtype: str, kind: str, k: int, joint: str, side: str) -> None:
    n = 64
    bases = bases_at_common_angle(n, k, DEGREES[1:], 2, seed=k)
    values: list[Value] = []
    for i, U in enumerate(bases):
        W = matrix_on(U, 40, i).to(getattr(torch, dtype))
        B, A = (x.to(getattr(torch, dtype)) for x in factors_on(U, 40, i))
        if side == "left":
            values.append(W if kind == "dense" else (B, A))
        else:
            values.append(W.T.contiguous() if kind == "dense" else (A.T.contiguous(), B.T.contiguous()))
    matrices = [seen_from(as_matrix(v), side) for v in values]
    rtol = 1e-10 if dtype == "float64" else 1e-5
    projectors = [literal.projector(literal.column_basis(W, rtol=rtol)) for W in matrices]
    if joint == "chain":
        view = View.of_paper()
        P = literal.chain(projectors)
        eigenvalues = literal.eigen(P)[0].real
        Z = literal.shared_repaired(P, TAU)
    else:
        view = View()
        Z, eigenvalues = literal.mean_projector_basis(projectors, TAU)
    d = decomposed(pool(*values), view, rank="none", dtype=dtype, side=side, mode="joint")
    s = d.spectra["w", side, None]
    # The planted ones: eigenvalues of a chain far below them are ill-conditioned, and nothing depends on them.
    assert float((s.eigenvalues[:3] - eigenvalues[:3]).abs().max()) < EIGENVALUE[dtype]
    assert s.count == Z.shape[1] == 2
    assert projector_distance(d.joint_subspace("w", side), Z) < PROJECTOR[dtype]
    parts = []
    for name, W in zip("ABCDE"[:k], matrices, strict=True):
        scale = float(torch.linalg.norm(W))
        parts.append(literal.shared_part(Z, W))
        assert float(torch.linalg.norm(seen_from(dense(d.shared(name)), side) - parts[-1])) < PART[dtype] * scale
        unique = literal.unique_part(Z, W)
        assert float(torch.linalg.norm(seen_from(dense(d.unique(name)), side) - unique)) < PART[dtype] * scale
    average = literal.weighted_average(parts)
    found = seen_from(dense(d.shared()), side)
    assert float(torch.linalg.norm(found - average)) < PART[dtype] * float(torch.linalg.norm(average))
    assert rank_of(d.shared()) == 2


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["dense", "factors"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_target_against_a_pool(dtype: str, kind: str, k: int) -> None:
    bases = bases_at_common_angle(64, k, DEGREES[1:], 2, seed=20 + k)
    values: list[Value] = []
    for i, U in enumerate(bases):
        B, A = (x.to(getattr(torch, dtype)) for x in factors_on(U, 40, i))
        values.append(matrix_on(U, 40, i).to(getattr(torch, dtype)) if kind == "dense" else (B, A))
    matrices = [as_matrix(v) for v in values]
    scale = float(torch.linalg.norm(matrices[0]))
    d = decomposed(pool(*values), View(target_rule="sequence"), dtype=dtype, mode="target", target="A", rank="none")
    truth = literal.sequence_on_subspace(bases[0], matrices[0], bases[1:], TAU)
    assert float(torch.linalg.norm(dense(d.unique("A")) - truth)) < PART[dtype] * scale
    # Union: within the bound of every shared direction, and on this symmetric pool as large as one pair's.
    union = d.with_view(target_rule="union")
    Z = union.removed("w", "left", 0)
    assert Z is not None and Z.shape[1] == 2
    for U in bases[1:]:
        own = literal.shared_repaired(literal.projector(bases[0]) @ literal.projector(U), TAU)
        leak = float(torch.linalg.matrix_norm(own - Z.double() @ (Z.double().T @ own), ord=2)) ** 2
        assert leak <= 1 - TAU + 1e-5
    assert union.spectra.keys() == {("w", "left", (0, j)) for j in range(1, k)}, "only the target's pairs are formed"


def test_pairwise_unique_is_the_target_of_each() -> None:
    bases = bases_at_common_angle(64, 3, DEGREES[1:], 2, seed=30)
    values = [matrix_on(U, 40, i) for i, U in enumerate(bases)]
    together = decomposed(pool(*values), dtype="float64", rank="none")
    for i, name in enumerate("ABC"):
        alone = decomposed(pool(*values), dtype="float64", rank="none", mode="target", target=name)
        assert torch.allclose(dense(together.unique(name)), dense(alone.unique(name)), atol=1e-12)
        assert together.shared_energy("w", i) == pytest.approx(alone.shared_energy("w", i), abs=1e-12)


def test_what_all_share_is_assembled_once_for_all_parts_and_anew_under_another_view() -> None:
    U = bases_at_common_angle(N, 4, [0.0, 12.0], 3, 0)
    d = decomposed(pool(*(matrix_on(B, M, i) for i, B in enumerate(U))), rank="none", mode="joint", dtype="float64")
    assert d.joint_subspace("w", "left") is d.joint_subspace("w", "left") is d.removed("w", "left", 2)
    strict = d.with_view(threshold=0.99)
    assert (d.joint_subspace("w", "left").shape[1], strict.joint_subspace("w", "left").shape[1]) == (2, 1)
