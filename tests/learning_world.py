"""A tiny suite: three tasks of 8 x 8 pictures, a network with a head per task, a base and a fine-tune per task.

``base.safetensors``, ``a/b/c.safetensors`` (float16), ``net.py``, ``data/*.npz``, ``suite.yaml``, ``parts`` (their
decomposition) and ``recipe.yaml`` (originals and a shared part), as a user would have them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

TASKS = ("a", "b", "c")
CLASSES, SIDE, WIDTH = 4, 8, 24

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.heads = nn.ModuleDict({t: nn.Linear(24, 4) for t in "abc"})
    def forward(self, x, task):
        return self.heads[task](self.encoder(x.flatten(1)))

def build(state, config):
    net = Net()
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net
"""

SUITE = """
model: {python: net.py:build}
select: {from: test, fraction: 0.5}
input: {mean: [0.5], std: [0.25]}
tasks:
  - {name: a, data: data/a.npz}
  - {name: b, data: data/b.npz}
  - {name: c, data: data/c.npz, batch: 7}
"""

RECIPE = """
method: task-arithmetic
base: base.safetensors
sources: [a.safetensors, b.safetensors, c.safetensors, "ab=parts#shared:a+b"]
exclude: ["^heads"]
suite: suite.yaml
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(SIDE * SIDE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.heads = nn.ModuleDict({t: nn.Linear(WIDTH, CLASSES) for t in TASKS})

    def forward(self, x: torch.Tensor, task: str) -> torch.Tensor:
        out: torch.Tensor = self.heads[task](self.encoder(x.flatten(1)))
        return out


def pictures(task: str, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Four noisy patterns of the task's own."""
    patterns = np.random.default_rng([ord(task), 1]).integers(0, 256, (CLASSES, SIDE, SIDE))
    rng = np.random.default_rng([ord(task), len(split)])
    labels = rng.integers(0, CLASSES, count)
    noisy = 0.5 * patterns[labels] + 0.5 * rng.integers(0, 256, (count, SIDE, SIDE))
    return noisy.astype(np.uint8), labels


def build(folder: Path) -> Path:
    from devec.cli.main import run

    torch.manual_seed(3)
    (folder / "data").mkdir(parents=True)
    (folder / "net.py").write_text(textwrap.dedent(NET))
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "recipe.yaml").write_text(RECIPE)
    base = Net()
    rows = {}
    for t in TASKS:
        x, y = pictures(t, "train", 120)
        x_test, y_test = pictures(t, "testing", 80)
        np.savez(folder / "data" / f"{t}.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
        rows[t] = ((torch.from_numpy(x).float() / 255 - 0.5) / 0.25, torch.from_numpy(y))
    _train(base, {t: (x[:20], y[:20]) for t, (x, y) in rows.items()}, 10)
    _save(base, folder / "base.safetensors")
    for t in TASKS:
        tuned = Net()
        tuned.load_state_dict(base.state_dict())
        tuned.heads.requires_grad_(False)
        _train(tuned, {t: rows[t]}, 30)
        _save(tuned, folder / f"{t}.safetensors")
    models = [str(folder / f"{t}.safetensors") for t in TASKS]
    command = ["decompose", *models, "--base", str(folder / "base.safetensors"), "-o", str(folder / "parts"), "-q"]
    assert run([*command, "--exclude", "^heads", "--rank", "8", "--threshold", "0.3"]) == 0
    return folder


def _train(net: Net, rows: dict[str, tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward([F.cross_entropy(net(x, t), y) for t, (x, y) in rows.items()])
        optimiser.step()


def _save(net: Net, path: Path) -> None:
    save_file({k: v.detach().half() for k, v in net.state_dict().items()}, path)
