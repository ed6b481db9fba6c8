"""DARE and DELLA: their definition with the draws written out, and each of their guarantees."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.delta import DenseDelta
from devec.core.errors import InputError, UsageError
from devec.core.layout import Layout
from devec.methods.merge.dare import dare
from devec.methods.merge.della import della, probabilities
from merges import NAMES, Tensors, arrays, close, merged, models
from pools import block
from reference import elementwise

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["f32", "f64"]
)


@pytest.fixture(params=[1 << 17, 20], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devec.core.lazy.BLOCK", request.param)


def dare_by_hand(given: list[Tensors], p: float, **choices: Any) -> dict[str, np.ndarray]:
    plain = arrays(given)
    chances = [{n: np.full(x.shape, 1.0 - p) for n, x in m.items()} for m in plain]
    return elementwise.dropped(plain, list(NAMES[: len(given)]), chances, **choices)


def della_by_hand(given: list[Tensors], density: float, epsilon: float, **choices: Any) -> dict[str, np.ndarray]:
    plain = arrays(given)
    chances = [{n: elementwise.della_chances(x, density, epsilon) for n, x in m.items()} for m in plain]
    return elementwise.dropped(plain, list(NAMES[: len(given)]), chances, **choices)


@pytest.mark.usefixtures("_blocks")
@DTYPES
@pytest.mark.parametrize("rescale", ["inverse", "l1"])
@pytest.mark.parametrize("then", ["task-arithmetic", "ties"])
@pytest.mark.parametrize("method", ["dare", "della"])
def test_is_its_definition(method: str, then: str, rescale: str, dtype: torch.dtype, tolerance: float) -> None:
    given = models(3, dtype)
    common: dict[str, Any] = {
        "then": then, "rescale": rescale, "seed": 5, "scale": 0.7, "weights": [1.0, -0.5, 2.0]
    }  # fmt: skip
    if method == "dare":
        found, wanted = merged("dare", given, p=0.4, **common), dare_by_hand(given, 0.4, **common)
    else:
        found = merged("della", given, density=0.6, epsilon=0.3, **common)
        wanted = della_by_hand(given, 0.6, 0.3, **common)
    close(found, wanted, tolerance)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_a_transposed_file_changes_nothing(method: str) -> None:
    given = models(2)
    straight, turned = merged(method, given, seed=1), merged(method, given, transposed=True, seed=1)
    assert all(torch.equal(straight[n], turned[n]) for n in straight)


def mask(method: str, names: str = "A", name: str = "w", seed: int = 0, of: Tensor | None = None) -> Tensor:
    """Where the first vector's entries were kept."""
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)) if of is None else of
    deltas = (DenseDelta(x), *(DenseDelta(torch.zeros_like(x)) for _ in names[1:]))
    b = Block(name, Layout((40, 30)), tuple(names), deltas)
    choices: dict[str, Any] = {"p": 0.5} if method == "dare" else {"density": 0.5, "epsilon": 0.2}
    call: Any = dare if method == "dare" else della
    found: Tensor = call(b, then="task-arithmetic", seed=seed, **choices).dense() != 0
    return found


@pytest.mark.parametrize("method", ["dare", "della"])
def test_the_mask_is_a_function_of_seed_names_and_place(method: str) -> None:
    first = mask(method)
    torch.manual_seed(9)
    assert torch.equal(mask(method), first), "the global generator has a say"
    assert torch.equal(mask(method, "ABC"), first), "other vectors have a say"
    for other in (mask(method, "B"), mask(method, name="v"), mask(method, seed=1)):
        assert 0.3 < float((other == first).double().mean()) < 0.7
    before = torch.get_rng_state()
    mask(method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_the_mean_over_seeds_is_the_vector(method: str) -> None:
    """1500 draws with probability q: the standard deviation of the mean is |x| sqrt((1-q)/q/1500), below 0.06 |x|."""
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5, -0.25], [4.0, 3.0, 2.0, 1.0, 0.125]], dtype=torch.float64)
    sums = torch.zeros_like(x)
    choices: dict[str, Any] = {"p": 0.6} if method == "dare" else {"density": 0.5, "epsilon": 0.2}
    call: Any = dare if method == "dare" else della
    for seed in range(1500):
        sums += call(block([x]), then="task-arithmetic", scale=1.0, seed=seed, **choices).dense()
    assert bool(((sums / 1500 - x).abs() < 5 * 0.06 * x.abs()).all())


@pytest.mark.parametrize("method", ["dare", "della"])
def test_l1_keeps_the_norm_and_is_biased_draw_by_draw(method: str) -> None:
    """With l1 the 1-norm is exact; the mean of single draws is not the vector, which is where inverse differs."""
    x = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    choices: dict[str, Any] = {"p": 0.5} if method == "dare" else {"density": 0.5, "epsilon": 0.0}
    call: Any = dare if method == "dare" else della
    sums, draws = torch.zeros_like(x), 0
    for seed in range(500):
        found = call(block([x]), then="task-arithmetic", scale=1.0, rescale="l1", seed=seed, **choices).dense()
        size = float(found.abs().sum())
        assert size == pytest.approx(11.0, rel=1e-12) or size == 0.0
        sums, draws = sums + found, draws + 1
    assert abs(float(sums[0, 0]) / draws - 1.0) > 0.5, "the small entry alone is blown up to the whole norm"


def test_nothing_dropped_is_the_method_that_follows() -> None:
    given = models(3)
    w = [1.0, 0.5, 0.25]
    plain = merged("task-arithmetic", given, scale=0.7, weights=w)
    for found in (
        merged("dare", given, p=0.0, scale=0.7, weights=w),
        merged("della", given, density=1.0, epsilon=0.0, then="task-arithmetic", scale=0.7, weights=w),
    ):
        assert all(torch.allclose(found[n], plain[n], rtol=1e-6, atol=1e-7) for n in plain)
    elected = merged("ties", given, density=1.0, zero="none")
    for found in (merged("dare", given, p=0.0, then="ties", scale=1.0),
                  merged("della", given, density=1.0, epsilon=0.0, scale=1.0)):  # fmt: skip
        assert all(torch.allclose(found[n], elected[n], rtol=1e-6, atol=1e-7) for n in elected)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_permuting_the_vectors_with_their_names_changes_nothing(method: str) -> None:
    x = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    b = block(x)
    call: Any = dare if method == "dare" else della
    wanted = call(b).dense()
    for order in itertools.permutations(range(3)):
        moved = Block(b.name, b.layout, tuple(b.vectors[i] for i in order), tuple(b.deltas[i] for i in order))
        assert torch.allclose(call(moved).dense(), wanted, rtol=1e-5, atol=1e-7)


def test_probabilities_grow_with_the_rank_in_the_row() -> None:
    x = torch.tensor([[3.0, -1.0, 2.0, 1.0, 0.0]])
    assert probabilities(x, 0.5, 0.2)[0].tolist() == pytest.approx([0.7, 0.4, 0.6, 0.5, 0.3]), "equal ones by column"
    assert probabilities(torch.ones(3, 1), 0.5, 0.2).flatten().tolist() == [0.5] * 3
    q = probabilities(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)), 0.7, 0.07)
    assert torch.allclose(q.mean(1), torch.full((50,), 0.7, dtype=torch.float64))


def test_a_vector_is_one_row_to_della() -> None:
    """Alone in its row an entry would have the probability ``density``; as one row the largest is kept more often."""
    x = torch.arange(1.0, 401.0, dtype=torch.float64)
    kept = torch.zeros(400)
    for seed in range(200):
        kept += merged("della", [{"b": x}], density=0.5, epsilon=0.45, then="task-arithmetic", seed=seed)["b"] != 0
    assert float(kept[:40].mean()) / 200 < 0.15 and float(kept[-40:].mean()) / 200 > 0.85


@pytest.mark.parametrize(("method", "words", "said"), [
    ("dare", {"p": 1.0}, "p=1 is not"), ("dare", {"p": -0.1}, "p=-0.1 is not"), ("dare", {"then": "tie"}, "then='tie'"),
    ("dare", {"rescale": "l2"}, "rescale='l2'"), ("dare", {"weights": [1.0]}, "1 weights for 2"),
    ("della", {"density": 0.1, "epsilon": 0.1}, "density - epsilon=0"), ("della", {"epsilon": -0.1}, "epsilon=-0.1"),
    ("della", {"density": 0.95, "epsilon": 0.1}, "density \\+ epsilon=1.05"),
    ("della", {"then": "tie"}, "then='tie'"), ("della", {"rescale": "l2"}, "rescale='l2'"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(method: str, words: dict[str, Any], said: str) -> None:
    call: Any = dare if method == "dare" else della
    with pytest.raises(UsageError, match=said):
        call(block([torch.ones(2, 2), torch.ones(2, 2)]), **words)


@pytest.mark.parametrize("call", [dare, della])
def test_bad_entries_are_named(call: Any) -> None:
    x = torch.full((3, 3), float("inf"))
    with pytest.raises(InputError, match="NaN or infinity in A"):
        call(block([x]))
