"""The verbs as functions: state dicts and modules in, lazy results out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import devec
from devec.core.errors import IncompatibleError, InputError, UsageError
from fixtures_models import Models, column_basis, deltas, difference, same, unique_part, weights


def dense(vector: devec.TaskVector) -> dict[str, np.ndarray]:
    return {n: vector.deltas[n].dense().double().numpy() for n in vector.deltas}


def test_modules_and_state_dicts_are_models(gpt2: Models) -> None:
    """Conv1D is recognised by class, by configuration, and not at all in a bare state dict; the edit is one."""
    from transformers import GPT2LMHeadModel

    base, tuned = (GPT2LMHeadModel.from_pretrained(f) for f in (gpt2.base, gpt2.a))
    by_module, by_path = devec.extract(base, tuned), devec.extract(gpt2.base, gpt2.a)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert by_module.layouts[name].transposed and by_path.layouts[name].transposed
    assert torch.equal(by_module.deltas[name].dense(), by_path.deltas[name].dense())
    assert by_module.deltas[name].shape == (128, 32), "out x in"
    by_dict = devec.extract(base.state_dict(), tuned.state_dict())
    for vector in (by_module, by_path, by_dict):
        state = devec.apply(base, vector).state_dict()
        assert set(state) == set(base.state_dict()), "tied names included"
        assert all(torch.allclose(state[n], t, atol=1e-7) for n, t in tuned.state_dict().items())
    assert by_module.name == "model" and by_path.name == "a"


def test_apply_is_lazy_and_leaves_its_inputs_alone(llama: Models) -> None:
    base = load_file(f"{llama.base}/model.safetensors")
    before = {n: t.clone() for n, t in base.items()}
    vector = devec.load(llama.la)
    edited = devec.apply(base, [(0.5, vector), (-1.0, vector)])
    assert isinstance(edited, devec.Edited) and edited.names() == list(base)
    A = deltas(llama.la)
    for n, W in A.items():
        assert np.allclose(edited.get(n).numpy(), before[n].numpy() - 0.5 * W, atol=1e-6)
    assert all(torch.equal(base[n], before[n]) for n in base)
    untouched = "model.norm.weight"
    assert torch.equal(edited.get(untouched), base[untouched])


def test_save_writes_what_apply_gave(llama: Models, work: Path) -> None:
    edited = devec.apply(llama.base, [(1.0, llama.la)])
    assert isinstance(edited, devec.Edited)
    devec.save(edited, "out")
    found = load_file("out/model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in edited.state_dict().items())
    assert devec.verify("out").ok


def test_decompose_task_vectors_in_memory(llama: Models) -> None:
    a, b = devec.extract(llama.base, llama.a), devec.extract(llama.base, llama.b)
    d = devec.decompose([a, b], rank="4")
    A, B = difference(llama.a, llama.base), difference(llama.b, llama.base)
    same(dense(d.unique("a")), {n: unique_part(A[n], B[n], rank=4) for n in A}, 1e-5)
    strict = d.with_view(threshold=0.9999)
    assert strict.unique("a").norm() > d.unique("a").norm()
    assert strict.tensors is d.tensors


def test_analogy(llama: Models) -> None:
    a, b, c = (devec.extract(llama.base, getattr(llama, t)) for t in "abc")
    moved = devec.apply(llama.base, devec.analogy(a, b, c)).state_dict()
    Wa, Wb, Wc = weights(llama.a), weights(llama.b), weights(llama.c)
    for n in Wa:
        if n != "model.steps":
            assert np.abs(moved[n].double().numpy() - (Wc[n] + Wb[n] - Wa[n])).max() < 1e-6


def test_compare_against_dense_numbers(llama: Models) -> None:
    d, found = devec.compare([llama.la, llama.lb])
    A, B = deltas(llama.la), deltas(llama.lb)
    inner = sum(float((A[n] * B[n]).sum()) for n in A)
    norms = [np.sqrt(sum(float((W * W).sum()) for W in D.values())) for D in (A, B)]
    pair = found["pairs"][0]
    assert pair["cosine"] == pytest.approx(inner / (norms[0] * norms[1]), rel=1e-5)
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    assert np.allclose(found["gram"], [[norms[0] ** 2, inner], [inner, norms[1] ** 2]], rtol=1e-5)
    tops = [np.linalg.svd(column_basis(A[n]).T @ column_basis(B[n]), compute_uv=False)[0] ** 2 for n in A]
    assert pair["median_largest"] == pytest.approx(float(np.median(tops)), abs=1e-5)
    assert pair["largest"] == pytest.approx(max(tops), abs=1e-5)
    assert pair["tensors"] == 6 and d.vectors == ("la", "lb")


def test_compare_refuses_the_mode_that_leaves_pairs_out(llama: Models) -> None:
    with pytest.raises(UsageError, match="every pair"):
        devec.compare([llama.la, llama.lb], mode="target", target="la")


def test_merge_and_mix_are_lazy_task_vectors(llama: Models) -> None:
    merged = devec.merge("task-arithmetic", [llama.la, llama.lb], parameters={"scale": 2.0})
    A, B = deltas(llama.la), deltas(llama.lb)
    same(dense(merged.vector), {n: 2 * (A[n] + B[n]) for n in A}, 5e-6)
    mixed = devec.mix([llama.la, llama.lb], part="all", weights=[1, -1])
    same(dense(mixed.vector), {n: A[n] - B[n] for n in A}, 5e-6)
    assert mixed.decomposition is None and merged.vector.is_low_rank()


def test_inspect_names_what_differs(llama: Models, gpt2: Models) -> None:
    report = devec.inspect([llama.a, gpt2.a])
    assert not report["compatible"] and report["problems"][0]["exit_code"] == 4
    report = devec.inspect([llama.a, llama.b], base=llama.base)
    assert report["compatible"] and report["sources"][0]["architecture"] == "llama"
    A = difference(llama.a, llama.base)
    matrices = sum(float((W * W).sum()) for W in A.values())
    assert report["sources"][0]["delta"]["norm"] ** 2 > matrices


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda m: devec.decompose([m.la, m.lb], treshold=0.5), UsageError, "Did you mean 'threshold'"),
        (lambda m: devec.decompose([m.la, m.lb], threshold=1.5), UsageError, "from 0 to 1"),
        (lambda m: devec.decompose([m.la, m.lb], rank="foo"), UsageError, "rank"),
        (lambda m: devec.decompose([m.la]), UsageError, "at least two"),
        (lambda m: devec.decompose([m.a, m.b]), UsageError, "base"),
        (lambda m: devec.load(m.la + "x"), InputError, "there is no"),
        (lambda m: devec.apply(m.base, []), UsageError, "nothing to add"),
        (lambda m: devec.apply(3, [(1.0, m.la)]), UsageError, "int"),
        (lambda m: devec.extract(m.base, m.la), UsageError, "adapter"),
        (lambda m: devec.extract({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 3)}), IncompatibleError, "another shape"),
        (lambda m: devec.extract({"w": torch.ones(2)}, {"w": torch.ones(2).long()}), IncompatibleError, "int"),
        (lambda m: devec.extract({"w": [1]}, {"w": [1]}), InputError, "tensors"),
        (lambda m: devec.merge("average", []), UsageError, "no sources"),
        (lambda m: devec.load_decomposition(m.base), InputError, "manifest.json"),
    ],
)  # fmt: skip
def test_mistakes(call: object, error: type[Exception], word: str, llama: Models) -> None:
    with pytest.raises(error) as caught:
        call(llama)  # type: ignore[operator]
    assert word in str(caught.value)
