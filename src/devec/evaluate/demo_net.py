"""A small network with one encoder and a head per task: pre-trained on little, fine-tuned per task, heads frozen.

Training runs on one thread: the network is so small that more threads only wait for one another, and the numbers then
do not depend on how many there are. Everything random comes from a seeded generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from devec.core.errors import IncompatibleError
from devec.evaluate.demo_tasks import SIDE, Split, Task
from devec.linalg.numerics import one_blas_thread

State = Mapping[str, Tensor]
ENCODER = "encoder."


@dataclass(frozen=True)
class NetConfig:
    """``classes`` maps a task's name to its number of classes; ``width`` is the side of the square weight matrices."""

    classes: Mapping[str, int]
    width: int = 384
    blocks: int = 2
    pixels: int = SIDE * SIDE


@dataclass(frozen=True)
class Training:
    """AdamW steps with a cosine schedule to zero. ``batch`` is per task."""

    steps: int
    rate: float
    batch: int
    weight_decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Pretraining(Training):
    """``fraction`` of each class of each task's training split (at least two pictures), all tasks mixed."""

    steps: int = 40
    rate: float = 1e-3
    batch: int = 32
    weight_decay: float = 0.05
    fraction: float = 0.05


@dataclass(frozen=True)
class Finetuning(Training):
    """The whole training split of one task, in small steps."""

    steps: int = 200
    rate: float = 2e-4
    batch: int = 64


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm(x))
        return x + y


class Encoder(nn.Module):
    """``(n, 16, 16) -> (n, width)``: a linear embedding of the pixels, then residual MLP blocks."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.pixels, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)
        return features


class DemoNet(nn.Module):
    """``heads[task](encoder(x))``. Keys: ``encoder.blocks.0.mlp.fc1.weight``, ``heads.digits.weight``, ..."""

    def __init__(self, config: NetConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(config)
            self.heads = nn.ModuleDict({n: nn.Linear(config.width, c) for n, c in config.classes.items()})

    def forward(self, x: Tensor, task: str) -> Tensor:
        logits: Tensor = self.heads[task](self.encoder(x))
        return logits

    @classmethod
    def from_state(cls, state: State) -> DemoNet:
        """The network that a state dict belongs to, with those weights. The shapes say everything."""
        embed = state.get("encoder.embed.weight")
        if embed is None:
            raise IncompatibleError(
                "not a checkpoint of the demo network", tensor="encoder.embed.weight", values={"tensors": len(state)}
            )
        blocks = {k.split(".")[2] for k in state if k.startswith("encoder.blocks.")}
        heads = {k.split(".")[1]: state[k].shape[0] for k in state if k.startswith("heads.") and k.endswith("weight")}
        net = cls(NetConfig(heads, width=embed.shape[0], blocks=len(blocks), pixels=embed.shape[1]))
        net.load_state_dict({k: v.to(torch.float32) for k, v in state.items()})
        return net


def pretrain(tasks: Sequence[Task], config: NetConfig | None = None, training: Pretraining | None = None) -> DemoNet:
    """One network trained on a little of every task at once, its heads included."""
    training = training or Pretraining()
    net = DemoNet(config or NetConfig({t.name: t.classes for t in tasks}), seed=training.seed)
    g = torch.Generator().manual_seed(training.seed)
    pool = [_few(t, training.fraction, g) for t in tasks]

    def loss() -> Tensor:
        batches = [_draw(x, y, training.batch, g) for x, y in pool]
        features = net.encoder(torch.cat([x for x, _ in batches])).split(training.batch)
        terms = [
            F.cross_entropy(net.heads[t.name](f), y)
            for t, f, (_, y) in zip(tasks, features, batches, strict=True)
        ]  # fmt: skip
        return torch.stack(terms).sum()

    _optimise(list(net.parameters()), loss, training)
    return net


def finetune(net: DemoNet, task: Task, training: Finetuning | None = None) -> dict[str, Tensor]:
    """The state dict after fine-tuning the encoder on one task with its head frozen. ``net`` is not changed."""
    training = training or Finetuning()
    tuned = DemoNet.from_state(net.state_dict())
    tuned.heads.requires_grad_(False)
    g = torch.Generator().manual_seed(training.seed)

    def loss() -> Tensor:
        x, y = _draw(task.x_train, task.y_train, training.batch, g)
        return F.cross_entropy(tuned(x, task.name), y)

    _optimise(list(tuned.encoder.parameters()), loss, training)
    return {k: v.detach().clone() for k, v in tuned.state_dict().items()}


def accuracy(model: DemoNet | State, task: Task, split: Split = "test") -> float:
    """Fraction of right answers on one split."""
    net = model if isinstance(model, DemoNet) else DemoNet.from_state(model)
    return functional_accuracy(net, {}, task, split)


def functional_accuracy(net: DemoNet, params: State, task: Task, split: Split = "test") -> float:
    """As :func:`accuracy`, with ``params`` (full names, any subset) in place of the network's own tensors."""
    x, y = task.split(split)
    with one_blas_thread(), torch.no_grad():
        answer = functional_call(net, dict(params), (x, task.name)).argmax(dim=1)
    return float((answer == y).double().mean())


def scores(model: DemoNet | State, tasks: Sequence[Task], split: Split = "test") -> dict[str, float]:
    """Accuracy on every task, by its name."""
    net = model if isinstance(model, DemoNet) else DemoNet.from_state(model)
    return {t.name: accuracy(net, t, split) for t in tasks}


def mean_loss(
    net: DemoNet, tasks: Sequence[Task], split: Split = "select", limit: int | None = None
) -> Callable[[State], Tensor]:
    """``params -> mean over tasks of the cross-entropy on a split``, differentiable: what coefficients minimise.

    ``limit`` takes at most so many pictures of each task, evenly spaced, for speed.
    """

    def some(part: Tensor) -> Tensor:
        return part if limit is None else part[:: -(-len(part) // limit)]

    def loss(params: State) -> Tensor:
        terms = []
        for t in tasks:
            x, y = (some(part) for part in t.split(split))
            terms.append(F.cross_entropy(functional_call(net, dict(params), (x, t.name)), y))
        return torch.stack(terms).mean()

    return loss


def _optimise(parameters: list[nn.Parameter], loss: Callable[[], Tensor], training: Training) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(training.steps, 1))
    with one_blas_thread():
        for _ in range(training.steps):
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss())
            optimiser.step()
            schedule.step()


def _draw(x: Tensor, y: Tensor, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    i = torch.randint(len(y), (batch,), generator=g)
    return x[i], y[i]


def _few(task: Task, fraction: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = []
    for c in range(task.classes):
        members = (task.y_train == c).nonzero().flatten()
        count = min(len(members), max(2, round(fraction * len(members))))
        chosen.append(members[torch.randperm(len(members), generator=g)[:count]])
    index = torch.cat(chosen)
    return task.x_train[index], task.y_train[index]
