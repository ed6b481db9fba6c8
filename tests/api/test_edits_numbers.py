"""extract, apply, merge, negate and mix against dense float64 arithmetic on the raw files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fixtures_models import Models, Runner, deltas, difference, same, unique_part, weights


def test_extract_is_exact(devec: Runner, llama: Models) -> None:
    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "tv")
    found = {n: t.numpy() for n, t in load_file("tv/delta.safetensors").items()}
    W, W0 = load_file(f"{llama.a}/model.safetensors"), load_file(f"{llama.base}/model.safetensors")
    assert set(found) == set(W) - {"model.steps"}
    for n, t in found.items():
        assert np.array_equal(t, (W[n] - W0[n]).numpy()), n


def test_extract_rank_reports_the_true_error(devec: Runner, llama: Models) -> None:
    """Eckart-Young: the error of the best rank-2 approximation, as measured on what was written."""
    said = devec("extract", "--base", llama.base, "--model", llama.a, "--rank", 2, "-o", "lora", "--json").json
    D, L = difference(llama.a, llama.base), deltas("lora")
    assert set(L) == set(D)
    for n, W in D.items():
        s = np.linalg.svd(W, compute_uv=False)
        true = np.linalg.norm(W - L[n]) / np.linalg.norm(W)
        assert np.linalg.matrix_rank(L[n], tol=1e-5) == 2
        assert true == pytest.approx(said["error"][n], abs=2e-5)
        assert true == pytest.approx(np.sqrt((s[2:] ** 2).sum() / (s**2).sum()), abs=2e-5)
    assert said["error"]["model.norm.weight"] == 1.0, "1-D parameters are left out, and the error says so"


def test_extract_error_and_energy_choose_the_lowest_rank(devec: Runner, llama: Models) -> None:
    D = difference(llama.a, llama.base)
    devec("extract", "--base", llama.base, "--model", llama.a, "--error", 0.3, "-o", "e")
    devec("extract", "--base", llama.base, "--model", llama.a, "--energy", 0.8, "-o", "f")
    for folder, allowed in (("e", 0.09), ("f", 0.2)):
        for n, L in deltas(folder).items():
            s2 = np.linalg.svd(D[n], compute_uv=False) ** 2
            lost = 1 - np.cumsum(s2) / s2.sum()
            wanted = int((lost > allowed).sum()) + 1
            assert np.linalg.matrix_rank(L, tol=1e-5) == wanted
            assert np.linalg.norm(D[n] - L) ** 2 <= allowed * np.linalg.norm(D[n]) ** 2 * (1 + 1e-5)


def test_apply_adds_and_subtracts_and_loads_in_transformers(devec: Runner, llama: Models) -> None:
    from transformers import LlamaForCausalLM

    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "tv")
    terms = ["--add", 0.5, "tv", "--add", 2, llama.la, "--subtract", 0.25, llama.b]
    devec("apply", "--base", llama.base, *terms, "-o", "out")
    W0, Wa, Wb, L = weights(llama.base), weights(llama.a), weights(llama.b), deltas(llama.la)
    wanted = {
        n: w if n == "model.steps" else w + 0.5 * (Wa[n] - w) - 0.25 * (Wb[n] - w) + 2 * L.get(n, 0.0)
        for n, w in W0.items()
    }
    same(weights("out"), wanted, 1e-6)
    state = LlamaForCausalLM.from_pretrained("out").state_dict()
    same({n: t.double().numpy() for n, t in state.items()}, {n: w for n, w in wanted.items() if n in state}, 1e-6)
    assert {p.name for p in Path("out").iterdir()} == {
        "README.md", ".devec", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip
    assert "base_model" in yaml.safe_load(Path("out/README.md").read_text().split("---")[1])


def test_apply_rounds_once(devec: Runner, llama: Models) -> None:
    """A bfloat16 base: the sum is float32, and one rounding to nearest ends it."""
    tensors = load_file(f"{llama.base}/model.safetensors")
    low = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(low, "low.safetensors", {"format": "pt"})
    devec("apply", "--base", "low.safetensors", "--add", 0.3, llama.la, "--add", 0.7, llama.lc, "-o", "out.safetensors")
    found, L, M = load_file("out.safetensors"), deltas(llama.la), deltas(llama.lc)
    exact = 0
    for n, t in found.items():
        assert t.dtype == low[n].dtype
        if n in L:
            total = low[n].double().numpy() + 0.3 * L[n] + 0.7 * M[n]
            nearest = torch.from_numpy(total).to(torch.bfloat16)
            exact += int((t == nearest).sum())
            assert (t == nearest).double().mean() > 0.999, "float32 sums differ from float64 ones at ties alone"
        else:
            assert torch.equal(t, low[n])
    assert exact


def test_a_float64_base_is_summed_in_float64(devec: Runner, llama: Models) -> None:
    tensors = {n: t.double() for n, t in load_file(f"{llama.base}/model.safetensors").items() if t.is_floating_point()}
    tensors["model.norm.weight"] += 1e-12
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] += 1e-12
    save_file(tensors, "wide.safetensors")
    devec("apply", "--base", "wide.safetensors", "--add", 1, llama.la, "--dtype", "float64", "-o", "x.safetensors")
    found = load_file("x.safetensors")
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])
    wanted = tensors[name] + torch.from_numpy(deltas(llama.la)[name])
    assert float((found[name] - wanted).abs().max()) < 1e-14


def test_average_of_checkpoints_leaves_excluded_and_integers_to_the_first(devec: Runner, llama: Models) -> None:
    devec("merge", "--method", "average", llama.a, llama.b, llama.c, "--exclude", "lm_head", "-o", "out")
    found, (A, B, C) = weights("out"), (weights(f) for f in (llama.a, llama.b, llama.c))
    for n, w in found.items():
        if n in ("model.steps", "lm_head.weight"):
            assert np.array_equal(w, A[n]), n
        else:
            assert np.abs(w - (A[n] + B[n] + C[n]) / 3).max() < 1e-6, n
    config = json.loads(Path("out/config.json").read_text())
    assert config["model_type"] == "llama"


def test_average_weights_and_method_parameters(devec: Runner, llama: Models) -> None:
    devec("merge", "--method", "average", llama.a, llama.b, "--set", "weights=3,1", "-o", "out")
    A, B, found = weights(llama.a), weights(llama.b), weights("out")
    for n in set(A) - {"model.steps"}:
        assert np.abs(found[n] - (0.75 * A[n] + 0.25 * B[n])).max() < 1e-6


def test_task_arithmetic(devec: Runner, llama: Models) -> None:
    words = ["--method", "task-arithmetic", "--base", llama.base, "--set", "scale=0.4"]
    devec("merge", *words, llama.a, llama.lb, "-o", "out")
    W0, A, L, found = weights(llama.base), weights(llama.a), deltas(llama.lb), weights("out")
    for n in set(A) - {"model.steps"}:
        assert np.abs(found[n] - (W0[n] + 0.4 * (A[n] - W0[n] + L.get(n, 0.0)))).max() < 2e-6, n


def test_merge_of_adapters_stays_an_adapter(devec: Runner, llama: Models) -> None:
    devec("merge", "--method", "average", llama.la, llama.lb, "-o", "out")
    A, B = deltas(llama.la), deltas(llama.lb)
    same(deltas("out"), {n: (A[n] + B[n]) / 2 for n in A}, 2e-6)
    devec("merge", "--method", "average", llama.la, llama.lb, "--rank", 3, "-o", "low")
    for n, L in deltas("low").items():
        mean = (A[n] + B[n]) / 2
        s = np.linalg.svd(mean, compute_uv=False)
        assert np.linalg.norm(mean - L) == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-4)


def test_merge_of_adapters_on_a_base_is_a_checkpoint(devec: Runner, llama: Models) -> None:
    words = ["--method", "task-arithmetic", "--base", llama.base, "--set", "scale=1"]
    devec("merge", *words, llama.la, llama.lb, "-o", "out")
    found, A, B = difference("out", llama.base), deltas(llama.la), deltas(llama.lb)
    same({n: found[n] for n in A}, {n: A[n] + B[n] for n in A}, 1e-5)


def test_recipe_and_command_line_write_the_same_weights(devec: Runner, llama: Models) -> None:
    recipe = {
        "method": "task-arithmetic", "base": llama.base, "sources": [f"one={llama.a}", llama.b],
        "parameters": {"scale": 0.5, "weights": [1, 0.5]}, "exclude": ["lm_head"], "out_dtype": "bfloat16",
    }  # fmt: skip
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    devec("merge", "r.yaml", "-o", "one")
    devec(
        "merge", "--method", "task_arithmetic", "--base", llama.base, f"one={llama.a}", llama.b, "--set", "scale=0.5",
        "--set", "weights=1,0.5", "--exclude", "lm_head", "--out-dtype", "bfloat16", "-o", "two",
    )  # fmt: skip
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    assert json.loads(Path("one/config.json").read_text())["dtype"] == "bfloat16"
    devec("merge", "r.yaml", "-o", "three", "--set", "scale=0.25")
    assert Path("one/model.safetensors").read_bytes() != Path("three/model.safetensors").read_bytes()


def test_a_recipe_may_name_parts_with_a_view(devec: Runner, llama: Models) -> None:
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    recipe = {
        "method": "task-arithmetic", "sources": ["u=parts#unique:la", "v=parts#unique:lb"], "parameters": {"scale": 1},
        "view": {"threshold": 0.999},
    }  # fmt: skip
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    devec("merge", "r.yaml", "-o", "none")
    A, B = deltas(llama.la), deltas(llama.lb)
    same(deltas("none"), {n: A[n] + B[n] for n in A}, 2e-6)
    devec("merge", "r.yaml", "-o", "some", "--threshold", 0.85)
    same(deltas("some"), {n: unique_part(A[n], B[n]) + unique_part(B[n], A[n]) for n in A}, 5e-6)


def test_a_view_changes_what_is_given_and_keeps_the_rest(devec: Runner, llama: Models) -> None:
    """The artifact stores threshold 0.3; another option leaves that alone, in export, merge, apply alike."""
    devec("decompose", llama.la, llama.lb, "--threshold", 0.3, "-o", "parts")
    A, B = deltas(llama.la), deltas(llama.lb)
    wanted = {n: unique_part(A[n], B[n], 0.3) for n in A}
    devec("export", "parts#unique:la", "--pair-basis", "own", "-o", "e")
    devec("merge", "--method", "average", "parts#unique:la", "--pair-basis", "own", "-o", "m")
    devec("apply", "--base", llama.base, "--add", 1, "parts#unique:la", "--pair-basis", "own", "-o", "w")
    same(deltas("e"), wanted, 5e-6)
    same(deltas("m"), wanted, 5e-6)
    found = difference("w", llama.base)
    same({n: found[n] for n in A}, wanted, 2e-5)


def test_negate_adapters(devec: Runner, llama: Models) -> None:
    A, B = deltas(llama.la), deltas(llama.lb)
    devec("negate", "--target", llama.la, "--pool", llama.lb, "--coefficient", 0.7, "-o", "out")
    same(deltas("out"), {n: -0.7 * unique_part(A[n], B[n]) for n in A}, 2e-6)
    devec("negate", "--target", llama.la, "--part", "all", "-c", 2, "-o", "all")
    same(deltas("all"), {n: -2 * A[n] for n in A}, 2e-6)


def test_negate_checkpoints(devec: Runner, llama: Models) -> None:
    devec("negate", "--base", llama.base, "--target", llama.a, "--pool", llama.b, "-o", "out")
    A, B, found = difference(llama.a, llama.base), difference(llama.b, llama.base), difference("out", llama.base)
    same(found, {n: -unique_part(A[n], B[n], rank=4) for n in A}, 2e-4)
    W, W0 = weights("out"), weights(llama.base)
    assert all(np.array_equal(W[n], W0[n]) for n in W if W[n].ndim == 1), "1-D parameters stay the base's"


def test_negate_pool_of_several(devec: Runner, llama: Models) -> None:
    """Three ways to write one pool."""
    b, c = llama.lb, llama.lc
    for i, words in enumerate((["--pool", b, c], ["--pool", b, "--pool", c], ["--pool", f"p={b},{c}"])):
        devec("negate", "--target", llama.la, *words, "-o", f"o{i}")
    one = Path("o0/adapter_model.safetensors").read_bytes()
    assert one == Path("o1/adapter_model.safetensors").read_bytes() == Path("o2/adapter_model.safetensors").read_bytes()


def test_mix_is_the_sum_of_unique_parts(devec: Runner, llama: Models) -> None:
    A, B = deltas(llama.la), deltas(llama.lb)
    devec("mix", llama.la, llama.lb, "--weights", "1,0.5", "-o", "u")
    devec("mix", llama.la, llama.lb, "--part", "shared", "-o", "s")
    devec("mix", llama.la, llama.lb, "--part", "all", "-w", "2,-1", "-o", "w")
    unique = {n: (unique_part(A[n], B[n]), unique_part(B[n], A[n])) for n in A}
    same(deltas("u"), {n: a + 0.5 * b for n, (a, b) in unique.items()}, 5e-6)
    same(deltas("s"), {n: A[n] + B[n] - a - b for n, (a, b) in unique.items()}, 5e-6)
    same(deltas("w"), {n: 2 * A[n] - B[n] for n in A}, 2e-6)


def test_mix_compressed_tells_its_error(devec: Runner, llama: Models) -> None:
    said = devec("mix", llama.la, llama.lb, llama.lc, "--part", "all", "--rank", 5, "-o", "out", "--json").json
    whole = [deltas(f) for f in (llama.la, llama.lb, llama.lc)]
    for n, L in deltas("out").items():
        total = sum(d[n] for d in whole)
        assert np.linalg.norm(total - L) / np.linalg.norm(total) == pytest.approx(said["error"][n], abs=1e-4)


def test_mix_of_three_adds_ranks_up_to_the_matrix(devec: Runner, llama: Models) -> None:
    devec("mix", llama.la, llama.lb, llama.lc, "--part", "all", "-o", "out")
    same(deltas("out"), {n: sum(deltas(f)[n] for f in (llama.la, llama.lb, llama.lc)) for n in deltas(llama.la)}, 5e-6)
    assert {t.shape[0] for k, t in load_file("out/adapter_model.safetensors").items() if "lora_A" in k} <= {15, 16}


def test_verify_and_methods(devec: Runner, llama: Models) -> None:
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    devec("mix", llama.la, llama.lb, "-o", "mixed")
    devec("apply", "--base", llama.base, "--add", 1, llama.la, "-o", "one.safetensors")
    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "tv")
    for out in ("parts", "mixed", "one.safetensors", "tv"):
        assert "hashes agree" in devec("verify", out).out
    path = Path("mixed/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    said = devec("verify", "mixed", code=7)
    assert "changed = adapter_model.safetensors" in said.errors[0]
    listed = devec("methods").out
    assert all(name in listed for name in ("average", "task-arithmetic", "shared-unique"))
    assert "W_0 + scale * sum_i w_i Delta_i" in devec("methods", "task_arithmetic").out


def test_heads_ride_along_only_when_asked(devec: Runner, llama: Models) -> None:
    """modules_to_save: export copies its own, mix writes none unless --heads-from names an input."""
    import shutil

    for i, task in enumerate(("la", "lb")):
        shutil.copytree(getattr(llama, task), task)
        path = Path(task) / "adapter_model.safetensors"
        head = torch.full((48, 32), float(i + 1))
        save_file({**load_file(path), "base_model.model.lm_head.weight": head}, path, {"format": "pt"})
        config = Path(task) / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["lm_head"]}))
    said = devec("decompose", "la", "lb", "-o", "parts")
    assert "head-kept-apart" in said.warnings
    devec("export", "parts#unique:lb", "-o", "e")
    assert float(load_file("e/adapter_model.safetensors")["base_model.model.lm_head.weight"].mean()) == 2.0
    devec("mix", "la", "lb", "-o", "m")
    assert not any("lm_head" in k for k in load_file("m/adapter_model.safetensors"))
    devec("mix", "la", "lb", "--heads-from", "la", "-o", "h")
    assert float(load_file("h/adapter_model.safetensors")["base_model.model.lm_head.weight"].mean()) == 1.0
    devec("apply", "--base", llama.base, "--add", 1, "la", "-o", "w")
    assert np.array_equal(weights("w")["lm_head.weight"], weights(llama.base)["lm_head.weight"])
    devec("apply", "--base", llama.base, "--add", 1, "la", "--heads-from", "la", "-o", "v")
    assert (weights("v")["lm_head.weight"] == 1).all()
    assert "names no input" in devec("mix", "la", "lb", "--heads-from", "lx", "-o", "x", code=2).errors[0]


def test_a_value_too_large_for_the_output_is_refused_by_name(devec: Runner, llama: Models) -> None:
    words = ["apply", "--base", llama.base, "--add", 1e6, llama.la, "-o", "out"]
    said = devec(*words, "--out-dtype", "float16", code=5)
    assert "too large for float16" in said.errors[0] and "down_proj" in said.errors[0] and "partial" not in said.err
    assert not Path("out").exists()
    devec(*words, "--out-dtype", "bfloat16")


def test_shards_are_written_and_read(devec: Runner, llama: Models) -> None:
    from transformers import LlamaForCausalLM

    devec("merge", "--method", "average", llama.a, llama.b, "--shard-size", "20kB", "-o", "many")
    devec("merge", "--method", "average", llama.a, llama.b, "-o", "one")
    assert len(list(Path("many").glob("model-*.safetensors"))) > 3
    whole = load_file("one/model.safetensors")
    state = LlamaForCausalLM.from_pretrained("many").state_dict()
    assert all(torch.equal(t, whole[n]) for n, t in state.items())
    devec("merge", "--method", "average", "many", "-o", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()


def test_names_with_brackets_are_printed_as_they_are(devec: Runner, llama: Models) -> None:
    import shutil

    shutil.copytree(llama.la, "k[bold]x:smile:")
    assert "k[bold]x:smile:" in devec("inspect", "k[bold]x:smile:").out


def test_base_plus_adapter_as_a_base_is_another_base(devec: Runner, llama: Models) -> None:
    """BASE+ADAPTER is a model of its own: adapters add to it, vectors taken against BASE are refused."""
    under = f"{llama.base}+{llama.lb}"
    devec("apply", "--base", under, "--add", 1, llama.la, "-o", "out")
    A, B, found = deltas(llama.la), deltas(llama.lb), difference("out", llama.base)
    same({n: found[n] for n in A}, {n: A[n] + B[n] for n in A}, 1e-5)
    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "tv")
    assert "another base" in devec("apply", "--base", under, "--add", 1, "tv", "-o", "x", code=4).errors[0]
    devec("merge", "--method", "average", under, llama.a, "-o", "avg")
    W, Wa, W0 = weights("avg"), weights(llama.a), weights(llama.base)
    for n in A:
        assert np.abs(W[n] - (W0[n] + B[n] + Wa[n]) / 2).max() < 1e-6
