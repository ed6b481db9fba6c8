"""Parts of decompositions, written and loaded by the real libraries, against dense float64 arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fixtures_models import (
    Models,
    Runner,
    column_basis,
    deltas,
    difference,
    same,
    shared_directions,
    unique_part,
    weights,
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(torch.arange(12)[None]).logits


def edited_logits(kind: str, base: str, changes: dict[str, np.ndarray], transposed: bool = False) -> torch.Tensor:
    """The base with dense changes added to its parameters, in float64."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(base).double()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for n, change in changes.items():
            named[n].add_(torch.from_numpy(change.T if transposed else change))
    return logits(model)


def test_unique_lora_in_real_peft_gives_the_dense_edits_logits(devec: Runner, llama: Models) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    devec("decompose", llama.la, llama.lb, "-o", "parts")
    devec("export", "parts#unique:la", "-o", "out")
    A, B = deltas(llama.la), deltas(llama.lb)
    wanted = {n: unique_part(A[n], B[n]) for n in A}
    assert all(np.linalg.norm(wanted[n]) < 0.9 * np.linalg.norm(A[n]) for n in A), "something is shared"
    same(deltas("out"), wanted, 2e-6)
    ranks = {t.shape[0] for k, t in load_file("out/adapter_model.safetensors").items() if "lora_A" in k}
    assert ranks == {4}, "LoRA in, LoRA out, no rank added"
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama.base), "out")
    reference = edited_logits("LlamaForCausalLM", llama.base, wanted)
    plain = edited_logits("LlamaForCausalLM", llama.base, {})
    assert float((reference - plain).abs().max()) > 0.1
    assert float((logits(loaded) - reference).abs().max()) < 1e-5


def test_gpt2_conv1d_adapter_applied_equals_pefts_own_merge(devec: Runner, gpt2: Models) -> None:
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    devec("apply", "--base", gpt2.base, "--add", 1, gpt2.la, "-o", "merged")
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(gpt2.base), gpt2.la).merge_and_unload()
    ours = GPT2LMHeadModel.from_pretrained("merged")
    for (n, p), (_, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), n
    devec("decompose", gpt2.la, gpt2.lb, "-o", "parts")
    devec("export", "parts#unique:la", "-o", "unique")
    A, B = deltas(gpt2.la), deltas(gpt2.lb)
    wanted = {n: unique_part(A[n], B[n]) for n in A}
    loaded = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(gpt2.base), "unique")
    reference = edited_logits("GPT2LMHeadModel", gpt2.base, wanted, transposed=True)
    assert float((logits(loaded) - reference).abs().max()) < 1e-5


def test_square_conv1d_part_lands_the_right_way_round_without_the_adapters_flag(
    devec: Runner, gpt2: Models, work: Path
) -> None:
    """attn.c_proj is square, so no shape gives it away: the base's configuration must decide."""
    import shutil

    for task in ("la", "lb"):
        shutil.copytree(getattr(gpt2, task), work / task)
        path = work / task / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": False}))
    devec("decompose", "la", "lb", "-o", "parts")
    devec("apply", "--base", gpt2.base, "--add", 1, "parts#original:la", "-o", "merged")
    W0, W, A = weights(gpt2.base), weights("merged"), deltas("la")
    same({n: W[n] - W0[n] for n in A}, {n: A[n].T for n in A}, 1e-5)


def test_dense_parts_side_left(devec: Runner, llama: Models) -> None:
    devec("decompose", llama.a, llama.b, "--base", llama.base, "-o", "parts")
    A, B = difference(llama.a, llama.base), difference(llama.b, llama.base)
    wanted = {n: unique_part(A[n], B[n], rank=4) for n in A}
    devec("export", "parts#unique:a", "--base", llama.base, "-o", "unique")
    devec("export", "parts#shared:a", "--base", llama.base, "-o", "shared")
    found = difference("unique", llama.base)
    same(found, wanted, 2e-4)  # differences of float32 weights carry rounding of the weights
    shared = difference("shared", llama.base)
    same({n: found[n] + shared[n] for n in A}, A, 5e-5)
    same({n: W for n, W in weights("unique").items() if W.ndim == 1}, {
        n: W for n, W in weights(llama.base).items() if W.ndim == 1
    })  # fmt: skip


def test_side_both_and_right(devec: Runner, llama: Models) -> None:
    A, B = deltas(llama.la), deltas(llama.lc)
    devec("decompose", llama.la, llama.lc, "--side", "right", "--threshold", 0.3, "-o", "right")
    devec("export", "right#unique:la", "-o", "r")
    same(deltas("r"), {n: unique_part(A[n].T, B[n].T, 0.3).T for n in A}, 2e-6)
    devec("decompose", llama.la, llama.lc, "--side", "both", "--threshold", 0.3, "-o", "both")
    devec("export", "both#unique:la", "-o", "bu")
    devec("export", "both#shared:la", "-o", "bs")
    wanted = {}
    for n in A:
        L, R = shared_directions(A[n], B[n], 0.3), shared_directions(A[n].T, B[n].T, 0.3)
        wanted[n] = L @ L.T @ A[n] @ R @ R.T
    assert any(np.linalg.norm(w) > 0 for w in wanted.values())
    found = deltas("bs")
    same({n: found.get(n, np.zeros_like(w)) for n, w in wanted.items()}, wanted, 5e-6)
    same(deltas("bu"), {n: A[n] - wanted[n] for n in A}, 5e-6)


def test_shared_pair_is_the_bisector(devec: Runner, llama: Models) -> None:
    """Eq. (14) over the bisectors of principal vectors, weights by norm."""
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    devec("export", "parts#shared:la+lb", "-o", "out")
    A, B = deltas(llama.la), deltas(llama.lb)
    wanted = {}
    for n in A:
        U1, U2 = column_basis(A[n]), column_basis(B[n])
        P, c, Qt = np.linalg.svd(U1.T @ U2)
        k = int((c**2 > 0.85).sum())
        Z, _ = np.linalg.qr(U1 @ P[:, :k] + U2 @ Qt.T[:, :k])
        terms = [Z @ Z.T @ W for W in (A[n], B[n])]
        norms = [np.linalg.norm(t) for t in terms]
        wanted[n] = sum(w * t for w, t in zip(norms, terms, strict=True)) / sum(norms)
    same(deltas("out"), wanted, 5e-6)


def test_joint_shared_is_order_free_and_of_one_subspace(devec: Runner, llama: Models) -> None:
    devec("decompose", llama.la, llama.lb, llama.lc, "--mode", "joint", "-o", "one")
    devec("decompose", llama.lc, llama.la, llama.lb, "--mode", "joint", "-o", "two")
    for folder in ("one", "two"):
        devec("export", f"{folder}#shared", "-o", f"s{folder}")
        devec("export", f"{folder}#unique:la", "-o", f"u{folder}")
    same(deltas("sone"), deltas("stwo"), 1e-5)
    same(deltas("uone"), deltas("utwo"), 1e-5)
    # the consensus: top eigenvectors of the mean projector, written out
    A, B, C = deltas(llama.la), deltas(llama.lb), deltas(llama.lc)
    for n in A:
        mean = sum(U @ U.T for U in map(column_basis, (A[n], B[n], C[n]))) / 3
        values, vectors = np.linalg.eigh(mean)
        wanted = vectors[:, -2:]
        assert values[-3] < 0.85 < values[-2], "two directions are common to all"
        residual = deltas("uone")[n]
        assert np.abs(wanted.T @ residual).max() < 1e-4 * np.abs(A[n]).max()
        assert np.allclose(residual, A[n] - wanted @ wanted.T @ A[n], atol=2e-5 * np.abs(A[n]).max())


def test_target_mode_equals_pairwise_unique_of_that_vector(devec: Runner, llama: Models) -> None:
    """The greedy union is the same in both; only the target's part exists."""
    devec("decompose", llama.la, llama.lb, llama.lc, "--mode", "target", "--target", "lb", "-o", "target")
    devec("decompose", llama.la, llama.lb, llama.lc, "-o", "pairs")
    devec("export", "target#unique:lb", "-o", "t")
    devec("export", "pairs#unique:lb", "-o", "p")
    same(deltas("t"), deltas("p"), 1e-6)
    B = deltas(llama.lb)
    for n, W in deltas("t").items():
        for other in (deltas(llama.la)[n], deltas(llama.lc)[n]):
            Z = shared_directions(B[n], other)
            # each pairwise shared direction is gone but for what the union's leak (1 - threshold) allows
            assert np.linalg.norm(Z.T @ W) < np.sqrt(1 - 0.85) * np.linalg.norm(Z.T @ B[n])
    assert "no #unique:la" in devec("export", "target#unique:la", "-o", "x", code=2).err


def test_paper_depends_on_order_and_says_so(devec: Runner, llama: Models) -> None:
    said = devec("decompose", llama.la, llama.lb, "--paper", "-o", "one").err
    assert "depends on the order given (pair-basis first)" in said
    devec("decompose", llama.lb, llama.la, "--paper", "-o", "two")
    for folder in ("one", "two"):
        devec("export", f"{folder}#unique:la", "-o", f"u{folder}")
    one, two, A, B = deltas("uone"), deltas("utwo"), deltas(llama.la), deltas(llama.lb)
    # both uses of one Z, taken from the first vector's basis
    same(one, {n: unique_part(A[n], B[n]) for n in A}, 5e-6)
    Z = {n: shared_directions(B[n], A[n]) for n in A}
    same(two, {n: A[n] - Z[n] @ Z[n].T @ A[n] for n in A}, 5e-6)
    assert max(np.abs(one[n] - two[n]).max() for n in A) > 1e-3


def test_split_qkv_joins_again(devec: Runner, gpt2: Models) -> None:
    shown = devec("decompose", gpt2.a, gpt2.b, "--base", gpt2.base, "--split-qkv", "-o", "parts", "--json").json
    assert "transformer.h.0.attn.c_attn.weight::q" in shown["tensors"]
    for part in ("unique", "shared", "original"):
        devec("export", f"parts#{part}:a", "--base", gpt2.base, "-o", part)
    A, B = difference(gpt2.a, gpt2.base), difference(gpt2.b, gpt2.base)
    parts = {p: difference(p, gpt2.base) for p in ("unique", "shared", "original")}
    same({n: parts["unique"][n] + parts["shared"][n] for n in A}, A, 1e-4)
    same(parts["original"], A, 1e-6)
    name = "transformer.h.0.attn.c_attn.weight"
    for rows in (slice(0, 32), slice(32, 64), slice(64, 96)):  # Conv1D stores in x out: rows of out are columns there
        wanted = unique_part(A[name][:, rows].T, B[name][:, rows].T, rank=4).T
        assert np.allclose(parts["unique"][name][:, rows], wanted, atol=2e-5)
    whole = unique_part(A[name].T, B[name].T, rank=4).T
    assert np.abs(parts["unique"][name] - whole).max() > 1e-3, "splitting matters"


def test_split_qkv_of_adapters_keeps_rank(devec: Runner, gpt2: Models) -> None:
    devec("decompose", gpt2.la, gpt2.lb, "--split-qkv", "-o", "parts")
    devec("export", "parts#unique:la", "-o", "u")
    devec("export", "parts#shared:la", "-o", "s")
    u, s, A = deltas("u"), deltas("s"), deltas(gpt2.la)
    same({n: u[n] + s[n] for n in A}, A, 2e-6)
    ranks = {t.shape[0] for k, t in load_file("u/adapter_model.safetensors").items() if "lora_A" in k}
    assert ranks == {4}


def test_one_d_parameters(devec: Runner, llama: Models) -> None:
    """A vector is a column; of two different columns nothing is shared, and with --one-d they are unique parts."""
    plain = devec("decompose", llama.a, llama.b, "--base", llama.base, "--json").json
    assert not any("norm" in n for n in plain["tensors"])
    devec("decompose", llama.a, llama.b, "--base", llama.base, "--one-d", "-o", "parts")
    devec("export", "parts#unique:a", "--base", llama.base, "-o", "u")
    W, W0, Wa = weights("u"), weights(llama.base), weights(llama.a)
    name = "model.norm.weight"
    assert np.abs(Wa[name] - W0[name]).max() > 1e-3
    assert np.allclose(W[name], Wa[name], atol=1e-6)


def test_original_keeps_one_d_and_unique_leaves_them(devec: Runner, llama: Models) -> None:
    devec("decompose", llama.a, llama.b, "--base", llama.base, "-o", "parts")
    devec("export", "parts#original:a", "--base", llama.base, "-o", "whole")
    found, wanted = weights("whole"), weights(llama.a)
    assert found.pop("model.steps") == 0 and wanted.pop("model.steps") == 1, "integers are the base's"
    same(found, wanted, 1e-6)


@pytest.mark.parametrize("what", ["la", "a"])
def test_base_plus_adapter_and_names(devec: Runner, llama: Models, what: str) -> None:
    source = f"x={llama.base}+{llama.la}" if what == "la" else f"x={llama.a}"
    devec("decompose", source, f"y={llama.b}", "--base", llama.base, "-o", "parts")
    devec("export", "parts#original:x", "--base", llama.base, "-o", "out")
    found = difference("out", llama.base)
    change = deltas(llama.la) if what == "la" else difference(llama.a, llama.base)
    same(found, {n: change.get(n, np.zeros_like(w)) for n, w in found.items()}, 5e-5)
