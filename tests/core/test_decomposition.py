"""Decompositions against the literal transcription: eigenvalues, subspaces, parts, for every mode, side and view."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devec.core.decomposition import Decomposition
from devec.core.delta import DenseDelta, LowRankDelta
from devec.core.errors import UsageError
from devec.core.options import View
from pools import Value, decomposed, dense, float_factors, pool, rank_of, vector
from reference import literal
from reference.allocations import largest_allocation
from reference.planted import (
    bases_at_common_angle,
    factors_on,
    generator,
    matrix_on,
    orthonormal,
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


# --- promises --------------------------------------------------------------------------------------------------------


def mixed_pool(k: int, seed: int) -> list[Value]:
    """Dense and factored float32 deltas with planted sharing on both sides and rank-12 signals, noise on the dense."""
    left, right = bases_at_common_angle(96, k, [5.0] * 4 + [70.0] * 2, 2, seed), bases_at_common_angle(
        80, k, [5.0] * 4 + [70.0] * 2, 2, seed + 1
    )
    out: list[Value] = []
    for i, (U, V) in enumerate(zip(left, right, strict=True)):
        g = generator(seed + 10 + i)
        core = orthonormal(8, 8, g) * torch.linspace(3, 1, 8, dtype=torch.float64)
        if i % 2:
            noise = 0.002 * torch.randn(96, 80, generator=g, dtype=torch.float64)
            out.append((U @ core @ V.T + noise).float())
        else:
            out.append(float_factors(U @ core, V.T))
    return out


VIEWS = {
    "default": View(),
    "paper": View.of_paper(),
    "own": View(pair_basis="own"),
    "sequence": View(target_rule="sequence"),
    "chain": View(joint="chain"),
    "angles": View(angles=True),
    "chance": View(threshold="chance"),
    "all": View(threshold=0.0),
    "nothing": View(threshold=1.0),
}


def cases() -> list[tuple[str, str, str]]:
    return list(itertools.product(["pairwise", "joint", "target"], ["left", "right", "both"], VIEWS))


@pytest.fixture(scope="module")
def factored() -> dict[tuple[str, str], Decomposition]:
    p = pool(*mixed_pool(3, 40))
    return {
        (mode, side): decomposed(p, mode=mode, side=side, target="A" if mode == "target" else None)
        for mode in ("pairwise", "joint", "target")
        for side in ("left", "right", "both")
    }


@pytest.mark.parametrize(("mode", "side", "view"), cases())
def test_shared_plus_unique_is_the_original(
    mode: str, side: str, view: str, factored: dict[tuple[str, str], Decomposition]
) -> None:
    d = factored[mode, side].with_view(VIEWS[view])
    for i, name in enumerate(d.vectors if mode != "target" else ("A",)):
        original = dense(d.original(name))
        shared, unique = dense(d.shared(name)), dense(d.unique(name))
        scale = float(original.abs().max())
        assert float((shared + unique - original).abs().max()) <= 2e-6 * scale
        assert bool(torch.isfinite(shared).all()) and bool(torch.isfinite(unique).all())
        energy = float((torch.linalg.norm(shared) / torch.linalg.norm(original)) ** 2)
        assert d.shared_energy("w", i) <= energy + 1e-5
        for s in ("left", "right") if side == "both" else (side,):
            Z = d.removed("w", s, i)
            if Z is None:
                continue
            eye = torch.eye(Z.shape[1], dtype=torch.float64)
            assert float((Z.double().T @ Z.double() - eye).abs().max()) < 5e-6, "orthonormal"
            if side != "both":
                gone = Z.double().T @ seen_from(unique, s)
                assert float(gone.abs().max()) < 1e-5 * scale * 10, "Z^T unique = 0"
        value = d.pool[i].deltas["w"]
        if isinstance(value, LowRankDelta) and side != "both":
            for part in (d.shared(name), d.unique(name)):
                assert isinstance(part.deltas["w"], LowRankDelta)
                assert part.deltas["w"].rank_bound <= value.rank_bound, "no rank added"


def test_the_planted_sharing_is_found_and_the_extremes_do_what_they_say(
    factored: dict[tuple[str, str], Decomposition],
) -> None:
    d = factored["pairwise", "left"]
    assert {s.count for s in d.spectra.values()} == {4}
    assert {s.count for s in d.with_view(threshold=1.0).spectra.values()} == {0}
    assert {s.count for s in d.with_view(threshold=0.0).spectra.values()} == {8}
    assert torch.equal(dense(d.with_view(threshold=1.0).unique("A")), dense(d.original("A")))
    assert rank_of(d.with_view(threshold=0.0).unique("A")) == 0 or float(
        dense(d.with_view(threshold=0.0).unique("A")).norm()
    ) < 1e-5 * float(dense(d.original("A")).norm())
    assert {s.count for s in d.with_view(threshold="chance").spectra.values()} == {4}


def test_threshold_one_still_keeps_exact_sharing() -> None:
    """A strict comparison with 1 would keep nothing of identical vectors."""
    B, A = torch.randn(30, 4, generator=generator(0)), torch.randn(4, 20, generator=generator(1))
    d = decomposed(pool((B, A), (B, A)), View(threshold=1.0))
    s = d.spectra["w", "left", (0, 1)]
    assert s.count == 4 and s.ties == 4
    assert float(dense(d.unique("A")).norm()) < 1e-5 * float((B @ A).norm())


@pytest.mark.parametrize("mode", ["pairwise", "joint"])
def test_defaults_do_not_depend_on_order_and_the_papers_reading_does(mode: str) -> None:
    values = mixed_pool(3, 60)
    order = [2, 0, 1]
    straight, turned = pool(*values), pool(*[values[i] for i in order])
    for view, same in ((View(), True), (View.of_paper(), False)):
        a, b = decomposed(straight, view, mode=mode), decomposed(turned, view, mode=mode)
        worst = 0.0
        for position, i in enumerate(order):
            x, y = dense(a.unique("ABC"[i])), dense(b.unique("ABC"[position]))
            worst = max(worst, float(torch.linalg.norm(x - y) / torch.linalg.norm(x)))
        assert (worst < 1e-5) == same, (mode, view, worst)


def test_rotating_the_outputs_rotates_the_parts() -> None:
    values = [matrix_on(U, 40, i) for i, U in enumerate(bases_at_common_angle(60, 3, [5.0] * 3, 3, 70))]
    Q = orthonormal(60, 60, generator(71))
    a = decomposed(pool(*values), dtype="float64", rank="none", exact=True)
    b = decomposed(pool(*[Q @ W for W in values]), dtype="float64", rank="none", exact=True)
    for name in "ABC":
        assert torch.allclose(Q @ dense(a.unique(name)), dense(b.unique(name)), atol=1e-10)
    assert torch.allclose(Q @ dense(a.shared("A", "B")), dense(b.shared("A", "B")), atol=1e-10)


def test_the_shared_part_of_a_shared_part_is_itself() -> None:
    values = [matrix_on(U, 40, i) for i, U in enumerate(bases_at_common_angle(60, 2, [5.0] * 3, 3, 72))]
    d = decomposed(pool(*values), dtype="float64", rank="none", mode="joint")
    Z = d.joint_subspace("w", "left")
    for name in "AB":
        assert torch.allclose(literal.shared_part(Z, dense(d.shared(name))), dense(d.shared(name)), atol=1e-12)


def test_a_zero_or_missing_vector_takes_no_part() -> None:
    values = mixed_pool(3, 80)
    whole = decomposed(pool(*values))
    zero = torch.zeros(96, 80)
    with_zero = decomposed(pool(*values, zero))
    lacking = decomposed(pool(*[{"w": v} for v in values], {"other": torch.ones(4, 4)}))
    for d in (with_zero, lacking):
        assert d.tensors["w"].members == (0, 1, 2)
        for name in "ABC":
            assert torch.equal(dense(d.unique(name)), dense(whole.unique(name)))
    assert float(dense(with_zero.unique("D")).norm()) == 0.0
    assert float(dense(with_zero.shared("D")).norm()) == 0.0
    for d in (with_zero, lacking):
        joint = decomposed(d.pool, mode="joint")
        alone = decomposed(pool(*values), mode="joint")
        assert torch.equal(dense(joint.unique("A")), dense(alone.unique("A"))), "k counts those that are there"
    alone = decomposed(pool({"w": values[0]}, {"v": values[1]}))
    assert torch.equal(dense(alone.unique("A")), dense(alone.original("A")))
    assert alone.spectra == {}


def test_low_precision_inputs_are_computed_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = [v.to(dtype) if isinstance(v, Tensor) else tuple(x.to(dtype) for x in v) for v in mixed_pool(2, 90)]
        narrow, wide = pool(*values), pool(*[
            v.float() if isinstance(v, Tensor) else tuple(x.float() for x in v) for v in values
        ])
        a, b = decomposed(narrow), decomposed(wide)
        for name in "AB":
            assert torch.equal(dense(a.unique(name)), dense(b.unique(name)))
            assert torch.equal(dense(a.shared(name)), dense(b.shared(name)))
        assert torch.equal(dense(a.shared("A", "B")), dense(b.shared("A", "B")))


def test_float64_on_request_reaches_the_parts_of_float32_deltas() -> None:
    values = mixed_pool(2, 95)
    d = decomposed(pool(*values), dtype="float64")
    for i, name in enumerate("AB"):
        Z = d.removed("w", "left", i)
        assert Z is not None and Z.dtype == torch.float64
        size = float(torch.linalg.norm(dense(d.original(name))))
        assert float((Z.T @ dense(d.unique(name))).abs().max()) < 1e-14 * size


def test_reading_another_way_factorises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    d = decomposed(pool(*mixed_pool(3, 97)), mode="joint")
    d.spectra  # noqa: B018
    for name in ("svd_of_dense", "svd_of_product"):
        monkeypatch.setattr(f"devec.methods.decompose.shared_unique.{name}", lambda *_a, **_k: pytest.fail("factored"))
    for view in VIEWS.values():
        dense(d.with_view(view).unique("A"))


def test_parts_are_refused_where_they_do_not_exist() -> None:
    values = mixed_pool(3, 98)
    pairwise, joint = decomposed(pool(*values)), decomposed(pool(*values), mode="joint")
    target = decomposed(pool(*values), mode="target", target="A")
    for d, part in (
        (pairwise, "shared"), (pairwise, "shared:A+B+C"), (pairwise, "shared:A+A"), (pairwise, "unique:Z"),
        (pairwise, "unique"), (pairwise, "other:A"), (joint, "shared:A+B"), (target, "unique:B"),
        (target, "shared:B+C"), (pairwise, "unique:A+B"),
    ):
        with pytest.raises(UsageError):
            d.part(part)
    assert torch.equal(dense(pairwise.part("shared:A+B")), dense(pairwise.shared("A", "B")))
    assert torch.equal(dense(target.part("shared:A+B")), dense(target.shared("A", "B")))


def test_a_part_of_a_vector_keeps_its_heads_and_layouts() -> None:
    values = mixed_pool(2, 99)
    a = vector("A", {"w": values[0], "x": torch.ones(5, 5)}, heads={"score": torch.ones(2, 3)})
    b = vector("B", {"w": values[1]})
    d = decomposed(type(pool(*values))((a, b)))
    assert set(d.unique("A").heads) == {"score"} and set(d.shared("A", "B").heads) == set()
    assert list(d.unique("A").deltas) == ["w", "x"] and list(d.shared("A", "B").deltas) == ["w"]


def test_a_lora_pair_is_decomposed_without_a_dense_matrix() -> None:
    n, r = 4096, 64
    g = generator(100)
    values = [(torch.randn(n, r, generator=g), torch.randn(r, n, generator=g)) for _ in range(2)]
    p = pool(*values)

    def everything() -> None:
        d = decomposed(p, View(threshold=0.001))
        for part in (d.unique("A"), d.shared("B"), d.shared("A", "B")):
            delta = part.deltas["w"]
            assert isinstance(delta, LowRankDelta)

    assert largest_allocation(everything) <= n * r
