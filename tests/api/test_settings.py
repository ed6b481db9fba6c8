"""Parameters that vary over the model: what each tensor is given, against numbers worked out by hand."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from devec.api.merge import merge, model_for
from devec.api.settings import bind, of_sources
from devec.api.varying import places
from devec.core.errors import UsageError
from devec.methods import registry
from merges import vector

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("mlp.up_proj", "self_attn.q_proj")),
    "model.norm.weight",
]  # fmt: skip


def given(setting: Any, method: str = "slerp", parameter: str = "t", names: list[str] = NAMES) -> dict[str, Any]:
    """What every tensor's parameter comes to."""
    settings = bind(registry.get("merge", method), {parameter: setting})
    return {n: values[parameter] for n, values in settings.over({n: n for n in names}, names).items()}


def up(i: int) -> str:
    return f"model.layers.{i}.mlp.up_proj.weight"


def q(i: int) -> str:
    return f"model.layers.{i}.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("values", "by_layer"),
    [
        ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
        ([0, 1, 0], [0, 0.5, 1, 0.5, 0]),
        ([1, 0, 0.5, 0], [1, 0.25, 0.25, 0.375, 0]),
        ([0.3], [0.3] * 5),
        (["1e-1", 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]),  # YAML reads 1e-1 as text
    ],
)
def test_a_list_is_linear_over_the_layers(values: list[Any], by_layer: list[float]) -> None:
    found = given(values)
    for i, wanted in enumerate(by_layer):
        assert found[up(i)] == pytest.approx(wanted, abs=1e-15)
        assert found[q(i)] == found[up(i)]
    for outside in ("model.embed_tokens.weight", "model.norm.weight"):
        assert found[outside] == float(values[0])


def test_the_ends_are_exact() -> None:
    found = given([0.1, 0.7, 0.3])
    assert (found[up(0)], found[up(2)], found[up(4)]) == (0.1, 0.7, 0.3)


def test_an_only_layer_has_the_last_value() -> None:
    names = ["h.0.attn.weight", "wte.weight"]
    assert given([0.2, 0.9], names=names) == {"h.0.attn.weight": 0.9, "wte.weight": 0.2}


def test_the_first_entry_that_fits_decides() -> None:
    found = given([{"filter": "self_attn", "value": [0, 1]}, {"filter": "layers.1.", "value": 0.6}, {"value": 0.5}])
    assert [found[q(i)] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert found[up(1)] == 0.6
    assert found[up(0)] == found["model.norm.weight"] == 0.5


@pytest.mark.parametrize("everything", [{"filter": "*", "value": 0.5}, {"filter": None, "value": 0.5}, {"value": 0.5}])
def test_what_fits_everything(everything: dict[str, Any]) -> None:
    assert set(given([everything, {"value": 1}]).values()) == {0.5}
    assert set(given(everything).values()) == {0.5}


def test_entries_by_layers_have_gradients_of_their_own() -> None:
    found = given([{"layers": [0, 3], "value": [0, 1]}, {"layers": [3, 5], "value": [1, 0]}, {"value": 0.25}])
    assert [found[up(i)] for i in range(5)] == [0, 0.5, 1, 1, 0]
    assert found["model.norm.weight"] == 0.25


def test_an_entry_whose_value_fits_nothing_is_passed_over() -> None:
    found = given([{"layers": [0, 2], "value": [{"filter": "mlp", "value": 1}]}, {"value": 0.5}])
    assert (found[up(1)], found[q(1)], found[up(2)]) == (1, 0.5, 0.5)


def test_a_value_per_vector_varies_by_itself() -> None:
    found = given([1, [0, 1], [{"filter": "mlp", "value": 2}, {"value": 3}]], "task-arithmetic", "weights")
    assert found[up(1)] == [1, 0.25, 2]
    assert found[q(4)] == [1, 1, 3]
    assert given([{"filter": "mlp", "value": [1, 2]}, {"value": [3, 4]}], "average", "weights")[q(0)] == [3, 4]


def test_a_list_of_numbers_of_such_a_parameter_is_one_per_vector() -> None:
    """Where a parameter may have a value per vector, a gradient is called one."""
    assert given([0.3, 0.5], "consensus", "threshold")[up(2)] == [0.3, 0.5]
    assert given({"gradient": [0.3, 0.5]}, "consensus", "threshold")[up(2)] == 0.4


def test_stacks_of_layers_have_depths_of_their_own() -> None:
    found = places(["encoder.layers.3.w", "encoder.layers.0.w", "decoder.layers.1.w", "h.2.experts.7.w", "norm.w"])
    at = {n: (p.layer, p.stop, p.depth) for n, p in found.items()}
    assert at == {
        "encoder.layers.3.w": (3, 4, 1.0), "encoder.layers.0.w": (0, 4, 0.0), "decoder.layers.1.w": (1, 2, 1.0),
        "h.2.experts.7.w": (2, 3, 1.0), "norm.w": (None, 0, 0.0),
    }  # fmt: skip


def test_sources_with_parameters_of_their_own() -> None:
    ta = registry.get("merge", "task-arithmetic")
    own = [{"weight": [{"filter": "mlp", "value": [0, 1]}]}, {"weight": [0, 4]}, {}]
    found = of_sources(ta, {"weights": 0.5}, own)
    by_name = given(found["weights"], "task-arithmetic", "weights")
    assert by_name[up(1)] == [0.25, 1, 0.5]
    assert by_name[q(1)] == [0.5, 1, 0.5], "where no entry fits, the common value holds"
    assert of_sources(ta, {}, [{"weights": 2}, {}])["weights"] == [2, 1.0]
    with pytest.raises(UsageError, match="each source has its own of"):
        of_sources(ta, {}, [{"scale": 2}, {}])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ([], "empty"), ([{"filter": "a"}], "cannot be read"), ([{"value": 1, "filtr": "a"}], "filtr"),
        (["a", "b"], "gradient of something else"), ([True, False], "gradient of something else"),
        ([{"layers": [2, 2], "value": 1}], "layers"), ([{"layers": [0, 6], "value": 1}], "5 layers"),
        ([{"filter": "mlp", "value": 1}], "no entry of t fits"), ([{"value": "half"}], "does not fit"),
        ({"gradient": [0, 1], "value": 1}, "cannot be read"), ([{"filter": 3, "value": 1}], "no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(setting: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        given(setting)


def test_a_gradient_needs_layers() -> None:
    with pytest.raises(UsageError, match="no tensor's name tells its layer"):
        given([0, 1], names=["first.weight", "second.weight"])
    assert given([{"filter": "first", "value": 1}, {"value": 0}], names=["first.weight", "second.weight"])


def models() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{n: torch.randn(6, 4, generator=g) for n in NAMES} for _ in range(2)]


def test_a_merge_is_that_of_each_tensor_alone() -> None:
    a, b = models()
    parameters = {"weights": [1, [0, 1]], "scale": [{"filter": "mlp", "value": [0.5, 1]}, {"value": 2}]}
    out = merge("task-arithmetic", [vector("A", a), vector("B", b)], parameters=parameters).vector
    for i in range(LAYERS):
        depth = i / 4
        assert torch.allclose(out.deltas[up(i)].dense(), (0.5 + 0.5 * depth) * (a[up(i)] + depth * b[up(i)]))
        assert torch.allclose(out.deltas[q(i)].dense(), 2 * (a[q(i)] + depth * b[q(i)]))
    n = "model.norm.weight"
    assert torch.allclose(out.deltas[n].dense(), 2 * a[n])


def test_a_first_pass_over_each_tensor_has_that_tensors_parameters() -> None:
    a, b = models()
    given = [vector("A", a), vector("B", b)]
    varied = merge("ties", given, parameters={"density": [{"filter": "mlp", "value": 0.2}, {"value": 0.9}]}).vector
    for n in NAMES:
        alone = merge("ties", given, parameters={"density": 0.2 if "mlp" in n else 0.9}).vector
        assert torch.equal(varied.deltas[n].dense(), alone.deltas[n].dense())


def test_a_first_pass_over_the_model_has_one_set_of_parameters() -> None:
    given = [vector(name, tensors) for name, tensors in zip("AB", models(), strict=True)]
    with pytest.raises(UsageError, match="density cannot vary"):
        merge("ties", given, parameters={"scope": "model", "density": {"gradient": [0.2, 0.9]}})
    with pytest.raises(UsageError, match="scope cannot vary"):
        merge("ties", given, parameters={"scope": [{"filter": "mlp", "value": "model"}, {"value": "tensor"}]})
    out = merge("ties", given, parameters={"scope": "model", "scale": [0, 1]}).vector
    whole = merge("ties", given, parameters={"scope": "model"}).vector
    assert torch.allclose(out.deltas[up(1)].dense(), 0.25 * whole.deltas[up(1)].dense())


def test_a_wrong_value_in_any_layer_is_refused_at_once() -> None:
    given = [vector(name, tensors) for name, tensors in zip("AB", models(), strict=True)]
    with pytest.raises(UsageError, match=r"t=1.125 is not in"):
        merge("slerp", given, parameters={"t": [0, 1, 1.25]})


def test_another_process_is_told_in_plain_data(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    for name, tensors in zip(("base", "a", "b"), (*models(), models()[0]), strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    parameters = {"weights": [1, [0, 1]], "scale": [{"filter": "mlp", "value": 0.5}, {"value": 2}]}
    told = {"method": "task-arithmetic", "sources": files, "base": str(tmp_path / "base.safetensors"),
            "parameters": parameters, "dtype": "float32", "out_dtype": None}  # fmt: skip
    model = model_for(**pickle.loads(pickle.dumps(told)))
    a, b = models()
    wanted = a[up(1)] + 0.5 * ((b[up(1)] - a[up(1)]) + 0.25 * (a[up(1)] - a[up(1)]))
    assert torch.allclose(model.get(up(1)), wanted, atol=1e-6)
