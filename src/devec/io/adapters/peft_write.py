"""A task vector as a PEFT LoRA folder that ``PeftModel.from_pretrained`` loads as it is.

The scale of a delta is folded into its factors, so the adapter is a plain LoRA with ``lora_alpha = r`` (scale 1),
module by module where ranks differ. Nothing of the input's own scaling or initialisation is carried over: rsLoRA
would multiply again, and initialisers such as PiSSA would change the base on loading.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from devec.core.delta import Delta, LowRankDelta
from devec.core.errors import RefusedError
from devec.core.layout import Layout
from devec.core.provenance import Provenance
from devec.core.vectors import TaskVector
from devec.io.adapters.adapter_folder import AdapterFiles, FolderOptions, write_adapter_folder
from devec.io.adapters.peft_heads import saved_modules, usable_task_type
from devec.io.model_folder import WrittenModel
from devec.io.records import dump_json
from devec.io.rounding import cast

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_CARRIED = ("auto_mapping", "revision", "lora_dropout")
_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|embed_tokens|embed_positions|embed_in|tok_embeddings|shared|"
    r"(word|position|token_type)_embeddings)$"
)
"""Modules that Hugging Face models implement as ``nn.Embedding``; used only where no adapter says so itself."""

_REMEDY = "Give a rank (--rank R or --energy E), or --base to write a checkpoint."


@dataclass(frozen=True)
class PeftAdapter:
    """The two files of an adapter in memory: ``tensors`` under PEFT's keys, and ``config``."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, object]
    notes: tuple[str, ...] = ()


@dataclass
class _Modules:
    """LoRA modules by name: stored-orientation factors, and what the configuration must say of them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    empty: dict[str, Callable[[], None]] = field(default_factory=dict)  # rank 0: makes a zero LoRA on demand
    outputs: dict[str, int] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    transposed: bool = False
    convolutions: bool = False


def to_peft(
    vector: TaskVector,
    *,
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    embeddings: Collection[str] | None = None,
) -> PeftAdapter:
    """The adapter whose loading adds exactly ``vector`` to its base.

    Math        delta(module) = lora_B lora_A, scale lora_alpha / r = 1
    Keys        ``a.b.weight`` -> ``base_model.model.a.b.lora_{A,B}.weight`` (embeddings: ``lora_embedding_{A,B}``)
    Shapes      lora_A (r, in), lora_B (out, r); convolutions (r, in, k...), (out, r, 1...); embeddings hold the
                transposed delta: lora_embedding_A (r, rows), lora_embedding_B (dim, r)
    Left out    modules of rank 0; if that is all of them they are kept as zeros of rank 1, so that it still loads
    ``heads``   whole tensors for ``modules_to_save``; default the vector's own, ``{}`` for none
    ``dtype``   of the LoRA factors; heads keep theirs
    ``embeddings`` names of embedding tensors; default what the tensor's layout says, else well-known module names

    Raises :class:`RefusedError` for a nonzero delta that a LoRA cannot hold (dense, sparse, or of a bare parameter).
    """
    config = vector.origin.config
    heads = vector.heads if heads is None else heads
    is_embedding = _embedding_rule(vector, embeddings)
    modules, biases = _Modules(), {}
    for name, delta in vector.deltas.items():
        layout = vector.layouts[name]
        module, _, parameter = name.rpartition(".")
        if layout.is_vector or parameter != "weight" or not module:
            if delta.norm() > 0:
                if parameter != "bias" or not layout.is_vector:
                    raise _refused("a LoRA cannot hold a change of this tensor", name, vector, layout)
                biases[name] = delta
            continue
        if not isinstance(delta, LowRankDelta):
            if delta.norm() > 0:
                raise _refused("the change is not low-rank, and a LoRA must be", name, vector, layout)
            rows, cols = delta.shape
            delta = LowRankDelta(torch.zeros(rows, 0), torch.zeros(0, cols))
        _add_module(modules, module, name, delta, layout, dtype, is_embedding(name))
    _add_biases(modules, biases, vector, dtype)
    if not modules.ranks:
        if not modules.empty:
            raise RefusedError(
                "there is nothing to write: no tensor is shared, or none is left", values={"vector": vector.name}
            )
        for make in modules.empty.values():
            make()
    targets = list(modules.ranks)
    saved, head_tensors, trained_bias = saved_modules(heads, config, targets)
    rank = Counter(modules.ranks.values()).most_common(1)[0][0]
    patterns = rank_patterns(modules.ranks, rank)
    if modules.transposed and modules.convolutions:
        raise RefusedError(
            "peft cannot load one LoRA for both Conv1D and convolution layers",
            values={"vector": vector.name}, remedy="Leave one kind out with --exclude.",
        )
    written: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": usable_task_type(config.get("task_type"), saved),
        "base_model_name_or_path": base_model or vector.origin.base_name or config.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        # One flag for all layers: peft itself turns it off at each nn.Linear and on at each Conv1D.
        "fan_in_fan_out": modules.transposed,
        "modules_to_save": saved or None,
        "bias": "all" if trained_bias else "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    if biases:
        written["lora_bias"] = True
    written |= {key: config[key] for key in _CARRIED if config.get(key) is not None}
    tensors = {**modules.tensors, **head_tensors}
    left_out = [m for m in modules.empty if m not in modules.ranks]
    notes = (f"{len(left_out)} modules of rank 0 are left out: {', '.join(left_out[:4])}",) if left_out else ()
    return PeftAdapter(tensors, written, notes)


def _add_module(
    modules: _Modules, module: str, name: str, delta: LowRankDelta, layout: Layout, dtype: torch.dtype, embedding: bool
) -> None:
    B, A = delta.B, delta.A
    if embedding:
        stored = delta.transpose() if layout.transposed else delta  # rows x dim, as nn.Embedding holds it
        B, A = stored.A.T, stored.B.T
        keys = (f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B")
        modules.embeddings.add(module)
    else:
        keys = (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight")
        modules.transposed |= layout.transposed
        modules.convolutions |= len(layout.shape) > 2
    modules.outputs[module] = B.shape[0]

    def put(A: Tensor, B: Tensor) -> None:
        r = A.shape[0]
        if len(layout.shape) > 2:
            A = A.reshape(r, *layout.shape[1:])
            B = B.reshape(B.shape[0], r, *[1] * (len(layout.shape) - 2))
        modules.tensors[keys[0]] = cast(name, A.contiguous(), dtype)
        modules.tensors[keys[1]] = cast(name, B.contiguous(), dtype)
        modules.ranks[module] = r

    if A.shape[0] == 0:
        modules.empty[module] = lambda: put(torch.zeros(1, A.shape[1]), torch.zeros(B.shape[0], 1))
    else:
        put(A, B)


def _add_biases(modules: _Modules, biases: Mapping[str, Delta], vector: TaskVector, dtype: torch.dtype) -> None:
    """Changes of biases ride on ``lora_B.bias``, which peft gives to every module of the adapter or to none."""
    if not biases:
        return
    for name in biases:
        module = name.removesuffix(".bias")
        if module in modules.empty and module not in modules.ranks:
            modules.empty[module]()
        if module not in modules.ranks or modules.embeddings:
            raise _refused("a LoRA cannot hold a change of this bias", name, vector, vector.layouts[name])
    for module in modules.ranks:
        delta = biases.get(f"{module}.bias")
        value = torch.zeros(modules.outputs[module]) if delta is None else delta.dense().reshape(-1)
        modules.tensors[f"{PREFIX}{module}.lora_B.bias"] = cast(f"{module}.bias", value.contiguous(), dtype)


def rank_patterns(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """``rank_pattern`` for the modules whose rank is not ``default``.

    peft takes the first key that matches the end of a module's name, as a regular expression. Plain names, longest
    first, are what every reader of the format understands; where one would catch another module as well (``fc``
    inside ``block.fc``, ``a.b`` for ``a_b``), all keys are escaped and anchored.
    """
    special = sorted((m for m in ranks if ranks[m] != default), key=lambda m: (-len(m), m))
    plain = {m: ranks[m] for m in special}
    if all(_resolve(plain, m, default) == r for m, r in ranks.items()):
        return plain
    return {f"^{re.escape(m)}": ranks[m] for m in special}


def _resolve(patterns: Mapping[str, int], module: str, default: int) -> int:
    for key, rank in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return rank
        except re.error:
            return -1
    return default


def _embedding_rule(vector: TaskVector, embeddings: Collection[str] | None) -> Callable[[str], bool]:
    if embeddings is not None:
        known = frozenset(embeddings)
        return lambda name: name in known

    def rule(name: str) -> bool:
        said = vector.layouts[name].embedding
        return _EMBEDDING.search(name.removesuffix(".weight")) is not None if said is None else said

    return rule


def _refused(what: str, name: str, vector: TaskVector, layout: Layout) -> RefusedError:
    values: dict[str, object] = {"vector": vector.name, "shape": layout.shape}
    return RefusedError(what, tensor=name, values=values, file=vector.origin.file, remedy=_REMEDY)


def write_peft(
    out: Path,
    vector: TaskVector,
    *,
    provenance: Provenance,
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    embeddings: Collection[str] | None = None,
    **options: Unpack[FolderOptions],
) -> WrittenModel:
    """Write ``vector`` as an adapter folder: weights, configuration, card, and ``.devec/``. See :func:`to_peft`."""
    files = peft_files(vector, heads=heads, dtype=dtype, base_model=base_model, embeddings=embeddings)
    return write_adapter_folder(Path(out), files, provenance, **options)


def peft_files(
    vector: TaskVector,
    *,
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    embeddings: Collection[str] | None = None,
) -> AdapterFiles:
    """What the folder holds: see :func:`to_peft`."""
    adapter = to_peft(vector, heads=heads, dtype=dtype, base_model=base_model, embeddings=embeddings)
    base = adapter.config["base_model_name_or_path"]
    return AdapterFiles(
        WEIGHTS, adapter.tensors, "peft", base_model=str(base) if base else None,
        others={CONFIG: dump_json(adapter.config)}, notes=adapter.notes,
    )
