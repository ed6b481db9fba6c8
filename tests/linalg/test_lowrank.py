"""Thin factorisations: exact products, every scale, bad inputs, the iterative path against the exact one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devec.linalg import lowrank
from devec.linalg.lowrank import ThinSVD, svd_of_dense, svd_of_product, svd_of_sum
from devec.linalg.numerics import NonFiniteError
from devec.linalg.subspace import pair_spectrum
from reference.allocations import largest_allocation
from reference.planted import bases_at_common_angle, generator, orthonormal, projector_distance


def rebuilt(svd: ThinSVD) -> Tensor:
    return (svd.U.double() * svd.S) @ svd.V.double().T


def assert_thin_svd(svd: ThinSVD, W: Tensor, tolerance: float) -> None:
    eye = torch.eye(svd.rank, dtype=torch.float64)
    assert torch.allclose(svd.U.double().T @ svd.U.double(), eye, atol=tolerance)
    assert torch.allclose(svd.V.double().T @ svd.V.double(), eye, atol=tolerance)
    assert bool((svd.S[1:] <= svd.S[:-1] * (1 + 1e-12)).all())
    scale = float(torch.linalg.matrix_norm(W.double(), ord=2))
    assert float((rebuilt(svd) - W.double()).abs().max()) <= tolerance * scale


TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 12), st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_product_equals_its_svd(n: int, m: int, r: int, seed: int, dtype: torch.dtype) -> None:
    g = generator(seed)
    B = torch.randn(n, r, generator=g, dtype=torch.float64).to(dtype)
    A = torch.randn(r, m, generator=g, dtype=torch.float64).to(dtype)
    svd = svd_of_product(B, A)
    W = B.double() @ A.double()
    assert svd.rank == min(n, m, r)
    assert svd.U.dtype == dtype and svd.S.dtype == torch.float64
    assert svd.total == pytest.approx(float((W * W).sum()), rel=1e-5)
    if r:
        assert_thin_svd(svd, W, TOLERANCE[dtype])
        assert svd.energy_kept == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_factors_give_no_spurious_directions(dtype: torch.dtype) -> None:
    """A QR of B alone would return 16 columns here, 8 of them arbitrary."""
    g = generator(0)
    B = torch.randn(300, 16, generator=g, dtype=torch.float64)
    A = torch.randn(16, 200, generator=g, dtype=torch.float64)
    twins = B.clone()
    twins[:, 8:] = B[:, :8]  # duplicate columns
    flat = A.clone()
    flat[8:] = torch.randn(8, 8, generator=g, dtype=torch.float64) @ A[:8]  # rows that depend on the others
    for left, right in ((twins, A), (B, flat), (twins, flat)):
        svd = svd_of_product(left.to(dtype), right.to(dtype))
        assert svd.rank == 8
        truth = torch.linalg.svd(left @ right, full_matrices=False)
        assert projector_distance(svd.U, truth.U[:, :8]) < 10 * TOLERANCE[dtype]
        assert torch.allclose(svd.S, truth.S[:8], rtol=10 * TOLERANCE[dtype])


def test_more_columns_than_rows() -> None:
    B, A = torch.randn(5, 9, generator=generator(0)), torch.randn(9, 7, generator=generator(1))
    svd = svd_of_product(B, A)
    assert svd.rank == 5
    assert_thin_svd(svd, B.double() @ A.double(), 5e-6)


@pytest.mark.parametrize("exponent", [-25, -12, 0, 12, 25])
def test_every_scale_gives_the_same_directions(exponent: int) -> None:
    g = generator(3)
    B, A = torch.randn(80, 6, generator=g), torch.randn(6, 50, generator=g)
    W = torch.randn(80, 50, generator=g)
    big = 10.0**exponent
    for at_one, scaled in (
        (svd_of_product(B, A), svd_of_product(B * big, A)),
        (svd_of_product(B, A), svd_of_product(B, A * big)),
        (svd_of_dense(W), svd_of_dense(W * big)),
        (svd_of_dense(W.double()), svd_of_dense(W.double() * big)),
    ):
        assert scaled.rank == at_one.rank
        assert projector_distance(at_one.U, scaled.U) < 1e-5
        assert torch.allclose(scaled.S, at_one.S * big, rtol=1e-5)
        assert scaled.total == pytest.approx(at_one.total * big * big, rel=1e-5)
        assert scaled.energy_kept == pytest.approx(at_one.energy_kept, rel=1e-6)


def test_both_factors_at_the_end_of_the_range() -> None:
    g = generator(4)
    B, A = torch.randn(40, 3, generator=g), torch.randn(3, 30, generator=g)
    for big in (1e-25, 1e25):
        svd = svd_of_product(B * big, A * big)  # entries of the product: 1e-50 and 1e50, outside float32
        assert svd.rank == 3
        assert torch.allclose(svd.S, svd_of_product(B, A).S * big * big, rtol=1e-5)
    tiny = svd_of_product(B * 1e-40, A)  # subnormal: few bits are left, but no infinity
    assert bool(torch.isfinite(tiny.U).all()) and bool(torch.isfinite(tiny.S).all())


def test_unbalanced_columns_are_not_lost() -> None:
    """B times D and D^-1 times A is the same matrix however far D is from the identity."""
    g = generator(5)
    B, A = torch.randn(60, 4, generator=g), torch.randn(4, 50, generator=g)
    D = torch.tensor([1e-6, 1.0, 1e4, 1e-3])
    assert torch.allclose(svd_of_product(B * D, A / D[:, None]).S, svd_of_product(B, A).S, rtol=1e-4)
    assert svd_of_product(B * D, A / D[:, None]).rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_and_empty_give_an_empty_basis(dtype: torch.dtype) -> None:
    for svd in (
        svd_of_product(torch.zeros(7, 3, dtype=dtype), torch.ones(3, 5, dtype=dtype)),
        svd_of_product(torch.ones(7, 3, dtype=dtype), torch.zeros(3, 5, dtype=dtype)),
        svd_of_product(torch.zeros(7, 0, dtype=dtype), torch.zeros(0, 5, dtype=dtype)),
        svd_of_dense(torch.zeros(7, 5, dtype=dtype)),
    ):
        assert svd.rank == 0 and svd.U.shape == (7, 0) and svd.V.shape == (5, 0)
        assert svd.U.dtype in (torch.float32, torch.float64)
        assert svd.total == 0.0 and svd.energy_kept == 1.0
    assert svd_of_dense(torch.zeros(0, 5, dtype=dtype)).U.shape == (0, 0)


def test_factors_that_cancel_are_a_zero_matrix() -> None:
    """B A = 0 exactly with nonzero factors: no direction may come out of rounding."""
    B = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.5, 0.5]])
    A = torch.tensor([[1.0, -3.0], [-1.0, 3.0]])
    assert svd_of_product(B, A).rank == 0
    g = generator(6)
    X, Y = torch.randn(50, 4, generator=g), torch.randn(4, 40, generator=g)
    assert svd_of_sum([(X, Y), (X, -Y)]).rank == 0
    assert svd_of_sum([(X, Y), (-X, Y)]).rank == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_entries_are_counted_not_propagated(bad: float) -> None:
    W, B, A = torch.ones(6, 5), torch.ones(6, 2), torch.ones(2, 5)
    W[1, 2] = bad
    B[3, 1] = bad
    with pytest.raises(NonFiniteError, match="1 of 30 entries"):
        svd_of_dense(W)
    with pytest.raises(NonFiniteError, match="1 of 12 entries"):
        svd_of_product(B, A)
    with pytest.raises(NonFiniteError, match="1 of 12 entries"):
        svd_of_product(torch.zeros(5, 2), B.T)  # a zero factor does not hide it


def test_sum_of_products_is_exact() -> None:
    g = generator(7)
    terms = [(torch.randn(30, r, generator=g), torch.randn(r, 20, generator=g)) for r in (1, 3, 4)]
    total = sum(B.double() @ A.double() for B, A in terms)
    svd = svd_of_sum(terms)
    assert svd.rank == 8
    assert_thin_svd(svd, total, 5e-6)


def test_inner_products_of_factors() -> None:
    g = generator(8)
    B1, A1 = torch.randn(20, 3, generator=g), torch.randn(3, 15, generator=g)
    B2, A2 = torch.randn(20, 5, generator=g), torch.randn(5, 15, generator=g)
    W1, W2 = B1.double() @ A1.double(), B2.double() @ A2.double()
    assert lowrank.inner_of_products(B1, A1, B2, A2) == pytest.approx(float((W1 * W2).sum()), rel=1e-12)
    assert lowrank.inner_of_dense(W1.float(), W2.float(), block=7) == pytest.approx(float((W1 * W2).sum()), rel=1e-5)
    assert lowrank.frobenius_of_product(B1, A1) == pytest.approx(float(torch.linalg.norm(W1)), rel=1e-12)
    assert lowrank.frobenius_of_product(B1[:, :0], A1[:0]) == 0.0


@pytest.mark.parametrize("shape", [(400, 90), (90, 400), (150, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_exact_path(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = torch.randn(*shape, generator=generator(9), dtype=torch.float64).to(dtype)
    svd = svd_of_dense(W)
    assert svd.rank == min(shape) and svd.total == pytest.approx(float((W.double() ** 2).sum()), rel=1e-10)
    assert_thin_svd(svd, W, 2e-5 if dtype == torch.float32 else 1e-12)


def test_dense_rank_deficient_matrix_has_its_rank_in_both_dtypes() -> None:
    g = generator(10)
    W = torch.randn(300, 7, generator=g, dtype=torch.float64) @ torch.randn(7, 280, generator=g, dtype=torch.float64)
    for X in (W, W.float()):
        for rule in ("none", "auto", "noise", "mp", "energy=1"):
            svd = svd_of_dense(X, rule)
            assert svd.rank == 7, (X.dtype, rule)
            assert projector_distance(svd.U, torch.linalg.svd(W).U[:, :7]) < 1e-5


def test_small_singular_values_keep_their_directions_in_float32() -> None:
    """s_1/s_r = 256: a Gram matrix in float32 would lose the small directions by 30 degrees."""
    g = generator(11)
    s = torch.arange(1, 129, dtype=torch.float64) ** -1.14
    U, V = orthonormal(512, 128, g), orthonormal(400, 128, g)
    W = ((U * s) @ V.T).float()
    svd = svd_of_dense(W, 64, exact=True)
    assert projector_distance(svd.U, U[:, :64]) < 1e-4
    assert projector_distance(svd.V, V[:, :64]) < 1e-4


# --- the iterative path ----------------------------------------------------------------------------------------------


def two_dense_vectors(n: int, m: int, exponent: float, seed: int) -> tuple[Tensor, Tensor]:
    """16 planted shared directions at 10 degrees and 48 own ones, spectrum j^-exponent, white noise at half the
    smallest signal value."""
    U = bases_at_common_angle(n, 2, [10.0] * 16, 48, seed)
    out = []
    for i in range(2):
        g = generator(1000 * seed + i)
        order = torch.randperm(64, generator=g)
        s = (torch.arange(1, 65, dtype=torch.float64) ** -exponent)[order]
        W = (U[i] * s) @ orthonormal(m, 64, g).T
        noise = torch.randn(n, m, generator=g, dtype=torch.float64)
        W += noise * (0.5 * float(s.min()) / (n**0.5 + m**0.5))
        out.append(W.float())
    return out[0], out[1]


@pytest.mark.parametrize(
    ("n", "m", "exponent", "rule"),
    [(1024, 1024, 0.5, "64"), (1024, 1024, 1.0, "64"), (1024, 1024, 0.5, "auto"), (2048, 1024, 0.5, "64")],
)
def test_iteration_finds_every_planted_direction(n: int, m: int, exponent: float, rule: str) -> None:
    pair = two_dense_vectors(n, m, exponent, seed=1)
    fast = [svd_of_dense(W, rule, key=("t", i)) for i, W in enumerate(pair)]
    exact = [svd_of_dense(W, rule, exact=True) for W in pair]
    assert [x.rank for x in fast] == [x.rank for x in exact] == [64, 64]
    for side in ("U", "V"):
        found = pair_spectrum(getattr(fast[0], side).T @ getattr(fast[1], side)).eigenvalues
        truth = pair_spectrum(getattr(exact[0], side).T @ getattr(exact[1], side)).eigenvalues
        assert float((found - truth).abs().max()) <= 3e-3
        assert int((found > 0.85).sum()) == int((truth > 0.85).sum()) == (16 if side == "U" else 0)
    for x in fast:
        assert torch.allclose(x.U.T @ x.U, torch.eye(64), atol=1e-5)
        assert torch.allclose(x.V.T @ x.V, torch.eye(64), atol=1e-5)


def test_iteration_is_really_used_and_gives_up_where_it_cannot_help(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    exact = lowrank._by_gram
    monkeypatch.setattr(lowrank, "_by_gram", lambda X: calls.append("exact") or exact(X))
    W = two_dense_vectors(512, 512, 0.5, seed=2)[0]
    svd_of_dense(W, 32)
    assert calls == []
    for kwargs in ({"rule": 33}, {"rule": 32, "exact": True}, {"rule": "none"}, {"rule": "energy=0.999"}):
        calls.clear()
        svd_of_dense(W, **kwargs)
        assert calls == ["exact"], kwargs


def test_same_key_same_bits() -> None:
    W = two_dense_vectors(512, 512, 0.5, seed=3)[0]
    a, b, c = (svd_of_dense(W, 20, key=k) for k in ("x", "x", "y"))
    assert torch.equal(a.U, b.U) and torch.equal(a.S, b.S) and torch.equal(a.V, b.V)
    assert not torch.equal(a.U, c.U)
    g = generator(12)
    B, A = torch.randn(500, 8, generator=g), torch.randn(8, 300, generator=g)
    p, q = svd_of_product(B, A), svd_of_product(B.clone(), A.clone())
    assert torch.equal(p.U, q.U) and torch.equal(p.S, q.S) and torch.equal(p.V, q.V)
    x, y = svd_of_dense(W, exact=True), svd_of_dense(W, exact=True)
    assert torch.equal(x.U, y.U) and torch.equal(x.V, y.V)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_lora_pair_allocates_nothing_of_the_size_of_the_matrix() -> None:
    n, r = 4096, 64
    g = generator(13)
    B, A = torch.randn(n, r, generator=g), torch.randn(r, n, generator=g)
    assert largest_allocation(lambda: svd_of_product(B, A)) <= n * r
    assert largest_allocation(lambda: svd_of_sum([(B, A), (B, A)])) <= n * 2 * r


@pytest.mark.parametrize("shape", [(4096, 256), (256, 4096)])
@pytest.mark.parametrize("rule", ["none", "16"])
def test_dense_allocates_no_square_of_the_long_side(shape: tuple[int, int], rule: str) -> None:
    W = torch.randn(*shape, generator=generator(14))
    assert largest_allocation(lambda: svd_of_dense(W, rule)) <= 4096 * 256
