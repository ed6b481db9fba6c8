"""What the laws of the engine are held for: every registered method, and methods made here of every grain.

A new method enters itself; one with parameters that have no default says in ``SETTINGS`` with what to try it. The
methods made here have grains that no registered one has today, so that the engine's ways to feed them are held too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.contracts import Grain
from devec.core.delta import Delta, DenseDelta
from devec.methods import registry
from devec.methods.merge.entries import Alone
from laws.worlds import World

SETTINGS: dict[str, tuple[str, ...]] = {
    "emr": ("task=1",), "lines": ("blocks=2", "beta=0.5"), "slerp": ("t=0.3",), "tall-masks": ("task=1",),
    "tsv-c": ("task=1",),
}  # fmt: skip
"""Merge method -> KEY=VALUE of the parameters that it cannot do without."""

TAKES = {"slerp": 2}
"""Merge method -> how many models it takes, if not any number."""

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
    more: tuple[str, ...] = ()
    """KEY=VALUE of a merge method, beside those of ``SETTINGS``."""

    @property
    def title(self) -> str:
        return "-".join((self.kind, self.name, *self.more))

    @property
    def settings(self) -> tuple[str, ...]:
        return (*SETTINGS.get(self.name, ()), *self.more)

    @property
    def method(self) -> registry.Method:
        """The method, also where it is made here."""
        if self.local:
            return registry.Method("merge", self.name, GRAINS[self.name][1], GRAINS[self.name][0], "here")
        return registry.get(self.kind, self.name)

    @property
    def parameters(self) -> dict[str, Any]:
        return registry.bind(self.method, dict(item.split("=") for item in self.settings))

    def sources(self, world: World) -> tuple[Path, ...]:
        return world.sources[: TAKES.get(self.name)]

    def command(self, world: World, folder: Path) -> list[str]:
        """Everything but how to run it; the output is the one thing in ``folder``."""
        if self.kind == "merge":
            settings = [word for item in self.settings for word in ("--set", item)]
            words = ["merge", "--method", self.name, *settings, "--shard-size", "600KB", "-o", str(folder / world.out)]
            return [*words, *map(str, self.sources(world)), "--base", str(world.base), "-q"]
        if self.kind == "apply":
            part = f"{world.artifact}#{self.name}:{world.sources[0].name}"
            words = ["apply", "--base", str(world.base), "--add", "0.7", part, "--shard-size", "600KB", "-q"]
            return [*words, "-o", str(folder / world.out)]
        return [*COMMANDS[self.name], "-o", str(folder / "out"), *world.words, "-q"]


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
REGISTERED = [Subject(m.kind, m.name) for m in registry.all_methods() if not m.needs]
VARIANTS = [
    Subject("merge", "ties", more=("scope=model", "zero=majority")),
    Subject("merge", "dare", more=("then=ties", "rescale=l1")),
]
"""Ways through the engine that no default takes: a pass over the model, sums over a tensor that is being written."""
PARTS = [Subject("apply", "unique"), Subject("apply", "shared")]
SUBJECTS = [*REGISTERED, *VARIANTS, *PARTS, *(Subject("merge", name, local=True) for name in GRAINS)]
WORLDS = ["checkpoints", "adapters", "both"]

Plain = Callable[[Subject, World], dict[str, bytes]]
"""What one worker writes, by file."""


def prepared(method: registry.Method, block: Block, parameters: Mapping[str, Any]) -> Block:
    """The block with what the method's first pass over it finds, so that its rows can be merged alone."""
    if method.measure is None:
        return block
    found = method.measure(Alone(block), **method.filled(parameters))
    return replace(block, stats={"measured": found})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
