"""Saved decompositions and task vectors, below the verbs: what is embedded, what is referred to, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from devec.api.decompose import decompose
from devec.api.run import Engine
from devec.core.decomposition import Decomposition
from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import DevecError, IncompatibleError, InputError
from devec.core.layout import Layout
from devec.core.results import Finding
from devec.core.summary import as_dict
from devec.core.vectors import LazyMap, Origin, Pool, TaskVector
from devec.io import artifact
from devec.io.artifact import Source, SourcedMap

SHAPES = {"a.weight": (12, 9), "b.weight": (7, 10), "c.weight": (6, 4, 3, 3)}


def vectors(kind: str, names: tuple[str, ...] = ("A", "B", "C")) -> Pool:
    found = []
    for i, name in enumerate(names):
        g = torch.Generator().manual_seed(i)
        deltas: dict[str, Delta] = {}
        for n, shape in SHAPES.items():
            rows, cols = Layout(shape).matrix_shape
            B, A = torch.randn(rows, 3, generator=g), torch.randn(3, cols, generator=g)
            deltas[n] = LowRankDelta(B, A) if kind == "low-rank" else DenseDelta(B @ A)
        heads = {"head.weight": torch.full((2, 3), float(i))}
        layouts = {n: Layout(s) for n, s in SHAPES.items()}
        origin = Origin(reference=f"{name}-ref", dialect="peft", config={"r": 3, "target_modules": ["a"]})
        found.append(TaskVector(name, deltas, layouts, heads, origin))
    return Pool(tuple(found))


def decomposition(pool: Pool, **choices: str) -> Decomposition:
    note = Finding("integer-copied", "A: something", ("x", "y"))
    return decompose(pool, notes=[note], threshold=0.3, pair_basis="own", engine=Engine(workers=1), **choices)


def never(name: str, source: Source, dtype: torch.dtype) -> TaskVector:
    raise AssertionError("nothing was referred to")


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
@pytest.mark.parametrize("choices", [{}, {"mode": "joint"}, {"mode": "target", "target": "B"}, {"side": "both"}])
def test_everything_comes_back(kind: str, choices: dict[str, str], tmp_path: Path) -> None:
    d = decomposition(vectors(kind), **choices)
    artifact.write_decomposition(tmp_path, d, as_dict(d), {})
    assert artifact.artifact_kind(tmp_path) == "decomposition"
    again = artifact.read_decomposition(tmp_path, never)
    assert (again.factoring, again.view, again.notes, again.vectors) == (d.factoring, d.view, d.notes, d.vectors)
    assert as_dict(again) == as_dict(d) == json.loads((tmp_path / "spectra.json").read_text())
    for v, w in zip(d.pool, again.pool, strict=True):
        assert v.origin == w.origin and v.layouts == w.layouts and v.partial == w.partial
        assert torch.equal(v.heads["head.weight"], w.heads["head.weight"])
    for name in ["B"] if choices.get("target") else d.vectors:
        for kind_of_part in ("unique", "shared"):
            one, two = d.part(f"{kind_of_part}:{name}"), again.part(f"{kind_of_part}:{name}")
            assert all(torch.allclose(one.deltas[n].dense(), two.deltas[n].dense(), atol=1e-6) for n in SHAPES)


def test_referred_vectors_are_opened_once_and_only_when_needed(tmp_path: Path) -> None:
    pool = vectors("dense")
    d = decomposition(pool, dtype="float64")
    artifact.write_decomposition(tmp_path, d, as_dict(d), {"A": Source("model", "1" * 64, "base", "2" * 64)})
    opened: list[tuple[str, Source, torch.dtype]] = []

    def reopen(name: str, source: Source, dtype: torch.dtype) -> TaskVector:
        opened.append((name, source, dtype))
        return pool["A"]

    again = artifact.read_decomposition(tmp_path, reopen)
    assert as_dict(again)["totals"] == as_dict(d)["totals"] and opened == [], "spectra need no vector"
    again.unique("B").deltas["a.weight"].dense()
    assert opened == []
    for n in SHAPES:
        again.unique("A").deltas[n].dense()
    found = Source(str(Path("model").absolute()), "1" * 64, str(Path("base").absolute()), "2" * 64)
    assert opened == [("A", found, torch.float64)]
    size = (tmp_path / "factors.safetensors").stat().st_size
    full = tmp_path / "full"
    full.mkdir()
    artifact.write_decomposition(full, d, as_dict(d), {})
    assert size < (full / "factors.safetensors").stat().st_size


def test_only_untouched_vectors_have_a_source() -> None:
    """Scaling, adding and selecting by pattern make plain maps; restricting keeps the source."""
    pool = vectors("dense")
    a = pool["A"]
    source = Source("model", "1", "base", "2")
    sourced = replace(a, deltas=SourcedMap(a.names(), lambda n: a.deltas[n], lambda: source))
    for changed in (0.5 * sourced, sourced + pool["B"], -sourced, sourced.where("a"), sourced.to_lowrank(1)):
        assert isinstance(changed.deltas, LazyMap) and not isinstance(changed.deltas, SourcedMap)
    assert isinstance(sourced.named("x").deltas, SourcedMap)
    some = sourced.deltas.only(["b.weight"])
    assert list(some) == ["b.weight"] and some.source() == source


def test_task_vectors_come_back_exactly(tmp_path: Path) -> None:
    v = vectors("dense")["A"]
    artifact.write_task_vector(tmp_path, v)
    assert artifact.artifact_kind(tmp_path) == "task-vector"
    again = artifact.read_task_vector(tmp_path)
    assert again.layouts == v.layouts and again.name == "A" and again.origin.dialect == "artifact"
    assert all(torch.equal(again.deltas[n].dense(), v.deltas[n].dense()) for n in SHAPES)
    assert isinstance(again.deltas, SourcedMap)
    source = again.deltas.source()
    assert source is not None and source.base == "" and source.model_sha256 == artifact.delta_hash(tmp_path)


def test_a_task_vector_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    v = vectors("dense")["A"].map(lambda _, d: d.to(torch.float64).scale(1 / 3))
    artifact.write_task_vector(tmp_path, v, torch.float64)
    again = artifact.read_task_vector(tmp_path)
    assert all(torch.equal(again.deltas[n].dense(), v.deltas[n].dense()) for n in SHAPES)
    with pytest.raises(IncompatibleError, match="not finite"):
        broken = v.map(lambda _, d: d.scale(float("nan")))
        (tmp_path / "x").mkdir()
        artifact.write_task_vector(tmp_path / "x", broken)
    assert not list((tmp_path / "x").iterdir())


def test_broken_artifacts(tmp_path: Path) -> None:
    d = decomposition(vectors("low-rank"))
    artifact.write_decomposition(tmp_path, d, as_dict(d), {})
    path = tmp_path / "manifest.json"
    whole = json.loads(path.read_text())
    for damage in (
        {"schema": 2}, {"kind": "other"}, {"tensors": [{"name": "a"}]}, {"vectors": [{}]}, {"factoring": {"side": 3}},
        {"view": {"treshold": 1}}, {"tensors": None},
    ):  # fmt: skip
        path.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(DevecError) as caught:
            artifact.read_decomposition(tmp_path, never)
        assert caught.value.exit_code in (2, 3), damage
    path.write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        artifact.artifact_kind(tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot read the artifact"):
        artifact.read_decomposition(tmp_path, never)


def test_folders_of_others_are_no_artifacts(tmp_path: Path) -> None:
    assert artifact.artifact_kind(tmp_path) is None
    (tmp_path / "manifest.json").write_text("not JSON")
    assert artifact.artifact_kind(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"kind": "something else"}')
    assert artifact.artifact_kind(tmp_path) is None


def test_a_delta_of_another_shape_is_refused(tmp_path: Path) -> None:
    artifact.write_task_vector(tmp_path, vectors("dense")["A"])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["layouts"]["a.weight"]["shape"] = [9, 12]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another shape"):
        artifact.read_task_vector(tmp_path)
    manifest["layouts"]["zz"] = manifest["layouts"].pop("b.weight")
    manifest["layouts"]["a.weight"]["shape"] = [12, 9]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="missing"):
        artifact.read_task_vector(tmp_path)
