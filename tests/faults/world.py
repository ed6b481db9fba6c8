"""Models small enough to be written some thousand times, and the commands that are tried on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Width of the matrices, number of layers (three matrices and a vector each, and an embedding), bytes per file,
    rank of the changes (of rank 1, chance is a formula; otherwise it is drawn, which takes a third of a second)."""

    width: int
    layers: int
    shard: str
    rank: int


TINY = Size(16, 1, "3KB", 1)
"""A run of about a hundred calls that change the disk."""

SMALL = Size(96, 12, "300KB", 4)
"""49 tensors in 9 files: a run of a few tenths of a second."""


@dataclass(frozen=True)
class Case:
    """A command, ``words`` without ``-o``. With ``old`` an older output stands in its place, and ``--overwrite`` is
    given; without ``swap`` the system cannot exchange two paths in one step. ``begun`` is the call in which an earlier
    run was killed that is now resumed. ``like`` names a case that does most of the same calls."""

    name: str
    words: tuple[str, ...]
    out: str = "out"
    old: bool = False
    swap: bool = True
    begun: str | None = None
    like: str | None = None

    def command(self, *more: str) -> list[str]:
        mine = [*(["--overwrite"] if self.old else []), *(["--resume"] if self.begun else [])]
        return [*self.words, "-o", self.out, *mine, *more]


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    n = size.width
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (2 * n, n)}
    for i in range(size.layers):
        layer = f"model.layers.{i}"
        found[f"{layer}.self_attn.q_proj.weight"] = (n, n)
        found[f"{layer}.mlp.up_proj.weight"] = (2 * n, n)
        found[f"{layer}.mlp.down_proj.weight"] = (n, 2 * n)
        found[f"{layer}.input_layernorm.weight"] = (n,)
    return found


def build(folder: Path, size: Size) -> None:
    """``base``, fine-tunes ``a`` and ``b``, LoRAs ``la`` and ``lb``, ``style.safetensors`` and ``ink.safetensors``."""
    g = torch.Generator().manual_seed(size.width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    base = {n: normal(*s) for n, s in shapes(size).items()}
    own = size.rank // 2
    common = {n: normal(s[0], size.rank - own) for n, s in shapes(size).items() if len(s) == 2}

    def columns(n: str) -> Tensor:
        """Half in common with the other vector but for a little, half of its own."""
        near = common[n] + 0.1 * normal(*common[n].shape)
        return torch.cat([near, normal(near.shape[0], own)], dim=1)

    checkpoint(folder / "base", base, shards=2)
    for name in "ab":
        tuned = {}
        for n, w in base.items():
            if w.ndim == 1:
                tuned[n] = w + 0.01 * normal(*w.shape)
            else:
                tuned[n] = w + columns(n) @ (0.02 * normal(size.rank, w.shape[1]))
        checkpoint(folder / name, tuned, shards=1)
    for name, other in (("la", "style"), ("lb", "ink")):
        factors = {
            n: (columns(n), 0.1 * normal(size.rank, s[1]))
            for n, s in shapes(size).items()
            if len(s) == 2 and "embed" not in n
        }
        lora(folder / name, factors)
        keys = {
            f"unet.down_blocks.0.attentions.{i}.transformer_blocks.0.attn1.to_q.lora_{x}.weight": t
            for i, (B, A) in enumerate(factors.values())
            for x, t in (("A", A), ("B", B))
        }
        save_file({k: t.contiguous() for k, t in keys.items()}, folder / f"{other}.safetensors")


def checkpoint(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lora(folder: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    folder.mkdir(parents=True)
    tensors = {}
    for name, (B, A) in factors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = A.contiguous(), B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    rank = next(iter(factors.values()))[0].shape[1]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": "org/base", "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


PREPARATIONS = (
    ["decompose", "a", "b", "--base", "base", "-o", "parts"],
    ["decompose", "la", "lb", "-o", "lora-parts"],
)
"""Commands that make what the cases read beside the models."""


def cases(world: Path, size: Size, workers: int) -> list[Case]:
    """Every command that writes, in every form of output, new and over an old one."""
    base, a, b, la, lb, parts, lora_parts = (
        str(world / n) for n in ("base", "a", "b", "la", "lb", "parts", "lora-parts")
    )
    style, ink = (str(world / f"{n}.safetensors") for n in ("style", "ink"))
    run = ("--workers", str(workers))
    shards = ("--shard-size", size.shard)
    merge = ("merge", "--method", "task-arithmetic", "--base", base, a, b, "--set", "scale=0.4", *shards, *run)
    split = ("decompose", a, b, "--base", base, *run)
    lora = ("extract", "--base", base, "--model", a, "--rank", "2", *run)
    third = "write out.partial-run/.run/journal.jsonl #3"
    return [
        Case("merge over", merge, old=True),
        Case("merge", merge, like="merge over"),
        Case("merge over, no exchange", merge, old=True, swap=False, like="merge over"),
        Case("merge resumed", merge, begun=third),
        Case("merge over a file", merge, out="out.safetensors", old=True),
        Case("merge to a file", merge, out="out.safetensors", like="merge over a file"),
        Case("decompose over", split, old=True),
        Case("decompose", split, like="decompose over"),
        Case("decompose resumed", split, begun=third),
        Case("decompose LoRA", ("decompose", la, lb, *run), like="decompose over"),
        Case("export to a model", ("export", f"{parts}#unique:a", "--base", base, *shards, *run)),
        Case("export LoRA", ("export", f"{lora_parts}#unique:la", *run)),
        Case("apply", ("apply", "--base", base, "--add", "0.5", la, "--subtract", "0.3", lb, *shards, *run)),
        Case("extract", ("extract", "--base", base, "--model", a, *run)),
        Case("extract LoRA", lora),
        Case("extract LoRA resumed", lora, begun=third),
        Case("mix over", ("mix", la, lb, *run), old=True),
        Case("mix", ("mix", la, lb, *run), like="mix over"),
        Case("mix over, no exchange", ("mix", la, lb, *run), old=True, swap=False, like="mix over"),
        Case("mix to a file", ("mix", style, ink, *run), out="out.safetensors"),
    ]


CASES = tuple(case.name for case in cases(Path(), TINY, 1))


def older(case: Case, folder: Path) -> None:
    """An output of another run where ``case``'s will stand: a file, or a folder with some files of the same names."""
    out = folder / case.out
    if out.suffix:
        out.write_bytes(b"older" * 1000)
        return
    (out / ".devec").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "README.md", "extra.bin", ".devec/manifest.json"):
        (out / name).write_bytes(b"older " * 500 + name.encode())
