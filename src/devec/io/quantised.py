"""Quantised checkpoints, refused by the name of what made them: their stored numbers are not weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from devec.core.contracts import TensorInfo
from devec.core.errors import RefusedError

_BY_NAME: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("GPTQ", re.compile(r"\.g_idx$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros)$")),
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|SCB|weight_format)$")),
    ("bitsandbytes", re.compile(r"\.quant_state\.|\.bitsandbytes__")),
    ("FP8", re.compile(r"\.(weight_scale_inv|weight_scale|input_scale)$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
    ("HQQ or Quanto", re.compile(r"\.(W_q|weight\._data|weight\._scale)$")),
)  # fmt: skip
_FP8 = tuple(v for n, v in vars(torch).items() if n.startswith("float8_") and isinstance(v, torch.dtype))
_PACKED = re.compile(r"(weight|_blocks|_scales)$")


class _Named(Protocol):
    config: dict[str, Any] | None

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def file_of(self, name: str) -> str: ...


def refuse_quantised(source: _Named, reference: str) -> None:
    """Raises RefusedError (exit 5) for a quantised checkpoint, naming the kind and a tensor that shows it."""
    refuse_declared(source.config or {}, reference)
    for name in source.names():
        for kind, pattern in _BY_NAME:
            if pattern.search(name):
                raise _refusal(kind, "its tensor names", name, source.file_of(name))
        info = source.info(name)
        if info.dtype in _FP8:
            raise _refusal("FP8", f"dtype {info.dtype}", name, source.file_of(name))
        if info.dtype in (torch.uint8, torch.int8) and len(info.shape) >= 2 and _PACKED.search(name):
            kind = "packed integers (bitsandbytes or MXFP4?)"
            raise _refusal(kind, f"dtype {info.dtype}", name, source.file_of(name))


def refuse_declared(config: Mapping[str, Any], reference: str) -> None:
    """The same for what a configuration says of itself, before any weights are there."""
    declared = config.get("quantization_config")
    if declared:
        method = declared.get("quant_method") if isinstance(declared, Mapping) else None
        raise _refusal(str(method or "an unnamed method"), "quantization_config in config.json", None, reference)


def _refusal(kind: str, evidence: str, tensor: str | None, file: str) -> RefusedError:
    return RefusedError(
        f"a checkpoint quantised by {kind} is not read: its stored numbers are not weights",
        tensor=tensor,
        values={"seen in": evidence},
        file=file,
        remedy="Use the unquantised checkpoint, or dequantise it first.",
    )
