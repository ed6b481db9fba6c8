"""What the laws of the engine are held for: every registered method, and methods made here of every grain.

A new method enters itself; one with parameters that have no default says in ``SETTINGS`` with what to try it. The
methods made here have grains that no registered one has today, so that the engine's ways to feed them are held too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Grain
from devec.core.delta import Delta, DenseDelta
from devec.methods import registry
from laws.worlds import World

SETTINGS: dict[str, tuple[str, ...]] = {
    "lines": ("blocks=2", "beta=0.5"),
    "tsv-c": ("task={first}",),
}
"""Merge method -> KEY=VALUE of the parameters that it cannot do without; ``{first}`` is the first source's name."""


def parameters(method: str, first: str) -> dict[str, str]:
    """What a method is tried with, in a pool whose first source has this name."""
    return dict(item.format(first=first).split("=") for item in SETTINGS.get(method, ()))


def settings(method: str, first: str) -> list[str]:
    """The same as words of a command."""
    return [word for key, value in parameters(method, first).items() for word in ("--set", f"{key}={value}")]

COMMANDS = {"shared-unique": ("decompose", "--one-d", "--device", "cpu")}
"""Decomposition -> its command."""


@dataclass(frozen=True)
class Subject:
    """A method, and the command that runs it. ``local``: made by this file, so that no other process knows it.

    Of kind "apply" it is a part of a decomposition, added to the base.
    """

    kind: str
    name: str
    local: bool = False

    def command(self, world: World, folder: Path) -> list[str]:
        """Everything but how to run it; the output is the one thing in ``folder``."""
        if self.kind == "merge":
            given = settings(self.name, world.sources[0].name)
            words = ["merge", "--method", self.name, *given, "--shard-size", "600KB", "-o", str(folder / world.out)]
        elif self.kind == "apply":
            part = f"{world.artifact}#{self.name}:{world.sources[0].name}"
            words = ["apply", "--base", str(world.base), "--add", "0.7", part, "--shard-size", "600KB", "-q"]
            return [*words, "-o", str(folder / world.out)]
        else:
            words = [*COMMANDS[self.name], "-o", str(folder / "out")]
        return [*words, *world.words, "-q"]


# --- methods of every grain ------------------------------------------------------------------------------------------


def trial_elements(block: Block) -> Delta:
    """The largest change of each entry, and none of it where the signs disagree."""
    stack = torch.stack([d.dense() for d in block.deltas if d is not None])
    agree = stack.sign().sum(0).abs() == len(stack)
    return DenseDelta(torch.where(agree, stack.amax(0), stack.new_zeros(())))


def trial_rows(block: Block) -> Delta:
    """Each row of the sum, divided by its largest entry."""
    total = sum(d.dense() for d in block.deltas if d is not None)
    assert isinstance(total, Tensor)
    if not total.numel():
        return DenseDelta(total)
    return DenseDelta(total / total.abs().amax(1, keepdim=True).clamp_min(1e-3))


def trial_matrix(block: Block) -> Delta:
    """The sum, divided by its norm."""
    total = sum(d.dense() for d in block.deltas if d is not None)
    assert isinstance(total, Tensor)
    return DenseDelta(total / (1e-3 + float(total.double().norm())))


GRAINS: dict[str, tuple[Grain, Callable[[Block], Delta]]] = {
    "trial-elements": ("elements", trial_elements),
    "trial-rows": ("rows", trial_rows),
    "trial-matrix": ("matrix", trial_matrix),
    "trial-tensor": ("tensor", trial_matrix),
}
REGISTERED = [Subject(m.kind, m.name) for m in registry.all_methods()]
PARTS = [Subject("apply", "unique"), Subject("apply", "shared")]
SUBJECTS = [*REGISTERED, *PARTS, *(Subject("merge", name, local=True) for name in GRAINS)]
WORLDS = ["checkpoints", "adapters", "both"]

Plain = Callable[[Subject, World], dict[str, bytes]]
"""What one worker writes, by file."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
