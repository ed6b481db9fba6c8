"""Broken, hostile and unlike inputs: one clear line, the right exit code, nothing written, nothing run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures_models import Models, Runner, refused


@pytest.fixture
def adapter(llama: Models, work: Path) -> Path:
    """A copy of an adapter, to be broken."""
    shutil.copytree(llama.la, work / "bad")
    return work / "bad" / "adapter_model.safetensors"


def header(entries: dict[str, object], data: int = 64) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "wrong magic": lambda b: b"\x89HDF\r\n\x1a\n" + b[8:],
    "an HTML page": lambda b: b"<!DOCTYPE html><html>not found</html>",
    "a Git LFS pointer": lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "header length 2^62": lambda b: struct.pack("<Q", 1 << 62) + b[8:],
    "header that is no JSON": lambda b: struct.pack("<Q", 16) + b"not JSON at all." + bytes(64),
    "trailing bytes": lambda b: b + bytes(8),
    "overlapping offsets": lambda b: header({"a.lora_A.weight": entry([4, 2], 0, 32), "b": entry([4, 2], 16, 48)}),
    "equal offsets": lambda b: header({"a.lora_A.weight": entry([4, 2], 0, 32), "b": entry([4, 2], 0, 32)}, 32),
    "offsets beyond the file": lambda b: header({KEY: entry([64, 2], 0, 512)}),
    "shape unlike its bytes": lambda b: header({KEY: entry([3, 2], 0, 64)}),
    "duplicate names": lambda b: (
        lambda text: struct.pack("<Q", len(text)) + text + bytes(64)
    )(f'{{"{KEY}":{json.dumps(entry([4, 2], 0, 32))},"{KEY}":{json.dumps(entry([4, 2], 32, 64))}}}'.encode()),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", ["mix", "apply"])
def test_broken_safetensors(kind: str, command: str, adapter: Path, devec: Runner, llama: Models) -> None:
    adapter.write_bytes(BROKEN[kind](adapter.read_bytes()))
    words = {
        "mix": ["mix", "bad", llama.lb],
        "apply": ["apply", "--base", llama.base, "--add", "1", str(adapter.parent)],
    }[command]
    line = refused(devec(*words, "-o", "out", code=3))
    assert "adapter_model.safetensors" in line


def test_broken_checkpoint_in_every_command(devec: Runner, llama: Models, work: Path) -> None:
    shutil.copytree(llama.a, work / "bad")
    path = work / "bad" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for words in (
        ["inspect", "bad"],
        ["compare", "bad", llama.b, "--base", llama.base],
        ["extract", "--base", llama.base, "--model", "bad", "-o", "out"],
        ["decompose", "bad", llama.b, "--base", llama.base, "-o", "out"],
        ["apply", "--base", "bad", "--add", "1", llama.la, "-o", "out"],
        ["merge", "--method", "average", llama.a, "bad", "-o", "out"],
        ["negate", "--base", llama.base, "--target", "bad", "--pool", llama.b, "-o", "out"],
        ["verify", "bad"],
    ):
        refused(devec(*words, code=3))


@pytest.mark.parametrize(
    ("index", "code", "word"),
    [
        ({"weight_map": {"w": "model-00001-of-00001.safetensors"}}, 3, "missing"),
        ({"weight_map": {"w": "../outside.safetensors"}}, 5, "outside"),
        ({"weight_map": {"w": "/etc/passwd"}}, 5, "outside"),
        ({"weight_map": {}}, 3, ""),
        ({"metadata": {}}, 3, "weight_map"),
        ([1, 2], 3, ""),
    ],
)
def test_shard_indexes(index: object, code: int, word: str, devec: Runner, llama: Models, work: Path) -> None:
    (work / "bad").mkdir()
    (work / "bad" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"w": torch.ones(2, 2)}, work / "outside.safetensors")
    refused(devec("merge", "--method", "average", "bad", llama.a, "-o", "out", code=code), word)


def test_unlike_shapes(devec: Runner, llama: Models, work: Path) -> None:
    tensors = load_file(f"{llama.a}/model.safetensors")
    tensors["lm_head.weight"] = torch.ones(50, 32)
    save_file(tensors, "bad.safetensors")
    for words in (
        ["extract", "--base", llama.base, "--model", "bad.safetensors", "-o", "out"],
        ["merge", "--method", "average", llama.a, "bad.safetensors", "-o", "out"],
        ["decompose", "bad.safetensors", llama.b, "--base", llama.base, "-o", "out"],
    ):
        refused(devec(*words, code=4), "lm_head.weight", "(50, 32)", "(48, 32)", "--exclude")
    devec("extract", "--base", llama.base, "--model", "bad.safetensors", "--exclude", "lm_head", "-o", "out")
    said = devec("inspect", llama.a, "bad.safetensors", code=4)
    assert len(said.errors) == 1


def test_a_missing_and_an_extra_tensor(devec: Runner, llama: Models, work: Path) -> None:
    tensors = load_file(f"{llama.a}/model.safetensors")
    kept = dict(tensors)
    del kept["model.norm.weight"]
    save_file(kept, "less.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(2)}, "more.safetensors")
    for name, word in (("less", "that the model lacks"), ("more", "that the base lacks")):
        words = ["--base", llama.base, "--model", f"{name}.safetensors"]
        refused(devec("extract", *words, "-o", "out", code=4), word)


def test_another_base_by_fingerprint(devec: Runner, llama: Models) -> None:
    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "tv")
    refused(devec("apply", "--base", llama.b, "--add", 1, "tv", "-o", "out", code=4), "another base", "recorded")
    devec("extract", "--base", llama.b, "--model", llama.c, "-o", "tw")
    refused(devec("decompose", "tv", "tw", "-o", "out", code=4), "different bases")
    devec("decompose", llama.a, llama.b, "--base", llama.base, "-o", "parts")
    refused(devec("export", "parts#unique:a", "--base", llama.c, "-o", "out", code=4), "another base")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_one_tensor_of_a_checkpoint(value: float, devec: Runner, llama: Models) -> None:
    tensors = load_file(f"{llama.a}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 3] = value
    save_file(tensors, "bad.safetensors")
    for words in (
        ["decompose", "bad.safetensors", llama.b, "--base", llama.base, "-o", "out"],
        ["extract", "--base", llama.base, "--model", "bad.safetensors", "-o", "out"],
        ["extract", "--base", llama.base, "--model", "bad.safetensors", "--rank", "2", "-o", "out"],
        ["apply", "--base", "bad.safetensors", "--add", "1", llama.la, "-o", "out"],
        ["apply", "--base", llama.base, "--add", "1", "bad.safetensors", "-o", "out"],
        ["merge", "--method", "average", llama.b, "bad.safetensors", "-o", "out"],
        ["merge", "--method", "average", "bad.safetensors", llama.b, "-o", "out"],
        ["merge", "--method", "task-arithmetic", "--base", llama.base, "bad.safetensors", "-o", "out"],
        ["inspect", "bad.safetensors", "--base", llama.base],
    ):
        line = refused(devec(*words, code=3), name)
        assert "partial" not in line and "bad" in line, line


def test_nan_in_one_tensor_of_an_adapter(adapter: Path, devec: Runner, llama: Models) -> None:
    tensors = load_file(adapter)
    tensors[KEY][0, 0] = float("nan")
    save_file(tensors, adapter, {"format": "pt"})
    refused(devec("mix", "bad", llama.lb, "-o", "out", code=3), "NaN", "adapter_model.safetensors")


def test_an_adapter_for_another_architecture(devec: Runner, llama: Models, gpt2: Models) -> None:
    refused(devec("mix", llama.la, f"g={gpt2.la}", "-o", "out", code=4), "no module in common")
    refused(devec("decompose", llama.la, f"g={gpt2.la}", "-o", "out", code=4), "no module in common")
    refused(
        devec("apply", "--base", llama.base, "--add", 1, gpt2.la, "-o", "out", code=4), "no counterpart in the base"
    )
    refused(devec("negate", "--base", gpt2.base, "--target", llama.la, "--pool", llama.lb, "-o", "out", code=4))


def test_an_adapter_of_another_size(devec: Runner, llama: Models, adapter: Path) -> None:
    tensors = load_file(adapter)
    save_file({k: t[:, :16].contiguous() if "lora_A" in k else t for k, t in tensors.items()}, adapter)
    refused(devec("mix", "bad", llama.lb, "-o", "out", code=4), "unlike shapes")
    refused(devec("apply", "--base", llama.base, "--add", 1, "bad", "-o", "out", code=4), "does not fit the base")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_pickle_that_would_run_code(devec: Runner, llama: Models, work: Path) -> None:
    torch.save({"w": torch.ones(2, 2), "evil": _Evil()}, work / "bad.pt")
    (work / "bad.bin").write_bytes(pickle.dumps({"w": _Evil()}, protocol=2))
    for name in ("bad.pt", "bad.bin"):
        refused(devec("merge", "--method", "average", name, llama.a, "-o", "out", code=5), "system")
        refused(devec("inspect", name, code=5), "system")
    assert not (work / "ran").exists()


def test_an_empty_folder_and_a_missing_path(devec: Runner, llama: Models, work: Path) -> None:
    (work / "empty").mkdir()
    refused(devec("inspect", "empty", code=3), "holds no checkpoint", "looked for")
    refused(devec("mix", "empty", llama.la, "-o", "out", code=3), "empty")
    shutil.copytree(llama.la, work / "adapter-cooking")
    line = refused(devec("mix", "adapter-coking", llama.lb, "-o", "out", code=3))
    assert "Did you mean adapter-cooking?" in line
    refused(devec("inspect", "someone/some-model", code=3), "Hub", "download")
    refused(devec("merge", "recipe.yaml", "-o", "out", code=3), "recipe.yaml")


def test_read_only_and_full(devec: Runner, llama: Models, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.access
    with monkeypatch.context() as m:  # root may write anywhere, so the refusal is simulated
        m.setattr(os, "access", lambda p, mode, **k: Path(p) != work and true(p, mode, **k))
        refused(devec("mix", llama.la, llama.lb, "-o", "out", code=5), "not writable")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for what in ("pwrite", "write"):
        with monkeypatch.context() as m:
            m.setattr(os, what, full)
            for words in (
                ["mix", llama.la, llama.lb],
                ["decompose", llama.la, llama.lb],
                ["apply", "--base", llama.base, "--add", "1", llama.la],
                ["extract", "--base", llama.base, "--model", llama.a],
            ):
                refused(devec(*words, "-o", "out", code=5), "no space left")
    usage = shutil.disk_usage(work)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        refused(devec("apply", "--base", llama.base, "--add", "1", llama.la, "-o", "out", code=5), "not enough space")


def test_overwrite_keeps_the_old_output_when_writing_fails(
    devec: Runner, llama: Models, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devec("mix", llama.la, llama.lb, "-o", "kept")
    before = {p.name: p.read_bytes() for p in Path("kept").iterdir() if p.is_file()}

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full)
        refused(devec("mix", llama.la, llama.lc, "-o", "kept", "--overwrite", code=5))
    assert before == {p.name: p.read_bytes() for p in Path("kept").iterdir() if p.is_file()}


NOT_READ = {
    "kohya": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8),
              "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 4)},
    "LyCORIS": {"lora_unet_x.hada_w1_a": (8, 4), "lora_unet_x.hada_w1_b": (4, 8)},
    "cloneofsimo": {"unet:0:up": (8, 4), "unet:0:down": (4, 8)},
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_READ)
def test_dialects_that_are_not_read(kind: str, devec: Runner, llama: Models) -> None:
    save_file({n: torch.ones(s) for n, s in NOT_READ[kind].items()}, "bad.safetensors")
    refused(devec("mix", "bad.safetensors", llama.la, "-o", "out", code=5), kind, "not read yet")
    refused(devec("inspect", "bad.safetensors", code=5), kind)


def test_gguf_and_quantised_models(devec: Runner, llama: Models, work: Path) -> None:
    (work / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(devec("merge", "--method", "average", "x.gguf", llama.a, "-o", "out", code=3), "GGUF")
    shutil.copytree(llama.base, work / "q")
    config = json.loads((work / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (work / "q" / "config.json").write_text(json.dumps(config))
    refused(devec("apply", "--base", "q", "--add", 1, llama.la, "-o", "out", code=5), "bitsandbytes")


def test_a_dora_needs_its_base(devec: Runner, llama: Models, adapter: Path) -> None:
    tensors = load_file(adapter)
    for key in list(tensors):
        if "lora_B" in key:
            tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[key]))
    save_file(tensors, adapter)
    config = adapter.parent / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    refused(devec("mix", "bad", llama.lb, "-o", "out", code=5), "DoRA", "--base")
    devec("decompose", "bad", llama.lb, "--base", llama.base, "-o", "out")


@pytest.mark.parametrize("name", ["manifest.json", "factors.safetensors", "spectra.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_artifact(name: str, damage: str, devec: Runner, llama: Models) -> None:
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    path = Path("parts") / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    devec("verify", "parts", code=7)
    if name == "spectra.json":
        return  # for people; parts are read without it
    code = 2 if (name, damage) == ("manifest.json", "gone") else 3
    refused(devec("export", "parts#unique:la", "-o", "out", code=code), "parts")
