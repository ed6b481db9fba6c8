"""LoRA files in diffusers keys (Stable Diffusion and its successors), three generations of spelling.

One module has one canonical name, ``<component>.<module>.weight``, however it is spelt:

=====================================================  ==========================================
``unet.M.attn1.to_k.lora.down.weight``                 ``unet.M.attn1.to_k.weight``
``[unet.]M.attn1.processor.to_k_lora.down.weight``     ``unet.M.attn1.to_k.weight``
``[unet.]M.attn1.processor.to_out_lora.up.weight``     ``unet.M.attn1.to_out.0.weight``
``unet.M.attn1.to_k.lora_A.weight``                    ``unet.M.attn1.to_k.weight``
``text_encoder.M.self_attn.to_q_lora.down.weight``     ``text_encoder.M.self_attn.q_proj.weight``
``text_encoder.M.q_proj.lora_linear_layer.up.weight``  ``text_encoder.M.q_proj.weight``
=====================================================  ==========================================

``Delta = (alpha / r) up down``; without a stored alpha the scale is 1. Newer files carry alpha and rank in the
``lora_adapter_metadata`` of the header, as PEFT settings by component.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from devec.core.delta import Delta
from devec.core.errors import IncompatibleError, InputError, RefusedError
from devec.core.layout import Layout
from devec.core.vectors import Origin, TaskVector
from devec.io.adapters.factors import Fit, check_rank, product, read_finite
from devec.io.adapters.peft_config import PeftConfig
from devec.io.checkpoint import Checkpoint
from devec.io.dialect import TensorFile

_COMPONENT = re.compile(r"^(unet|text_encoder(?:_\d)?|transformer|prior)\.")
_BARE_UNET = re.compile(r"^(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\.")
_DOWN, _UP = "down", "up"
_FACTOR = re.compile(
    r"^(?P<module>.+?)"
    r"(?P<style>\.lora_linear_layer\.|\.lora\.|_lora\.|\.lora_)"
    r"(?P<factor>down|up|A|B)(?:\.(?!weight$)[^.]+)?\.weight$"
)
_ALPHA = re.compile(r"^(?P<module>.+?)(?:\.lora_linear_layer|\.lora|_lora)?\.(?:network_)?alpha$")
_DORA = re.compile(r"(lora_magnitude_vector|dora_scale)")
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class _Pair:
    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def read_diffusers(
    file: TensorFile, *, name: str, reference: str, base: Checkpoint | None, dtype: torch.dtype
) -> TaskVector:
    """The task vector of one file in diffusers keys."""
    pairs = _pairs(file)
    settings = _settings(file)
    fit = Fit(base, list(pairs), file.path)
    deltas: dict[str, Delta] = {}
    layouts: dict[str, Layout] = {}
    for canonical, pair in pairs.items():
        if pair.down is None or pair.up is None:
            raise IncompatibleError(
                f"{canonical} has no {'down' if pair.down is None else 'up'} factor",
                tensor=pair.up or pair.down or pair.alpha,
                file=file.path,
                remedy="The adapter is incomplete; get it again.",
            )
        component, module = canonical.removesuffix(".weight").split(".", 1)
        config = settings.get(component)
        down, up = check_rank(file, pair.down, pair.up, config.rank(module) if config else None)
        scale = _scale(file, pair.alpha, down.shape[0]) if config is None else config.scale(module)
        A, B = read_finite(file, pair.down, dtype), read_finite(file, pair.up, dtype)
        deltas[canonical] = product(A, B, scale)
        layouts[canonical] = fit.layout(canonical, _layout(up.shape, down.shape, fit, canonical))
    origin = Origin(
        reference=reference,
        file=str(file.path),
        dialect="diffusers",
        config={part: dict(config.raw) for part, config in settings.items()},
    )
    return TaskVector(name=name, deltas=deltas, layouts=layouts, origin=origin, partial=True)


def _layout(up: tuple[int, ...], down: tuple[int, ...], fit: Fit, name: str) -> Layout:
    shape = (up[0], *down[1:])
    if fit.base is not None and len(shape) == 2 and fit.base.info(fit.names[name]).shape == (*shape, 1, 1):
        # Stable Diffusion 1 stores proj_in and proj_out as 1 x 1 convolutions; some trainers write plain matrices
        shape = (*shape, 1, 1)
    return Layout(shape)


def _scale(file: TensorFile, alpha: str | None, rank: int) -> float:
    if alpha is None:
        return 1.0
    value = read_finite(file, alpha)
    if value.numel() != 1:
        raise InputError("alpha is not one number", tensor=alpha, values={"shape": tuple(value.shape)}, file=file.path)
    return float(value) / rank


def _pairs(file: TensorFile) -> dict[str, _Pair]:
    pairs: dict[str, _Pair] = {}
    alphas: dict[str, str] = {}
    for key in file.names():
        if _DORA.search(key):
            raise RefusedError(
                "a DoRA in diffusers keys is not read", tensor=key, file=file.path, remedy="Use a plain LoRA."
            )
        match = _FACTOR.match(key)
        if match is None:
            alpha = _ALPHA.match(key)
            if alpha is None:
                raise IncompatibleError(
                    "a tensor of an adapter in diffusers keys that is not a LoRA factor", tensor=key, file=file.path
                )
            alphas[_canonical(alpha["module"], key, file)] = key
            continue
        canonical = _canonical(match["module"], key, file)
        pair = pairs.setdefault(canonical, _Pair())
        side = _DOWN if match["factor"] in ("down", "A") else _UP
        if getattr(pair, side) is not None:
            raise IncompatibleError(
                f"two tensors are the {side} factor of {canonical}", tensor=key,
                values={"also": getattr(pair, side)}, file=file.path,
            )  # fmt: skip
        setattr(pair, side, key)
    for canonical, key in alphas.items():
        pairs.setdefault(canonical, _Pair()).alpha = key
    return pairs


def _canonical(module: str, key: str, file: TensorFile) -> str:
    found = _COMPONENT.match(module)
    if found is not None:
        component, rest = found.group(1), module[found.end() :]
    elif _BARE_UNET.match(module):
        component, rest = "unet", module
    elif re.match(r"^\w*transformer_blocks\.", module):
        component, rest = "transformer", module
    elif module.startswith("text_model."):
        component, rest = "text_encoder", module
    else:
        raise IncompatibleError("it is not clear which part of the model this belongs to", tensor=key, file=file.path)
    rest = rest.removeprefix("base_model.model.").replace(".processor.", ".")
    parent, _, leaf = rest.rpartition(".")
    if component.startswith("text_encoder"):
        leaf = _TEXT_PROJECTIONS.get(leaf, leaf)
    elif leaf == "to_out":
        leaf = "to_out.0"
    return f"{component}.{parent + '.' if parent else ''}{leaf}.weight"


def _settings(file: TensorFile) -> dict[str, PeftConfig]:
    """PEFT settings by component, from the header's ``lora_adapter_metadata`` where a file has it."""
    text = file.metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        flat: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"lora_adapter_metadata is not valid JSON: {error}", file=file.path) from None
    if not isinstance(flat, Mapping):
        raise InputError("lora_adapter_metadata is not a JSON object", file=file.path)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, setting = str(key).partition(".")
        parts.setdefault(component, {})[setting] = value
    return {part: PeftConfig({"peft_type": "LORA", **raw}, file.path) for part, raw in parts.items()}
