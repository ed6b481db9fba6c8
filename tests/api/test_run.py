"""How work is divided, and what another process is told of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import devec
from devec.api import jobs
from devec.api.jobs import Job, checkpoints_of, kept_of
from devec.api.run import Engine, learn, portable, stretch
from devec.core.errors import InputError, UsageError
from devec.core.vectors import TaskVector
from devec.io.folder import Run
from devec.io.journal import Finished, Identity, stamp

# --- parts of an output ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), max_size=30), st.integers(1, 40))
def test_every_tensor_is_in_one_part_and_parts_are_neighbours(sizes: list[int], count: int) -> None:
    names = [f"w{i}" for i in range(len(sizes))]
    parts = [stretch(names, sizes, i, count) for i in range(1, count + 1)]
    assert [n for part in parts for n in part] == names


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(1, 10))
def test_no_part_is_larger_than_its_share_and_one_tensor(sizes: list[int], count: int) -> None:
    names = [f"w{i}" for i in range(len(sizes))]
    size_of = dict(zip(names, sizes, strict=True))
    for i in range(1, count + 1):
        mine = sum(size_of[n] for n in stretch(names, sizes, i, count))
        assert mine <= sum(sizes) / count + max(sizes)


# --- jobs ------------------------------------------------------------------------------------------------------------


def opened(reference: str) -> tuple[str, bytes]:
    """What a job makes here: where it was made, and what the file holds."""
    return str(Path.cwd()), Path(reference).read_bytes()


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    jobs._kept.cache_clear()


def job_in(folder: Path) -> Job:
    run = Run(Identity({}, "", stamp([folder / "x"]), (), str(folder)))
    return portable(Job(f"{__name__}.opened", {"reference": "x"}), run)


def test_a_job_is_made_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x").write_text(place)
    monkeypatch.chdir(tmp_path)
    for place in ("here", "there", "here"):  # a worker lives on and is given one job after another
        assert kept_of(job_in(tmp_path / place)) == (str(tmp_path / place), place.encode())
    assert Path.cwd() == tmp_path


def test_what_a_job_opened_is_kept_until_its_files_change(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("one")
    first = kept_of(job_in(tmp_path))
    assert kept_of(job_in(tmp_path)) is first
    (tmp_path / "x").write_text("two")
    os.utime(tmp_path / "x", ns=(0, 1))
    assert kept_of(job_in(tmp_path))[1] == b"two"


def test_a_worker_without_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not see the folder.*one file system"):
        Job(f"{__name__}.opened", {"reference": "x"}, place=str(tmp_path / "nowhere")).make()


def test_what_stands_in_memory_has_no_job() -> None:
    with pytest.raises(UsageError, match="--executor"):
        portable(None, Run(Identity({}, "", {})))


@pytest.mark.parametrize("engine", [Engine(executor="ray"), Engine(shard=(1, 2))])
def test_work_of_one_process_refuses_others(engine: Engine) -> None:
    with pytest.raises(UsageError, match="an adapter is the work of one process"):
        engine.alone("an adapter")
    Engine(workers=3, memory=1, resume=True).alone("an adapter")


# --- the files behind a model ----------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        save_file({"w": torch.full((4, 3), float(i)), "v": torch.full((4,), float(i))}, f"{name}.safetensors")
    return {n: devec.open_model(f"{n}.safetensors") for n in ("base", "a", "b")}


def test_the_checkpoints_of_a_model_are_found_once_each_in_one_order(models: dict[str, Any]) -> None:
    base, a, b = models["base"], models["a"], models["b"]
    ta, tb = devec.extract(base, a, name="a"), devec.extract(base, b, name="b")
    assert checkpoints_of(base) == [base]
    assert set(checkpoints_of(ta)) == {base, a}
    for make in (lambda: devec.apply(base, [(1.0, ta), (0.5, tb)]), lambda: devec.apply(base, [(1.0, ta + 2.0 * tb)])):
        found = checkpoints_of(make())
        assert found[0] is base and set(found) == {base, a, b} and len(found) == 3
        assert checkpoints_of(make()) == found  # hashes are told apart by the place in this list
    edited = devec.apply(base, [(1.0, ta)])
    assert set(checkpoints_of(devec.apply(edited, [(1.0, devec.extract(edited, b, name="b"))]))) == {base, a, b}
    averaged = devec.merge("average", ["a.safetensors", "b.safetensors"])
    assert averaged.base is not None and len(checkpoints_of(averaged.base)) == 1
    assert checkpoints_of(TaskVector("nothing", {}, {})) == []


def test_hashes_that_others_found_go_to_the_files_they_are_of(models: dict[str, Any]) -> None:
    base, a = models["base"], models["a"]
    record = Finished("w", "f", "s", 1, {"0": {"w": "of base"}, "1": {"w": "of a"}, "7": {"w": "of nobody"}})
    learn([base, a], [record])
    assert base.digests.get("w") == "of base" and a.digests.get("w") == "of a"
    assert len(base.digests.get("v")) == 64


def test_a_write_notes_the_hashes_of_what_it_read(models: dict[str, Any], tmp_path: Path) -> None:
    base, a = models["base"], models["a"]
    expected = {m: devec.open_model(m.reference).digests.get("w") for m in (base, a)}  # type: ignore[attr-defined]
    model = devec.apply(base, [(1.0, devec.extract(base, a, name="a"))])
    for source in (base, a):
        source.digests.watch()
    writer = SimpleNamespace(write=lambda name, blocks: (list(blocks), Finished(name, "f", "s", 1))[1])
    record = jobs.write_tensor(model, writer, "w")  # type: ignore[arg-type]
    assert record.inputs == {"0": {"w": expected[base]}, "1": {"w": expected[a]}}
