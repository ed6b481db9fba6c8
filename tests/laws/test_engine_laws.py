"""Every registered method through every way the engine can run it: the same bytes in every file of the output.

A new method enters itself; one with parameters that have no default says in ``SETTINGS`` with what to try it. Methods
of grains that no registered method has today are made here, so that the engine's own ways to feed them are held too.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import Tensor

import devec
from devec.api.edit import Edited
from devec.cli.main import run
from devec.core.block import Block
from devec.core.contracts import Grain
from devec.core.delta import Delta, DenseDelta
from devec.core.lazy import row_blocks
from devec.io.checkpoint import checkpoint_from_state_dict
from devec.io.journal import Finished, Journal
from devec.methods import registry
from laws.worlds import SHAPES, World, build

SETTINGS: dict[str, tuple[str, ...]] = {}
"""Merge method -> KEY=VALUE of the parameters that it cannot do without."""

COMMANDS = {"shared-unique": ("decompose", "--one-d", "--device", "cpu")}
"""Decomposition -> its command."""


@dataclass(frozen=True)
class Subject:
    """A method, and the command that runs it. ``local``: made by this file, so that no other process knows it."""

    kind: str
    name: str
    local: bool = False

    def command(self, world: World, folder: Path) -> list[str]:
        """Everything but how to run it; the output is the one thing in ``folder``."""
        if self.kind == "merge":
            settings = [word for item in SETTINGS.get(self.name, ()) for word in ("--set", item)]
            words = ["merge", "--method", self.name, *settings, "--shard-size", "600KB", "-o", str(folder / world.out)]
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
SUBJECTS = [*REGISTERED, *(Subject("merge", name, local=True) for name in GRAINS)]
WORLDS = ["checkpoints", "adapters", "both"]

each_world = pytest.mark.parametrize("world", WORLDS, indirect=True)
each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: f"{s.kind}-{s.name}")


@pytest.fixture(autouse=True)
def trial_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (grain, call) in GRAINS.items():
        monkeypatch.setitem(registry._methods, ("merge", name), registry.Method("merge", name, call, grain, "here"))


# --- worlds, and what a plain run writes -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {w.name: w for w in build(tmp_path_factory.mktemp("worlds"))}


@pytest.fixture
def world(worlds: dict[str, World], request: pytest.FixtureRequest) -> World:
    return worlds[request.param]


Plain = Callable[[Subject, World], dict[str, bytes]]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """What one worker writes, by file; run once."""
    known: dict[tuple[str, str], dict[str, bytes]] = {}

    def written(subject: Subject, world: World) -> dict[str, bytes]:
        if (subject.name, world.name) not in known:
            folder = tmp_path_factory.mktemp("plain")
            assert run([*subject.command(world, folder), "--workers", "1"]) == 0
            known[subject.name, world.name] = tree(folder)
        return known[subject.name, world.name]

    return written


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(folder: Path, expected: dict[str, bytes]) -> None:
    found = tree(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


# --- the laws --------------------------------------------------------------------------------------------------------


def test_every_registered_method_is_here() -> None:
    for method in registry.all_methods():
        if method.kind != "merge":
            assert (method.kind, method.name) in {("decompose", name) for name in COMMANDS}, method.name
            continue
        given_here = {item.partition("=")[0].replace("-", "_") for item in SETTINGS.get(method.name, ())}
        needed = {p.name for p in method.parameters.values() if p.default is inspect.Parameter.empty}
        assert needed <= given_here, f"SETTINGS must say with what {method.name} is to be tried"


def test_the_worlds_hold_what_they_should(worlds: dict[str, World]) -> None:
    blocks = {n: len(list(row_blocks(shape))) for n, (shape, _) in SHAPES.items()}
    base = devec.open_model(worlds["checkpoints"].base)
    several = {n for n, count in blocks.items() if count > 1}
    assert {base.layout(n).transposed for n in several} == {True, False}  # type: ignore[attr-defined]
    assert {len(shape) for shape, _ in SHAPES.values()} == {0, 1, 2, 4}
    assert any(not dtype.is_floating_point for _, dtype in SHAPES.values())
    assert len({base.file_of(n) for n in base.names()}) == 2


@each_world
@each_subject
@pytest.mark.parametrize("workers", [2, 8])
def test_any_number_of_workers(subject: Subject, world: World, workers: int, plain: Plain, tmp_path: Path) -> None:
    expected = plain(subject, world)
    assert run([*subject.command(world, tmp_path), "--workers", str(workers)]) == 0
    same(tmp_path, expected)


@each_world
@each_subject
def test_parts_by_several_processes_joined(
    subject: Subject, world: World, plain: Plain, tmp_path: Path
) -> None:
    expected, words = plain(subject, world), subject.command(world, tmp_path)
    out = Path(words[words.index("-o") + 1])
    for part in ("3/3", "1/3", "2/3"):
        assert run([*words, "--shard-of", part, "--workers", "2"]) == 0
        assert not out.exists()
    assert run(["join", str(out), "-q"]) == 0
    same(tmp_path, expected)


@each_world
@each_subject
def test_the_smallest_memory_that_is_accepted(
    subject: Subject, world: World, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No method's numbers depend on the budget: there is no piece of work yet that a small budget cuts smaller."""
    expected = plain(subject, world)
    monkeypatch.setattr("devec.engine.memory.resident", lambda: 300 << 20)  # or it would grow from run to run
    words = [*subject.command(world, tmp_path), "--workers", "8"]
    capsys.readouterr()
    assert run([*words, "--max-memory", "1MiB"]) == 5
    named = re.search(r"Give --max-memory (\d+)MiB", capsys.readouterr().err)
    assert named is not None
    assert run([*words, "--max-memory", f"{int(named[1]) - 1}MiB"]) == 5
    assert list(tmp_path.iterdir()) == []
    assert run([*words, "--max-memory", f"{named[1]}MiB"]) == 0
    same(tmp_path, expected)


@each_world
@each_subject
def test_going_on_after_a_stop_half_way(
    subject: Subject, world: World, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected, words = plain(subject, world), subject.command(world, tmp_path)
    with monkeypatch.context() as patch:
        finished = stop_after(patch, 2)
        assert run([*words, "--workers", "2"]) == 130
    assert "2 tensors are finished and kept: give the same command with --resume" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [f"{Path(words[words.index('-o') + 1]).name}.partial-run"]
    with monkeypatch.context() as patch:
        again = stop_after(patch, 1000)
        assert run([*words, "--resume", "--workers", "3"]) == 0
    assert not set(finished) & set(again), "a finished tensor was made again"
    same(tmp_path, expected)


def stop_after(patch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Ctrl-C once ``count`` tensors are in the journal; returns the list of their names, which fills."""
    names: list[str] = []
    append = Journal.append

    def counting(self: Journal, record: Finished) -> None:
        if len(names) == count:
            raise KeyboardInterrupt
        append(self, record)
        names.append(record.name)

    patch.setattr(Journal, "append", counting)
    return names


@pytest.mark.parametrize("method", [m.name for m in registry.all_methods("merge") if m.keeps_rank])
def test_a_merge_of_adapters_that_stays_one(method: str, worlds: dict[str, World], tmp_path: Path) -> None:
    settings = [word for item in SETTINGS.get(method, ()) for word in ("--set", item)]
    for workers in ("1", "2", "8"):
        (tmp_path / workers).mkdir()
        words = ["merge", "--method", method, *settings, *map(str, worlds["adapters"].sources)]
        assert run([*words, "-o", str(tmp_path / workers / "out"), "--workers", workers, "-q"]) == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "8")
    assert "out/adapter_model.safetensors" in tree(tmp_path / "1")


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ray() -> Iterator[object]:
    """A cluster of two workers in another folder than the tests; started once, since that takes seconds."""
    ray = pytest.importorskip("ray", reason="--executor ray needs devec[ray]")
    where = str(Path(devec.__file__).parents[1])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": where}},
    )
    yield ray
    ray.shutdown()


@pytest.mark.xdist_group("ray")
@each_world
@pytest.mark.parametrize("subject", REGISTERED, ids=lambda s: f"{s.kind}-{s.name}")
def test_workers_of_a_ray_cluster(
    subject: Subject, world: World, plain: Plain, tmp_path: Path, ray: object
) -> None:
    expected = plain(subject, world)
    assert run([*subject.command(world, tmp_path), "--executor", "ray"]) == 0
    same(tmp_path, expected)


@pytest.mark.xdist_group("ray")
def test_ray_workers_read_relative_paths_as_the_command_does(
    worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: object
) -> None:
    """Two folders with the same names in them: the workers, which live on, must not take one for the other."""
    for place, model in (("here", worlds["checkpoints"].sources[0]), ("there", worlds["checkpoints"].sources[1])):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        Path("model").symlink_to(model)
        Path("base").symlink_to(worlds["checkpoints"].base)
        for out, words in (("ray", ["--executor", "ray"]), ("threads", [])):
            Path(out).mkdir()
            assert run(["apply", "--base", "base", "--add", "0.5", "model", "-o", f"{out}/out", "-q", *words]) == 0
        assert tree(Path("ray/out")) == tree(Path("threads/out"))


@pytest.mark.xdist_group("ray")
def test_an_error_in_a_ray_worker_is_the_users_one_line(
    worlds: dict[str, World], tmp_path: Path, capfd: pytest.CaptureFixture[str], ray: object
) -> None:
    """And nothing of what other workers were at: Ray prints errors that nobody asks for."""
    world = worlds["checkpoints"]
    words = ["apply", "--base", str(world.base), "--add", "1e38", str(world.sources[0]), "-o", str(tmp_path / "out")]
    capfd.readouterr()
    assert run([*words, "-q", "--out-dtype", "float16", "--executor", "ray"]) == 5
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(said) == 1 and said[0].startswith("devec: a value is too large for float16 [tensor transformer.")
    assert list(tmp_path.iterdir()) == []


# --- files against memory --------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def written_by(plain: Plain, subject: Subject, world: World) -> dict[str, Tensor]:
    """The tensors of a plain run's files."""
    files = plain(subject, world)
    return {n: t for f, data in files.items() if f.endswith(".safetensors") for n, t in load(data).items()}


def vectors_of(world: World, base: object) -> list[devec.TaskVector]:
    """The pool of a world, checkpoints as state dicts."""
    return [
        devec.load(path, base=base) if (path / "adapter_config.json").exists()
        else devec.extract(base, state(path), name=path.name)
        for path in world.sources
    ]  # fmt: skip


def in_memory(world: World) -> devec.Checkpoint:
    return checkpoint_from_state_dict(state(world.base), {"model_type": "gpt2"})


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@each_world
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.kind == "merge"], ids=lambda s: s.name)
def test_a_merge_in_memory_is_what_is_streamed(subject: Subject, world: World, plain: Plain) -> None:
    base = in_memory(world)
    settings = dict(item.split("=") for item in SETTINGS.get(subject.name, ()))
    merged = devec.merge(subject.name, vectors_of(world, base), base=base, parameters=settings)
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

ELEMENTS = [s for s in SUBJECTS if s.kind == "merge" and (
    GRAINS[s.name][0] if s.local else registry.get("merge", s.name).grain) == "elements"]  # fmt: skip


@pytest.mark.parametrize("subject", ELEMENTS, ids=lambda s: s.name)
@given(data=st.data())
@settings(max_examples=25)
def test_a_method_of_elements_gives_the_same_bits_in_any_split(subject: Subject, data: st.DataObject) -> None:
    """The method itself, whatever rows and columns it is given at once."""
    method = GRAINS[subject.name][1] if subject.local else registry.get("merge", subject.name).call
    n, m = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    whole = Block(
        "w", devec.core.layout.Layout((n, m)), ("A", "B", "C"),
        tuple(DenseDelta(torch.randn(n, m, generator=g)) for _ in "ABC"),
    )  # fmt: skip
    once = method(whole).dense()
    pieces = [method(whole.rows(a, b)).dense() for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(pieces), once)


@pytest.mark.parametrize("subject", ELEMENTS, ids=lambda s: s.name)
def test_rows_of_a_merge_are_rows_of_the_whole(subject: Subject, worlds: dict[str, World]) -> None:
    """From the files, through any stretch of rows: for changes that are stored dense, no bit depends on the stretch."""
    world, choice = worlds["checkpoints"], random.Random(0)
    merged = devec.merge(subject.name, list(world.sources), base=world.base)
    model = devec.apply(world.base, merged.vector)
    assert isinstance(model, Edited)
    for name, (shape, _) in SHAPES.items():
        whole = model.get(name)
        for _ in range(5 if shape else 0):
            start, stop = sorted((choice.randint(0, shape[0]), choice.randint(0, shape[0])))
            assert equal(model.rows(name, start, stop), whole[start:stop]), (name, start, stop)
