"""What lies beside a model's weights for its tokenizer: the vocabulary and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devec.core.errors import InputError

TEMPLATE, CONFIG, TOKENIZER = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> row of the embedding, from ``tokenizer.json``; ``None`` without that file."""
    data = _json(folder / TOKENIZER)
    if data is None:
        return None
    stored = (data.get("model") or {}).get("vocab") or {}
    tokens = dict(stored) if isinstance(stored, Mapping) else {str(item[0]): i for i, item in enumerate(stored)}
    return {**tokens, **{token["content"]: token["id"] for token in data.get("added_tokens") or []}}


def chat_template(folder: Path) -> str | None:
    """The (default) chat template: its own file, else what ``tokenizer_config.json`` says."""
    try:
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    except FileNotFoundError:
        found = (_json(folder / CONFIG) or {}).get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template cannot be read: {error}", file=folder / TEMPLATE) from None
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def with_template(template: str, folder: Path | None) -> dict[str, bytes]:
    """The files, by name, of a model that has this template, also where ``tokenizer_config.json`` holds one."""
    files = {TEMPLATE: template.encode()}
    config = None if folder is None else _json(folder / CONFIG)
    if config is not None and "chat_template" in config:
        config["chat_template"] = template
        files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _json(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=file) from None
    if not isinstance(data, dict):
        raise InputError("is no JSON object", file=file)
    return data
