"""Tokens and chat templates of the models of a merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devec.api.references import open_model
from devec.core.errors import IncompatibleError
from devec.core.results import Finding
from devec.io.tokenizer import chat_template, vocabulary


def template_of(data: Mapping[str, Any], models: Sequence[str]) -> str | None:
    """The template that the output is to have; ``None`` for the first model's own."""
    wanted: str | None = data.get("chat_template")
    if wanted != "auto":
        return wanted
    own = [None if folder is None else chat_template(folder) for folder in map(_folder, dict.fromkeys(models))]
    templates = Counter(text.strip() for text in own if text)
    if not templates:
        return None
    chosen = templates.most_common(1)[0][0]
    return None if own[0] is not None and own[0].strip() == chosen else chosen


def _folder(model: str) -> Path | None:
    found: Path | None = getattr(open_model(model), "folder", None)
    return found


def same_tokens(data: Mapping[str, Any], models: Sequence[str], base: str | None) -> list[Finding]:
    """mergekit moves rows of embeddings to where the base's tokenizer has their tokens; here all must have them there.

    Raises IncompatibleError for a model whose tokenizer has not.
    """
    if base is None or (data.get("tokenizer_source") is None and data.get("tokenizer") is None):
        return []
    known = {m: None if (f := _folder(m)) is None else vocabulary(f) for m in dict.fromkeys([base, *models])}
    for model, tokens in known.items():
        if tokens is not None and known[base] is not None and tokens != known[base]:
            raise IncompatibleError(
                "the tokenizers differ, and no rows of embeddings are moved from token to token",
                values={base: f"{len(known[base] or ())} tokens", model: f"{len(tokens)} tokens"},
                remedy="Take tokenizer_source (or tokenizer) out if the rows mean the same tokens.",
            )
    unknown = [model for model, tokens in known.items() if tokens is None]
    if unknown:
        return [Finding("tokenizer-unknown", f"no tokenizer.json in {unknown[0]}: tokens were not compared")]
    return []


def strange_tokens(data: Mapping[str, Any]) -> list[str]:
    """What the file asks of tokenizers that is more than the base's own."""
    strange = []
    template = data.get("chat_template")
    if template not in (None, "auto") and not (isinstance(template, str) and "{" in template):
        strange.append(f"chat_template: {template}")
    source, tokenizer = data.get("tokenizer_source"), data.get("tokenizer")
    own = () if data.get("base_model") is None else ("base", data["base_model"])
    if source not in (None, *own):
        strange.append(f"tokenizer_source: {source}")
    if tokenizer is not None:
        more = dict(tokenizer) if isinstance(tokenizer, Mapping) else {"source": tokenizer}
        source = more.pop("source", "union")
        if source not in own:
            strange.append(f"tokenizer.source: {source}")
        strange += [f"tokenizer.{key}" for key, value in more.items() if value]
    return strange
