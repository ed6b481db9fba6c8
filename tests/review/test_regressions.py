"""Mistakes that were made once: each test fails on the code as it was."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import devec
from devec.api.extract import extract
from devec.api.merge import Compression, save_merged
from devec.api.mix import mix
from devec.api.output import Saving, save_artifact
from devec.core.decomposition import Decomposition
from devec.core.errors import UsageError
from devec.core.findings import pool_findings
from devec.core.options import Factoring, View
from devec.core.results import Subspace
from devec.io.names import qkv_split
from devec.linalg.lowrank import svd_of_dense
from devec.linalg.subspace import overlaps
from pools import decomposed, pool, vector


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(folder, modules=("l1",), seed=0, embeddings=(), heads=None, bias=False, **config):
    """A PEFT LoRA folder of rank 4; matrices are 40 x 30."""
    folder.mkdir()
    tensors = {f"base_model.model.{n}": t for n, t in (heads or {}).items()}
    for i, m in enumerate(modules):
        B, A = rand(40, 4, seed=seed + 3 * i), rand(4, 30, seed=seed + 3 * i + 1)
        a, b = ("lora_embedding_A", "lora_embedding_B") if m in embeddings else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"base_model.model.{m}.{a}": A, f"base_model.model.{m}.{b}": B}
        if bias:
            tensors[f"base_model.model.{m}.lora_B.bias"] = rand(40, seed=seed + 3 * i + 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(modules), "lora_bias": bias}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return str(folder)


def keys(file):
    with safe_open(str(file), "pt") as opened:
        return sorted(opened.keys())


def test_paper_through_with_view_is_the_whole_preset():
    d = decomposed(pool((rand(20, 3, seed=1), rand(3, 12, seed=2)), (rand(20, 3, seed=3), rand(3, 12, seed=4))))
    assert d.with_view(paper=True).view == View.of_paper()
    assert d.with_view(paper=True, threshold=0.5).view == View.of_paper(threshold=0.5)


def test_an_embedding_of_an_unusual_name_stays_an_embedding(tmp_path):
    first = adapter(tmp_path / "a", ["l1"], seed=1)
    second = adapter(tmp_path / "b", ["l1", "lookup"], seed=20, embeddings=["lookup"])
    d = devec.decompose([first, second])
    devec.save_decomposition(d, tmp_path / "parts")
    devec.export(f"{tmp_path / 'parts'}#unique:b", tmp_path / "unique")
    merged = devec.merge("task-arithmetic", [first, second])  # the first adapter knows no embedding
    save_merged(merged, tmp_path / "merged", Saving("merge"))
    for out in ("unique", "merged"):
        found = keys(tmp_path / out / "adapter_model.safetensors")
        assert "base_model.model.lookup.lora_embedding_A" in found and "base_model.model.l1.lora_A.weight" in found


def test_trained_lora_biases_ride_along_with_the_original_and_with_a_merge(tmp_path):
    sources = [adapter(tmp_path / n, seed=s, bias=True) for n, s in (("a", 1), ("b", 30))]
    d = devec.decompose(sources)
    devec.export(d.original("a"), tmp_path / "again")
    save_merged(devec.merge("task-arithmetic", sources), tmp_path / "merged", Saving("merge"))
    for out in ("again", "merged"):
        assert "base_model.model.l1.lora_B.bias" in keys(tmp_path / out / "adapter_model.safetensors")


def test_a_mix_of_whole_adapters_leaves_biases_out_unless_asked(tmp_path):
    sources = [adapter(tmp_path / n, seed=s, bias=True) for n, s in (("a", 1), ("b", 30))]
    assert mix(sources, part="all").vector.names() == ["l1.weight"]
    assert set(mix(sources, part="all", one_d=True).vector.names()) == {"l1.weight", "l1.bias"}


def test_a_checkpoint_vector_of_matrices_is_still_dense():
    v = vector("a", {"w": rand(6, 4)})
    assert not v.is_low_rank() and v.first_dense() == "w"


def test_compression_to_rank_zero_is_a_usage_error():
    with pytest.raises(UsageError, match="rank"):
        Compression(rank=0)


def test_an_adapter_merged_with_a_checkpoint_is_written_in_one_spelling(tmp_path):
    base = {"h.0.a.weight": rand(40, 30, seed=1), "h.1.a.weight": rand(40, 30, seed=2)}
    tuned = {n: w + 0.1 * rand(40, 30, seed=9) for n, w in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    source = adapter(tmp_path / "a", ["transformer.h.0.a"])
    sources = [source, tmp_path / "tuned.safetensors"]
    merged = devec.merge("task-arithmetic", sources, base=tmp_path / "base.safetensors")
    save_merged(merged, tmp_path / "out", Saving("merge"), compression=Compression(rank=4))
    found = keys(tmp_path / "out" / "adapter_model.safetensors")
    assert all(k.startswith("base_model.model.transformer.h.") for k in found) and len(found) == 4


def test_export_to_a_checkpoint_takes_the_adapters_own_heads(tmp_path):
    head = torch.full((3, 40), 7.0)
    sources = [adapter(tmp_path / "a", seed=1, heads={"classifier.weight": head, "extra.weight": head + 1}),
               adapter(tmp_path / "b", seed=30)]
    d = devec.decompose(sources)
    base = {"l1.weight": rand(40, 30), "classifier.weight": torch.zeros(3, 40)}
    written = devec.export(d.unique("a"), tmp_path / "out.safetensors", base=base)
    with safe_open(str(tmp_path / "out.safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("classifier.weight"), head)
    assert "extra.weight" in written.notes[0]


def test_row_spaces_of_1d_parameters_are_refused():
    with pytest.raises(UsageError, match="1-D"):
        Factoring(side="right", one_d=True)


def test_grouped_attention_is_not_split_into_thirds_by_guess():
    with pytest.raises(UsageError, match="head counts"):
        qkv_split("layers.0.self_attn.qkv_proj.weight", (6144, 4096), None)  # 4096 + 2 x 1024 rows
    with pytest.raises(UsageError, match="head counts"):
        qkv_split("transformer.h.0.attn.c_attn.weight", (2304, 2048), None)  # multi-query: 2048 + 2 x 128
    assert qkv_split("c_attn.weight", (36, 12), None) == [("q", 0, 12), ("k", 12, 24), ("v", 24, 36)]


def test_a_subspace_projects_narrow_matrices_without_rounding_itself():
    Z = torch.linalg.qr(rand(40, 5)).Q
    W = rand(40, 30, seed=3).bfloat16()
    assert torch.allclose(Subspace(Z).project(W), Z @ (Z.T @ W.float()), atol=1e-6)


def test_the_largest_numbers_are_not_taken_for_zero():
    svd = svd_of_dense(torch.full((20, 20), 2e38))
    assert svd.rank == 1 and float(svd.S[0]) == pytest.approx(20 * 2e38, rel=1e-5)


def test_target_mode_overlaps_the_target_alone():
    vectors = [(rand(30, 3, seed=2 * i), rand(3, 20, seed=2 * i + 1)) for i in range(5)]
    d = decomposed(pool(*vectors), mode="target", target="C")
    assert set(d.algebra["w", "left"].overlaps.blocks) == {(0, 2), (1, 2), (2, 3), (2, 4)}
    assert set(overlaps([torch.eye(4)[:, :2]] * 3).blocks) == {(0, 1), (0, 2), (1, 2)}


def test_a_path_to_the_base_is_no_name_that_differs(tmp_path):
    base = {"l1.weight": rand(40, 30)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"l1.weight": rand(40, 30, seed=5)}, tmp_path / "tuned.safetensors")
    source = adapter(tmp_path / "a", base_model_name_or_path="some/model")
    sources = [source, tmp_path / "tuned.safetensors"]
    merged = devec.merge("task-arithmetic", sources, base=tmp_path / "base.safetensors")
    assert not [f for f in pool_findings(merged.pool) if f.code == "base-name-differs"]


def test_a_saved_task_vector_is_called_as_its_folder(tmp_path):
    base = {"w": rand(20, 10)}
    for name, seed in (("one", 1), ("two", 2)):
        v = extract(base, {"w": base["w"] + rand(20, 10, seed=seed)}, name="model")
        save_artifact(v, tmp_path / name, Saving("extract"))
    assert devec.decompose([tmp_path / "one", tmp_path / "two"]).vectors == ("one", "two")


def test_views_in_any_order_read_what_a_fresh_view_reads():
    S = torch.linalg.qr(rand(40, 3)).Q
    vectors = [
        (torch.cat([S + 0.03 * rand(40, 3, seed=i), rand(40, 3, seed=10 + i)], 1), rand(6, 25, seed=20 + i))
        for i in range(4)
    ]
    p = pool(*vectors)
    changes = [{"threshold": 0.5}, {"joint": "chain"}, {"angles": True}, {"threshold": "chance"}, {"paper": True},
               {"paper": False, "joint": "consensus", "angles": False}, {"target_rule": "sequence"}]
    for mode in ("pairwise", "joint"):
        d = decomposed(p, mode=mode)
        for change in changes:
            d = d.with_view(**change)
            fresh = Decomposition(p, d.factoring, d.tensors, d.view)
            for name in d.vectors:
                assert torch.equal(d.unique(name).deltas["w"].dense(), fresh.unique(name).deltas["w"].dense())
