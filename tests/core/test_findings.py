"""Every warning fires where it should and is silent where it should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from devec.core.decomposition import Decomposition
from devec.core.findings import decomposition_findings, pool_findings
from devec.core.options import View
from devec.core.results import Finding
from devec.core.summary import all_findings, as_dict
from devec.core.vectors import Origin, Pool
from pools import Value, decomposed, delta, pool, vector
from reference.planted import bases_at_common_angle, factors_on, generator, orthonormal

N, M, R = 96, 80, 4


def lora(seed: int, n: int = N, m: int = M, r: int = R) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(n, r, generator=g), torch.randn(r, m, generator=g) / m**0.5


def codes(findings: list[Finding]) -> set[str]:
    return {f.code for f in findings}


def found(*values: Value, view: View | None = None, **factoring: object) -> set[str]:
    return codes(all_findings(decomposed(pool(*values), view, **factoring)))


def the(d: Decomposition, code: str) -> Finding:
    matches = [f for f in all_findings(d) if f.code == code]
    assert len(matches) == 1, [f.code for f in all_findings(d)]
    return matches[0]


def test_independent_adapters_share_nothing_and_that_is_all_there_is_to_say() -> None:
    for mode in ("pairwise", "joint"):
        d = decomposed(pool(lora(0), lora(1), lora(2)), mode=mode)
        assert codes(all_findings(d)) == {"nothing-shared"}
        assert "0.85" in the(d, "nothing-shared").message


def test_something_shared_is_silent() -> None:
    U = bases_at_common_angle(N, 2, [5.0, 5.0], 3, 0)
    values = [tuple(x.float() for x in factors_on(B, M, i)) for i, B in enumerate(U)]
    assert found(*values) == set()  # type: ignore[arg-type]


def test_zero_vectors() -> None:
    zero = (torch.zeros(N, R), torch.ones(R, M))
    d = decomposed(pool({"w": lora(0), "x": lora(1)}, {"w": lora(2), "x": zero}, {"w": zero, "x": zero}))
    messages = {f.message.split()[0]: f for f in all_findings(d) if f.code == "zero-vector"}
    assert set(messages) == {"B", "C"}
    assert messages["B"].tensors == ("x",) and "everywhere" in messages["C"].message
    assert set(messages["C"].tensors) == {"w", "x"}
    assert "zero-vector" not in found(lora(0), (1e-20 * lora(1)[0], lora(1)[1])), "small is not zero"
    assert "zero-vector" in found(lora(0), torch.zeros(N, M))


def test_a_module_that_one_adapter_lacks() -> None:
    p = pool({"w": lora(0), "x": lora(1)}, {"w": lora(2)}, {"w": lora(3), "y": lora(4)})
    missing = [f for f in pool_findings(p) if f.code == "missing-module"]
    assert {(f.tensors, "B" in f.message, "A" in f.message) for f in missing} == {
        (("x",), True, False), (("y",), True, True)
    }
    assert pool_findings(pool(lora(0), lora(1))) == []


def test_near_duplicates_and_only_they() -> None:
    B, A = lora(0)
    noise = torch.randn(N, R, generator=generator(9))
    assert "near-duplicate" in found((B, A), (3 * B + 0.3 * noise, A))
    assert "near-duplicate" in found(B @ A, B @ A + 1e-4 * torch.randn(N, M, generator=generator(8)))
    far = (B + 0.6 * noise, A)  # cosine about .86
    assert "near-duplicate" not in found((B, A), far)
    assert "negative-overlap" not in found((B, A), far)


def test_minus_twice_a_vector_cancels_and_is_no_duplicate() -> None:
    B, A = lora(0)
    codes_ = found((B, A), (-2 * B, A))
    assert {"negative-overlap", "everything-shared"} <= codes_
    assert "near-duplicate" not in codes_ and "base-is-mean" not in codes_
    d = decomposed(pool((B, A), (-B, A)))
    assert float(d.shared("A", "B").deltas["w"].norm()) < 1e-5 * float((B @ A).norm()), "Eq. (14) cancels"


def test_the_same_outputs_mixed_by_a_rotation_are_shared_but_no_duplicates() -> None:
    B, A = lora(0)
    turned = B @ orthonormal(R, R, generator(1)).float()
    codes_ = found((B, A), (turned, lora(2)[1]))
    assert codes_ == {"everything-shared"}
    d = decomposed(pool((B, A), (turned, lora(2)[1])))
    assert float(d.unique("A").norm()) < 1e-5 * float((B @ A).norm())


def test_a_base_that_is_the_mean_of_its_fine_tunes() -> None:
    models = [torch.randn(N, M, generator=generator(i)) for i in range(4)]
    mean = sum(models) / 4  # type: ignore[arg-type]
    assert "base-is-mean" in found(*[m - mean for m in models], rank=8)
    assert "base-is-mean" not in found(*models, rank=8)
    off = mean + 0.1 * torch.randn(N, M, generator=generator(9))
    assert "base-is-mean" not in found(*[m - off for m in models], rank=8)
    assert "base-is-mean" not in found(torch.zeros(N, M), torch.zeros(N, M)), "zeros are reported as zeros"


def test_in_mode_target_a_mean_base_is_still_seen_and_a_negated_target_is_none() -> None:
    """Only the target's inner products are kept there: they vanish in both cases, the sum of the vectors in one."""
    target = {"mode": "target", "target": "B"}
    models = [torch.randn(N, M, generator=generator(i)) for i in range(4)]
    mean = sum(models) / 4  # type: ignore[arg-type]
    assert "base-is-mean" in found(*[m - mean for m in models], rank=8, **target)
    assert "base-is-mean" not in found(*models, rank=8, **target)
    assert "base-is-mean" not in found(models[0], models[1], -models[1], rank=8, **target)


def test_in_mode_target_a_seed_counts_if_the_target_has_it() -> None:
    common = lora(0)[1]
    same_seed = [(lora(10 + i)[0], common + 0.02 * torch.randn(R, M, generator=generator(i)) / M**0.5) for i in (1, 2)]
    values = (lora(30), *same_seed)
    assert "shared-seed" in found(*values, mode="target", target="C")
    assert "shared-seed" not in found(*values, mode="target", target="A")


def test_a_shared_seed_of_lora_a() -> None:
    common = lora(0)[1]
    tuned = [common + 0.02 * torch.randn(R, M, generator=generator(i)) / M**0.5 for i in (1, 2, 3)]
    same_seed = [(lora(10 + i)[0], A) for i, A in enumerate(tuned)]
    for side in ("left", "right", "both"):
        assert "shared-seed" in found(*same_seed, side=side)
    d = decomposed(pool(*same_seed))
    assert the(d, "shared-seed").tensors == ("w",)
    assert "shared-seed" not in found(lora(0), lora(1))
    B, A = same_seed[0]
    assert "shared-seed" not in found((B, A), (B.clone(), tuned[1])), "outputs agree too: that is sharing"
    assert "shared-seed" not in found(*[B @ A for B, A in same_seed]), "a full fine-tune has no lora_A"
    few = [
        {f"w{t}": (lora(50 + t + 20 * i)[0], tuned[i] if t == 0 else lora(90 + t + 20 * i)[1]) for t in range(4)}
        for i in range(2)
    ]
    assert "shared-seed" not in found(*few), "one layer of four is no seed"  # type: ignore[arg-type]


def test_outlying_norms() -> None:
    B, A = lora(0)
    assert "norm-outlier" in found((1000 * B, A), lora(1), lora(2))
    assert "norm-outlier" not in found((8 * B, A), lora(1), lora(2))
    assert "norm-outlier" not in found((1000 * B, A), lora(1)), "of two, neither is the norm"
    layers = {f"w{i}": lora(i) for i in range(6)}
    broken = {**layers, "w3": (100 * layers["w3"][0], layers["w3"][1])}
    d = decomposed(pool(broken, {f"w{i}": lora(30 + i) for i in range(6)}))
    assert the(d, "norm-outlier").tensors == ("w3",)
    assert "norm-outlier" not in codes(all_findings(decomposed(pool(layers, layers))))


def test_ranks_at_which_chance_passes_the_threshold() -> None:
    wide = [torch.randn(N, M, generator=generator(i)) for i in range(2)]
    assert "edge-above-threshold" in found(*wide, rank="none")
    d = decomposed(pool(*wide), rank="none")
    assert "longer side" in the(d, "edge-above-threshold").message
    assert "edge-above-threshold" not in found(*wide, rank=8)
    assert "edge-above-threshold" not in found(*wide, rank="none", view=View(threshold="chance"))
    square = [torch.randn(N, N, generator=generator(i)) for i in range(2)]
    assert "longer side" not in the(decomposed(pool(*square), rank="none"), "edge-above-threshold").message


def test_ties() -> None:
    B, A = lora(0)
    assert "threshold-tie" in found((B, A), (B, A), view=View(threshold=1.0))
    assert "threshold-tie" not in found((B, A), (B, A))
    U = bases_at_common_angle(N, 2, [25.0], 1, 1)
    values = [tuple(factors_on(X, M, i)) for i, X in enumerate(U)]
    exact = float(torch.cos(torch.deg2rad(torch.tensor(25.0, dtype=torch.float64)))) ** 2
    tied = decomposed(pool(*values), View(threshold=exact), dtype="float64")  # type: ignore[arg-type]
    assert the(tied, "threshold-tie").tensors == ("w",)
    assert tied.spectra["w", "left", (0, 1)].count == 1, "a tie counts as shared"


def test_everything_shared() -> None:
    B, A = lora(0)
    assert "everything-shared" in found((B, A), (B, A))
    assert "everything-shared" not in found((B, A), lora(1))
    square = [torch.randn(N, N, generator=generator(i)) for i in range(2)]
    assert "everything-shared" in found(*square, rank="none"), "two full-rank matrices: every projector is I"


@pytest.mark.parametrize("mode", ["pairwise", "joint", "target"])
def test_nothing_shared_names_the_threshold(mode: str) -> None:
    target = "A" if mode == "target" else None
    d = decomposed(pool(lora(0), lora(1)), View(threshold="chance"), mode=mode, target=target)
    assert "chance" in the(d, "nothing-shared").message
    B, A = lora(0)
    assert "nothing-shared" not in found((B, A), (B, A), mode=mode, target=target)


def test_a_delta_that_the_rank_rule_empties_is_no_zero_vector_but_is_reported() -> None:
    noise = [torch.randn(400, 400, generator=generator(i)) for i in range(2)]
    d = decomposed(pool(*noise))
    assert d.tensors["w"].members == ()
    assert codes(all_findings(d)) == {"nothing-shared"}, "unique equals original: that must not pass in silence"
    assert "takes a whole delta for noise" in the(d, "nothing-shared").message
    assert the(d, "nothing-shared").tensors == ("w",)


def test_heads_and_bases() -> None:
    a = vector("a", {"w": lora(0)}, heads={"score": torch.ones(2, 2)}, origin=Origin(base_name="one"))
    b = vector("b", {"w": lora(1)}, origin=Origin(base_name="two"))
    said = {f.code: f for f in pool_findings(Pool((a, b)))}
    assert set(said) == {"head-kept-apart", "base-name-differs"}
    assert said["head-kept-apart"].tensors == ("a:score",)
    same = replace(b, origin=Origin(base_name="one"))
    unknown = replace(b, origin=Origin())
    assert "base-name-differs" not in codes(pool_findings(Pool((a, same))))
    assert "base-name-differs" not in codes(pool_findings(Pool((a, unknown))))


def test_notes_of_the_readers_are_passed_on() -> None:
    note = Finding("integer-copied", "one integer tensor", ("position_ids",))
    d = replace(decomposed(pool(lora(0), lora(1))), notes=(note,))
    assert note in decomposition_findings(d)
    assert note.as_dict() in as_dict(d)["warnings"]


def test_the_summary_holds_what_the_parts_do() -> None:
    U = bases_at_common_angle(N, 3, [5.0, 5.0], 3, 2)
    values = [tuple(x.float() for x in factors_on(B, M, i)) for i, B in enumerate(U)]
    d = decomposed(pool(*values))  # type: ignore[arg-type]
    summary = as_dict(d)
    tensor = summary["tensors"]["w"]
    assert tensor["shared_directions"] == {"A+B": 2, "A+C": 2, "B+C": 2}
    for i, name in enumerate("ABC"):
        exact = (float(d.shared(name).norm()) / float(delta(values[i]).norm())) ** 2  # type: ignore[arg-type]
        assert tensor["shared_energy"][name] == pytest.approx(exact, abs=1e-5)
        assert summary["totals"]["shared_energy"][name] == pytest.approx(exact, abs=1e-5)
    assert summary["totals"]["shared_directions"] == 6
    assert summary["order_dependent"] == []
    assert as_dict(d.with_view(View.of_paper()))["order_dependent"] == ["pair-basis first", "target-rule sequence"]
