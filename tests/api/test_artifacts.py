"""Saved decompositions: the same parts again, nothing factored twice, and never another vector than was decomposed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import devec
from devec.core.vectors import TaskVector
from devec.methods.decompose import shared_unique
from fixtures_models import Models, Runner, deltas, difference, same, weights

PARTS = ("unique:a", "shared:a", "shared:b", "original:b", "shared:a+b")


def dense(vector: TaskVector) -> dict[str, np.ndarray]:
    return {n: vector.deltas[n].dense().double().numpy() for n in vector.deltas}


@pytest.mark.parametrize("kind", ["adapters", "checkpoints", "task-vectors", "memory"])
def test_saved_and_loaded_parts_are_identical(kind: str, llama: Models, devec_run: Runner, work: Path) -> None:
    base = llama.base
    sources: list[object] = [f"a={llama.la}", f"b={llama.lb}"]
    if kind == "checkpoints":
        sources = [llama.a, llama.b]
    if kind == "task-vectors":
        for task in "ab":
            devec_run("extract", "--base", base, "--model", getattr(llama, task), "-o", f"tv_{task}")
        sources = ["a=tv_a", "b=tv_b"]
    if kind == "memory":
        sources = [(0.5 * devec.extract(base, getattr(llama, t))).named(t) for t in "ab"]
    d = devec.decompose(sources, base=base)
    devec.save_decomposition(d, "saved")
    again = devec.load_decomposition("saved")
    assert again.vectors == d.vectors and again.factoring == d.factoring and again.view == d.view
    for part in PARTS:
        one, two = dense(d.part(part)), dense(again.part(part))
        assert set(one) == set(two)
        assert all(np.array_equal(one[n], two[n]) for n in one), part
    embedded = json.loads(Path("saved/manifest.json").read_text())["vectors"]
    assert [v["source"] is None for v in embedded] == [kind in ("adapters", "memory")] * 2


@pytest.fixture
def devec_run(request: pytest.FixtureRequest) -> Runner:
    """The command's runner under a name that leaves ``devec`` to the package."""
    return request.getfixturevalue("devec")  # type: ignore[no-any-return]


def test_a_scaled_difference_is_not_mistaken_for_its_files(llama: Models, work: Path) -> None:
    """Half a task vector knows the files of the whole one; the artifact must hold the half."""
    half, other = 0.5 * devec.extract(llama.base, llama.a), devec.extract(llama.base, llama.b)
    devec.save_decomposition(devec.decompose([half.named("h"), other]), "saved")
    found = dense(devec.load_decomposition("saved").original("h"))
    same({n: w for n, w in found.items() if w.shape[1] > 1}, {
        n: 0.5 * w for n, w in difference(llama.a, llama.base).items()
    }, 1e-6)  # fmt: skip


def test_parts_of_parts(llama: Models, devec_run: Runner) -> None:
    """A dense part is decomposed again: its vector is the part, not the checkpoint that it came from."""
    devec_run("decompose", llama.a, llama.b, "--base", llama.base, "-o", "one")
    devec_run("decompose", "u=one#unique:a", llama.c, "--base", llama.base, "-o", "two")
    u = dense(devec.load("one#unique:a"))
    same(dense(devec.load("two#original:u")), u, 1e-7)


def count_factorings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("svd_of_dense", "svd_of_product"):
        true = getattr(shared_unique, name)
        monkeypatch.setattr(shared_unique, name, lambda *a, _t=true, _n=name, **k: (calls.append(_n), _t(*a, **k))[1])
        import devec.linalg.lowrank as lowrank

        monkeypatch.setattr(lowrank, name, lambda *a, _t=true, _n=name, **k: (calls.append(_n), _t(*a, **k))[1])
    return calls


@pytest.mark.parametrize("mode", ["pairwise", "joint", "target"])
def test_sweeping_read_time_choices_factorises_nothing(
    mode: str, llama: Models, devec_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ["--target", "la"] if mode == "target" else []
    calls = count_factorings(monkeypatch)
    devec_run("decompose", llama.la, llama.lb, llama.lc, "--mode", mode, *target, "-o", "parts")
    assert len(calls) == 18, "six tensors, three vectors"
    calls.clear()
    seen = set()
    for i, view in enumerate(
        (
            ["--threshold", "0.3"], ["--threshold", "0.9"], ["--threshold", "chance", "--fdr", "0.05"], ["--angles"],
            ["--joint", "chain"], ["--target-rule", "sequence"], ["--pair-basis", "own"], ["--paper"],
        )
    ):  # fmt: skip
        devec_run("export", "parts#unique:la", *view, "-o", f"u{i}")
        seen.add(Path(f"u{i}/adapter_model.safetensors").read_bytes())
    assert calls == []
    assert len(seen) >= 2, "the choices do change the parts"


def test_views_read_from_disk_equal_a_decomposition_with_that_view(llama: Models, devec_run: Runner) -> None:
    devec_run("decompose", llama.la, llama.lb, llama.lc, "-o", "parts")
    for i, view in enumerate((["--threshold", "0.3"], ["--target-rule", "sequence"], ["--angles"])):
        devec_run("decompose", llama.la, llama.lb, llama.lc, *view, "-o", f"d{i}")
        devec_run("export", f"d{i}#unique:lb", "-o", f"x{i}")
        devec_run("export", "parts#unique:lb", *view, "-o", f"y{i}")
        names = [f"{f}{i}/adapter_model.safetensors" for f in "xy"]
        assert Path(names[0]).read_bytes() == Path(names[1]).read_bytes(), view


@pytest.mark.parametrize("which", ["model", "base"])
def test_a_dense_input_that_changed_is_refused(which: str, llama: Models, devec_run: Runner, work: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(getattr(llama, name), work / name)
    devec_run("decompose", "a", "b", "--base", "base", "-o", "parts")
    path = Path("a" if which == "model" else "base") / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    # under another base's fingerprint the part is refused as well; here the given base is the old one
    said = devec_run("export", "parts#unique:a", "--base", llama.base, "-o", "out", code=4)
    assert "has changed since it was decomposed" in said.errors[0] and not Path("out").exists()


def test_a_task_vector_that_changed_is_refused(llama: Models, devec_run: Runner) -> None:
    for task in "ab":
        devec_run("extract", "--base", llama.base, "--model", getattr(llama, task), "-o", f"tv_{task}")
    devec_run("decompose", "a=tv_a", "b=tv_b", "-o", "parts")
    devec_run("extract", "--base", llama.base, "--model", llama.c, "-o", "tv_a", "--overwrite")
    said = devec_run("apply", "--base", llama.base, "--add", 1, "parts#unique:a", "-o", "out", code=4)
    assert "has changed since it was decomposed" in said.errors[0]


def test_adapters_are_embedded_whole(llama: Models, devec_run: Runner, work: Path) -> None:
    """An artifact of adapters needs its inputs no more."""
    for name in ("la", "lb"):
        shutil.copytree(getattr(llama, name), work / name)
    devec_run("decompose", "la", "lb", "-o", "parts")
    devec_run("export", "parts#unique:la", "-o", "before")
    for name in ("la", "lb"):
        shutil.rmtree(work / name)
    devec_run("export", "parts#unique:la", "-o", "after")
    same(deltas("after"), deltas("before"), 0.0)


def test_float64_decompositions_stay_float64(llama: Models, work: Path) -> None:
    d = devec.decompose([llama.a, llama.b], base=llama.base, dtype="float64")
    devec.save_decomposition(d, "saved")
    again = devec.load_decomposition("saved")
    n = "model.layers.0.mlp.up_proj.weight"
    for found in (d, again):
        u, s = found.unique("a").deltas[n].dense(), found.shared("a").deltas[n].dense()
        assert u.dtype == s.dtype == torch.float64
        exact = weights(llama.a)[n] - weights(llama.base)[n]
        assert np.abs((u + s).numpy() - exact).max() < 1e-15


def test_extract_in_float64_keeps_every_digit(llama: Models, devec_run: Runner) -> None:
    tensors = {n: t.double() for n, t in load_file(f"{llama.base}/model.safetensors").items() if t.is_floating_point()}
    save_file(tensors, "base.safetensors")
    save_file({n: t * (1 + 1e-11) for n, t in tensors.items()}, "tuned.safetensors")
    devec_run(
        "extract", "--base", "base.safetensors", "--model", "tuned.safetensors", "--dtype", "float64", "-o", "tv"
    )
    found, tuned = load_file("tv/delta.safetensors"), load_file("tuned.safetensors")
    assert all(torch.equal(found[n], tuned[n] - tensors[n]) for n in tensors)
