"""Small models on disk that hold every kind of tensor, and adapters: what the laws of the engine are tried on.

``base``, ``a``, ``b``, ``c`` are folders of two shards and an index. The configuration says GPT-2, so that some
matrices are stored transposed (Conv1D). Three tensors have more than one block of rows. Any two of a kind have
directions in common and their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "transformer.wte.weight": ((8300, 32), torch.bfloat16),  # two blocks of rows
    "transformer.h.0.attn.c_attn.weight": ((24, 11000), torch.float32),  # transposed, two blocks of the file's rows
    "transformer.h.0.mlp.c_fc.weight": ((24, 40), torch.bfloat16),  # transposed
    "transformer.h.0.mlp.gate.weight": ((40, 24), torch.float64),
    "transformer.h.0.conv.weight": ((8, 4, 3, 3), torch.float16),
    "transformer.h.0.ln_1.weight": ((24,), torch.bfloat16),
    "transformer.h.0.steps": ((3,), torch.int64),
    "transformer.h.0.temperature": ((), torch.float32),
    "transformer.h.0.nothing.weight": ((0, 24), torch.float32),
    "transformer.h.0.void.weight": ((4, 0), torch.float32),
    "transformer.h.0.position": ((270_000,), torch.float16),  # one-dimensional, two blocks
}
ADAPTED = {"transformer.h.0.attn.c_attn": 3, "transformer.h.0.mlp.gate": 2, "transformer.wte": 2}
"""Module -> rank of its adapter; the last is an embedding."""


@dataclass(frozen=True)
class World:
    """Sources of a pool, and the base that a merge of them is written on: as shards, or as the one file ``out``."""

    name: str
    base: Path
    sources: tuple[Path, ...]
    out: str = "out"
    artifact: Path | None = None
    """A decomposition of the sources."""

    @property
    def words(self) -> list[str]:
        return [*map(str, self.sources), "--base", str(self.base)]


def build(folder: Path) -> list[World]:
    """Write the models below ``folder``; returns the worlds that they make up."""
    g = torch.Generator().manual_seed(0)
    base = {n: _start(shape, dtype, g) for n, (shape, dtype) in SHAPES.items()}
    common = {n: torch.randn(shape[0], 2, generator=g) for n, (shape, _) in SHAPES.items() if len(shape) >= 2}
    _save(folder / "base", base)
    for name in "abc":
        _save(folder / name, {n: _tuned(n, w, common, g) for n, w in base.items()})
    for name in ("la", "lb"):
        _adapter(folder / name, base, g)
    place = {n: folder / n for n in ("base", "a", "b", "c", "la", "lb")}
    return [
        World("checkpoints", place["base"], (place["a"], place["b"], place["c"])),
        World("adapters", place["base"], (place["la"], place["lb"])),
        World("both", place["base"], (place["a"], place["la"]), out="out.safetensors"),
    ]


def _start(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    if not dtype.is_floating_point:
        return torch.arange(3, dtype=dtype)
    return (0.05 * torch.randn(shape, generator=g)).to(dtype)


def _tuned(name: str, w: Tensor, common: dict[str, Tensor], g: torch.Generator) -> Tensor:
    if not w.is_floating_point():
        return w + 1
    change = 0.002 * torch.randn(w.shape, generator=g)
    if w.ndim >= 2:
        width = prod(w.shape[1:])
        both = common[name] + 0.1 * torch.randn(common[name].shape, generator=g)
        left = torch.cat([both, torch.randn(w.shape[0], 1, generator=g)], dim=1)
        change += 0.02 * (left @ torch.randn(3, width, generator=g)).reshape(w.shape)
    return (w.double() + change).to(w.dtype)


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    names = list(tensors)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, mine in files.items():
        save_file({n: tensors[n] for n in mine}, folder / file, {"format": "pt"})
    where = {n: file for file, mine in files.items() for n in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def _adapter(folder: Path, base: dict[str, Tensor], g: torch.Generator) -> None:
    folder.mkdir()
    tensors = {}
    for module, rank in ADAPTED.items():
        rows, columns = base[f"{module}.weight"].shape
        key = f"base_model.model.{module}"
        if module.endswith("wte"):
            tensors[f"{key}.lora_embedding_A"] = torch.randn(rank, rows, generator=g)
            tensors[f"{key}.lora_embedding_B"] = 0.02 * torch.randn(columns, rank, generator=g)
            continue
        if module.endswith("c_attn"):
            rows, columns = columns, rows
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=g)
        tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(rows, rank, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"c_attn": 3}, "fan_in_fan_out": True,
        "target_modules": sorted({m.rpartition(".")[2] for m in ADAPTED}), "base_model_name_or_path": "base",
        "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
