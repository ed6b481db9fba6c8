"""What is streamed from files in blocks of rows is what whole tensors in memory give, bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import Tensor

import devec
from devec.api.edit import Edited
from devec.core.block import Block
from devec.core.delta import DenseDelta
from devec.core.layout import Layout
from devec.io.checkpoint import checkpoint_from_state_dict
from laws.trials import SUBJECTS, TAKES, WORLDS, Plain, Subject, prepared
from laws.worlds import SHAPES, World

pytestmark = pytest.mark.usefixtures("trial_methods")
each_world = pytest.mark.parametrize("world", WORLDS, indirect=True)


def state(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def written_by(plain: Plain, subject: Subject, world: World) -> dict[str, Tensor]:
    """The tensors of a plain run's files."""
    files = plain(subject, world)
    return {n: t for f, data in files.items() if f.endswith(".safetensors") for n, t in load(data).items()}


def vectors_of(world: World, base: object, sources: Sequence[Path] = ()) -> list[devec.TaskVector]:
    """The pool of a world (or some of its sources), checkpoints as state dicts."""
    return [
        devec.load(path, base=base) if (path / "adapter_config.json").exists()
        else devec.extract(base, state(path), name=path.name)
        for path in sources or world.sources
    ]  # fmt: skip


def in_memory(world: World) -> devec.Checkpoint:
    return checkpoint_from_state_dict(state(world.base), {"model_type": "gpt2"})


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@each_world
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.kind == "merge"], ids=lambda s: s.title)
def test_a_merge_in_memory_is_what_is_streamed(subject: Subject, world: World, plain: Plain) -> None:
    base = in_memory(world)
    vectors = vectors_of(world, base, subject.sources(world))
    merged = devec.merge(subject.name, vectors, base=base, parameters=subject.parameters)
    model = devec.apply(base, merged.vector)
    assert isinstance(model, Edited)
    written, made = written_by(plain, subject, world), model.state_dict()
    assert written.keys() == made.keys() == SHAPES.keys()
    assert [n for n in made if not equal(made[n], written[n])] == []


@each_world
def test_a_decomposition_in_memory_is_what_is_streamed(world: World, plain: Plain) -> None:
    base = in_memory(world)
    d = devec.decompose(vectors_of(world, base), base=base, one_d=True, device="cpu")
    written = written_by(plain, Subject("decompose", "shared-unique"), world)
    for index, factors in enumerate(d.tensors.values()):
        for i, svd in factors.svd.items():
            assert equal(svd.U, written[f"t{index:05d}.v{i}.U"]) and equal(svd.S, written[f"t{index:05d}.v{i}.S"])


@pytest.mark.parametrize(("method", "factor"), [("task-arithmetic", 0.3), ("average", 1 / 3)])
def test_a_merge_of_checkpoints_is_its_formula_on_whole_tensors(
    method: str, factor: float, worlds: dict[str, World], plain: Plain
) -> None:
    """Bit for bit: ``W_0 + (w d_a + w d_b) + w d_c`` in float32 or wider, rounded once."""
    world = worlds["checkpoints"]
    written, before = written_by(plain, Subject("merge", method), world), state(world.base)
    models = [state(path) for path in world.sources]
    for name, w in before.items():
        if not w.is_floating_point():
            assert equal(written[name], w)
            continue
        wide = torch.promote_types(w.dtype, torch.float32)
        total = sum((m[name].to(wide) - w.to(wide)) * factor for m in models)
        assert equal(written[name], (w.to(wide) + total).to(w.dtype)), name


# --- any split of the rows -------------------------------------------------------------------------------------------

ELEMENTS = [s for s in SUBJECTS if s.kind == "merge" and s.method.grain == "elements"]


@pytest.mark.parametrize("subject", ELEMENTS, ids=lambda s: s.title)
@given(data=st.data())
@settings(max_examples=25)
def test_a_method_of_elements_gives_the_same_bits_in_any_split(subject: Subject, data: st.DataObject) -> None:
    """The method itself, whatever rows and columns it is given at once."""
    method, given = subject.method, subject.parameters
    n, m = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    whole = Block(
        "w", Layout((n, m)), tuple("ABC")[: TAKES.get(subject.name)],
        tuple(DenseDelta(torch.randn(n, m, generator=g)) for _ in "ABC")[: TAKES.get(subject.name)],
    )  # fmt: skip
    once = method.call(whole, **given).dense()
    whole = prepared(method, whole, given)
    pieces = [method.call(whole.rows(a, b), **given).dense() for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), once)
    flipped = Block("w", Layout((m, n), transposed=True), whole.vectors, whole.deltas, stats=whole.stats).in_file()
    assert torch.equal(method.call(flipped, **given).dense().T, once), "which way the file lies changes a bit"


@pytest.mark.parametrize("subject", ELEMENTS, ids=lambda s: s.title)
def test_rows_of_a_merge_are_rows_of_the_whole(subject: Subject, worlds: dict[str, World]) -> None:
    """From the files, through any stretch of rows: for changes that are stored dense, no bit depends on the stretch."""
    world, choice = worlds["checkpoints"], random.Random(0)
    sources = list(subject.sources(world))
    merged = devec.merge(subject.name, sources, base=world.base, parameters=subject.parameters)
    model = devec.apply(world.base, merged.vector)
    assert isinstance(model, Edited)
    for name, (shape, _) in SHAPES.items():
        whole = model.get(name)
        for _ in range(5 if shape else 0):
            start, stop = sorted((choice.randint(0, shape[0]), choice.randint(0, shape[0])))
            assert equal(model.rows(name, start, stop), whole[start:stop]), (name, start, stop)
