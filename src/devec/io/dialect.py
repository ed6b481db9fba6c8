"""Which program wrote an adapter, decided from tensor names and the files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import InputError
from devec.io.pickle_file import PickleFile
from devec.io.safetensors_file import SafetensorsFile
from devec.io.sniff import GGUF, PICKLE, ZIP, head_of, looks_like, refuse_gguf

Dialect = Literal["peft", "diffusers", "kohya", "cloneofsimo", "lycoris", "xlabs", "comfy"]

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
INDEX_FILES = tuple(f"{name}.index.json" for name in WHOLE_FILES)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt")

# The first rule that any name matches decides; the most specific come first
_RULES: tuple[tuple[Dialect, re.Pattern[str]], ...] = (
    ("lycoris", re.compile(r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|oft_diag)$")),
    ("cloneofsimo", re.compile(r"^(unet|text_encoder):\d+:(up|down)$")),
    ("kohya", re.compile(r"^(lora|lycoris)_(unet|te\d?|transformer|prior_unet)_")),
    ("xlabs", re.compile(r"(^|\.)(double|single)_blocks\.\d+\.processor\.\w*lora\d?\.(down|up)\.weight$")),
    ("comfy", re.compile(r"^(diffusion_model|model\.diffusion_model)\..*lora")),
    ("peft", re.compile(r"^base_model\..*\.lora_\w+")),
    ("diffusers", re.compile(r"^(unet|text_encoder(_\d)?)\..*lora")),
    ("diffusers", re.compile(r"\.processor\.to_\w+_lora\.|\.lora\.(down|up)\.weight$")),
    ("diffusers", re.compile(r"^(transformer\.)?(\w*transformer_blocks|down_blocks|up_blocks|mid_block)\..*lora")),
    ("peft", re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")),
)  # fmt: skip


class TensorFile(Protocol):
    """What ``SafetensorsFile`` and ``PickleFile`` have in common."""

    path: Path
    metadata: dict[str, str]

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def get(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...

    def place(self, name: str) -> tuple[int, int, int]: ...

    def close(self) -> None: ...


def open_file(path: str | Path) -> SafetensorsFile | PickleFile:
    """The right reader for one weight file, chosen by its content and not by its suffix.

    Raises InputError (exit 3) for anything that is neither, naming what it looks like.
    """
    path = Path(path)
    head = head_of(path)
    kind = looks_like(head)
    if kind == GGUF:
        raise refuse_gguf(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    # a safetensors file starts with the length of its header, which no magic number survives as
    plausible = len(head) >= 8 and int.from_bytes(head[:8], "little") <= path.stat().st_size
    if plausible and kind not in (ZIP, PICKLE):
        return SafetensorsFile(path)
    return PickleFile(path)


def dialect_of(names: Sequence[str]) -> Dialect | None:
    """The dialect whose spelling ``names`` use, or ``None`` when they are not an adapter's."""
    for dialect, pattern in _RULES:
        if any(pattern.search(name) for name in names):
            return dialect
    return None


def adapter_file(path: Path) -> Path | None:
    """The adapter's weight file for a file or a folder, or ``None`` when the folder holds no adapter.

    A folder counts when it has an adapter configuration, a file of an adapter's customary name, or one lone weight
    file whose tensor names are an adapter's.
    """
    if not path.is_dir():
        return path
    for name in ADAPTER_FILES:
        if (path / name).is_file():
            return path / name
    if any((path / name).is_file() for name in (*WHOLE_FILES, *INDEX_FILES)):
        return None
    if (path / CONFIG_FILE).is_file():
        raise InputError(
            f"{CONFIG_FILE} without weights beside it",
            values={"looked for": ", ".join(ADAPTER_FILES[:2])},
            file=path,
        )
    weights = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if len(weights) == 1:
        with open_file(weights[0]) as file:
            return weights[0] if dialect_of(file.names()) else None
    return None


def is_adapter(path: str | Path) -> bool:
    """Whether a file or folder holds an adapter, in whatever dialect, readable or not.

    Raises InputError when the path is missing or its weight file is broken.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file or folder", file=path, remedy="Check the path.")
    file = adapter_file(path)
    if file is None:
        return False
    if (file.parent / CONFIG_FILE).is_file() and file.name in ADAPTER_FILES:
        return True
    with open_file(file) as opened:
        return dialect_of(opened.names()) is not None
