"""Tensor names: which to take, how an adapter's match a base's, and which hold several projections fused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from devec.core.errors import IncompatibleError, UsageError


@dataclass(frozen=True)
class Selection:
    """Tensor names that match any ``include`` (all, if there is none) and no ``exclude``; ``re.search`` each.

    Raises UsageError (exit 2) for a pattern that is not a regular expression.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from None

    def keeps(self, name: str) -> bool:
        wanted = not self.include or any(re.search(p, name) for p in self.include)
        return wanted and not any(re.search(p, name) for p in self.exclude)

    def of(self, names: Iterable[str]) -> list[str]:
        """The names that are kept, in their order."""
        return [name for name in names if self.keeps(name)]


def nearest(word: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Up to ``count`` of ``options`` that are spelt most like ``word``, the nearest first."""
    return difflib.get_close_matches(word, list(options), n=count, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """A remedy sentence naming the nearest options, or ``None`` when nothing is near."""
    near = nearest(word, options)
    return f"Did you mean {' or '.join(near)}?" if near else None


PREFIXES: tuple[str, ...] = (
    "model.", "base_model.", "base_model.model.", "module.", "transformer.", "language_model.", "model.language_model.",
    "language_model.model.", "model.model.", "bert.", "roberta.", "distilbert.", "deberta.", "electra.", "albert.",
    "vit.", "vision_model.", "text_model.", "encoder.", "decoder.", "backbone.", "gpt_neox.", "unet.", "text_encoder.",
    "esm.", "wav2vec2.", "whisper.", "clip.",
)  # fmt: skip
"""What one class of a model library puts before names that another class of the same network leaves out."""


def resolve_names(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Map each wanted name to the available spelling of it.

    One renaming is applied to all: none, or one known prefix taken away, put on, or exchanged for another. It must
    explain every wanted name. Raises IncompatibleError (exit 4) when none does, naming the first unmatched tensor and
    its three nearest names, and when two renamings do with different results.
    """
    wanted, options = list(wanted), dict.fromkeys(available)
    if all(name in options for name in wanted):
        return {name: name for name in wanted}
    complete: dict[tuple[str, ...], None] = {}
    for old, new in _renamings(wanted):
        if new + wanted[0].removeprefix(old) in options:
            renamed = tuple(new + name.removeprefix(old) for name in wanted)
            if all(name in options for name in renamed):
                complete[renamed] = None
    if len(complete) == 1:
        return dict(zip(wanted, next(iter(complete)), strict=True))
    if len(complete) > 1:
        raise IncompatibleError(
            "the adapter's names fit the base in more than one way",
            tensor=wanted[0],
            values={"candidates": ", ".join(names[0] for names in complete)},
            remedy="Leave one of the parts out of the base.",
        )
    lost = min(
        ([n for n in wanted if new + n.removeprefix(old) not in options] for old, new in _renamings(wanted)), key=len
    )
    near = nearest(lost[0], options)
    raise IncompatibleError(
        f"{len(lost)} of {len(wanted)} tensors have no counterpart in the base",
        tensor=lost[0],
        values={"nearest": ", ".join(near) if near else "none is near"},
        remedy="Is this adapter for another architecture?",
    )


def _renamings(wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(prefix to take away, prefix to put on), the identity first."""
    common = [old for old in ("", *PREFIXES) if all(name.startswith(old) for name in wanted)]
    return [(old, new) for old in common for new in ("", *PREFIXES)]


# Fused projections

# "in_proj.weight" with a dot is Mamba's, which holds no query; torch's attention writes in_proj_weight
_FUSED = re.compile(
    r"(?:^|[._])(?:(c_attn|qkv_proj|Wqkv|wqkv|query_key_value|qkv|to_qkv|W_pack)(?:\.(?:weight|bias))?"
    r"|(in_proj)_(?:weight|bias))$"
)
_INTERLEAVED_MODELS = ("gpt_neox", "bloom", "falcon", "codegen", "gptneox", "refinedweb", "megatron", "internlm2")

_MAY_GROUP = frozenset({"c_attn", "qkv_proj", "Wqkv", "W_pack"})
"""Language models whose keys and values may have fewer rows than the query."""

QkvParts = list[tuple[str, int, int]]


def qkv_split(name: str, shape: Sequence[int], config: Mapping[str, object] | None) -> QkvParts | None:
    """Row ranges of the query, key and value in a fused tensor: ``[("q", 0, n), ("k", n, m), ("v", m, rows)]``.

    ``shape`` is that of the canonical ``out x in`` matrix (a bias: ``n x 1``). Sizes come from the configuration's
    ``num_attention_heads``, ``num_key_value_heads`` and ``head_dim``; without them, from three equal parts.

    Returns ``None`` for a tensor that is not fused. Raises UsageError (exit 2) where the three are interleaved by head
    (no row range is a query) or where nothing says how large each is, and IncompatibleError (exit 4) where the sizes do
    not add up to the rows.
    """
    match = _FUSED.search(name)
    if match is None:
        return None
    config = config or {}
    kind, rows = match.group(1) or match.group(2), shape[0]
    model = str(config.get("model_type", "")).lower()
    if kind in ("query_key_value", "wqkv", "qkv_proj", "Wqkv") and model.startswith(_INTERLEAVED_MODELS):
        raise UsageError(
            f"in {model} models query, key and value are interleaved by head, so they cannot be split by rows",
            tensor=name,
            remedy="Leave out --split-qkv for this tensor (--exclude), or altogether.",
        )
    if kind in ("query_key_value", "wqkv") and not config.get("multi_query_attention"):
        raise UsageError(
            "whether query, key and value are interleaved by head here is not known",
            tensor=name,
            values={"model_type": model or "no config.json"},
            remedy="Leave out --split-qkv for this tensor (--exclude), or altogether.",
        )
    if kind == "c_attn" and "crossattention" in name:
        return _even(name, rows, ("k", "v"))
    sizes = _sizes(config)
    if sizes is not None:
        q, kv = sizes
        if q + 2 * kv == rows:
            return [("q", 0, q), ("k", q, q + kv), ("v", q + kv, rows)]
        if q != kv:
            raise IncompatibleError(
                "the head counts of config.json do not add up to this fused tensor",
                tensor=name,
                values={"rows": rows, "query + 2 x key rows": q + 2 * kv},
                remedy="Leave out --split-qkv for this tensor (--exclude).",
            )
    elif kind in _MAY_GROUP and not name.endswith("bias") and rows != 3 * shape[1]:
        raise UsageError(
            "query, key and value need not be of one size here (grouped or multi-query attention), and no head counts "
            "say how the rows part",
            tensor=name,
            values={"out x in": tuple(shape)},
            remedy="Give --base with its config.json, or leave out --split-qkv for this tensor (--exclude).",
        )
    return _even(name, rows, ("q", "k", "v"))


def _even(name: str, rows: int, parts: tuple[str, ...]) -> QkvParts:
    step, rest = divmod(rows, len(parts))
    if rest:
        raise IncompatibleError(
            f"a fused tensor whose rows do not divide into {len(parts)} equal parts, and no configuration to say more",
            tensor=name,
            values={"rows": rows},
            remedy="Leave out --split-qkv for this tensor (--exclude).",
        )
    return [(part, i * step, (i + 1) * step) for i, part in enumerate(parts)]


def _number(config: Mapping[str, object], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _sizes(config: Mapping[str, object]) -> tuple[int, int] | None:
    """Rows of the query, and rows of the key (as many as of the value)."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and "num_attention_heads" not in config:
        config = nested
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    if heads is None:
        return None
    size = _number(config, "head_dim") or (hidden // heads if hidden is not None else None)
    if size is None:
        return None
    if config.get("multi_query") is True:
        groups = 1
    else:
        groups = _number(config, "num_key_value_heads", "n_head_kv", "multi_query_group_num") or heads
    return heads * size, groups * size
