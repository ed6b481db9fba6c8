"""``devec merge`` with every elementwise method: checkpoints and adapters against plain float64 on the raw files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fixtures_models import Models, Runner, deltas, refused, same, weights
from reference import elementwise as plain

Arrays = dict[str, np.ndarray]


def changes(model: str, base: str, transposed: tuple[str, ...] = ()) -> Arrays:
    """Fine-tuned minus base of every float tensor, subtracted in float32 as merges do by default, ``out x in``."""
    W, W0 = (load_file(f"{folder}/model.safetensors") for folder in (model, base))
    found = {n: (W[n] - W0[n]).double().numpy() for n in W0 if W0[n].is_floating_point()}
    return {n: x.T if n.endswith(transposed) and x.ndim == 2 else x for n, x in found.items()} if transposed else found


def chances(models: list[Arrays], of: Callable[[np.ndarray], np.ndarray]) -> list[Arrays]:
    return [{n: of(x) for n, x in m.items()} for m in models]


def dare(m: list[Arrays], names: list[str], **more: Any) -> Arrays:
    return plain.dropped(m, names, chances(m, lambda x: np.full(x.shape, 0.5)), **{**DROPPED, **more})


def della(m: list[Arrays], names: list[str], **more: Any) -> Arrays:
    return plain.dropped(m, names, chances(m, lambda x: plain.della_chances(x, 0.6, 0.2)), **{**DROPPED, **more})


DROPPED: dict[str, Any] = {
    "rescale": "inverse", "seed": 3, "then": "task-arithmetic", "scale": 0.3, "weights": None
}  # fmt: skip
CASES: dict[str, tuple[str, Callable[[list[Arrays], list[str]], Arrays]]] = {
    "ties": ("density=0.3 scale=0.5", lambda m, _: plain.ties(m, 0.3, 0.5)),
    "ties model": ("scope=model reduce=sum weights=1,0.5", lambda m, _: plain.ties(
        m, weights=[1.0, 0.5], scope="model", reduce="sum")),
    "dare": ("p=0.5 seed=3", dare),
    "dare ties": ("p=0.5 seed=3 then=ties rescale=l1", lambda m, v: dare(m, v, then="ties", rescale="l1")),
    "breadcrumbs": ("beta=0.3 gamma=0.05", lambda m, _: plain.breadcrumbs(m, 0.3, 0.05, 0.4)),
    "breadcrumbs tensor": ("scope=tensor", lambda m, _: plain.breadcrumbs(m, 0.2, 0.1, 0.4, scope="tensor")),
    "della": ("density=0.6 epsilon=0.2 seed=3", lambda m, v: della(m, v, then="ties", scale=1.1)),
    "slerp": ("t=0.25", lambda m, _: {n: plain.slerp(m[0][n], m[1][n], 0.25) for n in m[0]}),
    "model-stock": ("", lambda m, _: {n: plain.model_stock([x[n] for x in m]) for n in m[0]}),
    "pcb": ("ratio=0.2 scale=1.2", lambda m, _: plain.pcb(m, 0.2, 1.2)),
    "consensus": ("threshold=0.3,0.5", lambda m, _: plain.consensus(m, 0.3, 2, [0.3, 0.5])),
    "tall-masks": ("task=b", lambda m, _: plain.tall_masks(m, 1, 0.4)),
    "emr": ("task=2", lambda m, _: plain.emr(m, 1)),
}  # fmt: skip
"""Case -> the settings, and the same in plain float64 for two models and their names."""


def words(case: str) -> list[str]:
    return ["merge", "--method", case.split()[0], *(w for s in CASES[case][0].split() for w in ("--set", s))]


@pytest.mark.parametrize("case", CASES)
def test_checkpoints(devec: Runner, llama: Models, case: str) -> None:
    devec(*words(case), "--base", llama.base, llama.a, llama.b, "-o", "out")
    W0 = weights(llama.base)
    wanted = CASES[case][1]([changes(m, llama.base) for m in (llama.a, llama.b)], ["a", "b"])
    same(weights("out"), {n: w + wanted[n] if n in wanted else w for n, w in W0.items()}, 1e-6)
    changed = sum(int((x != 0).sum()) for x in wanted.values())
    assert changed > 100, "the case would pass without a merge"
    read_again = devec("verify", "out")
    assert "agree" in read_again.out


@pytest.mark.parametrize("case", ["breadcrumbs", "della", "dare", "ties", "emr"])
def test_files_that_hold_the_transpose(devec: Runner, gpt2: Models, case: str) -> None:
    """GPT-2's Conv1D: rows are the matrix's, which are the file's columns."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    settings = [w.replace("task=2", "task=b") for w in words(case)]
    devec(*settings, "--base", gpt2.base, gpt2.a, gpt2.b, "-o", "out")
    found = CASES[case][1]([changes(m, gpt2.base, turned) for m in (gpt2.a, gpt2.b)], ["a", "b"])
    wanted = {n: x.T if n.endswith(turned) else x for n, x in found.items()}
    W0 = weights(gpt2.base)
    same(weights("out"), {n: w + wanted[n] if n in wanted else w for n, w in W0.items()}, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_adapters_on_a_base(devec: Runner, llama: Models, case: str) -> None:
    """Products of factors: their float32 rounding may move an entry over a threshold, so few entries may differ."""
    settings = [w.replace("task=b", "task=lb") for w in words(case)]
    devec(*settings, "--base", llama.base, llama.la, llama.lb, "-o", "out")
    given = [deltas(llama.la), deltas(llama.lb)]
    names = list(dict.fromkeys(n for m in given for n in m))
    zeros = {n: np.zeros(next(m[n].shape for m in given if n in m)) for n in names}
    wanted = CASES[case][1]([{n: m.get(n, zeros[n]) for n in names} for m in given], ["la", "lb"])
    found, W0 = weights("out"), weights(llama.base)
    for n, w in W0.items():
        expected = w + wanted[n] if n in wanted else w
        far = np.abs(found[n] - expected) > 2e-6 * max(np.abs(expected).max(), 1.0)
        assert far.mean() <= 0.002, n


@pytest.mark.parametrize("case", [c for c in CASES if c.split()[0] not in ("slerp", "model-stock")])
def test_adapters_alone_need_a_base_or_a_rank(devec: Runner, llama: Models, case: str) -> None:
    settings = [w.replace("task=b", "task=lb") for w in words(case)]
    line = refused(devec(*settings, llama.la, llama.lb, "-o", "out", code=2), "--base BASE", "--rank R")
    assert f"{case.split()[0]} makes full matrices" in line


@pytest.mark.parametrize(("ask", "least"), [(("--rank", 4), 4), (("--energy", 0.9), 1), (("--error", 0.5), 1)])
def test_adapters_alone_with_a_rank_say_the_error(
    devec: Runner, llama: Models, ask: tuple[str, float], least: int
) -> None:
    said = devec(*words("ties"), llama.la, llama.lb, *ask, "-o", "out", "--json").json
    devec(*words("ties"), "--base", llama.base, llama.la, llama.lb, "-o", "full")
    W0, full, low = weights(llama.base), weights("full"), deltas("out")
    assert low and set(said["error"]) == set(low)
    for n, error in said["error"].items():
        D = full[n] - W0[n]
        assert np.linalg.norm(D - low[n]) / np.linalg.norm(D) == pytest.approx(error, abs=1e-4)
        assert np.linalg.matrix_rank(low[n], tol=1e-5) >= least
    assert ask[0] != "--error" or max(said["error"].values()) <= 0.5
    assert "error" in devec(*words("ties"), llama.la, llama.lb, *ask, "-o", "again").out


@pytest.mark.parametrize("case", ["slerp", "model-stock"])
def test_sums_of_adapters_stay_adapters(devec: Runner, llama: Models, case: str) -> None:
    devec(*words(case), llama.la, llama.lb, "-o", "out")
    assert Path("out/adapter_model.safetensors").exists()
    given, found = [deltas(llama.la), deltas(llama.lb)], deltas("out")
    zeros = {n: np.zeros(x.shape) for m in given for n, x in m.items()}
    wanted = CASES[case][1]([{**zeros, **m} for m in given], [])
    same({n: found.get(n, x) for n, x in zeros.items()}, wanted, 2e-6)


def test_slerp_of_whole_models_needs_no_base(devec: Runner, llama: Models) -> None:
    devec("merge", "--method", "slerp", "--set", "t=0.25", llama.a, llama.b, "-o", "out")
    A, B = weights(llama.a), weights(llama.b)
    wanted = {n: plain.slerp(A[n], B[n], 0.25) if A[n].dtype == np.float64 else A[n] for n in A}
    same(weights("out"), wanted, 1e-6)


@pytest.mark.parametrize(("method", "setting", "said"), [
    ("ties", "density=2", "density=2 is not in (0, 1]"), ("ties", "scope=layer", "scope='layer'"),
    ("ties", "weights=1,2,3", "3 weights for 2 vectors"), ("dare", "p=1", "dare: p=1 is not in [0, 1)"),
    ("tall-masks", "task=z", "task='z' is no vector"), ("emr", "tsk=a", "Did you mean task?"),
    ("slerp", "t=2", "t=2 is not in [0, 1]"), ("pcb", "ratio=0", "ratio=0"),
])  # fmt: skip
def test_a_wrong_setting_is_refused_before_anything_is_written(
    devec: Runner, llama: Models, method: str, setting: str, said: str
) -> None:
    command = ["merge", "--method", method, "--base", llama.base, llama.a, llama.b, "--set", setting, "-o", "out"]
    refused(devec(*command, code=2), said)
    refused(devec(*command, "--dry-run", code=2), said)


@pytest.mark.parametrize("method", ["slerp", "tall-masks", "emr"])
def test_what_has_no_default_is_asked_for(devec: Runner, llama: Models, method: str) -> None:
    missing = "t" if method == "slerp" else "task"
    refused(devec("merge", "--method", method, "--base", llama.base, llama.a, llama.b, "-o", "out", code=2),
            f"{method} needs {missing}", "--set KEY=VALUE")  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.split()[0] not in ("slerp", "model-stock")])
def test_an_entry_that_is_no_number_is_found_and_its_file_named(devec: Runner, llama: Models, case: str) -> None:
    """Comparisons with NaN are false: a mask alone would drop it and say nothing."""
    tensors = load_file(f"{llama.b}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, "b.safetensors", {"format": "pt"})
    said = devec(*words(case), "--base", llama.base, llama.a, "b.safetensors", "-o", "out", code=3)
    refused(said, "NaN or infinity in b", name, "b.safetensors")


def test_a_plan_counts_every_look(devec: Runner, llama: Models) -> None:
    read = {}
    for case in ("consensus", "ties", "pcb"):
        plan = devec(*words(case), "--base", llama.base, llama.a, llama.b, "-o", "out", "--dry-run", "--json").json
        read[case] = plan["stages"][0]["bytes_read"]
    assert read["ties"] == 4 * read["consensus"] and read["pcb"] == 7 * read["consensus"]


def test_a_recipe_s_seed_is_the_method_s(devec: Runner, llama: Models) -> None:
    text = f"method: dare\nbase: {llama.base}\nsources: [{llama.a}, {llama.b}]\n"
    for seed in (0, 7):
        Path(f"{seed}.yaml").write_text(f"{text}seed: {seed}\n")
        devec("merge", f"{seed}.yaml", "-o", f"recipe-{seed}")
        settings = ["--set", f"seed={seed}"]
        devec("merge", "--method", "dare", "--base", llama.base, llama.a, llama.b, *settings, "-o", f"words-{seed}")
        same(weights(f"recipe-{seed}"), weights(f"words-{seed}"), 0.0)
    W = [weights(f"recipe-{seed}") for seed in (0, 7)]
    assert any(not np.array_equal(W[0][n], W[1][n]) for n in W[0])
    devec("merge", "7.yaml", "--set", "seed=0", "-o", "over")
    same(weights("over"), W[0], 0.0)


def test_methods_say_what_they_need(devec: Runner) -> None:
    listed = {m["name"]: m for m in devec("methods", "--json").json}
    for case in CASES:
        method = listed[case.split()[0]]
        assert method["data"] == "none" and method["needs"] == []
        assert method["per_task"] == (method["name"] in ("tall-masks", "emr"))
    assert "one per task" in devec("methods").out
    assert "not comparable" in devec("methods", "emr").out
