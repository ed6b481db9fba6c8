"""Adapters that real peft loads, with the logits of the dense edit."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from devec.core.delta import DenseDelta, LowRankDelta
from devec.core.errors import IncompatibleError, RefusedError, SideStepError
from devec.core.layout import Layout
from devec.core.provenance import InputRecord, Provenance
from devec.core.vectors import Origin, TaskVector
from devec.io.adapters import adapter_folder
from devec.io.adapters.peft_write import rank_patterns, to_peft, write_peft
from devec.io.verify import verify_output

PROVENANCE = Provenance("export", {"part": "unique:a"}, (InputRecord("a=adapters/a", kind="peft"),))
IDS = torch.arange(3, 15)[None]


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def _distilbert():
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, max_position_embeddings=32, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    )


class _Convolutions(torch.nn.Module):
    """A convolution, a linear layer whose name ends like another's, and names that look alike as patterns."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.line = torch.nn.Conv1d(6, 4, 3)
        self.fc = torch.nn.Linear(4, 4)
        self.block = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "f_c": torch.nn.Linear(4, 4)})

    def forward(self, x):
        x = self.line(self.conv(x).flatten(2)).mean(-1)
        return self.block["f_c"](torch.tanh(self.block["fc"](torch.tanh(self.fc(x)))))


def _model(make):
    """With weights of order one, so that every change shows in the logits."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.4)
    return model


def _vector(model, ranks, *, transposed=(), heads=None, config=None, embeddings=None):
    """A random factored change of ``ranks[weight name]``, in the layout in which ``model`` stores it."""
    g = torch.Generator().manual_seed(1)
    weights = dict(model.named_parameters())
    deltas, layouts = {}, {}
    for name, r in ranks.items():
        layout = Layout(tuple(weights[name].shape), transposed=any(t in name for t in transposed))
        rows, cols = layout.matrix_shape
        deltas[name] = LowRankDelta(torch.randn(rows, r, generator=g) * 0.3, torch.randn(r, cols, generator=g) * 0.3)
        layouts[name] = layout if embeddings is None else replace(layout, embedding=name in embeddings)
    raw = dict(config or {})
    return TaskVector("a", deltas, layouts, heads=heads or {}, origin=Origin("a", dialect="peft", config=raw))


def _edited(model, vector, heads=None):
    """``model`` plus the dense delta: the truth."""
    changed = copy.deepcopy(model)
    weights = dict(changed.named_parameters())
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            weights[name].add_(vector.layouts[name].to_stored(delta.dense()))
        for name, value in (heads or {}).items():
            weights[name].copy_(value)
    return changed


def _loaded(model, folder):
    """Real peft; a warning about keys that were not found (or not used) fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Found).*")
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def _out(model, x=IDS):
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def _check(tmp_path, model, vector, x=IDS, heads=None, **options):
    write_peft(tmp_path / "out", vector, provenance=PROVENANCE, heads=heads, **options)
    loaded = _loaded(model, tmp_path / "out")
    want = _out(_edited(model, vector, vector.heads if heads is None else heads), x)
    assert (want - _out(model, x)).abs().max() > 1e-2
    torch.testing.assert_close(_out(loaded, x), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_out(loaded.merge_and_unload(), x), want, atol=1e-5, rtol=1e-5)
    return json.loads((tmp_path / "out" / "adapter_config.json").read_text())


LAYER = "model.layers.{}.{}.weight"


def test_llama_with_one_rank(tmp_path):
    model = _model(_llama)
    names = [LAYER.format(i, m) for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
    config = _check(tmp_path, model, _vector(model, dict.fromkeys(names, 4), config={"task_type": "CAUSAL_LM"}))
    assert config["r"] == config["lora_alpha"] == 4 and config["rank_pattern"] == {}
    assert config["target_modules"] == [n.removesuffix(".weight") for n in names]
    assert config["task_type"] == "CAUSAL_LM" and config["use_rslora"] is False


def test_llama_with_mixed_ranks_and_a_module_of_rank_zero(tmp_path):
    model = _model(_llama)
    ranks = {
        LAYER.format(0, "self_attn.q_proj"): 2, LAYER.format(1, "self_attn.q_proj"): 5, "lm_head.weight": 3,
        LAYER.format(0, "mlp.up_proj"): 2, LAYER.format(1, "mlp.up_proj"): 0, LAYER.format(0, "mlp.gate_proj"): 20,
    }  # fmt: skip
    config = _check(tmp_path, model, _vector(model, ranks))
    assert config["r"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {
        "model.layers.0.mlp.gate_proj": 20, "model.layers.1.self_attn.q_proj": 5, "lm_head": 3,
    }  # fmt: skip
    assert "model.layers.1.mlp.up_proj" not in config["target_modules"]
    assert not any("layers.1.mlp" in n for n in load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize("mixed", [False, True], ids=["Conv1D", "Conv1D and Linear"])
def test_gpt2_stores_in_by_out(tmp_path, mixed):
    model = _model(_gpt2)
    ranks = {f"transformer.h.{i}.{m}.weight": 2 + i for i in (0, 1) for m in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")}
    if mixed:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
        model.config.tie_word_embeddings = False
        ranks["lm_head.weight"] = 3
    vector = _vector(model, ranks, transposed=("c_attn", "c_fc", "c_proj"))
    config = _check(tmp_path, model, vector)
    assert config["fan_in_fan_out"] is True
    shape = load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    ].shape
    assert shape == (2, 16)


@pytest.mark.parametrize("declared", [True, False], ids=["named by the reader", "known name"])
def test_embeddings_hold_the_transposed_delta(tmp_path, declared):
    model = _model(_llama)
    name = "model.embed_tokens.weight"
    vector = _vector(
        model, {name: 3, LAYER.format(0, "self_attn.v_proj"): 3}, embeddings=[name] if declared else None
    )
    _check(tmp_path, model, vector)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (3, 40)


def test_a_classifier_head_goes_to_modules_to_save(tmp_path):
    model = _model(_distilbert)
    g = torch.Generator().manual_seed(2)
    heads = {
        n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters() if "classifier" in n
    }  # classifier and pre_classifier
    layer = "distilbert.transformer.layer.{}.attention.{}.weight"
    ranks = {layer.format(i, m): 1 + i for i in (0, 1) for m in ("q_lin", "v_lin")}
    vector = _vector(
        model, ranks, heads=heads,
        config={"task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier", "classifier"], "use_rslora": True,
                "init_lora_weights": "pissa", "lora_alpha": 32},
    )  # fmt: skip
    config = _check(tmp_path, model, vector)
    assert set(config["modules_to_save"]) == {"pre_classifier", "classifier"}
    assert config["task_type"] == "SEQ_CLS"
    assert config["use_rslora"] is False and config["init_lora_weights"] is True


def test_without_heads_the_task_type_that_would_demand_them_is_dropped(tmp_path):
    model = _model(_distilbert)
    vector = _vector(
        model, {"distilbert.transformer.layer.0.attention.q_lin.weight": 2},
        heads={"classifier.weight": torch.ones(2, 16), "classifier.bias": torch.ones(2)},
        config={"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
    )  # fmt: skip
    config = _check(tmp_path, model, vector, heads={})
    assert config["task_type"] is None and config["modules_to_save"] is None


def test_trained_biases_beside_the_lora(tmp_path):
    model = _model(_distilbert)
    module = "distilbert.transformer.layer.0.attention.q_lin"
    heads = {f"{module}.bias": torch.randn(16), "distilbert.transformer.layer.1.ffn.lin1.bias": torch.randn(24)}
    config = _check(tmp_path, model, _vector(model, {f"{module}.weight": 2}, heads=heads))
    assert config["bias"] == "all" and config["modules_to_save"] is None
    assert f"base_model.model.{module}.base_layer.bias" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_changes_of_biases_become_lora_bias(tmp_path):
    model = _model(_distilbert)
    modules = [f"distilbert.transformer.layer.{i}.attention.q_lin" for i in (0, 1)]
    vector = _vector(model, {f"{modules[0]}.weight": 2, f"{modules[1]}.weight": 0})
    bias = f"{modules[1]}.bias"
    vector.deltas[bias] = DenseDelta(torch.randn(16, 1))
    vector.layouts[bias] = Layout((16,))
    config = _check(tmp_path, model, vector)
    assert config["lora_bias"] is True and config["target_modules"] == modules


def test_convolutions_and_look_alike_names(tmp_path):
    model = _model(_Convolutions)
    ranks = {"conv.weight": 2, "line.weight": 3, "fc.weight": 1, "block.fc.weight": 2, "block.f_c.weight": 2}
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    config = _check(tmp_path, model, _vector(model, ranks), x)
    assert config["rank_pattern"] == {"^line": 3, "^fc": 1}
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.conv.lora_B.weight"
    ].shape == (6, 2, 1, 1)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({"a.b": 4, "a.c": 4}, {}),
        ({"x.a": 4, "y.a": 4, "a": 2}, {"^a": 2}),
        ({"x.a": 2, "y.b": 4, "a": 3, "z": 4}, {"x.a": 2, "a": 3}),
        ({"a.b": 2, "a_b": 4, "c": 4}, {"^a\\.b": 2}),
        ({"m.x(1": 2, "b": 4, "c": 4}, {"^m\\.x\\(1": 2}),
    ],
)
def test_rank_patterns_name_exactly_their_modules(ranks, expected):
    assert rank_patterns(ranks, 4) == expected


def test_peft_reads_back_its_own_adapter_after_a_round_trip(tmp_path):
    """An rsLoRA trained by peft, its scale folded, written by us: the same logits."""
    model = _model(_llama)
    trained = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False),
    )
    state = {n: p.detach() for n, p in trained.named_parameters() if "lora_" in n}
    deltas, layouts = {}, {}
    for i in (0, 1):
        key = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{{}}.default.weight"
        name = LAYER.format(i, "self_attn.q_proj")
        deltas[name] = LowRankDelta(state[key.format("B")] * 6 / 2.0, state[key.format("A")])
        layouts[name] = Layout((16, 16))
    vector = TaskVector("a", deltas, layouts, origin=Origin(config={"use_rslora": True, "lora_alpha": 6, "r": 4}))
    _check(tmp_path, model, vector)
    torch.testing.assert_close(_out(_loaded(model, tmp_path / "out")), _out(trained.eval()), atol=1e-5, rtol=1e-5)


def test_a_vector_of_zeros_still_loads_and_changes_nothing(tmp_path):
    model = _model(_llama)
    vector = _vector(model, {LAYER.format(0, "self_attn.q_proj"): 0})
    dense = LAYER.format(1, "self_attn.q_proj")
    vector.deltas[dense], vector.layouts[dense] = DenseDelta(torch.zeros(16, 16)), Layout((16, 16))
    write_peft(tmp_path / "out", vector, provenance=PROVENANCE)
    assert torch.equal(_out(_loaded(model, tmp_path / "out")), _out(model))


def test_what_a_lora_cannot_hold_is_refused_with_a_remedy():
    model = _model(_llama)
    name = LAYER.format(0, "self_attn.q_proj")
    vector = _vector(model, {name: 2})
    for bad, layout in (
        (LAYER.format(1, "self_attn.q_proj"), Layout((16, 16))),
        ("model.norm.weight", Layout((16,))),
        ("cls_token", Layout((4, 4))),
        ("model.layers.1.self_attn.o_proj.bias", Layout((16,))),
    ):
        deltas = {**vector.deltas, bad: DenseDelta(torch.ones(layout.matrix_shape))}
        worse = TaskVector("a", deltas, {**vector.layouts, bad: layout}, origin=Origin(file="x.safetensors"))
        with pytest.raises(RefusedError, match=rf"\[tensor {bad}\].*--rank R.*--base") as error:
            to_peft(worse)
        assert error.value.exit_code == 5
    with pytest.raises(IncompatibleError, match="both a LoRA and a whole replacement"):
        to_peft(vector, heads={name: torch.ones(16, 16)})
    with pytest.raises(RefusedError, match="too large for float16"):
        to_peft(vector * 1e6, dtype=torch.float16)
    with pytest.raises(RefusedError, match="nothing to write"):
        to_peft(TaskVector("a", {}, {}))


def test_folder_is_deterministic_verified_and_says_its_base(tmp_path):
    model = _model(_llama)
    vector = _vector(model, {LAYER.format(0, "mlp.up_proj"): 2}, config={"base_model_name_or_path": "org/base"})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_peft(tmp_path / name / "out", vector, provenance=PROVENANCE, dtype=torch.bfloat16)
    files = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "ab"
    ]
    assert files[0] == files[1]
    assert verify_output(tmp_path / "a" / "out").checked == 7
    card = (tmp_path / "a" / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\nbase_model_relation: adapter\nlibrary_name: peft\n" in card
    tensors = load_file(tmp_path / "a" / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    with pytest.raises(RefusedError, match="exists already"):
        write_peft(tmp_path / "a" / "out", vector, provenance=PROVENANCE)


def test_a_failed_card_keeps_the_weights_unless_strict(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ValueError("no card")

    monkeypatch.setattr(adapter_folder, "model_card", broken)
    vector = _vector(_model(_llama), {"lm_head.weight": 2})
    with pytest.raises(RefusedError, match="--strict"):
        write_peft(tmp_path / "out", vector, provenance=PROVENANCE, strict=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SideStepError):
        write_peft(tmp_path / "out", vector, provenance=PROVENANCE)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
