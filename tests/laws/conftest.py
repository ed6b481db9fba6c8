"""Models on disk, methods of every grain, and what a plain run writes: shared by the laws of the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from devec.cli.main import run
from devec.methods import registry
from laws.trials import GRAINS, Plain, Subject, tree
from laws.worlds import World, build


@pytest.fixture
def trial_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods made here, entered for one test: other laws are for what is registered."""
    for name, (grain, call) in GRAINS.items():
        monkeypatch.setitem(registry._methods, ("merge", name), registry.Method("merge", name, call, grain, "here"))


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    folder, found = tmp_path_factory.mktemp("worlds"), {}
    for world in build(folder):
        artifact = folder / f"parts-of-{world.name}"
        assert run(["decompose", *world.words, "--one-d", "--device", "cpu", "-o", str(artifact), "-q"]) == 0
        found[world.name] = replace(world, artifact=artifact)
    return found


@pytest.fixture
def world(worlds: dict[str, World], request: pytest.FixtureRequest) -> World:
    return worlds[request.param]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """What one worker writes, by file; run once."""
    known: dict[tuple[str, str], dict[str, bytes]] = {}

    def written(subject: Subject, world: World) -> dict[str, bytes]:
        if (subject.title, world.name) not in known:
            folder = tmp_path_factory.mktemp("plain")
            assert run([*subject.command(world, folder), "--workers", "1"]) == 0
            known[subject.title, world.name] = tree(folder)
        return known[subject.title, world.name]

    return written
