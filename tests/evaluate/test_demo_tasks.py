"""The demo's data, network and learned coefficients: what they promise, on a few steps."""

from __future__ import annotations

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from devec.core.errors import IncompatibleError, InputError, UsageError
from devec.evaluate import demo_tasks
from devec.evaluate.coefficients import learn_coefficients, merge, tensor_names
from devec.evaluate.demo_net import (
    DemoNet,
    Finetuning,
    NetConfig,
    Pretraining,
    accuracy,
    finetune,
    functional_accuracy,
    mean_loss,
    pretrain,
    scores,
)
from devec.evaluate.demo_tasks import SPLITS, Split, Task, make_tasks
from devec.linalg.numerics import one_blas_thread

pytest.importorskip("sklearn", reason="the demo's data come with scikit-learn")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return make_tasks(0)


@pytest.fixture(scope="module")
def net(tasks: list[Task]) -> DemoNet:
    return pretrain(tasks, NetConfig({t.name: t.classes for t in tasks}, width=64, blocks=1), Pretraining(steps=40))


# -- data ------------------------------------------------------------------------------------------------------------


def test_one_input_space_and_every_class_in_every_split(tasks: list[Task]) -> None:
    assert [t.name for t in tasks] == ["digits", "scene", "turn", "larger", "parity", "photo", "tumour"]
    for t in tasks:
        for split in SPLITS:
            x, y = t.split(split)
            assert x.shape[1:] == (16, 16) and x.dtype == torch.float32 and len(x) == len(y) > 100
            assert sorted(y.unique().tolist()) == list(range(t.classes))
        assert abs(float(t.x_train.mean())) < 1e-4 and abs(float(t.x_train.std()) - 1) < 1e-3
    with pytest.raises(ValueError, match="validation"):
        tasks[0].split("validation")  # type: ignore[arg-type]


def test_same_seed_same_bytes_and_another_seed_another_split(tasks: list[Task]) -> None:
    again, other = make_tasks(0), make_tasks(1)
    for a, b, c in zip(tasks, again, other, strict=True):
        for split in SPLITS:
            assert all(torch.equal(u, v) for u, v in zip(a.split(split), b.split(split), strict=True))
        assert not torch.equal(a.x_test[:50], c.x_test[:50])


def test_no_picture_of_a_test_split_is_trained_on_by_any_task(tasks: list[Task]) -> None:
    by_name = {t.name: t for t in tasks}

    def digits_of(split: Split) -> list[set[bytes]]:
        """The plain digits behind the pictures of four tasks (those of scene are painted over)."""
        turned, quarter = by_name["turn"].split(split)
        pairs = by_name["larger"].split(split)[0][:, 4:12]
        undone = [
            by_name["digits"].split(split)[0],
            -by_name["parity"].split(split)[0].flip(2),
            torch.stack([p.rot90(-int(k)) for p, k in zip(turned, quarter, strict=True)]),
            torch.cat([pairs[:, :, :8], pairs[:, :, 8:]]).repeat_interleave(2, 1).repeat_interleave(2, 2),
        ]
        return [{_digit_bytes(p) for p in x} for x in undone]

    train, select, test = (digits_of(split) for split in SPLITS)
    for part, count in ((train, 898), (select, 359), (test, 540)):
        assert all(p == part[0] for p in part) and abs(len(part[0]) - count) <= 5
    assert not (train[0] & test[0] or train[0] & select[0] or select[0] & test[0])


def _digit_bytes(picture: Tensor) -> bytes:
    """A digit, whatever scale it was standardised to: its 17 grey levels."""
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low) * 240).round().to(torch.uint8).numpy().tobytes()


def test_photograph_splits_share_no_pixel() -> None:
    numbered = [np.arange(96 * 120, dtype=np.float64).reshape(96, 120) + 1e6 * k for k in range(2)]
    x, y = demo_tasks._patches(numbered, np.random.default_rng(0))
    pixels = [set(part.ravel().tolist()) for part in x]
    assert all(pixels) and not (pixels[0] & pixels[1] or pixels[0] & pixels[2] or pixels[1] & pixels[2])
    assert all(int(p.max() >= 1e6) == label for part, labels in zip(x, y, strict=True)
               for p, label in zip(part, labels, strict=True))  # fmt: skip


def test_charts_show_the_ranks() -> None:
    heights = np.linspace(0, 1, 30)[None]
    chart = demo_tasks._bars(heights)[0]
    drawn = np.concatenate([chart[:8, :15].sum(0), chart[8:, :15].sum(0)])
    np.testing.assert_allclose(drawn, 8 * heights[0], atol=1e-12)
    assert not chart[:, 15].any()


def test_missing_scikit_learn_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"sklearn.*pip install 'devec\[demo\]'"):
        make_tasks(0)


# -- network ---------------------------------------------------------------------------------------------------------


def test_pretraining_and_finetuning_repeat_bit_for_bit(tasks: list[Task], net: DemoNet) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = pretrain(tasks, net.config, Pretraining(steps=40))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    few = Finetuning(steps=5)
    first, second = finetune(net, tasks[1], few), finetune(net, tasks[1], few)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_random_state_of_the_caller_is_untouched(tasks: list[Task]) -> None:
    before = torch.get_rng_state()
    DemoNet(NetConfig({"digits": 10}, width=16, blocks=1))
    assert torch.equal(before, torch.get_rng_state())


def test_finetuning_freezes_heads_helps_its_task_and_leaves_the_network_alone(tasks: list[Task], net: DemoNet) -> None:
    base = {k: v.clone() for k, v in net.state_dict().items()}
    task = tasks[1]
    tuned = finetune(net, task, Finetuning(steps=80, rate=1e-3))
    assert all(torch.equal(v, base[k]) for k, v in net.state_dict().items())
    changed = {k for k in base if not torch.equal(base[k], tuned[k])}
    assert changed == {k for k in base if k.startswith("encoder.")}
    assert accuracy(tuned, task) > accuracy(net, task) + 0.1
    assert accuracy(net, tasks[0]) > 0.5  # zero-shot is well above chance


def test_state_dict_gives_the_network_back(tasks: list[Task], net: DemoNet) -> None:
    state = net.state_dict()
    assert {"encoder.blocks.0.mlp.fc1.weight", "heads.digits.weight", "encoder.embed.weight"} <= set(state)
    again = DemoNet.from_state(state)
    assert again.config == net.config
    assert scores(state, tasks[:2]) == scores(net, tasks[:2])
    with pytest.raises(IncompatibleError, match=r"encoder\.embed\.weight"):
        DemoNet.from_state({"weight": torch.zeros(2, 2)})


def test_functional_accuracy_is_that_of_the_loaded_weights(tasks: list[Task], net: DemoNet) -> None:
    tuned = finetune(net, tasks[2], Finetuning(steps=10))
    encoder = {k: v for k, v in tuned.items() if k.startswith("encoder.")}
    assert functional_accuracy(net, encoder, tasks[2], "select") == accuracy(tuned, tasks[2], "select")


# -- coefficients ----------------------------------------------------------------------------------------------------


def test_learned_coefficients_solve_a_least_squares_problem() -> None:
    g = torch.Generator().manual_seed(3)
    base = {"a": torch.randn(4, 3, generator=g), "b": torch.randn(5, generator=g), "untouched": torch.zeros(2)}
    deltas = [{k: torch.randn(base[k].shape, generator=g) for k in ("a", "b")} for _ in range(3)]
    del deltas[1]["b"]  # a vector that lacks a tensor
    truth = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    goal = merge(base, deltas, truth)

    def loss(w: dict[str, Tensor]) -> Tensor:
        assert set(w) == {"a", "b"}
        return sum(((w[k] - goal[k]) ** 2).sum() for k in w)  # type: ignore[return-value]

    kept = {k: v.clone() for k, v in base.items()}
    c, history = learn_coefficients(base, deltas, loss, steps=400, lr=0.05, init=0.3)  # type: ignore[arg-type]
    assert len(history) == 401 and history[-1] < 1e-6 * history[0]
    assert torch.allclose(c, truth, atol=1e-3)
    assert all(torch.equal(base[k], kept[k]) for k in base)
    again, _ = learn_coefficients(base, deltas, loss, steps=400, lr=0.05, init=0.3)  # type: ignore[arg-type]
    assert torch.equal(c, again)


def test_gradient_is_that_of_autograd_through_the_sum() -> None:
    g = torch.Generator().manual_seed(4)
    base = {k: torch.randn(3, 3, generator=g, dtype=torch.float64) for k in ("a", "b")}
    deltas = [{k: torch.randn(3, 3, generator=g, dtype=torch.float64) for k in base} for _ in range(2)]

    def loss(w: dict[str, Tensor]) -> Tensor:
        return (w["a"] @ w["b"]).tanh().pow(2).sum()

    # Adam's first step is lr times the sign of the gradient: compare the signs through tiny steps, per tensor.
    c = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    merged = {k: base[k] + sum(c[t, j] * deltas[t][k] for t in range(2)) for j, k in enumerate(base)}
    (slope,) = torch.autograd.grad(loss(merged), c)
    learned, _ = learn_coefficients(base, deltas, loss, steps=1, lr=1e-3, per_tensor=True)  # type: ignore[arg-type]
    assert torch.allclose(learned, 0.3 - 1e-3 * slope / (slope.abs() + 1e-8), atol=1e-12)


def test_learning_on_the_selection_split_beats_the_start(tasks: list[Task], net: DemoNet) -> None:
    some = [replace(t, x_select=t.x_select[:100], y_select=t.y_select[:100]) for t in tasks[:3]]
    base = {k: v.detach() for k, v in net.state_dict().items() if k.startswith("encoder.")}
    deltas = []
    for t in some:
        tuned = finetune(net, t, Finetuning(steps=20))
        deltas.append({k: tuned[k] - base[k] for k in base})
    with one_blas_thread():
        c, history = learn_coefficients(base, deltas, mean_loss(net, some), steps=10, lr=0.1, init=0.1)
        by_tensor, deeper = learn_coefficients(base, deltas, mean_loss(net, some), 10, 0.1, 0.1, per_tensor=True)
    assert c.shape == (3,) and by_tensor.shape == (3, len(tensor_names(base, deltas)))
    assert history[-1] < history[0] and deeper[-1] < history[-1]


def test_bad_deltas_starts_and_losses_are_named() -> None:
    base = {"w": torch.zeros(2, 2)}

    def loss(w: dict[str, Tensor]) -> Tensor:
        return w["w"].sum() * float("nan")

    with pytest.raises(IncompatibleError, match=r"tensor w.*\(2, 2\).*\(3, 2\)"):
        tensor_names(base, [{"w": torch.zeros(3, 2)}])
    with pytest.raises(IncompatibleError, match="lacks"):
        tensor_names(base, [{"v": torch.zeros(2, 2)}])
    with pytest.raises(UsageError, match="vectors = 1"):
        learn_coefficients(base, [{"w": torch.ones(2, 2)}], loss, init=[0.1, 0.2])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not finite"):
        learn_coefficients(base, [{"w": torch.ones(2, 2)}], loss)  # type: ignore[arg-type]
