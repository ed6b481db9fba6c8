"""Objectives of a suite against autograd of the loss written out, in float64; metrics, loaders and drawn rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from devec.core.delta import DenseDelta
from devec.core.errors import IncompatibleError, InputError, UsageError
from devec.evaluate.data import Rows, TaskData, loader, read_task
from devec.evaluate.learning import Schedule, learn
from devec.evaluate.linear_model import LinearModel
from devec.evaluate.metrics import get_metric, metric, softmax_entropy
from devec.evaluate.network import Network
from devec.evaluate.objectives import PIECE, Sampling, SuiteObjective
from devec.evaluate.scoring import Head, Task, score
from devec.evaluate.suite import InputSpec
from devec.io.checkpoint import checkpoint_from_state_dict


class Net(nn.Module):
    """With BatchNorm, whose running statistics are weights of a checkpoint too, and a tensor that one task skips."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)

    def forward(self, x: Tensor, task: str) -> Tensor:
        hidden: Tensor = torch.tanh(self.norm(self.a(x.flatten(1))))
        return hidden if task == "short" else hidden + self.b(hidden)


def made() -> tuple[Network, list[Task]]:
    torch.manual_seed(0)
    net = Net().double()
    net.norm.running_mean.normal_()
    tensors = {**dict(net.named_parameters()), **{n: b for n, b in net.named_buffers() if b.is_floating_point()}}
    g = torch.Generator().manual_seed(1)
    tasks = []
    for name, count in (("long", 50), ("short", 23)):
        x = torch.randint(0, 256, (count, 2, 2), dtype=torch.uint8, generator=g)
        rows = Rows(x, torch.randint(0, 3, (count,), generator=g), "rows")
        head = Head(torch.randn(3, 5, generator=g), torch.randn(3, generator=g), cosine=name == "short", scale=3.0)
        tasks.append(Task(TaskData(name, Path("none"), rows, rows), head, batch=7))
    return Network(net, tensors), tasks


@pytest.mark.parametrize("kind", ["entropy", "ce"])
def test_gradients_are_those_of_the_mean_loss_of_the_step(kind: str) -> None:
    network, tasks = made()
    sampling = Sampling(batch=2 * PIECE + 5)
    learned = [n for n in network.tensors if n != "a.bias"]
    objective = SuiteObjective(network, tasks, kind, sampling, learned)  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        assert name not in found, "once a tensor"
        found[name] = gradient.clone()

    value = objective.gradients(3, take)
    parameters = {n: network.tensors[n] for n in learned if isinstance(network.tensors[n], nn.Parameter)}
    losses = []
    for task, rows in zip(tasks, objective.rows, strict=True):
        x, y = sampling.draw(rows, task.name, 3)
        features = network.module((x.double() / 255).unsqueeze(1), task.name)
        assert task.head is not None and task.head.bias is not None
        f = F.normalize(features, dim=1) if task.head.cosine else features
        logits = 3.0 * f @ task.head.weight.double().T + task.head.bias.double()
        p = logits.softmax(1)
        losses.append(-(p * p.log()).sum(1).mean() if kind == "entropy" else F.cross_entropy(logits, y))
    wanted = sum(losses) / 2
    slopes = torch.autograd.grad(wanted, list(parameters.values()))
    assert value == pytest.approx(float(wanted.detach()), rel=1e-6)  # pictures are normalised in float32
    assert value == pytest.approx(objective.loss(3), rel=1e-12)
    assert set(found) == set(parameters) and "a.bias" not in found
    for name, slope in zip(parameters, slopes, strict=True):
        torch.testing.assert_close(found[name], slope, rtol=1e-5, atol=1e-9)
    assert all(p.grad is None for p in network.module.parameters())


def test_running_statistics_are_merged_though_they_have_no_gradient() -> None:
    network, tasks = made()
    base = {n: t.detach().clone() for n, t in network.tensors.items()}
    names = ["a.weight", "norm.running_mean"]
    deltas = {n: torch.randn(base[n].shape, dtype=torch.float64).reshape(len(base[n]), -1) for n in names}
    changes = {n: [(0, DenseDelta(d))] for n, d in deltas.items()}
    model = LinearModel.of(checkpoint_from_state_dict(base), changes, 1, torch.float64)
    objective = SuiteObjective(network, tasks, "entropy", Sampling(), names)
    c = float(learn(objective, model, Schedule(steps=3, lr=0.1)).values)
    assert c != 0.3
    wanted = base["norm.running_mean"] + c * deltas["norm.running_mean"].reshape(-1)
    torch.testing.assert_close(network.tensors["norm.running_mean"], wanted)


def test_two_objectives_of_one_network_do_not_take_each_others_gradients() -> None:
    network, tasks = made()
    one, two = (SuiteObjective(network, tasks, "entropy", Sampling(), network.tensors) for _ in range(2))
    seen: list[str] = []
    one.gradients(0, lambda n, g: None)
    two.gradients(0, lambda n, g: seen.append(n))
    assert len(seen) == len([t for t in network.tensors.values() if isinstance(t, nn.Parameter)])


def test_nothing_to_learn_is_an_error() -> None:
    network, tasks = made()
    with pytest.raises(IncompatibleError, match="depends on no tensor"):
        SuiteObjective(network, tasks, "entropy", Sampling(), ["norm.running_mean"]).gradients(0, lambda n, g: None)


def test_rows_of_a_step_follow_from_seed_task_and_step_and_do_not_repeat() -> None:
    rows = Rows(torch.arange(40), torch.arange(40), "rows")
    one = Sampling(batch=30, seed=1).draw(rows, "a", 2)[0]
    assert torch.equal(one, Sampling(batch=30, seed=1).draw(rows, "a", 2)[0]) and len(one.unique()) == 30
    for other in (Sampling(batch=30).draw(rows, "a", 2), Sampling(batch=30, seed=1).draw(rows, "b", 2),
                  Sampling(batch=30, seed=1).draw(rows, "a", 3)):
        assert not torch.equal(one, other[0])
    assert len(Sampling(batch=99).draw(rows, "a", 0)[0]) == 40


def test_entropy_is_that_of_the_distribution_and_zero_for_a_sure_one() -> None:
    logits = torch.tensor([[0.0, 0.0], [900.0, -900.0]])
    torch.testing.assert_close(softmax_entropy(logits), torch.tensor([np.log(2.0), 0.0], dtype=torch.float32))


def test_metrics_and_loaders_of_a_users_own(tmp_path: Path) -> None:
    @metric("share-of-zeros", finish=lambda x: 100 * x)
    def zeros(logits: Tensor, labels: Tensor) -> Tensor:
        return (labels == 0).double()

    @loader(".rows")
    def rows(path: Path) -> dict[str, np.ndarray]:
        count = int(path.read_text())
        return {"x_test": np.zeros((count, 2, 2), np.uint8), "y_test": np.arange(count) % 2}

    (tmp_path / "t.rows").write_text("10")
    data = read_task("t", tmp_path / "t.rows", InputSpec())
    network, _ = made()
    found = score(network, [Task(data, Head(torch.ones(2, 5)))], [get_metric("share-of-zeros")])
    assert found.mean == {"share-of-zeros": 50.0}


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x_test": np.zeros((3, 2, 2)), "y_test": np.zeros(3, int)}, "neither uint8"),
        ({"x_test": np.zeros((3, 2, 2), np.uint8), "y_test": np.zeros(2, int)}, "one label"),
        ({"x_test": np.zeros((3, 2, 2), np.uint8), "y_test": np.array([0, -1, 0])}, "one label"),
        ({"x_test": np.zeros((3, 2, 2), np.uint8), "y_test": np.zeros(3)}, "one label"),
        ({"x_test": np.zeros((3, 2, 2), np.uint8)}, "lack y_test"),
        ({"x_test": np.array([None, "a"], dtype=object), "y_test": np.zeros(2, int)}, "cannot read"),
    ],
)
def test_arrays_that_are_no_task(tmp_path: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(InputError, match=text):
        read_task("t", tmp_path / "t.npz", InputSpec())


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"shots": 0}])
def test_a_sample_of_nothing_is_an_error(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)  # type: ignore[arg-type]
