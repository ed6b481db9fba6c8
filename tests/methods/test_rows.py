"""Blocks of rows: equal to whole matrices, for any cut, in memory that does not know how many rows there are."""

from __future__ import annotations

import itertools
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import Delta, LowRankDelta, SparseDelta
from devec.core.errors import InputError, UsageError
from devec.core.options import Factoring, View
from devec.methods.decompose.rows import RowSolution, SharedUniqueRows
from pools import Value, block, decomposed, dense, pool
from reference.allocations import largest_allocation
from reference.planted import bases_at_common_angle, generator, orthonormal

N, M = 120, 40


def rows_of(b: Block, start: int, stop: int) -> Block:
    return Block(b.name, b.layout, b.vectors, tuple(None if d is None else d.rows(start, stop) for d in b.deltas))


def run(method: SharedUniqueRows, b: Block, cuts: list[int]) -> tuple[RowSolution, dict[str, Tensor]]:
    """Each stretch between cuts is a worker's; the parts are put together again from the same stretches."""
    edges = [0, *sorted(cuts), b.layout.matrix_shape[0]]
    stretches = [rows_of(b, i, j) for i, j in itertools.pairwise(edges) if j > i]
    solution = method.solve(reduce(method.combine, [method.update(method.start(p), p) for p in stretches]))
    parts = [method.apply(solution, p) for p in stretches]
    return solution, {name: torch.cat([p[name].dense() for p in parts]) for name in parts[0]}


def values(k: int, kind: str, seed: int, dtype: torch.dtype = torch.float64, spread: float = 50.0) -> list[Value]:
    """Rank-10 signals on planted bases with s_1/s_r = spread, then (dense) noise of a thousandth: a gap at 10."""
    out: list[Value] = []
    for i, U in enumerate(bases_at_common_angle(N, k, [4.0] * 3 + [60.0] * 2, 5, seed)):
        g = generator(seed + 100 + i)
        s = torch.logspace(0, -float(torch.log10(torch.tensor(spread))), 10, dtype=torch.float64)
        B, A = U @ (orthonormal(10, 10, g) * s), orthonormal(M, 10, g).T
        if kind == "factors" or (kind == "mixed" and i % 2):
            out.append((B.to(dtype), A.contiguous().to(dtype)))
        else:
            noise = 1e-3 / spread * torch.randn(N, M, generator=g, dtype=torch.float64) / (N**0.5 + M**0.5)
            out.append((B @ A + noise).to(dtype))
    return out


VIEWS = {
    "default": View(), "paper": View.of_paper(), "chance": View(threshold="chance"),
    "sequence": View(target_rule="sequence"), "chain": View(joint="chain"),
}


@pytest.mark.parametrize("kind", ["dense", "factors", "mixed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["pairwise", "joint", "target"])
@pytest.mark.parametrize("view", VIEWS)
def test_equal_to_the_whole_matrix(kind: str, side: str, mode: str, view: str) -> None:
    p = pool(*values(3, kind, 0))
    target = "A" if mode == "target" else None
    factoring = Factoring(mode=mode, side=side, rank="10", dtype="float64", target=target)  # type: ignore[arg-type]
    whole = decomposed(p, VIEWS[view], mode=mode, side=side, rank="10", dtype="float64", target=target)
    solution, parts = run(SharedUniqueRows(factoring, VIEWS[view]), p.block("w"), [37, 80])
    assert solution.condition < 100 and solution.error < 1e-11
    assert parts.keys() == {f"{x}:{n}" for x in ("unique", "shared") for n in ("A" if target else "ABC")}
    for name, found in parts.items():
        scale = float(dense(whole.part(f"original:{name[-1]}")).norm())
        assert float((found - dense(whole.part(name))).norm()) < 1e-12 * scale, name
    for key, s in whole.spectra.items():
        other = solution.decomposition.spectra[key]
        assert torch.allclose(other.eigenvalues[:3], s.eigenvalues[:3], atol=1e-11) and other.count == s.count
    own = solution.decomposition.tensors["w"]
    for i, norm in whole.tensors["w"].norms.items():
        assert own.norms[i] == pytest.approx(norm, rel=1e-12)
    for pair, inner in whole.tensors["w"].gram.items():
        assert own.gram[pair] == pytest.approx(inner, rel=1e-9, abs=1e-12)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, N), max_size=6), st.sampled_from(["dense", "factors", "mixed"]),
    st.sampled_from(["left", "right"]), st.sampled_from(["pairwise", "joint"]),
)
def test_any_cut_is_one_pass(cuts: list[int], kind: str, side: str, mode: str) -> None:
    b = block(values(3, kind, 1))
    method = SharedUniqueRows(Factoring(mode=mode, side=side, rank="10", dtype="float64"))  # type: ignore[arg-type]
    _, one = run(method, b, [])
    _, many = run(method, b, cuts)
    for name, x in one.items():
        assert float((x - many[name]).norm()) <= 1e-12 * float(dense_sum(one, name).norm())


def dense_sum(parts: dict[str, Tensor], name: str) -> Tensor:
    return parts[f"unique:{name[-1]}"] + parts[f"shared:{name[-1]}"]


def test_order_and_grouping_of_the_blocks_do_not_matter_beyond_rounding() -> None:
    b = block(values(2, "mixed", 2))
    method = SharedUniqueRows(Factoring(rank="10", dtype="float64"))
    parts = [rows_of(b, i, i + 30) for i in range(0, N, 30)]
    states = [method.update(method.start(p), p) for p in parts]
    a = method.combine(method.combine(states[0], states[1]), method.combine(states[2], states[3]))
    c = method.combine(states[3], method.combine(method.combine(states[2], states[0]), states[1]))
    d = reduce(method.update, parts, method.start(b))
    assert a.rows == c.rows == d.rows == N
    for key, G in a.grams.items():
        assert torch.allclose(G, c.grams[key], rtol=0, atol=1e-14) and torch.allclose(G, d.grams[key], atol=1e-14)
    with pytest.raises(ValueError, match="unlike"):
        method.combine(a, method.start(Block("other", b.layout, b.vectors, b.deltas)))


@pytest.mark.parametrize("kind", ["dense", "factors", "mixed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_promises_in_float32(kind: str, side: str) -> None:
    given_ = values(2, kind, 3, torch.float32)
    b = block(given_)
    _, parts = run(SharedUniqueRows(Factoring(side=side, rank="10")), b, [50])  # type: ignore[arg-type]
    whole = decomposed(pool(*given_), side=side, rank="10")
    method = SharedUniqueRows(Factoring(side=side, rank="10"))  # type: ignore[arg-type]
    out = method.apply(method.solve(method.update(method.start(b), b)), b)
    for i, name in enumerate("AB"):
        W = dense(whole.original(name))
        scale = float(W.abs().max())
        assert parts[f"unique:{name}"].dtype == torch.float32
        assert float((dense_sum(parts, name).double() - W).abs().max()) < 2e-6 * scale
        assert float((parts[f"unique:{name}"].double() - dense(whole.unique(name))).norm()) < 1e-4 * float(W.norm())
        if isinstance(given_[i], tuple):
            for kind_ in ("unique", "shared"):
                delta = out[f"{kind_}:{name}"]
                assert isinstance(delta, LowRankDelta) and delta.rank_bound <= 10


@pytest.mark.parametrize("spread", [10.0, 100.0, 1e3, 1e4])
def test_the_error_is_reported_and_holds(spread: float) -> None:
    """Ill-conditioned or gapless spectra are not refused: the bound grows with the true error and stays above it."""
    p = pool(*values(2, "dense", 4, spread=spread))
    whole = decomposed(p, rank="10", dtype="float64")
    solution, parts = run(SharedUniqueRows(Factoring(rank="10", dtype="float64")), p.block("w"), [60])
    worst = 0.0
    for name in "AB":
        W = dense(whole.original(name))
        worst = max(worst, float((parts[f"unique:{name}"] - dense(whole.unique(name))).norm() / W.norm()))
    assert solution.condition == pytest.approx(spread, rel=0.1)
    assert worst <= 10 * solution.error
    assert solution.error <= 1e-15 * spread**2


def test_a_cut_through_a_cluster_is_reported() -> None:
    g = generator(5)
    W = orthonormal(N, 20, g) @ orthonormal(M, 20, g).T  # 20 equal singular values
    solution, _ = run(SharedUniqueRows(Factoring(rank="10", dtype="float64")), block([W, W + 0]), [])
    assert solution.error > 1e-3
    whole, _ = run(SharedUniqueRows(Factoring(rank="20", dtype="float64")), block([W, W + 0]), [])
    assert whole.error < 1e-14 and whole.condition == pytest.approx(1.0)


def test_rank_deficient_and_zero_factors() -> None:
    g = generator(6)
    B, A = torch.randn(N, 3, generator=g, dtype=torch.float64), torch.randn(3, M, generator=g, dtype=torch.float64)
    doubled = (torch.cat([B, B], dim=1), torch.cat([A, A], dim=0))
    zero = (torch.zeros(N, 2, dtype=torch.float64), torch.ones(2, M, dtype=torch.float64))
    b = block([doubled, (B, A), zero, None, torch.zeros(N, M, dtype=torch.float64)])
    solution, parts = run(SharedUniqueRows(Factoring(dtype="float64")), b, [10])
    assert {i: s.rank for i, s in solution.decomposition.tensors["w"].svd.items()} == {0: 3, 1: 3}
    for name in "AB":
        assert float(parts[f"unique:{name}"].norm()) < 1e-10 * float((B @ A).norm())
    for name in "CE":
        assert float(parts[f"unique:{name}"].norm()) == float(parts[f"shared:{name}"].norm()) == 0.0
    assert "unique:D" not in parts


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_every_scale(scale: float) -> None:
    plain, scaled = values(2, "mixed", 7, torch.float32), values(2, "mixed", 7, torch.float32)
    scaled = [v * scale if isinstance(v, Tensor) else (v[0] * scale, v[1]) for v in scaled]  # type: ignore[index]
    method = SharedUniqueRows(Factoring(rank="10"))
    _, a = run(method, block(plain), [])
    _, b = run(method, block(scaled), [])
    for name, x in a.items():
        assert torch.allclose(x, b[name] / scale, atol=2e-6), name


def test_a_narrow_input_is_widened_and_nothing_is_changed_in_place() -> None:
    given_ = [v.to(torch.bfloat16) if isinstance(v, Tensor) else v for v in values(2, "dense", 8, torch.float32)]
    copies = [v.clone() for v in given_ if isinstance(v, Tensor)]
    _, parts = run(SharedUniqueRows(Factoring(rank="10")), block(given_), [30])
    assert all(x.dtype == torch.float32 for x in parts.values())
    assert all(torch.equal(x, y) for x, y in zip(copies, given_, strict=True))  # type: ignore[arg-type]


def test_bad_rows_are_named() -> None:
    for bad in ("dense", "B", "A", "sparse"):
        W = torch.ones(N, M)
        B, A = torch.ones(N, 2), torch.ones(2, M)
        {"dense": W, "B": B, "A": A, "sparse": torch.zeros(N, M)}[bad][1, 1] = float("nan")
        second: Delta | Value = {
            "dense": W, "sparse": SparseDelta(torch.tensor([4]), torch.tensor([float("nan")]), (N, M)),
        }.get(bad, (B, A))
        with pytest.raises(InputError, match=r"vector B .*\[tensor emb\]"):
            run(SharedUniqueRows(), block([torch.ones(N, M), second], name="emb"), [])


def test_what_blocks_of_rows_cannot_decide_is_refused() -> None:
    with pytest.raises(UsageError, match="side both"):
        SharedUniqueRows(Factoring(side="both"))
    with pytest.raises(UsageError, match="angles"):
        SharedUniqueRows(view=View(angles=True))
    with pytest.raises(UsageError, match="wider than tall"):
        SharedUniqueRows().start(block([torch.ones(3, 5), torch.ones(3, 5)]))
    B, A = torch.ones(3, 1), torch.ones(1, 50)
    assert SharedUniqueRows().start(block([(B, A), (B, A)])).grams[0, 1].shape == (1, 1), "factors may be wide"


def test_memory_knows_neither_the_rows_nor_for_factors_the_columns() -> None:
    g = generator(9)
    n, m, r, step = 20_000, 3_000, 8, 500
    b = block([(torch.randn(n, r, generator=g), torch.randn(r, m, generator=g)) for _ in range(2)])
    method = SharedUniqueRows(view=View(threshold=0.0001))

    def everything() -> None:
        state = method.start(b)
        for i in range(0, n, step):
            state = method.update(state, rows_of(b, i, i + step))
        solution = method.solve(state)
        for i in range(0, n, step):
            method.apply(solution, rows_of(b, i, i + step))

    assert largest_allocation(everything) <= max(r * m, step * r), "no m x m, no n"
    tall = block([torch.randn(4096, 32, generator=g) for _ in range(2)])

    def dense_pass() -> None:
        state = method.start(tall)
        for i in range(0, 4096, 128):
            state = method.update(state, rows_of(tall, i, i + 128))
        solution = method.solve(state)
        for i in range(0, 4096, 128):
            method.apply(solution, rows_of(tall, i, i + 128))

    assert largest_allocation(dense_pass) <= 128 * 32
