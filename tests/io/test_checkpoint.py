"""Checkpoints in every shape they come in, and the folders that must be refused."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from devec.core.contracts import TensorSource
from devec.core.errors import DevecError, InputError, RefusedError, UsageError
from devec.core.layout import Layout
from devec.io.checkpoint import Checkpoint, checkpoint_from_module, checkpoint_from_state_dict, open_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4), "c.count": torch.tensor(7)}


def sharded(folder: Path, suffix: str = "safetensors", **index: Any) -> Path:
    """Two shards and their index, with ``weight_map`` entries changed as asked."""
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    parts = [{"a.weight": STATE["a.weight"]}, {n: STATE[n] for n in ("b.bias", "c.count")}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    where = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    where.update(index)
    where = {n: f for n, f in where.items() if f is not None}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def assert_state(checkpoint: Checkpoint, state: dict[str, torch.Tensor] = STATE) -> None:
    assert set(checkpoint.names()) == set(state) and len(checkpoint) == len(state)
    for name, value in state.items():
        assert torch.equal(checkpoint.get(name), value) and checkpoint.info(name).dtype == value.dtype
        assert name in checkpoint


def test_every_way_to_store_the_same_weights_has_one_fingerprint(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "one.safetensors")
    torch.save(OrderedDict(reversed(STATE.items())), tmp_path / "two.pth")
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    bins = tmp_path / "bins"
    bins.mkdir()
    torch.save(STATE, bins / "pytorch_model.bin")
    places = [tmp_path / "one.safetensors", tmp_path / "two.pth", folder, bins,
              sharded(tmp_path / "s"), sharded(tmp_path / "t", "bin")]  # fmt: skip
    prints = set()
    for place in places:
        with open_checkpoint(place) as checkpoint:
            assert isinstance(checkpoint, TensorSource) and checkpoint.reference == str(place)
            assert_state(checkpoint)
            assert Path(checkpoint.file_of("a.weight")).is_file()
            assert checkpoint.folder == (place if place.is_dir() else None)
            assert checkpoint.config == ({"model_type": "x"} if place == folder else None)
            prints.add(checkpoint.fingerprint())
    prints.add(checkpoint_from_state_dict(STATE).fingerprint())
    assert len(prints) == 1
    for name, other in (
        ("a.weight", STATE["a.weight"] + 1e-6),
        ("a.weight", STATE["a.weight"].reshape(3, 2)),
        ("b.bias", torch.ones(4, dtype=torch.float64)),
    ):
        assert checkpoint_from_state_dict({**STATE, name: other}).fingerprint() not in prints


def test_floats_and_layouts() -> None:
    checkpoint = checkpoint_from_state_dict(STATE, {"model_type": "llama"})
    assert checkpoint.info("a.weight").dtype.is_floating_point
    assert not checkpoint.info("c.count").dtype.is_floating_point
    assert checkpoint.layout("a.weight") == Layout((2, 3)) and checkpoint.layout("c.count") == Layout(())


@pytest.mark.parametrize("model", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_conv1d_weights_are_stored_transposed(model: str) -> None:
    state = {f"transformer.h.0.attn.{n}": torch.ones(2, 6) for n in ("c_attn.weight", "q_attn.weight", "other.weight")}
    state |= {"h.0.mlp.c_fc.weight": torch.ones(2, 8), "h.0.mlp.c_proj.weight": torch.ones(8, 2)}
    state |= {"h.0.attn.c_attn.bias": torch.ones(6), "wte.weight": torch.ones(9, 2)}
    checkpoint = checkpoint_from_state_dict(state, {"model_type": model})
    transposed = {n for n in state if checkpoint.layout(n).transposed}
    assert transposed == {
        n for n in state if n.endswith(("c_attn.weight", "q_attn.weight", "c_fc.weight", "c_proj.weight"))
    }
    assert checkpoint.layout("h.0.mlp.c_fc.weight").matrix_shape == (8, 2)
    assert not any(checkpoint_from_state_dict(state).layout(n).transposed for n in state)


def test_ties_in_memory_and_on_disk(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.twin = nn.Parameter(torch.zeros(5, 3))

    model = Tied()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    memory, disk = checkpoint_from_module(model), open_checkpoint(tmp_path / "x.pt")
    for checkpoint in (memory, disk):
        assert checkpoint.ties == {"head.weight": "embed.weight"}
        assert set(checkpoint.names()) == {"embed.weight", "twin"}
        assert "head.weight" in checkpoint and "nothing" not in checkpoint
        assert torch.equal(checkpoint.get("head.weight"), model.embed.weight)
        assert checkpoint.info("head.weight").shape == (5, 3)
    assert memory.fingerprint() == disk.fingerprint() and memory.file_of("twin") == "memory"


def test_a_module_says_which_of_its_weights_are_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    checkpoint = checkpoint_from_module(transformers.GPT2LMHeadModel(config))
    assert checkpoint.config is not None and checkpoint.config["model_type"] == "gpt2"
    assert checkpoint.layout("transformer.h.0.attn.c_attn.weight") == Layout((4, 12), transposed=True)
    assert checkpoint.ties == {"lm_head.weight": "transformer.wte.weight"}
    checkpoint.config = None
    assert checkpoint.layout("transformer.h.0.attn.c_attn.weight").transposed


def test_a_file_of_a_model_folder_is_read_with_its_configuration(tmp_path: Path) -> None:
    save_file({"h.0.attn.c_attn.weight": torch.ones(2, 6)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert open_checkpoint(tmp_path / "model.safetensors").layout("h.0.attn.c_attn.weight").transposed


def refused(path: Path, error: type[DevecError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", InputError, "no such file")
    refused(tmp_path, InputError, r"looked for = model\.safetensors, .*pytorch_model\.bin\.index\.json.*Check the path")
    (tmp_path / "weights.safetensors").touch()
    refused(tmp_path, InputError, r"Give the file itself, e\.g\. .*weights\.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refused(tmp_path, InputError, "shards without their index")


def test_a_broken_configuration(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    for text in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, InputError, r"JSON.*config\.json")


def test_an_index_that_is_broken(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
    ):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, InputError, message)


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    missing = sharded(tmp_path / "a", z="model-00003-of-00003.safetensors")
    refused(missing, InputError, r"names a file that is missing: shard = model-00003-of-00003\.safetensors")
    lacking = sharded(tmp_path / "b", **{"z.weight": "model-00001-of-00002.safetensors"})
    refused(lacking, InputError, r"does not hold.*tensor z\.weight.*model-00001")
    swapped = sharded(tmp_path / "c", **{"a.weight": "model-00002-of-00002.safetensors"})
    refused(swapped, InputError, r"names a (tensor|file).*(a\.weight|missing)")
    broken = sharded(tmp_path / "d")
    shard = broken / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    refused(broken, InputError, "model-00002-of-00002")


def test_a_tensor_that_two_shards_hold(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    save_file({**{n: STATE[n] for n in ("b.bias", "c.count")}, "a.weight": torch.zeros(2, 3)},
              folder / "model-00002-of-00002.safetensors")  # fmt: skip
    assert_state(open_checkpoint(folder))  # the index decides
    folder = sharded(tmp_path / "t", **{"a.weight": None, "only": "model-00001-of-00002.safetensors"})
    save_file({"a.weight": STATE["a.weight"], "only": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    save_file({**STATE}, folder / "model-00002-of-00002.safetensors")
    refused(folder, InputError, r"lies in two shards.*a\.weight")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "x/../../secret.safetensors", "ABSOLUTE", "link", "a\\b"])
def test_an_index_that_points_outside_its_folder(outside: str, tmp_path: Path) -> None:
    save_file({"z": torch.ones(1)}, tmp_path / "secret.safetensors")
    name = str(tmp_path / "secret.safetensors") if outside == "ABSOLUTE" else outside
    folder = sharded(tmp_path / "s", z=name)
    if outside == "link":
        (folder / "link").symlink_to(tmp_path / "secret.safetensors")
    refused(folder, RefusedError, "points outside its folder")


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_a_hub_cache_are_followed(shared: bool, tmp_path: Path) -> None:
    """From the snapshot to the repository's blobs, and from there perhaps to those that all repositories share."""
    snapshot = sharded(tmp_path / "real")
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "blobs" / "0a").mkdir(parents=True)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        if shared:
            file.rename(tmp_path / "blobs" / "0a" / str(i))
            (home / "blobs" / str(i)).symlink_to(f"../../blobs/0a/{i}")
        else:
            file.rename(home / "blobs" / str(i))
        (home / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{i}")
    assert_state(open_checkpoint(home / "snapshots" / "abc"))


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"m.qweight": torch.ones(2, 2, dtype=torch.int32), "m.g_idx": torch.ones(2, dtype=torch.int32)}, "GPTQ"),
        ({"m.qweight": torch.ones(2, 2, dtype=torch.int32), "m.scales": torch.ones(2).half()}, "GPTQ or AWQ"),
        ({"m.weight": torch.ones(8, 1, dtype=torch.uint8), "m.weight.absmax": torch.ones(2)}, "bitsandbytes|packed"),
        ({"m.weight": torch.ones(2, 2, dtype=torch.int8), "m.SCB": torch.ones(2)}, "bitsandbytes|packed"),
        ({"m.weight": torch.ones(2, 2, dtype=torch.uint8)}, "packed integers"),
        ({"m.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "FP8"),
        ({"m.weight": torch.ones(2, 2), "m.weight_scale_inv": torch.ones(1)}, "FP8"),
        ({"e.down_proj_blocks": torch.ones(2, 2, 2, dtype=torch.uint8)}, "packed integers .*MXFP4"),
    ],
)
def test_quantised_weights_are_refused_by_kind(tensors: dict[str, torch.Tensor], kind: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, RefusedError, rf"quantised by ({kind}).*(unquantised|dequantise)")


def test_a_declared_quantisation_is_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq", "bits": 4}}')
    refused(tmp_path, RefusedError, "quantised by awq")


def test_integer_buffers_are_not_taken_for_quantised_weights(tmp_path: Path) -> None:
    state = {"mask": torch.ones(2, 2, dtype=torch.uint8), "position_ids": torch.arange(3), "w.weight": torch.ones(2, 2)}
    assert_state(checkpoint_from_state_dict(state), state)


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.safetensors", "model.bin"):
        (tmp_path / name).write_bytes(b"GGUF" + b"\x03" * 60)
        refused(tmp_path / name, InputError, "GGUF")


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.bin")
    torch.save(STATE, tmp_path / "y.ckpt")
    for name in ("x.bin", "y.ckpt"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert isinstance(checkpoint, Checkpoint)
        assert_state(checkpoint)
    torch.save(STATE, tmp_path / "z.safetensors")
    refused(tmp_path / "z.safetensors", InputError, "looks like a zip archive")


def test_a_model_folder_with_a_leftover_adapter_configuration_is_a_checkpoint(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    assert_state(checkpoint)


def test_an_empty_tensor_has_a_fingerprint() -> None:
    assert len(checkpoint_from_state_dict({"x": torch.empty(0, 3), "y": torch.tensor(True)}).fingerprint()) == 64


def test_adapters_and_wrong_values(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, UsageError, "adapter, where a whole checkpoint belongs")
    with pytest.raises(InputError, match=r"holds tensors, not a int.*tensor w"):
        checkpoint_from_state_dict({"w": 3})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"no such tensor"):
        checkpoint_from_state_dict(STATE).get("nothing")


def test_the_data_pack() -> None:
    root = os.environ.get("DEVEC_DATA")
    if root is None:
        pytest.skip("DEVEC_DATA does not point to the data pack")
    yolo = open_checkpoint(Path(root) / "checkpoints" / "yolov5n" / "waste2.safetensors")
    assert len(yolo) == 349 and sum(not yolo.info(n).dtype.is_floating_point for n in yolo.names()) == 57
