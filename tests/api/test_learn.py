"""``learn`` and ``eval`` from files, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import devec
import learning_world
from devec.api.eval import Evaluator
from devec.api.learn import hold, learn_on, linear_model
from devec.api.recipe import read_recipe
from devec.api.references import load_pool, open_model, rename
from devec.cli.main import run
from devec.core.delta import LowRankDelta
from devec.core.errors import DevecError, IncompatibleError, InputError, UsageError
from devec.evaluate.data import row_hashes
from devec.evaluate.learning import Schedule
from devec.evaluate.objectives import FunctionObjective
from devec.evaluate.suite import read_suite
from devec.io.checkpoint import open_checkpoint
from devec.io.names import Selection


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learning_world.build(tmp_path_factory.mktemp("learning") / "world")


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def learn(*words: str, out: str = "c.json") -> dict[str, Any]:
    assert run(["learn", "recipe.yaml", "-o", out, "-q", *words]) == 0
    found: dict[str, Any] = json.loads(Path(out).read_text())
    return found


def scores(model: str) -> float:
    return float(devec.eval(model, "suite.yaml").scores.mean["accuracy"])


def change(file: str, **keys: Any) -> None:
    data = yaml.safe_load(Path(file).read_text())
    Path(file).write_text(yaml.safe_dump({**data, **keys}))


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["vector", "layer", "tensor"])
def test_learned_coefficients_lower_the_loss_and_merge_reads_them(world: Path, grain: str) -> None:
    found = learn("--objective", "ce", "--grain", grain, "--steps", "30", "--lr", "0.05")
    assert list(found["values"]) == ["a", "b", "c", "ab"] and found["grain"] == grain
    assert found["learned"]["history"][-1] < 0.8 * found["learned"]["history"][0]
    assert run(["merge", "recipe.yaml", "--coefficients", "c.json", "-o", "merged.safetensors", "-q"]) == 0
    assert scores("merged.safetensors") > scores("base.safetensors") + 0.2
    base, merged = load_file("base.safetensors"), load_file("merged.safetensors")
    tuned = {t: load_file(f"{t}.safetensors") for t in "abc"}
    name, bias = "encoder.0.weight", "encoder.0.bias"
    c = devec.read_coefficients("c.json")
    wanted = base[bias].double() + sum(c.of(t, bias) * (tuned[t][bias].double() - base[bias].double()) for t in "abc")
    torch.testing.assert_close(merged[bias].double(), wanted, rtol=1e-3, atol=1e-3)  # float16 output
    shared = devec.load("parts#shared:a+b").deltas[name].dense().double()
    wanted = base[name].double() + c.of("ab", name) * shared
    wanted += sum(c.of(t, name) * (tuned[t][name].double() - base[name].double()) for t in "abc")
    torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged["heads.a.weight"], base["heads.a.weight"])


def test_an_objective_of_the_users_own(world: Path) -> None:
    base = {n: t.float() for n, t in load_file("base.safetensors").items() if n.startswith("encoder")}
    wanted = load_file("b.safetensors")["encoder.0.weight"].float()
    objective = FunctionObjective(base, lambda w, step: (w["encoder.0.weight"] - wanted).square().sum())
    pool, _ = load_pool(
        ["a.safetensors", "b.safetensors"], base="base.safetensors", selection=Selection((r"encoder\.0\.weight",), ())
    )
    c = learn_on(objective, pool, "base.safetensors", Schedule(steps=200, lr=0.05))
    assert c.of("a", "any") == pytest.approx(0.0, abs=0.01) and c.of("b", "any") == pytest.approx(1.0, abs=0.01)


def test_a_vector_has_no_coefficient_where_it_changes_nothing(world: Path) -> None:
    values = learn("--steps", "1", "--grain", "tensor")["values"]
    assert "encoder.0.bias" in values["a"] and set(values["ab"]) == {"encoder.0.weight", "encoder.2.weight"}


def test_the_same_command_writes_the_same_bytes_on_any_number_of_workers(world: Path) -> None:
    assert learn("--steps", "0", "--init", "0.3,0.2,0.1,0", out="0.json")["values"]["b"] == 0.2
    for out, workers in (("1.json", "1"), ("2.json", "2"), ("3.json", "2")):
        learn("--steps", "5", "--lr", "0.05", "--grain", "tensor", "--workers", workers, out=out)
    assert Path("1.json").read_bytes() == Path("2.json").read_bytes() == Path("3.json").read_bytes()
    assert learn("--steps", "5", "--seed", "1", out="4.json")["learned"]["history"] != learn(
        "--steps", "5", out="5.json")["learned"]["history"]


def test_transductive_is_marked_in_the_coefficients_the_merge_and_its_scores(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = learn("--transductive", "--steps", "2")
    assert found["learned"]["transductive"] is True and found["learned"]["split"] == "test"
    assert run(["merge", "recipe.yaml", "--coefficients", "c.json", "-o", "merged.safetensors"]) == 0
    assert "note: Transductive" in capsys.readouterr().err
    change("recipe.yaml", coefficients="c.json")  # and in a folder's card, from Python
    recipe = read_recipe("recipe.yaml")
    merged = devec.merge(recipe.method, recipe.sources, base=recipe.base, coefficients=recipe.coefficients,
                         selection=Selection((), tuple(recipe.exclude)))
    assert devec.eval(merged, "suite.yaml").transductive
    devec.save(merged, "folder")
    each = Evaluator("base.safetensors", "suite.yaml")
    assert each(merged).scores == each("folder").scores != each("base.safetensors").scores
    assert "Transductive" in Path("folder/README.md").read_text()
    assert devec.eval("folder", "suite.yaml").transductive
    assert run(["merge", "recipe.yaml", "-o", "again.safetensors", "-q"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("merged.safetensors").read_bytes()
    assert run(["eval", "merged.safetensors", "--suite", "suite.yaml"]) == 0
    assert "TRANSDUCTIVE" in capsys.readouterr().out
    assert run(["eval", "merged.safetensors", "--suite", "suite.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transductive"] is True
    assert run(["eval", "base.safetensors", "--suite", "suite.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transductive"] is False
    assert learn("--steps", "2", out="d.json")["learned"]["transductive"] is False


def test_trimmed_vectors_are_trimmed_alike_when_merged(world: Path) -> None:
    learn("--trim", "0.2", "--steps", "1", "--init", "1", "--lr", "1e-9")
    assert run(["merge", "recipe.yaml", "--coefficients", "c.json", "-o", "m.safetensors", "-q"]) == 0
    base, merged = load_file("base.safetensors"), load_file("m.safetensors")
    moved = torch.cat([(merged[n] != base[n]).reshape(-1) for n in base if n.startswith("encoder.2")])
    assert 0.1 < float(moved.float().mean()) < 0.7, "most entries are nobody's largest"


def test_a_search_without_gradients_lowers_the_loss(world: Path) -> None:
    pytest.importorskip("cma")
    found = learn("--objective", "ce", "--search", "cma", "--steps", "12", "--lr", "0.3")["learned"]
    assert found["history"][-1] < 0.9 * found["history"][0]
    assert found["search"] == "cma" and found["schedule"]["sigma"] == 0.3


def test_least_squares_on_the_fine_tunes_outputs(world: Path) -> None:
    found = learn("--objective", "outputs")
    assert found["learned"]["history"][-1] < 0.5 * found["learned"]["history"][0]
    assert run(["merge", "recipe.yaml", "--coefficients", "c.json", "-o", "merged.safetensors", "-q"]) == 0
    assert scores("merged.safetensors") > scores("base.safetensors") + 0.2


def test_entropy_needs_no_labels(world: Path) -> None:
    """Other labels on the selection rows, the same coefficients."""
    one = learn("--steps", "4", "--lr", "0.05")
    for t in "abc":
        arrays = dict(np.load(f"data/{t}.npz"))
        np.savez(f"data/{t}.npz", **{**arrays, "y_test": np.zeros_like(arrays["y_test"])})
    assert learn("--steps", "4", "--lr", "0.05", out="d.json")["values"] == one["values"]


def test_shots_are_that_many_rows_a_class(world: Path) -> None:
    found = learn("--objective", "ce", "--shots", "2", "--steps", "2")
    assert found["learned"]["rows"]["a"].startswith("8 of ")
    assert found["learned"]["schedule"]["lr"] == 0.1


def test_published_defaults(world: Path) -> None:
    entropy = learn("--steps", "0")["learned"]
    assert entropy["schedule"] | {"steps": 500} == {
        "steps": 500, "lr": 1e-3, "init": 0.3, "clamp": True, "weight_decay": 0.0, "clip": 0.0, "betas": [0.9, 0.999],
        "epsilon": 1e-8,
    }  # fmt: skip
    assert entropy["batch"] == 32
    ce = learn("--steps", "0", "--objective", "ce", out="d.json")
    assert ce["learned"]["schedule"]["clamp"] is False and set(ce["values"].values()) == {0.0}


# --- memory ---------------------------------------------------------------------------------------------------------


def test_parts_stay_factors_and_originals_are_held_once_as_stored(world: Path) -> None:
    base = open_model("base.safetensors")
    sources = ["a.safetensors", "b.safetensors", "ab=parts#shared:a+b", "ua=parts#unique:a"]
    pool, _ = load_pool(sources, base=base, selection=Selection((), ("^heads",)))
    model = linear_model(base, pool, torch.float32, 1)
    held = model._held["encoder.0.weight"]
    assert [t for t, _ in held.dense] == [0, 1, 3] and set(held.owner.tolist()) == {2}
    part = pool[2].deltas["encoder.0.weight"]
    assert isinstance(part, LowRankDelta) and held.B.shape[1] == part.B.shape[1]
    for name in model.names:
        model.inner(name, torch.ones(base.info(name).shape))
    kept = base._kept  # type: ignore[attr-defined]
    assert kept["encoder.0.weight"].dtype == torch.float16
    assert not any(n.startswith("heads") for n in kept)


def test_one_file_opened_twice_is_held_once(world: Path) -> None:
    one, two = open_checkpoint("a.safetensors"), open_checkpoint("a.safetensors")
    hold([one, two])
    assert one.get("encoder.0.weight").data_ptr() == two.rows("encoder.0.weight", 0, 4).data_ptr()
    assert torch.equal(one.rows("encoder.0.weight", 3, 9), load_file("a.safetensors")["encoder.0.weight"][3:9])


# --- splits ---------------------------------------------------------------------------------------------------------


def test_a_row_stays_on_its_side_wherever_it_stands() -> None:
    x = torch.randint(0, 256, (50, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[7] = x[3]
    u = row_hashes(x, 0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(row_hashes(x[order], 0), u[order.numpy()]) and u[7] == u[3]
    assert not np.array_equal(row_hashes(x, 1), u)
    assert 0.3 < u.mean() < 0.7 and u.min() >= 0 and u.max() < 1


def test_halves_of_the_test_split_are_all_of_it(world: Path) -> None:
    select = devec.eval("base.safetensors", "suite.yaml", split="select").scores.rows
    test = devec.eval("base.safetensors", "suite.yaml").scores.rows
    for t in "abc":
        assert int(select[t].split()[0]) + int(test[t].split()[0]) == 80
    change("suite.yaml", select={"from": "train", "rows": 30})
    assert devec.eval("base.safetensors", "suite.yaml", split="select").scores.rows["a"] == "30 of 120 train rows"


def test_a_score_is_the_fraction_of_right_answers(world: Path) -> None:
    """Against the network written out by hand."""
    change("suite.yaml", select=None)
    net = learning_world.Net()
    net.load_state_dict({k: v.float() for k, v in load_file("b.safetensors").items()})
    found = devec.eval("b.safetensors", "suite.yaml", metrics=["accuracy", "loss"]).scores.per_task
    for t in "abc":
        arrays = np.load(f"data/{t}.npz")
        x, y = torch.from_numpy(arrays["x_test"]).float(), torch.from_numpy(arrays["y_test"])
        with torch.no_grad():
            logits = net((x / 255 - 0.5) / 0.25, t)
        assert found[t]["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
        assert found[t]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-5)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["eval", "base.safetensors", "--suite", "suite.yaml", "--metric", "acuracy"], 2, "Did you mean accuracy?"),
        (["eval", "base.safetensors", "--suite", "suite.yaml", "--task", "d"], 2, "no task 'd'"),
        (["eval", "base.safetensors", "--suite", "none.yaml"], 3, "none.yaml"),
        (["learn", "recipe.yaml", "-o", "c.json", "--objective", "ce", "--transductive"], 2, "not for learning"),
        (["learn", "recipe.yaml", "-o", "c.json", "--shots", "3"], 2, "labelled rows"),
        (["learn", "recipe.yaml", "-o", "c.json", "--objective", "outputs", "--search", "cma"], 2, "not searched"),
        (["learn", "recipe.yaml", "-o", "c.json", "--lr", "-1"], 2, "learning rate"),
        (["learn", "recipe.yaml", "-o", "recipe.yaml"], 5, "recipe.yaml"),
        (["merge", "recipe.yaml", "--coefficients", "suite.yaml", "-o", "m.safetensors"], 3, "not JSON"),
    ],
)
def test_a_mistake_is_one_line(
    world: Path, words: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and text in lines[0]


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"tasks": [{"name": "a", "data": "data/none.npz"}]}, InputError, "missing"),
        ({"tasks": [{"name": "a", "data": "net.py"}]}, InputError, "no loader"),
        ({"tasks": [{"name": "a", "data": "data/a.npz", "heads": 1}]}, UsageError, "Did you mean 'head'"),
        ({"model": {"python": "net.py:bild"}}, UsageError, "bild"),
        ({"model": {"python": "net.py:build", "transformers": "clip-image"}}, UsageError, "either"),
        ({"model": {"transformers": "image-classification"}}, InputError, r"config\.json"),
        ({"input": {"channels": 3}}, IncompatibleError, "failed on rows of task a"),
        ({"input": {"mean": [0.1, 0.2]}}, UsageError, "mean"),
        ({"select": {"from": "test", "fraction": 1.0}}, UsageError, "nothing to report"),
        ({"tasks": [{"name": "a", "data": "data/a.npz", "head": {"weight": "none"}}]}, UsageError, "not there"),
        (
            {"tasks": [{"name": "a", "data": "data/a.npz", "head": {"weight": "encoder.0.weight"}}]},
            IncompatibleError, "does not fit",
        ),
    ],
)  # fmt: skip
def test_a_suite_that_does_not_fit(world: Path, keys: dict[str, Any], error: type[DevecError], text: str) -> None:
    change("suite.yaml", **keys)
    with pytest.raises(error, match=text):
        devec.eval("base.safetensors", "suite.yaml")


def test_a_label_out_of_range_is_named(world: Path) -> None:
    arrays = dict(np.load("data/b.npz"))
    np.savez("data/b.npz", **{**arrays, "y_test": arrays["y_test"] + 1})
    with pytest.raises(IncompatibleError, match="task b has a label") as caught:
        devec.eval("base.safetensors", "suite.yaml")
    assert caught.value.values["largest label"] == 4


def test_a_missing_split_is_named(world: Path) -> None:
    change("suite.yaml", select=None)
    assert run(["learn", "recipe.yaml", "-o", "c.json"]) == 2
    with pytest.raises(UsageError, match="no selection split"):
        devec.eval("base.safetensors", "suite.yaml", split="select")
    change("suite.yaml", select={"from": "train"})
    arrays = dict(np.load("data/a.npz"))
    np.savez("data/a.npz", x_test=arrays["x_test"], y_test=arrays["y_test"])
    with pytest.raises(InputError, match="lack x_train"):
        devec.eval("base.safetensors", "suite.yaml", split="select")


def test_coefficients_of_other_inputs_are_refused(world: Path) -> None:
    learn("--steps", "1")
    sources = ["a.safetensors", "b.safetensors", "c.safetensors", "ab=parts#shared:a+b"]
    kept = {"base": "base.safetensors", "selection": Selection((), ("^heads",)), "coefficients": "c.json"}
    devec.merge("task-arithmetic", sources, **kept)  # type: ignore[arg-type]
    for wrong in (sources[::-1], sources[:3], [sources[0], "b=c.safetensors", "c=b.safetensors", sources[3]]):
        with pytest.raises(IncompatibleError, match=r"other vectors|not what the coefficients"):
            devec.merge("task-arithmetic", wrong, **kept)  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError, match="read another way"):
        devec.merge("task-arithmetic", sources, **kept, view={"threshold": 0.9})  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError, match="other tensors"):
        devec.merge("task-arithmetic", sources, **{**kept, "selection": None})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another method"):
        devec.merge("average", sources, **kept)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="take the place"):
        devec.merge("task-arithmetic", sources, **kept, parameters={"scale": 0.4})  # type: ignore[arg-type]
    change("recipe.yaml", sources=sources[:3])
    learn("--steps", "1", out="d.json")
    other = {**kept, "base": "a.safetensors", "coefficients": "d.json"}
    with pytest.raises(IncompatibleError, match="the base is not what"):
        devec.merge("task-arithmetic", sources[:3], **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken", ["{}", '{"schema": 1, "kind": "coefficients", "grain": "layer", "values": {"a": 0.3}}',
               '{"schema": 1, "kind": "coefficients", "grain": "vector", "values": {"a": "x"}}']
)
def test_a_broken_file_of_coefficients_is_an_input_error(tmp_path: Path, broken: str) -> None:
    (tmp_path / "c.json").write_text(broken)
    with pytest.raises(InputError):
        devec.read_coefficients(tmp_path / "c.json")


def test_coefficients_come_back_from_their_file(world: Path) -> None:
    for grain in ("vector", "tensor"):
        learn("--steps", "1", "--grain", grain, "--overwrite")
        c = devec.read_coefficients("c.json")
        devec.save_coefficients(c, "again.json", overwrite=True)
        assert Path("again.json").read_bytes() == Path("c.json").read_bytes()


def test_paths_of_a_suite_are_seen_from_its_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = read_suite("suite.yaml")
    assert suite.path("data/a.npz") == Path("data/a.npz")
    monkeypatch.chdir(world.parent)
    assert devec.eval("w/base.safetensors", "w/suite.yaml").scores.split == "test"


# --- adapters and transposed layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merges_written_into_a_network_are_those_that_apply_writes(
    family: str, request: pytest.FixtureRequest
) -> None:
    """Adapters stay factors, also where the file holds the transpose (GPT-2's Conv1D)."""
    models = request.getfixturevalue(family)
    base, c = open_model(models.base), [0.7, -0.4]
    pool, _ = load_pool([models.la, models.lb], base=base)
    model = linear_model(base, pool, torch.float32, 1)
    applied = devec.apply(models.base, list(zip(c, pool, strict=True)))
    g = torch.Generator().manual_seed(0)
    for name in model.names:
        assert not model._held[name].dense
        shape = base.info(name).shape
        out, G = torch.empty(shape), torch.randn(shape, generator=g)
        model.write(name, torch.tensor(c, dtype=torch.float64), out)
        torch.testing.assert_close(out, applied.get(name).float(), rtol=1e-5, atol=1e-6)
        change = [devec.apply(models.base, [(1.0, v)]).get(name).double() - base.get(name).double() for v in pool]
        wanted = torch.stack([(G.double() * d).sum() for d in change])
        torch.testing.assert_close(model.inner(name, G), wanted, rtol=1e-3, atol=1e-4)


def test_coefficients_of_adapters_merge_into_an_adapter(llama: Any, work: Path) -> None:
    base = open_model(llama.base)
    pool, _ = load_pool([llama.la, llama.lb], base=base)
    weights = {n: base.get(n).float() for n in linear_model(base, pool, torch.float32, 1).names}
    objective = FunctionObjective(weights, lambda w, step: torch.stack([x.square().sum() for x in w.values()]).sum())
    c = learn_on(objective, pool, base, Schedule(steps=3, lr=0.1, clamp=False), grain="layer")
    merged = devec.merge("task-arithmetic", list(pool), base=base, coefficients=c).vector
    shorter = [rename(v, {n: n.removeprefix("model.") for n in v.deltas}) for v in pool]
    again = devec.merge("task-arithmetic", shorter, base=base, coefficients=c).vector  # another spelling, same numbers
    for name in merged.names():
        assert torch.equal(again.deltas[name].dense(), merged.deltas[name].dense())
    with pytest.raises(IncompatibleError, match="took no part"):
        devec.merge("task-arithmetic", shorter, coefficients=c).vector.norm()
    devec.save_coefficients(c, "c.json")
    words = ["merge", "--method", "task-arithmetic", llama.la, llama.lb, "--coefficients", "c.json", "-o", "one", "-q"]
    assert run(words) == 0
    merged = devec.load("one")
    assert merged.is_low_rank()
    for name in merged.names():
        wanted = sum(c.of(v.name, n) * v.deltas[n].dense() for v in pool for n in v.deltas if n == name)
        torch.testing.assert_close(merged.deltas[name].dense(), wanted, rtol=1e-4, atol=1e-6)
