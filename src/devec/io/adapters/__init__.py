"""Adapters: one file a dialect. ``read_adapter`` finds out which it is."""

from __future__ import annotations

from pathlib import Path

import torch

from devec.core.errors import InputError, RefusedError, UsageError
from devec.core.vectors import TaskVector
from devec.io.adapters.diffusers import read_diffusers
from devec.io.adapters.peft import read_peft
from devec.io.checkpoint import Checkpoint
from devec.io.dialect import ADAPTER_FILES, CONFIG_FILE, adapter_file, dialect_of, is_adapter, open_file

__all__ = ["is_adapter", "read_adapter", "vector_name"]

_NOT_READ = {
    "kohya": "kohya (lora_unet_..., lora_te_...)",
    "cloneofsimo": "cloneofsimo (unet:0:up)",
    "lycoris": "LyCORIS (LoHa, LoKr, OFT)",
    "xlabs": "XLabs (processor.qkv_lora)",
    "comfy": "ComfyUI (diffusion_model...)",
}


def read_adapter(
    path: str | Path, *, name: str | None = None, base: Checkpoint | None = None, dtype: torch.dtype = torch.float32
) -> TaskVector:
    """An adapter folder or file as a task vector: per module ``Delta = scale * B A``, the scale folded into B.

    ``base`` gives the exact stored layout of each tensor, checks that the adapter fits, and makes a DoRA readable.

    Raises InputError (exit 3) for missing, broken or non-finite files; RefusedError (exit 5) for a dialect or a kind of
    adapter that is not read; IncompatibleError (exit 4) for factors that do not fit one another or the base;
    UsageError (exit 2) when the path holds no adapter.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file or folder", file=path, remedy="Check the path.")
    file = adapter_file(path)
    if file is None:
        raise UsageError(
            "the folder holds no adapter",
            values={"looked for": ", ".join((CONFIG_FILE, *ADAPTER_FILES))},
            file=path,
            remedy="Give an adapter's folder or file.",
        )
    with open_file(file) as opened:
        # a configuration beside the file settles it: PEFT's own keys need no prefix that gives them away
        described = (file.parent / CONFIG_FILE).is_file() and file.name in ADAPTER_FILES[:2]
        dialect = "peft" if described else dialect_of(opened.names())
        name = name or vector_name(path, file)
        if dialect == "peft":
            return read_peft(opened, name=name, reference=str(path), base=base, dtype=dtype)
        if dialect == "diffusers":
            return read_diffusers(opened, name=name, reference=str(path), base=base, dtype=dtype)
    if dialect is None:
        raise UsageError("the file holds no adapter", file=file, remedy="Give an adapter's folder or file.")
    raise RefusedError(
        f"an adapter in the dialect of {_NOT_READ[dialect]} is not read yet",
        file=file,
        remedy="Convert it to PEFT or diffusers keys first.",
    )


def vector_name(path: Path, file: Path) -> str:
    """A vector's own name: the folder's, for a folder or a file of customary name; else the file's stem."""
    if path.is_dir():
        return path.absolute().name
    return file.absolute().parent.name if file.name in ADAPTER_FILES else file.stem
