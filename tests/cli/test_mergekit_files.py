"""What ``devec merge`` makes of files of mergekit, and what it says of those that it does not carry over."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from devec.api.settings import bind
from devec.core.errors import DevecError
from devec.methods import registry
from fixtures_models import Models, Runner, deltas, refused, weights

sys.path.append(str(Path(__file__).parent.parent / "golden"))

import tiny_llama


@pytest.fixture(autouse=True)
def _models(work: Path) -> None:
    tiny_llama.write(work)


def config(name: str = "merge.yml", **keys: Any) -> str:
    given = {
        "merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.5},
        "models": [{"model": "a"}, {"model": "b"}],
    } | keys  # fmt: skip
    Path(name).write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
    return name


def sliced(*ranges: list[int], **more: Any) -> dict[str, Any]:
    return {
        "models": None,
        "slices": [{"sources": [{"model": m, "layer_range": r} for m in ("a", "b")], **more} for r in ranges],
    }


def test_every_key_that_is_not_carried_over_is_named_at_once(devec: Runner) -> None:
    file = config(
        parameters={"weight": 0.5, "wieght": 1, "select_topk": 0.1}, name_of_it="x", tokenizer_source="union",
        models=[{"model": "a", "parameters": {"normalize": True}}, {"model": "b", "revision": "x"}],
        chat_template="chatml",
    )  # fmt: skip
    line = refused(devec("merge", file, "-o", "out", code=2), "not carried over", file)
    for key in (
        "name_of_it", "parameters.wieght", "parameters.select_topk", "models[1].revision",
        "parameters.normalize of a model", "tokenizer_source: union", "chat_template: chatml",
    ):  # fmt: skip
        assert key in line
    assert "parameters.weight," not in line


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"merge_method": "della_ties"}, "'della_ties' is not carried over"),
        ({"merge_method": "passthrough"}, "Carried over: linear, slerp"),
        ({"base_model": None}, "needs base_model"),
        ({"parameters": {}}, "needs the parameter weight"),
        ({"models": [{"model": "base"}]}, "no model beside base_model"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "named twice"),
        ({"models": []}, "no list of mappings"),
        ({"models": None}, "models or slices"),
        ({"modules": {"default": {}}}, "modules"),
        ({"parameters": {"weight": "half"}}, "does not fit"),
        ({"parameters": {"weight": []}}, "empty list"),
        ({"parameters": {"weight": 1, "normalize": [True, False]}}, "gradient of something else"),
        ({"parameters": {"weight": [{"filter": "mlp", "value": 1, "layers": [0, 1]}]}}, "cannot be read"),
        ({"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, "no entry of weights fits"),
        ({"dtype": "int8"}, "dtype 'int8' is not carried over"),
        ({"tokenizer": {"source": "union"}}, "tokenizer.source: union"),
        ({"tokenizer": {"source": "base", "pad_to_multiple_of": 8}}, "tokenizer.pad_to_multiple_of"),
        ({"merge_method": "linear", "base_model": None, "tokenizer_source": "base"}, "tokenizer_source: base"),
        ({"merge_method": "linear", **sliced([0, 3])}, "none of the models of its slices"),
        (sliced([0, 2], [1, 3]), "repeat, leave out or move"),
        (sliced([0, 2]), "[0, 2], layers = 3"),
        (sliced([0, 3], [3, 6]), "layers = 3"),
        (sliced([0, 3], residual_weight=0.5), "slices[0].residual_weight"),
        ({"models": None, "slices": [{"sources": [
            {"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [1, 4]}]}]}, "different numbers"),
        ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]},
                                     {"sources": [{"model": "b", "layer_range": [1, 3]}]}]}, "different models"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "base_model and one other"),
        ({"merge_method": "slerp", "parameters": {}, "models": [{"model": "a"}]}, "needs the parameter t"),
        ({"merge_method": "linear", "parameters": {}, "models": [{"model": "a", "parameters": {"weight": 1}}]},
         "weight: model = base"),
        ({"merge_method": "ties", "parameters": {"weight": 1, "density": 0}}, "density=0"),
    ],
)  # fmt: skip
def test_what_is_not_carried_over_is_refused(devec: Runner, keys: dict[str, Any], said: str) -> None:
    refused(devec("merge", config(**keys), "-o", "out", code=2), said)
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["density", "rescale"])
def test_what_has_no_effect_in_mergekit_either_is_said(devec: Runner, key: str) -> None:
    file = config(parameters={"weight": 0.5, key: 0.5 if key == "density" else True})
    assert f"{key} changes nothing in task_arithmetic" in devec("merge", file, "-o", "out").err
    devec("merge", config("plain.yml"), "-o", "plain")
    assert Path("out/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()
    devec("merge", file, "-o", "again", "--strict", code=4)


def test_dtypes(devec: Runner) -> None:
    """``dtype`` alone is the output's too, as in mergekit; sums are taken in float32 or wider."""
    import torch
    from safetensors.torch import load_file

    for keys, wanted in (
        ({"dtype": "bfloat16"}, torch.bfloat16), ({"dtype": "torch.float16"}, torch.float16), ({}, torch.float32),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16), ({"dtype": "float64"}, torch.float64),
    ):  # fmt: skip
        devec("merge", config(**keys), "-o", "out", "--overwrite")
        assert {x.dtype for x in load_file("out/model.safetensors").values()} == {wanted}
    devec("merge", config(dtype="bfloat16"), "-o", "out", "--overwrite", "--out-dtype", "float32")
    assert load_file("out/model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_neither_workers_nor_shards_change_a_byte(devec: Runner) -> None:
    file = str(Path(__file__).parent.parent / "golden" / "mergekit" / "ties.yml")
    for i, more in enumerate((["--workers", 1], ["--workers", 3])):
        devec("merge", file, "-o", f"out-{i}", *more)
    for i in (1, 2):
        devec("merge", file, "-o", "joined", "--shard-of", f"{i}/2")
    devec("join", "joined")
    devec("merge", file, "-o", "other", "--shard-of", "1/2")
    mixed = Path("mixed.yml")
    mixed.write_text(Path(file).read_text().replace("[0.2, 0.9]", "[0.2, 0.8]"))
    assert "other" in devec("merge", mixed, "-o", "other", "--shard-of", "2/2", code=4).err, "a run is its parameters"
    one = Path("out-0/model.safetensors").read_bytes()
    assert all(Path(f"{out}/model.safetensors").read_bytes() == one for out in ("out-1", "joined"))


def test_a_plan_is_made_from_headers(devec: Runner) -> None:
    """Four models, each read twice for thresholds and once to merge."""
    file = str(Path(__file__).parent.parent / "golden" / "mergekit" / "ties.yml")
    said = devec("merge", file, "-o", "out", "--dry-run", "--json").json
    assert (said["sources"], said["tensors"]) == (3, 30)
    read = said["stages"][0]["bytes_read"]
    assert read == 3 * 4 * sum(x.nbytes for x in tiny_llama.models()["a"].values())
    assert not Path("out").exists()


def test_models_of_one_folder_name(devec: Runner) -> None:
    for m in ("a", "b"):
        Path(f"of-{m}").mkdir()
        Path(m).rename(f"of-{m}/model")
    devec("merge", config(models=[{"model": "of-a/model"}, {"model": "of-b/model"}]), "-o", "out")
    made = tiny_llama.models()
    for n, w in made["base"].items():
        wanted = w.astype(np.float64) + 0.5 * (made["a"][n] - w) + 0.5 * (made["b"][n] - w)
        assert np.abs(weights("out")[n] - wanted).max() < 1e-6


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_a_chat_template_is_written(devec: Runner) -> None:
    Path("base/tokenizer_config.json").write_text(json.dumps({"model_max_length": 7, "chat_template": "old {{ x }}"}))
    Path("base/chat_template.jinja").write_text("old {{ x }}")
    file = config(chat_template=TEMPLATE)
    devec("merge", file, "-o", "out")
    assert Path("out/chat_template.jinja").read_text() == TEMPLATE
    written = json.loads(Path("out/tokenizer_config.json").read_text())
    assert written == {"model_max_length": 7, "chat_template": TEMPLATE}
    assert "agree" in devec("verify", "out").out
    refused(devec("merge", file, "-o", "out.safetensors", code=2), "chat template", out="out.safetensors")
    refused(devec("merge", file, "-o", "adapter", "--rank", 2, code=2), "chat template", out="adapter")


def test_the_commonest_chat_template(devec: Runner) -> None:
    for m, text in (("base", "old {{ x }}"), ("a", TEMPLATE), ("b", TEMPLATE + "\n")):
        Path(f"{m}/chat_template.jinja").write_text(text)
    devec("merge", config(chat_template="auto"), "-o", "out")
    assert Path("out/chat_template.jinja").read_text() == TEMPLATE
    Path("b/chat_template.jinja").write_text("old {{ x }}")
    devec("merge", config(chat_template="auto"), "-o", "as-base")
    assert Path("as-base/chat_template.jinja").read_text() == "old {{ x }}"


def tokens(model: str, *names: str) -> None:
    data = {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(names)}}, "added_tokens": []}
    Path(f"{model}/tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}},
        {"tokenizer_source": "base", "models": [{"model": "base"}, {"model": "a"}]},
    ],
)  # fmt: skip
def test_the_tokens_of_the_base(devec: Runner, keys: dict[str, Any]) -> None:
    """mergekit would move rows of embeddings; where all tokenizers are alike there is nothing to move."""
    assert "no tokenizer.json in base" in devec("merge", config(**keys), "-o", "unknown").err
    for model in ("base", "a", "b"):
        tokens(model, "x", "y")
    assert devec("merge", config(**keys), "-o", "out").err == ""
    assert Path("out/tokenizer.json").exists()
    tokens("a", "y", "x")
    refused(devec("merge", config(**keys), "-o", "moved", code=4), "tokenizers differ", "a = 2 tokens", out="moved")


def test_a_recipe_with_sources_of_their_own_parameters(devec: Runner) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({
        "method": "task-arithmetic", "base": "base", "parameters": {"scale": [0.5, 1]},
        "sources": [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 2}]}}, "second=b"],
    }))  # fmt: skip
    devec("merge", "recipe.yaml", "-o", "out")
    made, found = tiny_llama.models(), weights("out")
    for n, w in made["base"].items():
        layer = int(n.split(".")[2]) if ".layers." in n else 0
        wanted = (0.5 + 0.25 * layer) * ((2 if "mlp" in n else 1) * (made["a"][n] - w) + made["b"][n] - w)
        assert np.abs(found[n] - w - wanted).max() < 1e-6
    recorded = yaml.safe_load(Path("out/.devec/recipe.yaml").read_text())["parameters"]["parameters"]
    assert recorded["weights"] == [[{"filter": "mlp", "value": 2}, {"value": 1.0}], 1.0]
    Path("wrong.yaml").write_text(yaml.safe_dump({"method": "average", "sources": [{"model": "a", "wieght": 1}]}))
    said = devec("merge", "wrong.yaml", "-o", "wrong", code=2)
    refused(said, "sources.0.wieght", "Known keys: model, parameters", out="wrong")


def test_settings_on_the_command_line(devec: Runner) -> None:
    command = ["merge", "--method", "task-arithmetic", "--base", "base", "a", "b"]
    devec(*command, "--set", "scale=0.5,1", "-o", "one")
    devec(*command, "--set", "scale=[0.5, 1]", "-o", "two")
    devec(*command, "--set", "scale={gradient: [0.5, 1]}", "-o", "three")
    found = [Path(f"{out}/model.safetensors").read_bytes() for out in ("one", "two", "three")]
    assert found[0] == found[1] == found[2]
    refused(devec(*command, "--set", "scale=[0.5", "-o", "out", code=2), "not YAML")


def test_models_with_adapters(devec: Runner, llama: Models) -> None:
    """``BASE+ADAPTER`` is a model of mergekit's too; depth is that of the base, in which adapters lack modules."""
    models = [{"model": f"{llama.base}+{llama.la}"}, {"model": llama.a, "parameters": {"weight": [0, 1]}}]
    devec("merge", config(base_model=llama.base, models=models), "-o", "out")
    W0, A, D, found = weights(llama.base), weights(llama.a), deltas(llama.la), weights("out")
    for n, w in W0.items():
        if w.dtype == np.float64:
            share = float(".layers.1." in n)
            wanted = w + 0.5 * D.get(n, 0.0) + share * (A[n] - w)
            assert np.abs(found[n] - wanted).max() < 1e-6, n


def test_adapters_by_the_names_of_the_base(devec: Runner, llama: Models) -> None:
    entries = "scale=[{filter: model.layers.1, value: 2}, {filter: v_proj, value: [0.5, 9]}, {value: 1}]"
    command = ["merge", "--method", "task-arithmetic", llama.la, llama.lb, "--set", entries]
    devec(*command, "--base", llama.base, "-o", "on-base")
    devec(*command, "-o", "alone")
    W0, found, low = weights(llama.base), weights("on-base"), deltas("alone")
    both = [deltas(llama.la), deltas(llama.lb)]
    for n in both[0]:
        scale = 2 if "model.layers.1" in n else 0.5 if "v_proj" in n else 1
        wanted = scale * (both[0][n] + both[1][n])
        assert np.abs(found[n] - W0[n] - wanted).max() < 1e-6, n
        assert np.abs(low[n] - wanted).max() < 1e-6, n


ODD: list[Any] = [
    None, 5, -1.5, True, "", "x", "a+b", [], [1], ["x"], [[1]], {}, {"x": 1}, {"value": 1}, [{"value": []}],
    [{"filter": 1}], float("nan"),
]  # fmt: skip


def swapped(data: Any) -> Iterator[Any]:
    """The same with any one part of it replaced by something odd."""
    yield from ODD
    if isinstance(data, dict):
        for key, value in data.items():
            yield from ({**data, key: odd} for odd in swapped(value))
        yield {**data, 7: 1}
    if isinstance(data, list):
        for i, value in enumerate(data):
            yield from ([*data[:i], odd, *data[i + 1 :]] for odd in swapped(value))


def test_whatever_a_file_holds_is_read_or_refused() -> None:
    from devec.api.recipe import Recipe, read_recipe

    wholes = [
        {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 1, "normalize": True},
         "models": [{"model": "a", "parameters": {"density": [{"filter": "x", "value": [0, 1]}, {"value": 1}]}}],
         "tokenizer": {"source": "base"}, "chat_template": "auto", "dtype": "float32"},
        {"merge_method": "slerp", "base_model": "a", "parameters": {"t": [0, 1]}, "tokenizer_source": "base",
         "slices": [{"sources": [{"model": m, "layer_range": [0, 3]} for m in "ab"], "parameters": {"t": 0.5}}]},
        {"method": "average", "sources": [{"model": "a", "parameters": {"weight": [0, 1]}}, "b"],
         "parameters": {"weights": [{"value": [1, 2]}], "reduce": "sum"}, "view": {"fdr": 0.1}},
    ]  # fmt: skip
    read = refusals = 0
    for whole in wholes:
        for data in swapped(whole):
            Path("any.yml").write_text(yaml.safe_dump(data))
            try:
                recipe = read_recipe("any.yml")
                assert isinstance(recipe, Recipe)
                bind(registry.get("merge", recipe.method), recipe.settings())
                read += 1
            except DevecError:
                refusals += 1
    assert read > 50 and refusals > 500
