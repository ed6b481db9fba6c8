"""The generated source: the same bytes however they are asked for, full rank, and what it says it planted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import devec
from devec.core.contracts import TensorSource
from devec.core.errors import InputError, UsageError
from devec.io.generated import Change, GeneratedModel, llama_shapes

SHAPES = {
    "square": (256, 256),
    "tall": (700, 96),
    "wide": (40, 1000),
    "long": (5, 100_003),  # several chunks, and blocks that end inside rows
    "conv": (32, 8, 3, 3),
    "norm": (300,),
    "scalar": (),
    "empty": (0, 5),
}


def base(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> GeneratedModel:
    return GeneratedModel(SHAPES, seed=seed, dtype=dtype)


def pool(shared: int = 0, **more: float) -> list[GeneratedModel]:
    return [base().fine_tune(name, Change(shared=shared, **more)) for name in "abc"]  # type: ignore[arg-type]


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def change_of(model: GeneratedModel, name: str) -> np.ndarray:
    W: np.ndarray = (model.get(name).double() - base().get(name).double()).numpy()
    return W


def test_it_is_a_tensor_source() -> None:
    for model in (base(), *pool()):
        assert isinstance(model, TensorSource)
        assert model.names() == list(SHAPES) and model.ties == {} and model.folder is None and model.config is None
        for name, shape in SHAPES.items():
            value = model.get(name)
            assert value.shape == model.info(name).shape == shape and value.dtype == model.info(name).dtype
            assert model.file_of(name) == model.reference
        with pytest.raises(InputError, match="nothing"):
            model.get("nothing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bytes_depend_on_neither_order_nor_instance_nor_thread(dtype: torch.dtype) -> None:
    def model() -> GeneratedModel:
        return base(dtype=dtype).fine_tune("a", Change(shared=4))

    first = {name: bits(model().get(name)) for name in SHAPES}
    one = model()
    assert {name: bits(one.get(name)) for name in reversed(SHAPES)} == dict(reversed(first.items()))
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda name: (name, bits(one.get(name))), [*SHAPES] * 4))
    assert all(first[name] == value for name, value in made)
    torch.set_num_threads(2)
    try:
        assert {name: bits(one.get(name)) for name in SHAPES} == first
    finally:
        torch.set_num_threads(1)


def test_any_split_of_the_rows_gives_the_same_bytes() -> None:
    for model in (base(), pool(shared=4)[0]):
        for name, shape in SHAPES.items():
            if not shape:
                continue
            whole = model.get(name)
            for inner in ((), (1,), (3, 3, 17, 39), (7, 38, 255)):
                cuts = [0, *(cut for cut in inner if cut < shape[0]), shape[0]]
                parts = [model.rows(name, a, b) for a, b in pairwise(cuts)]
                assert bits(torch.cat(parts)) == bits(whole), (name, cuts)
    for start, stop in ((-1, 2), (2, 1), (0, 257)):
        with pytest.raises(ValueError, match="no rows"):
            base().rows("square", start, stop)
    with pytest.raises(ValueError, match="no rows"):
        base().rows("scalar", 0, 1)


def test_models_tensors_and_seeds_differ() -> None:
    shapes = {"x": (64, 64), "y": (64, 64)}
    models = [GeneratedModel(shapes, seed=0), GeneratedModel(shapes, seed=1), GeneratedModel(shapes, name="other")]
    models += [models[0].fine_tune("a"), models[0].fine_tune("b"), models[0].fine_tune("a", Change(rank=3))]
    made = [model.get(name).double().flatten() for model in models for name in shapes]
    assert len({bits(x) for x in made}) == len(made)
    strangers = torch.stack(made[:6])  # base and strangers; fine-tunes lie near their base on purpose
    assert float((torch.corrcoef(strangers) - torch.eye(6)).abs().max()) < 0.08


def test_noise_has_the_singular_values_of_white_noise() -> None:
    """Marchenko-Pastur: all of them between sqrt(n) - sqrt(m) and sqrt(n) + sqrt(m), also over many blocks."""
    model = GeneratedModel({"square": (600, 600), "tall": (4000, 500)}, dtype=torch.float32)
    for name, (n, m) in (("square", (600, 600)), ("tall", (4000, 500))):
        s = np.linalg.svd(model.get(name).numpy() / 0.02, compute_uv=False)
        assert s.max() == pytest.approx(n**0.5 + m**0.5, rel=0.02)
        assert s.min() == pytest.approx(n**0.5 - m**0.5, rel=0.03, abs=0.15)
        assert float((s**2).mean()) == pytest.approx(n, rel=0.01)


def test_base_and_change_have_full_rank_and_no_zeros() -> None:
    for model in (base(), *pool(shared=4)):
        assert all(bool((model.get(name) != 0).all()) for name in SHAPES)
    for name in ("square", "tall", "wide"):
        for W in (base().get(name).double().numpy(), change_of(pool()[0], name)):
            assert np.linalg.matrix_rank(W) == min(W.shape)
    assert base().get("norm").float().mean() == pytest.approx(1.0, abs=0.01)
    assert np.abs(change_of(pool()[0], "norm")).max() > 0


def test_planted_singular_values_follow_the_power_law_above_the_noise() -> None:
    n = 1024
    under = GeneratedModel({"w": (n, n)}, dtype=torch.float32)
    tuned = under.fine_tune("a", Change(rank=8, decay=1.0, strength=40.0, noise=0.01))
    s = np.linalg.svd((tuned.get("w") - under.get("w")).numpy(), compute_uv=False)
    edge = 0.02 * 0.01 * 2 * n**0.5
    assert s[8] == pytest.approx(edge, rel=0.03)
    assert s[:8] == pytest.approx([40.0 * edge / j for j in range(1, 9)], rel=0.1)


def test_rounding_is_the_last_step() -> None:
    """A bfloat16 fine-tune is the float32 sum over the bfloat16 base, rounded to nearest."""
    narrow, wide = base(), base(dtype=torch.float32)
    change = Change(shared=2)
    exact = wide.fine_tune("a", change).get("square").double() - wide.get("square").double()
    wanted = narrow.get("square").double() + exact
    found = narrow.fine_tune("a", change).get("square").double()
    half_ulp = 2.0 ** (torch.frexp(wanted).exponent - 9)
    assert bool(((found - wanted).abs() <= half_ulp * 1.001).all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_decompose_finds_what_a_group_shares(side: str) -> None:
    under = GeneratedModel({"square": (512, 512), "tall": (640, 384)})
    change = Change(rank=8, shared=2)
    models = {name: under.fine_tune(name, change) for name in "ab"}
    models["alone"] = under.fine_tune("alone", replace(change, group="another"))
    d = devec.decompose([devec.extract(under, m, name=name) for name, m in models.items()], side=side)
    for name in under.names():
        assert [d.spectra[name, side, pair].count for pair in ((0, 1), (0, 2), (1, 2))] == [2, 0, 0]
        signal = models["a"]._layer(name, 0, under.info(name).shape[0])[2]
        assert signal is not None
        columns = signal.left.rows(0, under.info(name).shape[0]) if side == "left" else signal.right.T
        planted = columns[:, change.common(8)] / columns[:, change.common(8)].norm(dim=0)
        assert change.common(8) == [0, 4]
        assert float((d.pair_subspace(name, side, (0, 1)).T @ planted).norm(dim=0).min()) > 0.95


def test_parameters_out_of_range_are_refused() -> None:
    for bad in ({"shared": 17}, {"noise": 0.0}, {"strength": -1.0}, {"decay": -0.1}, {"rank": 4096, "decay": 2.0}):
        with pytest.raises(UsageError):
            Change(**bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="16 bits"):
        GeneratedModel(SHAPES, dtype=torch.int32)
    with pytest.raises(UsageError, match="name of its own"):
        base().fine_tune("a").fine_tune("base")
    with pytest.raises(UsageError, match="heads"):
        llama_shapes(64, 128, 1, 100, heads=6, kv_heads=3)


@pytest.mark.parametrize("rank", [1, 16, 300])
def test_the_signal_is_exact_in_float32(rank: int) -> None:
    """The planted product has the same bits as in float64, which is what makes it independent of the split."""
    under = GeneratedModel({"w": (400, 500)})
    tuned = under.fine_tune("a", Change(rank=rank, shared=min(rank, 2)))
    signal = tuned._layer("w", 0, 400)[2]
    assert signal is not None
    left, right = signal.left.rows(0, 400), signal.right
    assert bool((left == left.round()).all()) and bool((right == right.round()).all())
    assert float((left.abs().double() @ right.abs().double()).max()) < 2**24
    assert torch.equal(torch.mm(left, right).double(), left.double() @ right.double())
    assert torch.linalg.matrix_rank(left.double()) == rank


def test_transformers_knows_every_name_and_shape() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes, config = llama_shapes(48, 80, 2, 100, heads=6, kv_heads=2)
    model = GeneratedModel(shapes, config=config, dtype=torch.float32)
    assert model.config is not None and model.config["torch_dtype"] == "float32" and config["torch_dtype"] == "bfloat16"
    network = LlamaForCausalLM(LlamaConfig(**config))
    wanted = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    assert wanted == shapes and list(wanted) == model.names()
    network.load_state_dict({name: model.get(name) for name in model.names()})
    assert bool(torch.isfinite(network(torch.arange(7)[None]).logits).all())
