"""What a decomposition promises whatever the mode, side and view: sums, orthogonality, ranks, order, precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from devec.core.decomposition import Decomposition
from devec.core.delta import LowRankDelta
from devec.core.errors import UsageError
from devec.core.options import View
from devec.linalg import chance
from pools import Value, decomposed, dense, float_factors, pool, rank_of, vector
from reference import literal
from reference.allocations import largest_allocation
from reference.planted import bases_at_common_angle, generator, matrix_on, orthonormal


def seen_from(W: Tensor, side: str) -> Tensor:
    return W if side == "left" else W.T


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


def test_a_cut_at_a_number_draws_no_null_and_another_view_none_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    for name in ("pair_p_values", "joint_p_values"):
        original = getattr(chance, name)
        monkeypatch.setattr(chance, name, lambda *a, _f=original, _n=name: drawn.append(_n) or _f(*a))
    d = decomposed(pool(*mixed_pool(3, 97)), mode="joint")
    dense(d.unique("A"))
    assert drawn == []
    for key, s in d.spectra.items():
        assert s.p_values.shape == s.eigenvalues.shape, key
    assert sorted(drawn) == ["joint_p_values"] + ["pair_p_values"] * 3
    drawn.clear()
    for threshold in (0.5, 0.9):
        for s in d.with_view(threshold=threshold).spectra.values():
            assert bool((s.p_values >= 0).all())
    assert drawn == []


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
