"""Principal angles, chains, consensus, unions and sequences, against n x n matrices and against answers by design."""

from __future__ import annotations

from math import cos, radians, sin, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devec.linalg import subspace as sub
from reference import literal
from reference.allocations import largest_allocation
from reference.planted import (
    bases_at_common_angle,
    generator,
    matrix_on,
    orthonormal,
    pair_at_angles,
    projector_distance,
)

TAU = 0.85


def projectors(bases: list[Tensor]) -> list[Tensor]:
    return [literal.projector(U) for U in bases]


def kept(values: Tensor, tau: float) -> Tensor:
    return values > tau


# --- pairs -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(st.floats(0.0, 17.0) | st.floats(29.0, 90.0), min_size=1, max_size=6),  # cos^2 away from .85 by > .06
    st.integers(0, 4), st.integers(0, 1000),
)
def test_pair_equals_the_literal_product(degrees: list[float], extra: int, seed: int) -> None:
    U1, U2 = pair_at_angles(40, degrees, extra, seed)
    s = sub.pair_spectrum(U1.T @ U2)
    values, _ = literal.eigen(literal.projector(U1) @ literal.projector(U2))
    r = len(degrees) + extra
    assert torch.allclose(s.eigenvalues, values.real[:r].clamp(0, 1), atol=1e-10)
    planted = torch.tensor([cos(radians(x)) ** 2 for x in sorted(degrees)] + [0.0] * extra, dtype=torch.float64)
    assert torch.allclose(s.eigenvalues, planted, atol=1e-12)
    q = int((s.eigenvalues > TAU).sum())
    Z = sub.assemble([U1, U2], sub.pair_coefficients(s, q, "first"))
    assert torch.allclose(Z.T @ Z, torch.eye(q, dtype=torch.float64), atol=1e-12)
    assert projector_distance(Z, literal.shared_repaired(literal.projector(U1) @ literal.projector(U2), TAU)) < 1e-6
    bisector = sub.assemble([U1, U2], sub.pair_coefficients(s, q, "bisector"))
    assert torch.allclose(bisector.T @ bisector, torch.eye(q, dtype=torch.float64), atol=1e-12)
    # Both vectors keep (1 + c)/2 of each shared direction, whichever comes first.
    for U in (U1, U2):
        held = torch.linalg.eigvalsh(bisector.T @ U @ U.T @ bisector).flip(0)
        assert torch.allclose(held, (1 + s.c[:q]) / 2, atol=1e-12)
    t = sub.pair_spectrum(U2.T @ U1)
    turned = sub.assemble([U2, U1], sub.pair_coefficients(t, q, "bisector"))
    assert projector_distance(bisector, turned) < 1e-7
    for owner, U in ((0, U1), (1, U2)):
        own = sub.assemble([U1, U2], sub.pair_coefficients(s, q, "own", owner))
        assert float(torch.linalg.matrix_norm(own - U @ (U.T @ own))) < 1e-12, "own basis lies in the owner's span"


def test_pair_of_unlike_ranks_and_beyond_half_the_space() -> None:
    g = generator(1)
    U1, U2 = orthonormal(20, 15, g), orthonormal(20, 8, g)  # 15 + 8 > 20: three directions must be common
    s = sub.pair_spectrum(U1.T @ U2)
    assert s.eigenvalues.shape == (8,)
    assert int((s.eigenvalues > 1 - 1e-12).sum()) == 3
    assert float(s.eigenvalues.max()) <= 1.0


def test_degenerate_eigenvalue_one_where_the_literal_recipe_is_wrong() -> None:
    """100 directions shared exactly. eig may return any basis of the eigenspace, and returns a skew one."""
    n, shared = 300, 100
    g = generator(2)
    common = torch.randn(n, shared, generator=g, dtype=torch.float64)
    W1, W2 = (torch.cat([common, torch.randn(n, 50, generator=g, dtype=torch.float64)], dim=1) for _ in range(2))
    U1, U2 = literal.column_basis(W1), literal.column_basis(W2)
    s = sub.pair_spectrum(U1.T @ U2)
    q = int((s.eigenvalues > 1 - 1e-9).sum())
    assert q == shared
    for basis in ("first", "bisector"):
        Z = sub.assemble([U1, U2], sub.pair_coefficients(s, q, basis))
        assert torch.allclose(Z.T @ Z, torch.eye(q, dtype=torch.float64), atol=1e-12)
        assert projector_distance(Z, torch.linalg.qr(common).Q) < 1e-9
    truth = torch.linalg.qr(common).Q
    right = truth @ (truth.T @ W1)
    wrong = literal.shared_literal(literal.projector(U1) @ literal.projector(U2), 1 - 1e-9)
    error = torch.linalg.norm(literal.shared_part(wrong, W1) - right) / torch.linalg.norm(right)
    assert float(error) > 0.1, "the literal recipe was wrong by 71 % here; if not, the comparison proves nothing"
    ours = sub.assemble([U1, U2], sub.pair_coefficients(s, q, "first"))
    assert float(torch.linalg.norm(ours @ (ours.T @ W1) - right) / torch.linalg.norm(right)) < 1e-10


def test_symmetric_eigensolver_on_the_literal_product_would_be_wrong() -> None:
    """Eq. (9) reads like a symmetric eigenproblem; eigh of P1 P2 sees one triangle and gives other numbers."""
    U1, U2 = pair_at_angles(30, [5.0, 15.0, 30.0], 2, seed=3)
    symmetric = torch.linalg.eigvalsh(literal.projector(U1) @ literal.projector(U2)).flip(0)[:3]
    right = sub.pair_spectrum(U1.T @ U2).eigenvalues[:3]
    assert float((symmetric - right).abs().max()) > 1e-3


# --- angles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 1e-10, 1e-8, 1e-5, 1e-2])
def test_angles_are_resolved_near_0_and_near_90(epsilon: float) -> None:
    Q = orthonormal(50, 6, generator(4))
    U1 = Q[:, :3]
    near_0 = cos(epsilon) * Q[:, 0] + sin(epsilon) * Q[:, 3]
    near_90 = sin(epsilon) * Q[:, 1] + cos(epsilon) * Q[:, 4]
    at_45 = (Q[:, 2] + Q[:, 5]) / sqrt(2)
    angles = sub.principal_angles(U1, torch.stack([near_0, near_90, at_45], dim=1))
    expected = torch.tensor([epsilon, torch.pi / 4, torch.pi / 2 - epsilon], dtype=torch.float64)
    assert torch.allclose(angles, expected, rtol=0, atol=1e-14 if epsilon >= 1e-8 else 1e-10)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.01), (torch.float64, 1e-10)])
def test_figure_7_projections_and_qr_angles_find_one_subspace(dtype: torch.dtype, limit: float) -> None:
    """20 runs of two 300 x 150 matrices, 30 common columns and noise: the two forms differ by rounding alone."""
    worst = 0.0
    for seed in range(20):
        g = generator(100 + seed)
        S = torch.randn(300, 30, generator=g, dtype=torch.float64)
        bases = []
        for _ in range(2):
            W = torch.cat([S, torch.randn(300, 120, generator=g, dtype=torch.float64)], dim=1)
            W = W + 0.05 * torch.randn(300, 150, generator=g, dtype=torch.float64)
            bases.append(torch.linalg.svd(W.to(dtype), full_matrices=False).U[:, :75])
        plain = sub.pair_spectrum((bases[0].T @ bases[1]).double())
        by_angle, angles = sub.angle_spectrum(*bases)
        q = int((plain.eigenvalues > TAU).sum())
        assert q == int((by_angle.eigenvalues > TAU).sum())
        assert torch.allclose(torch.cos(angles) ** 2, by_angle.eigenvalues, atol=1e-12)
        pair = [sub.assemble(bases, sub.pair_coefficients(s, q, "first")).double() for s in (plain, by_angle)]
        pair = [torch.linalg.qr(Z).Q for Z in pair]
        worst = max(worst, float(sub.principal_angles(*pair).max()) * 180 / torch.pi)
    assert worst < limit


def test_angles_follow_the_recursive_definition() -> None:
    U1, U2 = pair_at_angles(30, [3.0, 20.0, 50.0, 80.0], 1, seed=5)
    assert torch.allclose(torch.cos(sub.principal_angles(U1, U2)), literal.principal_cosines(U1, U2), atol=1e-12)


# --- chain -----------------------------------------------------------------------------------------------------------


def spread_bases(k: int, seed: int, degrees: list[float] | None = None) -> list[Tensor]:
    return bases_at_common_angle(60, k, degrees or [0.0, 4.0, 8.0, 60.0], 3, seed)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_chain_equals_the_literal_product(k: int, seed: int) -> None:
    bases = spread_bases(k, seed)
    spectrum = sub.chain_spectrum(sub.overlaps(bases))
    P = literal.chain(projectors(bases))
    values, _ = literal.eigen(P)
    r = bases[0].shape[1]
    assert torch.allclose(spectrum.real[:4], values.real[:4], atol=1e-10)
    assert float(values.real[r:].abs().max()) < 1e-6
    keep = spectrum.real > TAU
    assert int(keep.sum()) == int((values.real > TAU).sum()) == 3
    Z = sub.assemble(bases, sub.chain_coefficients(spectrum, keep))
    assert torch.allclose(Z.T @ Z, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert projector_distance(Z, literal.shared_repaired(P, TAU)) < 1e-6


def test_chain_of_independent_subspaces_has_complex_pairs_and_keeps_them_whole() -> None:
    g = generator(6)
    bases = [orthonormal(40, 12, g) for _ in range(4)]
    s = sub.chain_spectrum(sub.overlaps(bases))
    assert float(s.imag.abs().max()) > 1e-3
    for cut in s.real.tolist():
        keep = s.real > cut
        C = sub.chain_coefficients(s, keep)[0]
        assert C.shape == (12, int(keep.sum()))
        assert torch.allclose(C.T @ C, torch.eye(C.shape[1], dtype=torch.float64), atol=1e-10)
        # Invariant: N C stays in span(C). A split pair would not.
        N = sub.overlaps(bases)
        M = N.block(0, 1) @ N.block(1, 2) @ N.block(2, 3) @ N.block(3, 0)
        assert float(torch.linalg.matrix_norm(M @ C - C @ (C.T @ M @ C))) < 1e-8


def test_degenerate_chain_of_exactly_shared_directions_is_orthonormal() -> None:
    for seed in range(6):
        bases = [U @ orthonormal(U.shape[1], U.shape[1], generator(seed + 50 + i))
                 for i, U in enumerate(bases_at_common_angle(120, 3, [0.0] * 20, 6, seed))]
        s = sub.chain_spectrum(sub.overlaps(bases))
        keep = s.real > TAU
        Z = sub.assemble(bases, sub.chain_coefficients(s, keep))
        truth = bases_at_common_angle(120, 3, [0.0] * 20, 6, seed)[0][:, :20]
        assert projector_distance(Z, truth) < 1e-7


def test_chain_with_nothing_kept_is_empty() -> None:
    bases = spread_bases(3, 7)
    s = sub.chain_spectrum(sub.overlaps(bases))
    assert sub.assemble(bases, sub.chain_coefficients(s, s.real > 2)).shape == (60, 0)


# --- consensus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_consensus_equals_the_mean_projector(k: int, seed: int) -> None:
    bases = spread_bases(k, seed, [0.0, 10.0, 16.0, 40.0])
    s = sub.consensus_spectrum(sub.overlaps(bases))
    basis, values = literal.mean_projector_basis(projectors(bases), TAU)
    assert torch.allclose(s.mean, values[: s.mean.numel()], atol=1e-10)
    assert float(values[s.mean.numel() :].abs().max()) < 1e-8
    keep = (s.mean > sub.consensus_threshold(TAU, k)) & (s.coverage.min(0).values > TAU)
    Z = sub.assemble(bases, {i: C[:, keep] for i, C in s.coefficients.items()})
    assert torch.allclose(Z.T @ Z, torch.eye(3, dtype=torch.float64), atol=1e-10)
    assert projector_distance(Z, basis) < 1e-7
    for i, U in enumerate(bases):
        assert torch.allclose(s.coverage[i, keep], ((U.T @ Z) ** 2).sum(0), atol=1e-10)


def test_consensus_of_two_is_the_bisector() -> None:
    U1, U2 = pair_at_angles(50, [5.0, 12.0, 20.0, 50.0], 2, seed=8)
    pair = sub.pair_spectrum(U1.T @ U2)
    bisector = sub.assemble([U1, U2], sub.pair_coefficients(pair, 3, "bisector"))
    s = sub.consensus_spectrum(sub.overlaps([U1, U2]))
    assert torch.allclose(s.mean[:3], (1 + pair.c[:3]) / 2, atol=1e-12)
    Z = sub.assemble([U1, U2], {i: C[:, :3] for i, C in s.coefficients.items()})
    assert projector_distance(Z, bisector) < 1e-10


def test_consensus_ignores_order_and_the_chain_does_not() -> None:
    g = generator(9)
    common = orthonormal(60, 5, g)
    bases = [torch.linalg.qr(torch.cat([common + 0.06 * torch.randn(60, 5, generator=g, dtype=torch.float64),
                                        torch.randn(60, 4, generator=g, dtype=torch.float64)], dim=1)).Q
             for _ in range(4)]
    order = [2, 0, 3, 1]
    shuffled = [bases[i] for i in order]

    def joint(B: list[Tensor]) -> Tensor:
        s = sub.consensus_spectrum(sub.overlaps(B))
        return sub.assemble(B, {i: C[:, :5] for i, C in s.coefficients.items()})

    def chained(B: list[Tensor]) -> Tensor:
        s = sub.chain_spectrum(sub.overlaps(B))
        keep = torch.zeros(9, dtype=torch.bool)
        keep[:5] = True
        return sub.assemble(B, sub.chain_coefficients(s, keep))

    assert projector_distance(joint(bases), joint(shuffled)) < 1e-10
    assert projector_distance(chained(bases), chained(shuffled)) > 1e-2


@pytest.mark.parametrize("k", [2, 3, 5, 10])
def test_mapped_thresholds_mean_one_angle_for_every_k(k: int) -> None:
    """16 directions at a common pairwise angle: kept at 22 degrees, dropped at 24, whatever k (tau: 22.8)."""
    for degrees, found in ((22.0, 4), (24.0, 0)):
        bases = bases_at_common_angle(120, k, [degrees] * 4, 2, seed=k)
        c = cos(radians(degrees))
        M = sub.overlaps(bases)
        chain, mean = sub.chain_spectrum(M), sub.consensus_spectrum(M)
        assert torch.allclose(chain.real[:4], torch.full((4,), c**k, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(mean.mean[:4], torch.full((4,), (1 + (k - 1) * c) / k, dtype=torch.float64), atol=1e-10)
        assert int((chain.real > sub.chain_threshold(TAU, k)).sum()) == found
        assert int((mean.mean > sub.consensus_threshold(TAU, k)).sum()) == found
        if k >= 3 and degrees == 22.0:
            assert int((chain.real > TAU).sum()) == 0, "the raw threshold asks for a smaller angle at k >= 3"


def test_a_direction_that_one_of_twenty_lacks_fails_on_coverage_alone() -> None:
    bases = bases_at_common_angle(200, 19, [0.0] * 3, 1, seed=10)
    bases.append(orthonormal(200, 4, generator(11)))
    s = sub.consensus_spectrum(sub.overlaps(bases))
    passes = s.mean > sub.consensus_threshold(TAU, 20)
    assert int(passes.sum()) == 3, "the mean alone is fooled"
    assert int((passes & (s.coverage.min(0).values > TAU)).sum()) == 0


# --- unions ----------------------------------------------------------------------------------------------------------


def worst_leak(Q: Tensor, shared: list[Tensor]) -> float:
    return max(float(torch.linalg.matrix_norm(A - Q @ (Q.T @ A), ord=2)) ** 2 for A in shared)


def tilted_pool(rank: int, true: int, p: int, degrees: float, seed: int) -> list[Tensor]:
    """p orthonormal coordinate sets: the same ``true`` directions, each tilted by ``degrees`` its own way."""
    g = generator(seed)
    common = torch.eye(rank, dtype=torch.float64)[:, :true]
    out = []
    for _ in range(p):
        noise = torch.randn(rank, true, generator=g, dtype=torch.float64)
        noise = noise - common @ (common.T @ noise)
        tilt = torch.linalg.qr(noise).Q if true <= rank - true else noise / noise.norm(dim=0)
        out.append(torch.linalg.qr(common * cos(radians(degrees)) + tilt * sin(radians(degrees))).Q)
    return out


def test_union_with_one_vector_is_exactly_what_is_shared() -> None:
    A = orthonormal(12, 5, generator(12))
    Q = sub.union_coefficients([A], [1 - TAU], 12)
    assert projector_distance(Q, A) < 1e-12
    assert sub.union_coefficients([A[:, :0]], [1 - TAU], 12).shape == (12, 0)
    assert sub.union_coefficients([], [], 12).shape == (12, 0)


@pytest.mark.parametrize("p", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("degrees", [3.0, 10.0, 20.0, 35.0, 70.0])
def test_union_keeps_its_bound(p: int, degrees: float) -> None:
    shared = tilted_pool(40, 6, p, degrees, seed=p)
    for leak in (0.02, 1 - TAU, 0.5):
        Q = sub.union_coefficients(shared, [leak] * p, 40)
        assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), atol=1e-12)
        assert worst_leak(Q, shared) <= leak + 2e-9
        assert 6 <= Q.shape[1] <= 40


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 1000), st.floats(0.0, 0.9),
    st.floats(0.0, 1.5),
)
def test_union_bound_and_order_on_random_subspaces(
    sizes: list[int], seed: int, leak: float, spread: float
) -> None:
    g = generator(seed)
    centre = torch.randn(8, 6, generator=g, dtype=torch.float64)
    shared = [
        torch.linalg.qr(centre[:, :q] + spread * torch.randn(8, q, generator=g, dtype=torch.float64)).Q for q in sizes
    ]
    Q = sub.union_coefficients(shared, [leak] * len(sizes), 8)
    assert worst_leak(Q, shared) <= leak + 2e-9
    turned = sub.union_coefficients(shared[::-1], [leak] * len(sizes), 8)
    assert projector_distance(Q, turned) < 1e-6
    # Not the choice of principal vectors inside a span, either.
    rotated = [A @ orthonormal(A.shape[1], A.shape[1], g) for A in shared]
    assert projector_distance(Q, sub.union_coefficients(rotated, [leak] * len(sizes), 8)) < 1e-6


def test_near_copies_do_not_remove_a_second_direction() -> None:
    """20 pool vectors at +-8 degrees around one direction: all are within 22.8 degrees of it, one is enough."""
    e = torch.eye(6, dtype=torch.float64)
    shared = [
        (cos(radians(8)) * e[:, :1] + (-1) ** j * sin(radians(8)) * e[:, 1:2]) for j in range(20)
    ]
    Q = sub.union_coefficients(shared, [1 - TAU] * 20, 6)
    assert projector_distance(Q, e[:, :1]) < 1e-9


# --- sequences -------------------------------------------------------------------------------------------------------


def keep_above(tau: float) -> sub.KeepRule:
    return lambda _j, values: int((values > tau).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 3, 5])
def test_sequence_equals_the_literal_iteration(k: int, seed: int) -> None:
    bases = spread_bases(k, seed, [0.0, 6.0, 12.0, 45.0])
    W = matrix_on(bases[0], 50, seed)
    Q = sub.sequence_coefficients(sub.overlaps(bases), 0, range(1, k), keep_above(TAU))
    assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), atol=1e-12)
    Z = bases[0] @ Q
    truth = literal.sequence(W, [matrix_on(U, 50, 90 + i) for i, U in enumerate(bases[1:])], TAU)
    assert torch.allclose(W - Z @ (Z.T @ W), truth, atol=1e-8)


def test_eight_tilted_copies_of_52_directions_do_not_fill_the_space() -> None:
    """A target of rank 64 whose 52 directions 8 pool vectors hold too, tilted by 10 degrees each its own way: 52 go.
    Every basis of all the columns would be 64 wide and leave nothing of the target."""
    n, r, true, p = 256, 64, 52, 8
    g = generator(14)
    U = orthonormal(n, r, g)
    bases = [U]
    for _ in range(p):
        tilt = orthonormal(n, true, g)
        common = U[:, :true] * cos(radians(10)) + tilt * sin(radians(10))
        own = torch.randn(n, r - true, generator=g, dtype=torch.float64)
        bases.append(torch.linalg.qr(torch.cat([common, own], dim=1)).Q)
    M = sub.overlaps(bases)
    shared = []
    for j in range(1, p + 1):
        s = sub.pair_spectrum(M.block(0, j))
        shared.append(s.A[:, : int((s.eigenvalues > TAU).sum())])
        assert shared[-1].shape[1] == true
    assert int(torch.linalg.matrix_rank(torch.cat(shared, dim=1))) == r
    union = sub.union_coefficients(shared, [1 - TAU] * p, r)
    assert union.shape[1] == true
    assert worst_leak(union, shared) <= 1 - TAU + 2e-9
    W = matrix_on(U, 100, 16, spread=2.0)
    size = float(torch.linalg.norm(W))

    def left(Q: Tensor) -> float:
        return float(torch.linalg.norm(W - (U @ Q) @ ((U @ Q).T @ W))) / size

    forwards = sub.sequence_coefficients(M, 0, range(1, p + 1), keep_above(TAU))
    backwards = sub.sequence_coefficients(M, 0, range(p, 0, -1), keep_above(TAU))
    assert forwards.shape[1] == backwards.shape[1] == true
    assert projector_distance(forwards, backwards) > 1e-3, "the sequence depends on its order"
    assert left(union) == pytest.approx(left(forwards), abs=0.02)
    assert left(union) == pytest.approx(sqrt(12 / 64), rel=0.2)


# --- size ------------------------------------------------------------------------------------------------------------


def test_nothing_larger_than_the_bases_or_the_square_of_their_ranks() -> None:
    n, r, k = 4096, 16, 4
    g = generator(17)
    bases = [orthonormal(n, r, g).float() for _ in range(k)]

    def everything() -> None:
        M = sub.overlaps(bases)
        s = sub.pair_spectrum(M.block(0, 1))
        sub.assemble(bases[:2], sub.pair_coefficients(s, 8, "bisector"))
        c = sub.consensus_spectrum(M)
        sub.assemble(bases, {i: C[:, :8] for i, C in c.coefficients.items()})
        sub.chain_coefficients(sub.chain_spectrum(M), torch.ones(r, dtype=torch.bool))
        sub.principal_angles(bases[0], bases[1])
        sub.angle_spectrum(bases[0], bases[1])
        sub.sequence_coefficients(M, 0, [1, 2, 3], keep_above(0.0))

    assert largest_allocation(everything) <= max(n * r, (k * r) ** 2)
