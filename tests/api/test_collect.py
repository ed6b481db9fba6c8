"""Statistics of data from files, and merges with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import devec
import learning_world
from devec.core.errors import DevecError, IncompatibleError, UsageError
from devec.evaluate.data import Rows
from devec.evaluate.network import Network
from devec.evaluate.statistics import moments
from devec.io.names import Selection

BODY = Selection((), ("^heads",))
MODELS = ["a.safetensors", "b.safetensors", "c.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learning_world.build(tmp_path_factory.mktemp("learning") / "world")


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def collect(kind: str, out: str = "stats", models: list[str] = MODELS, examples: int = 16) -> Any:
    return devec.collect(
        kind, models, out, base="base.safetensors", suite="suite.yaml", examples=examples, selection=BODY
    )


def merged(method: str, stats: object, models: list[str] = MODELS) -> Any:
    return devec.merge(method, models, base="base.safetensors", selection=BODY, statistics_of=stats)


def select_rows(task: str) -> torch.Tensor:
    from devec.api.eval import Evaluator

    (found,) = Evaluator("base.safetensors", "suite.yaml", tasks=[task]).tasks
    return found.data.inputs(found.data.split("select").x)


def net(task: str) -> learning_world.Net:
    found = learning_world.Net()
    found.load_state_dict({k: v.float() for k, v in load_file(f"{task}.safetensors").items()})
    return found


def test_fisher_is_the_mean_squared_gradient_of_each_label_weighted_by_its_probability(world: Path) -> None:
    stats = collect("fisher", examples=10**6)
    model, rows = net("b"), select_rows("b")
    weight = model.encoder[2].weight
    wanted = torch.zeros(weight.shape, dtype=torch.float64)
    for x in rows:
        log_p = F.log_softmax(model(x[None], "b")[0], 0)
        for y in range(4):
            (g,) = torch.autograd.grad(log_p[y], weight, retain_graph=True)
            wanted += float(log_p[y].exp().detach()) * g.double().square() / len(rows)
    found = load_file("stats/1.safetensors")
    torch.testing.assert_close(found["encoder.2.weight"].double(), wanted, rtol=1e-3, atol=1e-9)
    assert "heads.b.weight" not in found
    squares = sum(float(v.double().square().sum()) for v in found.values())
    assert stats.norms[1] == pytest.approx(squares**0.5)


def test_moments_are_of_the_inputs_that_the_fine_tune_itself_makes(world: Path) -> None:
    collect("moments", examples=10**6)
    found, model = load_file("stats/2.safetensors"), net("c")
    X = select_rows("c").flatten(1)
    assert set(found) == {"encoder.0.weight", "encoder.2.weight"}
    torch.testing.assert_close(found["encoder.0.weight"], X.T @ X / len(X), rtol=1e-4, atol=1e-5)
    H = model.encoder[1](model.encoder[0](X)).detach()
    torch.testing.assert_close(found["encoder.2.weight"], H.T @ H / len(H), rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "method"), [("fisher", "fisher"), ("moments", "regmean")])
def test_merges_with_statistics_are_recorded_repeat_and_beat_the_base(world: Path, kind: str, method: str) -> None:
    stats = collect(kind)
    devec.save(merged(method, stats), "one")
    devec.save(merged(method, "stats"), "two")
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    recipe = yaml.safe_load(Path("one/devec/recipe.yaml").read_text()) if Path("one/devec").is_dir() else None
    if recipe is not None:
        assert recipe["parameters"]["statistics"]["split"] == "select"
        assert recipe["parameters"]["statistics"]["examples"] == 16
    collect(kind, "again")
    for i in range(3):
        assert Path(f"stats/{i}.safetensors").read_bytes() == Path(f"again/{i}.safetensors").read_bytes()
    accuracy = devec.eval("one", "suite.yaml").scores.mean["accuracy"]
    assert accuracy > devec.eval("base.safetensors", "suite.yaml").scores.mean["accuracy"]


def test_errors(world: Path) -> None:
    with pytest.raises(UsageError, match="no task for the vector 'x'"):
        collect("fisher", models=["x=a.safetensors"])
    for wrong in (lambda: collect("neither"), lambda: collect("fisher", examples=0),
                  lambda: merged("fisher", None), lambda: merged("average", "stats")):
        with pytest.raises(UsageError):
            wrong()
    assert not Path("stats").exists()
    with pytest.raises(DevecError, match="cannot read the statistics"):
        merged("fisher", "nowhere")
    collect("fisher")
    with pytest.raises(UsageError, match="does not use"):
        merged("regmean", "stats")
    with pytest.raises(IncompatibleError, match="another order"):
        merged("fisher", "stats", MODELS[::-1])
    with pytest.raises(IncompatibleError, match="other tensors"):
        devec.merge("fisher", MODELS, base="base.safetensors", statistics_of="stats")
    save_file({k: v * 2 for k, v in load_file("a.safetensors").items()}, "a.safetensors")
    with pytest.raises(IncompatibleError, match="vector a is not what"):
        merged("fisher", "stats")
    Path("suite.yaml").write_text(Path("suite.yaml").read_text().replace("select: {from: test, fraction: 0.5}\n", ""))
    with pytest.raises(UsageError, match="no selection split"):
        collect("fisher", "other")


def test_moments_of_a_convolution_predict_its_outputs() -> None:
    """``mean |conv(x)|^2 = tr(W G W^T)`` for any kernel, stride and padding."""
    from devec.evaluate.data import TaskData
    from devec.evaluate.scoring import Task

    class Convolved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(x).flatten(1)
            return out

    torch.manual_seed(0)
    module = Convolved()
    rows = Rows(torch.randint(0, 256, (6, 8, 8), dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), "all")
    task = Task(TaskData("t", Path("t"), rows, rows), batch=4)
    G = moments(Network(module, {"w": module.conv.weight}), task, rows, {"w"}, lambda *_: None)["w"]
    out = module.conv(task.data.inputs(rows.x)).detach()
    W = module.conv.weight.detach().flatten(1)
    energy = out.square().sum(1).mean()
    torch.testing.assert_close(torch.trace(W @ G @ W.T), energy, rtol=1e-4, atol=1e-6)
