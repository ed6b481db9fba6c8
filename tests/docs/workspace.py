"""The small files that every snippet in README and docs may name. A snippet runs in a fresh folder that holds

    base/                        a Hugging Face folder: a tiny random Llama (2 layers, width 32), float32
    tuned/{poetry,cooking,law}/  full fine-tunes of it
    adapters/{poetry,cooking,law}/  PEFT LoRA folders of rank 4 on its q_proj and v_proj
    net.py, {poetry,law}.npz     a suite's own network, which predicts the token after a line, and such lines

Any two tasks have some directions in common, and each has its own, so that decompositions find both.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

TASKS = ("poetry", "cooking", "law")
WIDTH, HIDDEN, LAYERS, VOCABULARY, RANK = 32, 64, 2, 64, 4
NET = """
from transformers import LlamaConfig, LlamaForCausalLM

class LastToken(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask).logits[:, -1]

def build(state, config):
    net = LastToken(LlamaConfig(**config))
    net.load_state_dict(state)
    return net
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def build(folder: Path) -> None:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        head = f"model.layers.{layer}"
        shapes |= {f"{head}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{head}.mlp.{part}_proj.weight": (HIDDEN, WIDTH) for part in ("gate", "up")}
        shapes[f"{head}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{head}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
    shapes["model.norm.weight"] = (WIDTH,)
    base = {n: torch.ones(s) if len(s) == 1 else 0.2 * normal(*s) for n, s in shapes.items()}
    write_model(folder / "base", base)

    # Two columns in common (a little apart from task to task), two of each task's own.
    common = {name: normal(shape[0], 2) for name, shape in shapes.items() if len(shape) == 2}
    for task in TASKS:
        factors = {}
        for name, both in common.items():
            near = both + 0.2 * normal(*both.shape)
            factors[name] = (
                torch.cat([near, normal(len(both), RANK - 2)], dim=1) / len(both) ** 0.5,
                0.05 * normal(RANK, shapes[name][1]),
            )
        write_model(folder / "tuned" / task, {n: w + delta(factors, n, w) for n, w in base.items()})
        write_adapter(folder / "adapters" / task, factors)


    (folder / "net.py").write_text(NET)
    for seed, task in enumerate(("poetry", "law")):
        lines = np.random.default_rng(seed).integers(1, VOCABULARY, (40, 6))
        x, y = lines[:, :5], lines[:, 5]
        np.savez(folder / f"{task}.npz", x_train=x, y_train=y, x_test=x, y_test=y)


def delta(factors: dict[str, tuple[Tensor, Tensor]], name: str, like: Tensor) -> Tensor:
    if name not in factors:
        return torch.zeros_like(like)
    B, A = factors[name]
    return B @ A


def write_model(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))


def write_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    folder.mkdir(parents=True)
    tensors = {}
    for name, (B, A) in factors.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_B.weight"] = B.contiguous()
            tensors[f"{module}.lora_A.weight"] = A.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
