"""Every registered method through every way the engine can run it: the same bytes in every file of the output."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import devec
from devec.cli.main import run
from devec.core.lazy import row_blocks
from devec.io.journal import Finished, Journal
from devec.methods import registry
from laws.trials import COMMANDS, PARTS, REGISTERED, SETTINGS, SUBJECTS, VARIANTS, WORLDS, Plain, Subject, tree
from laws.worlds import SHAPES, World

pytestmark = pytest.mark.usefixtures("trial_methods")
each_world = pytest.mark.parametrize("world", WORLDS, indirect=True)
each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.title)


def same(folder: Path, expected: dict[str, bytes]) -> None:
    found = tree(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


# --- the laws --------------------------------------------------------------------------------------------------------


def test_every_registered_method_is_here() -> None:
    for subject in REGISTERED:
        method = registry.get(subject.kind, subject.name)
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
    for kind in ("shared", "unique"):  # the parts are of something
        part = devec.load(f"{worlds['checkpoints'].artifact}#{kind}:a")
        assert {len(SHAPES[n][0]) for n in part.deltas if part.deltas[n].norm() > 0} >= {2, 4}


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


@contextmanager
def a_ray_cluster() -> Iterator[None]:
    """Two workers, in another folder than the commands; a command finds Ray running and uses it."""
    ray = pytest.importorskip("ray", reason="--executor ray needs devec[ray]")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(devec.__file__).parents[1])}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def test_workers_of_a_ray_cluster(
    worlds: dict[str, World], plain: Plain, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every method in one test, so that a cluster, which takes seconds, is started once however tests are divided."""
    with a_ray_cluster():
        unlike = []
        for subject, world in itertools.product([*REGISTERED, *VARIANTS, *PARTS], worlds.values()):
            folder = tmp_path_factory.mktemp("ray")  # as deep as the plain one: artifacts hold relative paths
            code = run([*subject.command(world, folder), "--executor", "ray"])
            if code != 0 or tree(folder) != plain(subject, world):
                unlike.append((subject.title, world.name))
        assert unlike == []
        relative_paths_are_read_as_by_threads(worlds["checkpoints"], tmp_path_factory.mktemp("relative"), monkeypatch)
        an_error_is_one_line(worlds["checkpoints"], tmp_path_factory.mktemp("error"), capfd)


def relative_paths_are_read_as_by_threads(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders with the same names in them: the workers, which live on, must not take one for the other."""
    for place, model in (("here", world.sources[0]), ("there", world.sources[1])):
        (folder / place).mkdir(parents=True)
        monkeypatch.chdir(folder / place)
        Path("model").symlink_to(model)
        Path("base").symlink_to(world.base)
        for out, words in (("ray", ["--executor", "ray"]), ("threads", [])):
            Path(out).mkdir()
            assert run(["apply", "--base", "base", "--add", "0.5", "model", "-o", f"{out}/out", "-q", *words]) == 0
        assert tree(Path("ray/out")) == tree(Path("threads/out"))


def an_error_is_one_line(world: World, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing of what other workers were at: Ray prints errors that nobody asks for."""
    words = ["apply", "--base", str(world.base), "--add", "1e38", str(world.sources[0]), "-o", str(folder / "out")]
    capfd.readouterr()
    assert run([*words, "-q", "--out-dtype", "float16", "--executor", "ray"]) == 5
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(said) == 1 and said[0].startswith("devec: a value is too large for float16 [tensor transformer.")
    assert list(folder.iterdir()) == []
