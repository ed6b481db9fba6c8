"""The gradient of coefficients against autograd through the whole merge, on a tiny network in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from devec.core.coefficients import group_of, layer_of
from devec.core.delta import Delta, DenseDelta, LowRankDelta, SparseDelta
from devec.core.errors import IncompatibleError, UsageError
from devec.core.lazy import LazyDelta
from devec.evaluate.learning import ADAMERGING, Learned, Schedule, learn
from devec.evaluate.linear_model import Changes, LinearModel
from devec.evaluate.objectives import FunctionObjective
from devec.io.checkpoint import checkpoint_from_state_dict

SHAPES = {"net.0.weight": (7, 5), "net.0.bias": (7,), "net.1.kernel": (4, 7, 1, 1), "head.scale": ()}
VECTORS = 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def world() -> tuple[dict[str, Tensor], Changes]:
    """A base and four vectors: dense, read by rows, of factors (a part ``Z Z^T Delta``), sparse; not all in all."""
    base = {n: normal(i, *s) for i, (n, s) in enumerate(SHAPES.items())}
    dense, lazy = normal(10, 7, 5), normal(11, 7, 5)
    Z = torch.linalg.qr(normal(12, 7, 2)).Q
    sparse = SparseDelta(torch.tensor([1, 8, 34]), normal(13, 3), (7, 5))
    B, A = normal(14, 4, 9), normal(15, 9, 7)  # wider than the matrix: rank 9 of 4 x 7
    changes: dict[str, list[tuple[int, Delta]]] = {
        "net.0.weight": [
            (0, DenseDelta(dense)), (1, LazyDelta((7, 5), torch.float64, lambda a, b: lazy[a:b])),
            (2, DenseDelta(dense).project(Z)), (3, sparse),
        ],
        "net.0.bias": [(0, DenseDelta(normal(16, 7, 1))), (3, LowRankDelta(normal(17, 7, 1), normal(18, 1, 1)))],
        "net.1.kernel": [(1, LowRankDelta(B, A)), (2, LowRankDelta(normal(19, 4, 0), normal(20, 0, 7)))],
        "head.scale": [(0, DenseDelta(normal(21, 1, 1)))],
    }  # fmt: skip
    return base, changes


def loss_of(w: Mapping[str, Tensor], step: int) -> Tensor:
    x = normal(100 + step, 6, 5)
    hidden = torch.tanh(x @ w["net.0.weight"].T + w["net.0.bias"])
    out = (hidden @ w["net.1.kernel"].reshape(4, 7).T) * w["head.scale"]
    return -(out.softmax(1) * out.log_softmax(1)).sum(1).mean() + 0.1 * out.square().mean()


def merged(
    base: Mapping[str, Tensor], changes: Changes, c: Tensor, of: Callable[[str], str], groups: list[str]
) -> dict[str, Tensor]:
    """``W(c)`` written out with dense matrices: the reference that autograd differentiates."""
    return {
        n: base[n] + sum(c[t, groups.index(of(n))] * d.dense().reshape(base[n].shape) for t, d in changes[n])
        for n in base
    }


def run(schedule: Schedule, grain: str = "tensor", workers: int = 1, changes: Changes | None = None) -> Learned:
    base, own = world()
    model = LinearModel.of(checkpoint_from_state_dict(base), changes or own, VECTORS, torch.float64)
    return learn(FunctionObjective(base, loss_of), model, schedule, grain=grain, workers=workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("grain", ["vector", "layer", "tensor"])
@pytest.mark.parametrize("clamp", [False, True])
def test_steps_are_those_of_torch_with_autograd_through_the_merge(grain: str, clamp: bool) -> None:
    base, changes = world()
    schedule = Schedule(steps=6, lr=0.1, init=0.1, clamp=clamp, weight_decay=0.05, clip=0.5)
    found = run(schedule, grain)
    of = group_of(grain)  # type: ignore[arg-type]
    groups = list(dict.fromkeys(of(n) for n in changes))
    c = torch.full((VECTORS, len(groups)), 0.1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([c], lr=0.1, weight_decay=0.05)
    history = []
    for step in range(6):
        adam.zero_grad()
        loss = loss_of(merged(base, changes, c.clamp(0, 1) if clamp else c, of, groups), step)
        torch.autograd.backward(loss)
        assert c.grad is not None
        c.grad *= min(1.0, 0.5 / float(c.grad.norm()))  # torch's own clipping adds 1e-6 to the norm
        adam.step()
        history.append(float(loss.detach()))
    wanted = (c.clamp(0, 1) if clamp else c).detach()
    assert list(found.groups) == groups
    torch.testing.assert_close(found.values, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.tensor(found.history), torch.tensor(history), rtol=0, atol=1e-9)
    if clamp:
        assert bool((found.values == 0).any()), "the case must reach the clamp"


def test_inner_products_are_those_with_the_dense_matrices() -> None:
    base, changes = world()
    model = LinearModel.of(checkpoint_from_state_dict(base), changes, VECTORS, torch.float64)
    for name, terms in changes.items():
        G = normal(50, *SHAPES[name])
        wanted = torch.zeros(VECTORS, dtype=torch.float64)
        for t, d in terms:
            wanted[t] += (G.reshape(d.shape) * d.dense()).sum()
        torch.testing.assert_close(model.inner(name, G), wanted, rtol=0, atol=1e-12)


def test_factored_deltas_give_what_dense_ones_give() -> None:
    dense = {n: [(t, DenseDelta(d.dense())) for t, d in terms] for n, terms in world()[1].items()}
    schedule = Schedule(steps=5, lr=0.05)
    torch.testing.assert_close(run(schedule).values, run(schedule, changes=dense).values, rtol=0, atol=1e-9)


def test_each_vector_may_start_elsewhere() -> None:
    found = run(Schedule(steps=0, init=(0.1, 0.2, 0.3, 1.4)), "vector").values.reshape(-1)
    assert found.tolist() == [0.1, 0.2, 0.3, 1.0]
    with pytest.raises(UsageError, match="as many"):
        run(Schedule(init=(0.1, 0.2)))


def test_outside_the_clamp_nothing_moves() -> None:
    assert torch.equal(run(Schedule(steps=3, init=-0.2)).values, torch.zeros(VECTORS, len(SHAPES), dtype=torch.float64))
    above = run(Schedule(steps=3, init=1.5))
    assert torch.equal(above.values, torch.ones_like(above.values))


def test_the_number_of_workers_changes_no_bit() -> None:
    one, three = run(Schedule(steps=8, lr=0.1)), run(Schedule(steps=8, lr=0.1), workers=3)
    assert torch.equal(one.values, three.values) and one.history == three.history


def test_the_network_holds_the_result_afterwards() -> None:
    base, changes = world()
    model = LinearModel.of(checkpoint_from_state_dict(base), changes, VECTORS, torch.float64)
    objective = FunctionObjective(base, loss_of)
    found = learn(objective, model, Schedule(steps=2, lr=0.1), grain="vector")
    wanted = merged(base, changes, found.values, lambda _: "", [""])
    for name, weight in objective.weights().items():
        torch.testing.assert_close(weight.detach(), wanted[name], rtol=0, atol=1e-12)


def test_a_gradient_is_let_go_of_when_it_is_handed_over() -> None:
    base, _ = world()
    objective = FunctionObjective(base, loss_of)
    taken: list[str] = []

    def take(name: str, gradient: Tensor) -> None:
        taken.append(name)
        assert objective.weights()[name].grad is None
        assert all(w.grad is None for w in objective.weights().values()), "another gradient waits"

    objective.gradients(0, take)
    assert sorted(taken) == sorted(SHAPES)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    base, changes = world()
    model = LinearModel.of(checkpoint_from_state_dict(base), changes, VECTORS, torch.float64)
    with pytest.raises(UsageError, match="not finite"):
        learn(FunctionObjective(base, lambda w, step: w["head.scale"] * float("nan")), model)


def test_a_tensor_that_the_network_lacks_is_named() -> None:
    base, changes = world()
    model = LinearModel.of(checkpoint_from_state_dict(base), changes, VECTORS, torch.float64)
    fewer = {n: w for n, w in base.items() if n != "net.0.bias"}
    with pytest.raises(IncompatibleError, match=r"net\.0\.bias"):
        learn(FunctionObjective(fewer, loss_of), model)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"steps": -1}, {"init": float("nan")}, {"weight_decay": -1.0}])
def test_a_schedule_out_of_range_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Schedule(**wrong)  # type: ignore[arg-type]


def test_adamergings_own_values() -> None:
    s = ADAMERGING
    assert (s.steps, s.lr, s.init, s.clamp, s.weight_decay, s.betas) == (500, 1e-3, 0.3, True, 0.0, (0.9, 0.999))


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("vit.layers.11.attention.q_proj.weight", "vit.layers.11"),
        ("model.layers.0.block.3.weight", "model.layers.0"),
        ("0.weight", "0"),
        ("vit.embeddings.cls_token", "vit.embeddings"),
        ("scale", ""),
    ],
)
def test_layers(tensor: str, layer: str) -> None:
    assert layer_of(tensor) == layer


MEMORY = """
import resource, torch
from devec.core.delta import LowRankDelta
from devec.core.lazy import LazyDelta
from devec.evaluate.learning import Schedule, learn
from devec.evaluate.linear_model import LinearModel
from devec.evaluate.objectives import FunctionObjective
from devec.io.checkpoint import checkpoint_from_state_dict
n, T = 1200, 24
def lazy(t):  # what a file would give, block by block
    return LazyDelta((n, n), torch.float32, lambda a, b: torch.full((b - a, n), 1e-4 * t))
def thin(t):
    return LowRankDelta(torch.full((n, 4), 1e-2), torch.full((4, n), 1e-2 * t))
base = {f"b.{i}.w": torch.zeros(n, n, dtype=torch.float16) for i in range(3)}
w = {k: v.float() for k, v in base.items()}
x = torch.ones(8, n)
def loss(weights, step):
    return sum((x @ v.T).square().mean() for v in weights.values())
def go(T):
    changes = {k: [(t, lazy(t) if t % 2 else thin(t)) for t in range(T)] for k in base}
    model = LinearModel.of(checkpoint_from_state_dict(base), changes, T)
    learn(FunctionObjective(w, loss), model, Schedule(steps=2, lr=0.1))
go(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
go(T)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * n * n * 3))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
def test_no_copy_of_the_model_is_made_for_each_vector() -> None:
    """24 vectors where 2 were: the peak grows by about one copy of the model (the second run's own), not by 22."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert float(done.stdout) < 3.0
