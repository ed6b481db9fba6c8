"""The models of tests/golden: made anew from a seed on either side, so that none is stored. Needs numpy alone.

``base`` and ``a`` to ``i``: Llama-shaped checkpoints of 3 layers and width 8 in float32. ``d`` moves against ``a``;
``e``, ``f`` and ``g`` move much alike, ``h`` and ``i`` too but hardly. The stream of ``RandomState`` is frozen: every
numpy makes the same numbers.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

WIDTH, INNER, VOCABULARY, LAYERS = 8, 12, 16, 3
Tensors = dict[str, np.ndarray]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "max_position_embeddings": 32, "torch_dtype": "float32",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        head = f"model.layers.{i}"
        out |= {f"{head}.self_attn.{x}_proj.weight": (WIDTH // 2 if x in "kv" else WIDTH, WIDTH) for x in "qkvo"}
        out |= {f"{head}.mlp.{x}_proj.weight": (INNER, WIDTH) for x in ("gate", "up")}
        out[f"{head}.mlp.down_proj.weight"] = (WIDTH, INNER)
        out |= {f"{head}.{x}_layernorm.weight": (WIDTH,) for x in ("input", "post_attention")}
    return {**out, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def models() -> dict[str, Tensors]:
    random = np.random.RandomState(20)
    base = {n: 0.3 * random.standard_normal(s) + (len(s) == 1) for n, s in shapes().items()}
    common = {n: random.standard_normal(s) for n, s in shapes().items()}
    found = {"base": base}
    for name, size, alike in (("a", 0.1, 0.5), ("b", 0.15, 0.5), ("c", 0.05, 0.5), *((x, 0.1, 2.0) for x in "efg")):
        own = {n: random.standard_normal(s) for n, s in shapes().items()}
        found[name] = {n: base[n] + size * (alike * common[n] + own[n]) for n in base}
    found["d"] = {
        n: base[n] - 0.7 * (x - base[n]) + 0.05 * random.standard_normal(x.shape) for n, x in found["a"].items()
    }
    for name in "hi":
        found[name] = {n: base[n] + 1e-5 * (2 * common[n] + random.standard_normal(common[n].shape)) for n in base}
    return {name: {n: x.astype(np.float32) for n, x in tensors.items()} for name, tensors in found.items()}


def write(folder: Path) -> None:
    """The checkpoints as folders that any program reads."""
    for name, tensors in models().items():
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(CONFIG))
        write_safetensors(place / "model.safetensors", tensors)


def write_safetensors(file: Path, tensors: Tensors) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for n, x in tensors.items():
        header[n] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values()))


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([np.asarray(tensors[n], dtype=np.float32).ravel() for n in shapes()])


def parted(values: np.ndarray) -> Tensors:
    """The tensors of what :func:`flat` has put together."""
    ends = np.cumsum([int(np.prod(s)) for s in shapes().values()])
    return {n: x.reshape(s) for (n, s), x in zip(shapes().items(), np.split(values, ends[:-1]), strict=True)}
