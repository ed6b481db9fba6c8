"""Real peft is the oracle: the weights it merges, minus the base, are the deltas that are read."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from devec.core.delta import LowRankDelta
from devec.core.errors import IncompatibleError, InputError, RefusedError, UsageError
from devec.core.layout import Layout
from devec.core.vectors import TaskVector
from devec.io.adapters import read_adapter
from devec.io.checkpoint import checkpoint_from_module, open_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2(classes: int = 0) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    if classes:
        config.num_labels = classes
        return transformers.GPT2ForSequenceClassification(config)
    return transformers.GPT2LMHeadModel(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 5, 3)
        self.plane = nn.Conv2d(4, 6, (3, 2))
        self.point = nn.Conv2d(4, 6, 1)
        self.space = nn.Conv3d(2, 3, 2)
        self.flat = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attn(x, x, x)[0])


def train_and_save(model: nn.Module, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Adapt ``model`` with random factors, save with peft; returns merged minus base, by tensor name."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad:
                scale = 1.0 + 0.2 * torch.rand_like(value) if "magnitude" in name else 0.0
                value.copy_(value * scale if "magnitude" in name else 0.3 * torch.randn_like(value))
    adapted.save_pretrained(str(folder))
    after = adapted.merge_and_unload().state_dict()
    assert set(after) == set(before)
    return {name: after[name] - before[name] for name in before}


def assert_same(vector: TaskVector, changes: dict[str, torch.Tensor], heads: bool = False) -> None:
    for name, change in changes.items():
        if name in vector.deltas:
            layout = vector.layouts[name]
            assert layout.shape == tuple(change.shape), name
            got = layout.to_stored(vector.deltas[name].dense())
            assert (got - change).abs().max() < 1e-6, name
            assert change.abs().max() > 1e-3, name
        elif not heads:
            assert change.abs().max() == 0, name
    assert set(vector.deltas) <= set(changes)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 7}),
    "rslora": (llama, {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 3, r".*\.1\..*v_proj": 5, "proj": 1},
            "alpha_pattern": {"k_proj": 9, "layers.[01].mlp.up_proj": 2, "self_attn": 100},
        },
    ),
    "patterns with rslora": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "gpt2 Conv1D": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True},
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 4}),
    "embedding of gpt2": (gpt2, {"target_modules": ["wpe", "c_attn"], "r": 3, "fan_in_fan_out": True}),
    "head of untied llama": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["lm_head"], "r": 3}),
    "biases of LoRA": (
        lambda: llama(attention_bias=True),
        {"target_modules": ["q_proj"], "r": 2, "lora_bias": True, "lora_alpha": 5},
    ),
    "convolutions": (Convolutions, {"target_modules": ["line", "plane", "point", "space", "flat"], "r": 2}),
}


@pytest.mark.parametrize("base", [False, True], ids=["alone", "with base"])
@pytest.mark.parametrize("case", CASES)
def test_equals_what_peft_merges(case: str, base: bool, tmp_path: Path) -> None:
    make, settings = CASES[case]
    model = make()
    checkpoint = checkpoint_from_module(copy.deepcopy(model)) if base else None
    changes = train_and_save(model, tmp_path / "a", **settings)
    vector = read_adapter(tmp_path / "a", base=checkpoint)
    assert vector.is_low_rank() or "bias" in case
    assert vector.partial and vector.name == "a"
    assert_same(vector, changes)


def test_torch_attention_is_refused(tmp_path: Path) -> None:
    # peft both merges and runs out_proj's delta twice, so no one delta is what the file means
    train_and_save(Attention(), tmp_path / "a", target_modules=["attn", "out"], r=2)
    with pytest.raises(RefusedError, match="MultiheadAttention"):
        read_adapter(tmp_path / "a")


DORA: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 7}),
    "gpt2 Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 2, "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens"], "r": 3}),
    "convolutions": (Convolutions, {"target_modules": ["line", "plane", "point", "space"], "r": 2}),
    "rslora": (llama, {"target_modules": ["v_proj"], "r": 4, "use_rslora": True}),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_is_dense_with_its_base_and_refused_without(case: str, tmp_path: Path) -> None:
    make, settings = DORA[case]
    model = make()
    checkpoint = checkpoint_from_module(copy.deepcopy(model))
    changes = train_and_save(model, tmp_path / "a", use_dora=True, **settings)
    vector = read_adapter(tmp_path / "a", base=checkpoint)
    assert not any(isinstance(vector.deltas[n], LowRankDelta) for n in vector.names())
    assert vector.origin.base_fingerprint == checkpoint.fingerprint()
    assert_same(vector, changes)
    with pytest.raises(RefusedError, match=r"depends on its base.*--base"):
        read_adapter(tmp_path / "a")


def test_heads_are_kept_apart_under_the_models_own_names(tmp_path: Path) -> None:
    model = gpt2(classes=3)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    changes = train_and_save(
        model, tmp_path / "a", target_modules=["c_attn"], r=2, task_type="SEQ_CLS", fan_in_fan_out=True
    )
    vector = read_adapter(tmp_path / "a")
    assert list(vector.heads) == ["score.weight"]
    assert torch.allclose(vector.heads["score.weight"], before["score.weight"] + changes["score.weight"])
    assert_same(vector, changes, heads=True)


def test_the_copy_of_an_adapted_embedding_is_no_head_but_must_be_the_bases(tmp_path: Path) -> None:
    model = llama()
    base = checkpoint_from_module(copy.deepcopy(model))
    train_and_save(model, tmp_path / "a", target_modules=["embed_tokens"], r=2)
    copies = [n for n in load_file(tmp_path / "a" / "adapter_model.safetensors") if "base_layer" in n]
    assert copies == ["base_model.model.model.embed_tokens.base_layer.weight"]
    assert not read_adapter(tmp_path / "a", base=base).heads and not read_adapter(tmp_path / "a").heads
    with pytest.raises(IncompatibleError, match="the given base has another"):
        read_adapter(tmp_path / "a", base=checkpoint_from_module(llama()))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_whole_biases_are_heads(bias: str, tmp_path: Path) -> None:
    model = gpt2()
    train_and_save(model, tmp_path / "a", target_modules=["c_attn"], r=2, bias=bias, fan_in_fan_out=True)
    vector = read_adapter(tmp_path / "a")
    merged = model.state_dict()
    expected = {n for n in merged if n.endswith(".bias") and (bias == "all" or "c_attn" in n)}
    assert set(vector.heads) == expected and expected
    assert all(torch.equal(vector.heads[n], merged[n]) for n in expected)


def test_pickled_weights_and_float16_factors_read_the_same(tmp_path: Path) -> None:
    changes = train_and_save(llama(), tmp_path / "a", target_modules=["q_proj"], r=2)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    assert_same(read_adapter(tmp_path / "a"), changes)
    assert_same(read_adapter(tmp_path / "a" / "adapter_model.bin"), changes)
    torch.save({n: t.half() for n, t in tensors.items()}, tmp_path / "a" / "adapter_model.bin")
    vector = read_adapter(tmp_path / "a")
    assert all(vector.deltas[n].dtype == torch.float32 for n in vector.names())


# Files made by hand: one module of a 6 -> 4 linear layer


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(module: str = "base_model.model.m", infix: str = "") -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A{infix}.weight": torch.randn(2, 6), f"{module}.lora_B{infix}.weight": torch.randn(4, 2)}


def test_the_adapters_own_name_is_taken_out_of_the_keys(tmp_path: Path) -> None:
    tensors = factors(infix=".default") | {"base_model.model.score.modules_to_save.default.weight": torch.ones(2, 4)}
    vector = read_adapter(adapter(tmp_path / "x", tensors))
    assert vector.names() == ["m.weight"] and list(vector.heads) == ["score.weight"]
    B, A = tensors["base_model.model.m.lora_B.default.weight"], tensors["base_model.model.m.lora_A.default.weight"]
    assert torch.allclose(vector.deltas["m.weight"].dense(), 2.0 * B @ A)


def test_name_origin_and_layout(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "style", factors(), base_model_name_or_path="org/base", fan_in_fan_out=True)
    vector = read_adapter(folder)
    assert vector.name == "style" and read_adapter(folder, name="other").name == "other"
    assert read_adapter(folder / "adapter_model.safetensors").name == "style"
    assert vector.origin.base_name == "org/base" and vector.origin.dialect == "peft"
    assert vector.origin.config["lora_alpha"] == 4 and vector.origin.file is not None
    assert vector.layouts["m.weight"] == Layout((6, 4), transposed=True)
    assert vector.deltas["m.weight"].shape == (4, 6)
    assert isinstance(vector, TaskVector)


def test_a_linear_head_among_conv1d_modules_is_not_transposed(tmp_path: Path) -> None:
    tensors = factors("base_model.model.h.0.c_attn") | factors("base_model.model.lm_head")
    vector = read_adapter(adapter(tmp_path / "x", tensors, fan_in_fan_out=True))
    assert vector.layouts["h.0.c_attn.weight"].transposed and not vector.layouts["lm_head.weight"].transposed


def bad(tmp_path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    return adapter(tmp_path / "bad", tensors, **config)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_lone_factor(part: str, tmp_path: Path) -> None:
    tensors = factors()
    missing = next(n for n in tensors if part in n)
    del tensors[missing]
    with pytest.raises(IncompatibleError, match=f"no {part}"):
        read_adapter(bad(tmp_path, tensors))


def test_ranks_that_differ(tmp_path: Path) -> None:
    tensors = factors()
    tensors["base_model.model.m.lora_B.weight"] = torch.randn(4, 3)
    with pytest.raises(IncompatibleError, match=r"ranks differ.*\(2, 6\).*\(4, 3\)"):
        read_adapter(bad(tmp_path, tensors))
    with pytest.raises(IncompatibleError, match=r"m\.lora_A\.weight.*configuration = 8, file = 2"):
        read_adapter(bad(tmp_path, factors(), r=8))


def test_a_factor_that_was_not_gathered(tmp_path: Path) -> None:
    tensors = factors()
    tensors["base_model.model.m.lora_B.weight"] = torch.empty(0)
    with pytest.raises(IncompatibleError, match="sharded training"):
        read_adapter(bad(tmp_path, tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite(value: float, tmp_path: Path) -> None:
    tensors = factors()
    tensors["base_model.model.m.lora_B.weight"][1, 1] = value
    with pytest.raises(InputError, match=r"NaN or Inf.*lora_B\.weight.*1 of 8.*adapter_model\.safetensors"):
        read_adapter(bad(tmp_path, tensors))


def test_a_head_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"score\.weight"):
        read_adapter(bad(tmp_path, factors() | {"base_model.model.score.weight": torch.full((2, 2), float("nan"))}))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("alora_invocation_tokens", [5]),
        ("kasa_config", {"beta": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("some_later_variant", True),
    ],
)
def test_settings_that_change_the_delta_are_refused_by_name(setting: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=setting):
        read_adapter(bad(tmp_path, factors(), **{setting: value}))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "PREFIX_TUNING", None])
def test_other_kinds_of_adapter(kind: str | None, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=f"peft_type = {kind}"):
        read_adapter(bad(tmp_path, factors(), peft_type=kind))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": "eight"}, "r is missing or not a number"),
        ({"rank_pattern": {"(": 3}}, "broken pattern"),
        ({"alpha_pattern": {"m": "x"}}, "something other than a number"),
        ({"alpha_pattern": [1]}, "not a map"),
    ],
)
def test_broken_settings(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_adapter(bad(tmp_path, factors(), **config))


def test_unknown_and_doubled_tensors(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="lora_E"):
        read_adapter(bad(tmp_path, factors() | {"base_model.model.m.lora_E": torch.ones(2, 1)}))
    with pytest.raises(IncompatibleError, match="several adapters: adapters = one, two"):
        read_adapter(bad(tmp_path, factors(infix=".one") | factors("base_model.model.n", infix=".two")))
    with pytest.raises(IncompatibleError, match="twice"):
        read_adapter(bad(tmp_path, factors(infix=".one") | factors()))
    with pytest.raises(IncompatibleError, match="not floating point"):
        read_adapter(bad(tmp_path, {n: t.to(torch.int8) for n, t in factors().items()}))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_adapter(tmp_path / "nowhere")
    folder = bad(tmp_path, factors())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"no adapter_config\.json beside"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="without weights"):
        read_adapter(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no adapter"):
        read_adapter(tmp_path / "empty")


def test_an_adapter_for_another_architecture_or_size(tmp_path: Path) -> None:
    base = checkpoint_from_module(llama())
    train_and_save(gpt2(), tmp_path / "a", target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    with pytest.raises(IncompatibleError, match=r"c_attn.*another architecture"):
        read_adapter(tmp_path / "a", base=base)
    other = llama()
    other.model.layers[0].self_attn.q_proj = nn.Linear(16, 20, bias=False)
    train_and_save(llama(), tmp_path / "b", target_modules=["q_proj"], r=2)
    with pytest.raises(IncompatibleError, match=r"does not fit.*\(16, 16\).*\(20, 16\)"):
        read_adapter(tmp_path / "b", base=checkpoint_from_module(other))


def test_an_adapter_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "x", factors())
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(UsageError, match="adapter, where a whole checkpoint belongs"):
            open_checkpoint(path)


def test_a_base_with_another_prefix_is_matched(tmp_path: Path) -> None:
    model = gpt2()
    train_and_save(gpt2(), tmp_path / "a", target_modules=["c_attn", "c_proj"], r=2, fan_in_fan_out=True)
    bare = {n.removeprefix("transformer."): v for n, v in model.state_dict().items()}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({n: v.clone() for n, v in bare.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    vector = read_adapter(tmp_path / "a", base=open_checkpoint(folder))
    assert vector.names()[0].startswith("transformer.h.0.")
    # this base has no config.json to say that c_proj is stored transposed; the adapter's flag does
    assert all(vector.layouts[n].transposed for n in vector.names())


def test_the_data_pack() -> None:
    root = os.environ.get("DEVEC_DATA")
    if root is None:
        pytest.skip("DEVEC_DATA does not point to the data pack")
    folders = [p for p in Path(root).glob("adapters/*/*") if (p / "adapter_config.json").is_file()]
    assert len(folders) == 18
    for folder in folders:
        vector = read_adapter(folder)
        assert vector.is_low_rank() and vector.name == folder.name and vector.origin.base_name
        stored_transposed = "gpt2" in folder.parent.name + folder.name
        assert all(vector.layouts[n].transposed == stored_transposed for n in vector.names())
    named = [[n for n in read_adapter(f).names() if "c_attn" in n] for f in folders if f.parent.name == "gpt2"]
    assert len(named) == 9 and all(set(names) == set(named[0]) for names in named)
