"""Batches against float64 references and against the functions for one matrix: same ranks, same subspaces."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from devec.linalg import batched_iteration, iteration
from devec.linalg.batched import svd_of_dense_batch, svd_of_product_batch
from devec.linalg.inner import inner_products_of_dense, inner_products_of_factors
from devec.linalg.lowrank import ThinSVD, svd_of_dense, svd_of_product
from devec.linalg.numerics import NonFiniteError
from devec.linalg.subspace import overlaps, overlaps_at_once, pair_spectrum
from reference.planted import bases_at_common_angle, generator, projector_distance
from reference.planted import orthonormal as basis

PLACES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def on_cpu(svd: ThinSVD) -> ThinSVD:
    return ThinSVD(svd.U.cpu(), svd.S.cpu(), svd.V.cpu(), svd.total)


def assert_alike(ours: ThinSVD, one: ThinSVD, projector: float, values: float = 1e-6) -> None:
    """The batch's result and that for one matrix: both orthonormal, ranks equal, values and subspaces close."""
    ours = on_cpu(ours)
    assert ours.rank == one.rank
    assert ours.U.shape == one.U.shape and ours.V.shape == one.V.shape
    assert (ours.U.dtype, ours.S.dtype) == (one.U.dtype, one.S.dtype)
    assert ours.total == pytest.approx(one.total, rel=1e-6)
    if one.rank == 0:
        return
    eye = torch.eye(one.rank, dtype=torch.float64)
    for Q in (ours.U.double(), ours.V.double()):
        assert float((Q.T @ Q - eye).abs().max()) < 5e-6
    assert float((ours.S - one.S).abs().max()) <= values * float(one.S[0])
    assert projector_distance(ours.U, one.U) <= projector
    assert projector_distance(ours.V, one.V) <= projector


@cache
def planted(kind: str, n: int, seed: int, rank: int = 32, shared: int = 8) -> list[Tensor]:
    """Two ``n x n`` matrices with ``shared`` directions at 10 degrees. ``bulk``: white noise at half the smallest
    signal value; ``tail``: the power law goes on at 0.7 of its height, in directions of their own."""
    bases = bases_at_common_angle(n, 2, [10.0] * shared, rank - shared, seed)
    out = []
    for i, U in enumerate(bases):
        g = generator(1000 * seed + i)
        s = torch.arange(1, rank + 1, dtype=torch.float64)[torch.randperm(rank, generator=g)] ** -0.5
        W = (U * s) @ basis(n, rank, g).T
        if kind == "bulk":
            W += torch.randn(n, n, generator=g, dtype=torch.float64) * (0.5 * float(s.min()) / (2 * n**0.5))
        else:
            rest = torch.randn(n, n - rank, generator=g, dtype=torch.float64)
            rest = torch.linalg.qr(rest - U @ (U.T @ rest)).Q
            W += (rest * (0.7 * torch.arange(rank + 1, n + 1, dtype=torch.float64) ** -0.5)) @ basis(n, n - rank, g).T
        out.append(W.float())
    return out


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("n", "m", "r"), [(80, 50, 6), (50, 80, 1), (7, 30, 12), (30, 7, 12), (9, 9, 9), (1, 5, 2)])
def test_products_have_the_svd_of_their_matrices(n: int, m: int, r: int, place: str) -> None:
    g = generator(n * m + r)
    B, A = torch.randn(5, n, r, generator=g), torch.randn(5, r, m, generator=g)
    for i, svd in enumerate(map(on_cpu, svd_of_product_batch(B.to(place), A.to(place)))):
        W = B[i].double() @ A[i].double()
        truth = torch.linalg.svd(W, full_matrices=False)
        k = min(n, m, r)
        assert svd.rank == k and svd.total == pytest.approx(float((W * W).sum()), rel=1e-5)
        assert torch.allclose(svd.S, truth.S[:k], rtol=1e-5)
        assert float(((svd.U.double() * svd.S) @ svd.V.double().T - W).abs().max()) < 1e-5 * float(truth.S[0])
        assert_alike(svd, svd_of_product(B[i], A[i]), 1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_each_product_is_decided_by_itself(place: str) -> None:
    """Full rank, dependent columns, a zero factor, cancellation, unbalanced columns and both ends of the range."""
    g = generator(0)
    B, A = torch.randn(60, 8, generator=g), torch.randn(8, 50, generator=g)
    twins, none = B.clone(), torch.zeros(60, 8)
    twins[:, 4:] = B[:, :4]
    flat = A.clone()
    flat[4:] = -A[:4]
    D = torch.logspace(-6, 4, 8)
    pairs = [(B, A), (twins, A), (none, A), (twins, flat), (B * D, A / D[:, None]), (B * 1e-25, A), (B, A * 1e25)]
    got = svd_of_product_batch(
        torch.stack([b for b, _ in pairs]).to(place), torch.stack([a for _, a in pairs]).to(place), "auto"
    )
    assert [svd.rank for svd in got] == [8, 4, 0, 0, 8, 8, 8]
    for svd, (b, a) in zip(got, pairs, strict=True):
        assert_alike(svd, svd_of_product(b, a, "auto"), 2e-5)
    assert got[2].U.shape == (60, 0) and got[2].total == 0.0 == got[3].total


@pytest.mark.parametrize("rule", ["3", "energy=0.8", "nuclear=0.5", "noise", "mp"])
def test_rules_cut_products_as_they_cut_one(rule: str) -> None:
    g = generator(1)
    s = torch.arange(1, 11) ** -1.0
    B, A = torch.randn(4, 90, 10, generator=g) * s, torch.randn(4, 10, 70, generator=g)
    for i, svd in enumerate(svd_of_product_batch(B, A, rule, side_length=70)):
        assert_alike(svd, svd_of_product(B[i], A[i], rule, side_length=70), 1e-4)


def test_float64_keeps_its_digits() -> None:
    g = generator(2)
    B, A = torch.randn(2, 30, 4, generator=g, dtype=torch.float64), torch.randn(2, 4, 20, generator=g).double()
    W = torch.randn(2, 30, 20, generator=g, dtype=torch.float64)
    for i in range(2):
        assert torch.equal(svd_of_product_batch(B, A)[i].U, svd_of_product(B[i], A[i]).U)
        assert torch.equal(svd_of_dense_batch(W, keys="ab")[i].U, svd_of_dense(W[i]).U)


# --- dense matrices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["bulk", "tail"])
@pytest.mark.parametrize("rule", ["auto", "32", "mp", "energy=0.5"])
def test_a_batch_finds_what_one_matrix_at_a_time_finds(kind: str, rule: str, place: str) -> None:
    """Same starting vectors and decisions, so they differ by rounding; no gap at the rank amplifies it to 1e-5."""
    W = torch.stack(planted(kind, 512, seed=1) + planted(kind, 512, seed=2)[:1])
    keys = ["a", "b", "c"]
    got = svd_of_dense_batch(W.to(place), rule, keys=keys)
    for i, key in enumerate(keys):
        assert_alike(got[i], svd_of_dense(W[i], rule, key=key), 1e-4)
    if rule in ("auto", "mp") and kind == "bulk":
        assert {svd.rank for svd in got} == {32}


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bulk", "tail"])
def test_every_shared_direction_is_found(kind: str, products: str) -> None:
    """Eigenvalues of the pair against a float64 SVD: within 3e-3, as for one matrix, also with bfloat16 products."""
    pair = planted(kind, 512, seed=3)
    got = svd_of_dense_batch(torch.stack(pair), 32, keys=[0, 1], products=products)  # type: ignore[arg-type]
    truth = [torch.linalg.svd(W.double()).U[:, :32] for W in pair]
    found = pair_spectrum(got[0].U.T @ got[1].U).eigenvalues
    exact = pair_spectrum(truth[0].T @ truth[1]).eigenvalues
    assert float((found - exact).abs().max()) < 3e-3
    assert int((found > 0.85).sum()) == int((exact > 0.85).sum()) > 0
    for svd, W in zip(got, pair, strict=True):
        assert torch.allclose(svd.S, torch.linalg.svdvals(W.double())[:32], rtol=2e-3)


def test_bfloat16_products_come_first_and_float32_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    plain = batched_iteration.product
    monkeypatch.setattr(batched_iteration, "product", lambda Y, P: made.append(Y.dtype) or plain(Y, P))
    W = torch.stack(planted("bulk", 512, seed=4))
    svd_of_dense_batch(W, 16, keys=[0, 1], products="bfloat16")
    low = made.count(torch.bfloat16)
    assert low >= 4 and set(made[:low]) == {torch.bfloat16} and set(made[low:]) == {torch.float32}
    assert len(made) - low >= 2, "one whole step in float32 at least"
    made.clear()
    svd_of_dense_batch(W, 16, keys=[0, 1])
    assert set(made) == {torch.float32}


def odd_matrices(n: int = 300) -> dict[str, Tensor]:
    g = generator(5)
    rows = torch.zeros(n, n)
    rows[:3] = torch.randn(3, n, generator=g)
    steep = (basis(n, 12, g) * torch.logspace(0, -4, 12, dtype=torch.float64)) @ basis(n, 12, g).T
    return {
        "zero": torch.zeros(n, n),
        "ones": torch.ones(n, n),
        "rank 7": torch.randn(n, 7, generator=g) @ torch.randn(7, n, generator=g),
        "integers": (torch.randint(-2, 3, (n, 2), generator=g) @ torch.randint(-2, 3, (2, n), generator=g)).float(),
        "three rows": rows,
        "one entry": torch.zeros(n, n).index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(2.0)),
        "steep": steep.float(),
        "noise": torch.randn(n, n, generator=g),
        "tiny": torch.randn(n, 5, generator=g) @ torch.randn(5, n, generator=g) * 1e-25,
        "huge": torch.randn(n, 5, generator=g) @ torch.randn(5, n, generator=g) * 1e25,
    }


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["auto", "energy=0.9999", "none"])
def test_odd_matrices_in_one_batch_keep_their_own_ranks(rule: str, products: str) -> None:
    """Rank-deficient panels, a zero matrix, every scale: nothing that one matrix does reaches another."""
    cases = odd_matrices()
    W = torch.stack(list(cases.values()))
    got = svd_of_dense_batch(W, rule, keys=list(cases), products=products)  # type: ignore[arg-type]
    for svd, (name, matrix) in zip(got, cases.items(), strict=True):
        one = svd_of_dense(matrix, rule, key=name)
        # The smallest of the steep values is 1e-4 of the largest: float32 holds its direction to 1e-3.
        assert_alike(svd, one, 3e-3 if name == "steep" else 1e-4)
    if rule == "auto":
        assert [svd.rank for svd in got] == [0, 1, 7, 2, 3, 1, 12, 0, 5, 5]


def test_blocks_grow_for_those_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iteration, "FIRST_BLOCK", 4)
    widths: list[tuple[int, int]] = []
    plain = batched_iteration.product

    def counted(Y: Tensor, P: Tensor) -> Tensor:
        widths.append((P.shape[0], P.shape[2]))
        return plain(Y, P)

    monkeypatch.setattr(batched_iteration, "product", counted)
    W = torch.stack([planted("bulk", 512, seed=s, rank=rank, shared=1)[0] for s, rank in enumerate((3, 30, 7, 40))])
    got = svd_of_dense_batch(W, "auto", keys=range(4))
    assert [svd.rank for svd in got] == [3, 30, 7, 40]
    for i, svd in enumerate(got):
        assert_alike(svd, svd_of_dense(W[i], "auto", key=i), 1e-4)
    assert {count for count, width in widths if width > 24} == {1, 2}, "two matrices went on, one of them to the end"


def test_what_does_not_settle_is_factored_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iteration, "MAX_STEPS", 2)
    W = torch.stack(planted("tail", 300, seed=6))
    for products in ("float32", "bfloat16"):
        got = svd_of_dense_batch(W, 16, keys=[0, 1], products=products)  # type: ignore[arg-type]
        for i, svd in enumerate(got):
            assert_alike(svd, svd_of_dense(W[i], 16, exact=True), 1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(400, 90), (90, 400), (70, 70), (50, 1), (1, 50), (280, 300)])
@pytest.mark.parametrize("rule", ["none", "5", "auto"])
def test_exact_batches(shape: tuple[int, int], rule: str, place: str) -> None:
    W = torch.randn(3, *shape, generator=generator(7))
    W[1] = W[1, :, :1] @ W[1, :1]
    for i, svd in enumerate(svd_of_dense_batch(W.to(place), rule, exact=True, keys="abc")):
        assert_alike(svd, svd_of_dense(W[i], rule, exact=True), 1e-4)


def test_workers_change_no_byte_and_the_batch_is_left_alone() -> None:
    W = torch.stack(planted("bulk", 300, seed=8))
    before = W.clone()
    for rule in ("8", "none"):
        one, two = (svd_of_dense_batch(W, rule, keys="ab", workers=k) for k in (1, 3))
        assert all(torch.equal(x.U, y.U) and torch.equal(x.S, y.S) for x, y in zip(one, two, strict=True))
    assert torch.equal(W, before)
    low = svd_of_dense_batch(W.bfloat16(), 8, keys="ab")
    assert_alike(low[0], svd_of_dense(W[0].bfloat16(), 8, key="a"), 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_entry_names_its_matrix(bad: float) -> None:
    W, B, A = torch.ones(4, 6, 5), torch.ones(4, 6, 2), torch.ones(4, 2, 5)
    W[2, 1, 2] = B[3, 3, 1] = bad
    with pytest.raises(NonFiniteError, match="matrix 2 of the batch: 1 of 30 entries") as error:
        svd_of_dense_batch(W, keys=range(4))
    assert (error.value.index, error.value.reason) == (2, "1 of 30 entries are NaN or infinite")
    with pytest.raises(NonFiniteError, match="matrix 3 of the batch: 1 of 12"):
        svd_of_product_batch(B, A)
    with pytest.raises(NonFiniteError, match="matrix 3 of the batch: 1 of 12"):
        svd_of_product_batch(torch.zeros(4, 5, 2), B.mT)  # a zero factor does not hide it
    with pytest.raises(ValueError, match="4 matrices need as many keys, got 2"):
        svd_of_dense_batch(torch.ones(4, 6, 5), keys="ab")


def test_empty_batches() -> None:
    assert svd_of_dense_batch(torch.ones(0, 6, 5), keys=[]) == []
    assert svd_of_product_batch(torch.ones(0, 6, 2), torch.ones(0, 2, 5)) == []
    nothing = torch.ones(1, 7, 0)
    for svd in (*svd_of_product_batch(nothing, torch.ones(1, 0, 5)), *svd_of_dense_batch(nothing, keys="a")):
        assert svd.rank == 0 and svd.U.shape == (7, 0)


# --- inner products and overlaps -------------------------------------------------------------------------------------


def test_all_inner_products_at_once() -> None:
    g = generator(9)
    matrices = [torch.randn(20, 15, generator=g) for _ in range(4)]
    truth = torch.tensor([[float((x.double() * y.double()).sum()) for y in matrices] for x in matrices])
    assert torch.allclose(inner_products_of_dense(matrices, block=7).float(), truth, rtol=1e-6, atol=1e-5)
    factors = [(torch.randn(20, r, generator=g), torch.randn(r, 15, generator=g)) for r in (1, 4, 0, 3)]
    products = [B.double() @ A.double() for B, A in factors]
    exact = torch.stack([torch.stack([(x * y).sum() for y in products]) for x in products])
    assert torch.allclose(inner_products_of_factors(factors), exact, rtol=1e-12, atol=1e-12)


def test_overlaps_at_once_are_those_of_the_pairs() -> None:
    bases = [basis(60, r, generator(r)).float() for r in (5, 3, 9)]
    for pairs in (None, [(0, 2)]):
        ours, theirs = overlaps_at_once(bases, pairs), overlaps(bases, pairs)
        assert (ours.n, ours.ranks, set(ours.blocks)) == (theirs.n, theirs.ranks, set(theirs.blocks))
        for at, block in theirs.blocks.items():
            assert ours.blocks[at].dtype == torch.float64
            assert torch.allclose(ours.blocks[at], block, atol=1e-6)
