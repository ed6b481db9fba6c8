"""Llama-shaped checkpoints of a wanted size: a base and fine-tunes of it, full rank, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

from devec.io.generated import Change, GeneratedModel, llama_shapes
from devec.io.shards import DEFAULT_SHARD_SIZE, ShardWriter, plan_shards

TASKS = ("task-a", "task-b", "task-c", "task-d")
CHANGE = Change(rank=16, shared=4)
STAMP = "generated.json"

# (bytes from which on, hidden, intermediate, vocabulary, heads, key-value heads); the first is TinyLlama 1.1B's
WIDTHS = (
    (1_500_000_000, 2048, 5632, 32000, 32, 4),
    (250_000_000, 1024, 2816, 32000, 16, 4),
    (20_000_000, 512, 1408, 8000, 8, 4),
    (0, 128, 352, 1000, 4, 2),
)


@dataclass(frozen=True)
class Llama:
    """The shape of a generated model."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int

    def shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
        return llama_shapes(**asdict(self))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return 2 * sum(map(prod, self.shapes()[0].values()))


def llama_of(size: int) -> Llama:
    """The shallowest model of the fitting width whose bfloat16 tensors have at least ``size`` bytes."""
    _, hidden, intermediate, vocab, heads, kv_heads = next(w for w in WIDTHS if size >= w[0])
    candidates = (Llama(hidden, intermediate, layers, vocab, heads, kv_heads) for layers in count(1))
    return next(model for model in candidates if model.bytes >= size)


def write_folder(model: GeneratedModel, folder: Path, shard_size: int = DEFAULT_SHARD_SIZE) -> None:
    """A Hugging Face folder of weights and ``config.json``; memory: one tensor."""
    folder.mkdir(parents=True)
    entries = [(name, model.info(name)) for name in model.names()]
    writer = ShardWriter(folder, plan_shards(entries, shard_size))
    try:
        for name in writer.names:
            writer.put(name, model.get(name))
        writer.close()
    except BaseException:
        writer.abort()
        raise
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def write_family(
    shape: Llama, folder: Path, shard_size: int = DEFAULT_SHARD_SIZE, *, say: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """``base`` and its four fine-tunes below ``folder``; what an earlier run left complete is taken as it is."""
    shapes, config = shape.shapes()
    base = GeneratedModel(shapes, config=config)
    stamp = {"llama": asdict(shape), "change": asdict(CHANGE), "tasks": list(TASKS), "shard_size": shard_size}
    wanted = json.dumps(stamp, indent=1) + "\n"
    found = [folder / model for model in ("base", *TASKS)]
    if (folder / STAMP).is_file() and (folder / STAMP).read_text() == wanted:
        return found
    shutil.rmtree(folder, ignore_errors=True)  # half a family
    for path, model in zip(found, [base, *(base.fine_tune(task, CHANGE) for task in TASKS)], strict=True):
        say(f"generating {path.name}, {shape.bytes / 1e9:.2f} GB")
        write_folder(model, path, shard_size)
    (folder / STAMP).write_text(wanted)  # last: a folder with a stamp is complete
    return found


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
