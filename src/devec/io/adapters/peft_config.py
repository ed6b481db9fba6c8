"""``adapter_config.json`` of PEFT: the scale of each module, and the settings under which ``B A`` is not the delta."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from devec.core.errors import InputError, RefusedError

_CHANGES_THE_DELTA = {
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "single parameters (mixture-of-experts stacks) are adapted",
    "trainable_token_indices": "single rows of an embedding are replaced",
    "use_qalora": "inputs are pooled by group before A",
    "use_bdlora": "the factors are block-diagonal",
    "arrow_config": "several adapters are routed by token",
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "monteclora_config": "the factors are sampled",
    "kasa_config": "a diagonal stands between the factors",
    "enable_lora": "only some of a fused projection's parts are adapted",
}
"""LoRA settings that are not read, each with what it does to the weights."""

_RESIDUAL_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that subtract the first ``B A`` from the base: the delta is then ``B A`` minus what it began as."""

_KNOWN = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save peft_type
    peft_version qalora_group_size r rank_pattern revision runtime_config target_modules target_modules_to_tie
    task_type use_dora use_rslora velora_config merge_weights""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA configuration that has been checked; ``raw`` is the file's own content."""

    raw: Mapping[str, Any]
    file: Path

    def __post_init__(self) -> None:
        kind = str(self.raw.get("peft_type", "")).upper()
        if kind != "LORA":
            raise RefusedError(
                "only LoRA adapters of PEFT are read",
                values={"peft_type": self.raw.get("peft_type")},
                file=self.file,
                remedy="Merge it into its base with peft, and extract the difference.",
            )
        self._refuse_variants()
        for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
            value = self.raw.get(key)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InputError(f"{key} is missing or not a number", values={key: value}, file=self.file)
        for key in ("rank_pattern", "alpha_pattern"):
            self._check_pattern(key)

    def _refuse_variants(self) -> None:
        for key, effect in _CHANGES_THE_DELTA.items():
            if self.raw.get(key):
                raise self._unread(key, effect)
        init = str(self.raw.get("init_lora_weights", True)).lower()
        if init.startswith(_RESIDUAL_INIT):
            raise self._unread("init_lora_weights", "the base was changed when training began, so B A is not the delta")
        for key, value in self.raw.items():
            if key not in _KNOWN and key not in _CHANGES_THE_DELTA and value and not key.startswith("_"):
                raise self._unread(key, "a setting that is not known here may change the weights")

    def _unread(self, key: str, effect: str) -> RefusedError:
        remedy = "Merge it into its base with peft, and extract the difference."
        if key == "init_lora_weights":
            remedy = "Save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        return RefusedError(
            f"LoRA with {key} is not read: {effect}", values={key: self.raw[key]}, file=self.file, remedy=remedy
        )

    def _check_pattern(self, key: str) -> None:
        pattern = self.raw.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise InputError(f"{key} is not a map from patterns to numbers", file=self.file)
        for expression, value in pattern.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(
                    f"{key} holds something other than a number", values={expression: value}, file=self.file
                )
            try:
                re.compile(_suffix(expression))
            except re.error as error:
                raise InputError(f"{key} holds a broken pattern {expression!r}: {error}", file=self.file) from None

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.raw.get("fan_in_fan_out"))

    @property
    def use_dora(self) -> bool:
        return bool(self.raw.get("use_dora"))

    @property
    def base_name(self) -> str | None:
        name = self.raw.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def rank(self, module: str) -> int:
        """``r`` of a module: the first key of ``rank_pattern`` that the module's name ends with, else ``r``."""
        return int(self._by_pattern("rank_pattern", module, self.raw["r"]))

    def scale(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (Kalajdzievski, arXiv:2312.03732)."""
        rank = self.rank(module)
        if rank <= 0:
            raise InputError("a rank must be positive", values={"module": module, "r": rank}, file=self.file)
        alpha = float(self._by_pattern("alpha_pattern", module, self.raw["lora_alpha"]))
        return alpha / (sqrt(rank) if self.raw.get("use_rslora") else rank)

    def _by_pattern(self, key: str, module: str, default: float) -> float:
        for expression, value in (self.raw.get(key) or {}).items():
            if re.match(_suffix(expression), module):
                return float(value)
        return float(default)


def _suffix(expression: str) -> str:
    """PEFT's rule: the pattern, as a regular expression, must match the whole name or its end from a dot on."""
    return rf"(.*\.)?({expression})$"
