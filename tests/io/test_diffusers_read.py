"""LoRA files in diffusers keys: one module has one name in every spelling."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from devec.core.errors import IncompatibleError, InputError, RefusedError
from devec.core.layout import Layout
from devec.io.adapters import is_adapter, read_adapter
from devec.io.checkpoint import checkpoint_from_state_dict

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.3.self_attn"
DOWN, UP = torch.arange(12.0).reshape(2, 6), torch.arange(8.0).reshape(4, 2) - 3


def lora(path: Path, *stems: str, ends: tuple[str, str] = ("down", "up"), **more: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{s}{e}.weight": t.clone() for s in stems for e, t in zip(ends, (DOWN, UP), strict=True)}
    save_file({**tensors, **{k.replace("__", "."): v for k, v in more.items()}}, path)
    return path


@pytest.mark.parametrize(
    ("stem", "ends", "name"),
    [
        (f"unet.{ATTENTION}.to_k.lora.", ("down", "up"), f"unet.{ATTENTION}.to_k.weight"),
        (f"unet.{ATTENTION}.to_k.lora_", ("A", "B"), f"unet.{ATTENTION}.to_k.weight"),
        (f"unet.{ATTENTION}.to_k.lora_", ("A.default", "B.default"), f"unet.{ATTENTION}.to_k.weight"),
        (f"unet.{ATTENTION}.processor.to_k_lora.", ("down", "up"), f"unet.{ATTENTION}.to_k.weight"),
        (f"{ATTENTION}.processor.to_k_lora.", ("down", "up"), f"unet.{ATTENTION}.to_k.weight"),
        (f"{ATTENTION}.processor.to_out_lora.", ("down", "up"), f"unet.{ATTENTION}.to_out.0.weight"),
        (f"unet.{ATTENTION}.to_out.0.lora.", ("down", "up"), f"unet.{ATTENTION}.to_out.0.weight"),
        (f"unet.{ATTENTION}.to_out.0.lora_", ("A", "B"), f"unet.{ATTENTION}.to_out.0.weight"),
        (f"text_encoder.{TEXT}.to_q_lora.", ("down", "up"), f"text_encoder.{TEXT}.q_proj.weight"),
        (f"text_encoder.{TEXT}.to_out_lora.", ("down", "up"), f"text_encoder.{TEXT}.out_proj.weight"),
        (f"text_encoder.{TEXT}.q_proj.lora_linear_layer.", ("down", "up"), f"text_encoder.{TEXT}.q_proj.weight"),
        (f"text_encoder_2.{TEXT}.v_proj.lora_", ("A", "B"), f"text_encoder_2.{TEXT}.v_proj.weight"),
        (
            "transformer.single_transformer_blocks.0.attn.to_q.lora_",
            ("A", "B"),
            "transformer.single_transformer_blocks.0.attn.to_q.weight",
        ),
    ],
)
def test_spellings(stem: str, ends: tuple[str, str], name: str, tmp_path: Path) -> None:
    path = lora(tmp_path / "style" / "pytorch_lora_weights.safetensors", stem, ends=ends)
    for place in (path, path.parent):
        assert is_adapter(place)
        vector = read_adapter(place)
        assert vector.names() == [name] and vector.name == "style" and vector.origin.dialect == "diffusers"
        assert torch.equal(vector.deltas[name].dense(), UP @ DOWN) and vector.layouts[name] == Layout((4, 6))


def test_a_lone_file_is_called_by_its_stem(tmp_path: Path) -> None:
    path = lora(tmp_path / "folder" / "ink.safetensors", f"unet.{ATTENTION}.to_q.lora.")
    assert read_adapter(path).name == "ink" and read_adapter(path.parent).name == "folder"
    torch.save(
        {f"{ATTENTION}.processor.to_q_lora.{e}.weight": t for e, t in (("down", DOWN), ("up", UP))}, tmp_path / "x.bin"
    )
    assert read_adapter(tmp_path / "x.bin").names() == [f"unet.{ATTENTION}.to_q.weight"]


@pytest.mark.parametrize(
    "spelling", ["to_q.alpha", "to_q.lora.alpha", "processor.to_q_lora.alpha", "to_q.network_alpha"]
)
def test_alpha_over_rank(spelling: str, tmp_path: Path) -> None:
    key = f"unet.{ATTENTION}.{spelling}"
    vector = read_adapter(lora(tmp_path / "x.safetensors", f"unet.{ATTENTION}.to_q.lora.", **{key: torch.tensor(3.0)}))
    assert torch.allclose(vector.deltas[f"unet.{ATTENTION}.to_q.weight"].dense(), 1.5 * UP @ DOWN)


def test_settings_in_the_header(tmp_path: Path) -> None:
    stem = f"unet.{ATTENTION}.to_q.lora_"
    tensors = {f"{stem}A.weight": DOWN, f"{stem}B.weight": UP}
    settings = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.rank_pattern": {"attn1.to_q": 2},
        "unet.target_modules": ["to_q"],
    }
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    vector = read_adapter(tmp_path / "x.safetensors")
    assert torch.allclose(vector.deltas[f"unet.{ATTENTION}.to_q.weight"].dense(), 4.0 * UP @ DOWN)
    save_file(
        tensors,
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": json.dumps({**settings, "unet.use_bdlora": True})},
    )
    with pytest.raises(RefusedError, match="use_bdlora"):
        read_adapter(tmp_path / "x.safetensors")
    for text in ("{", "[]"):
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(InputError, match="lora_adapter_metadata"):
            read_adapter(tmp_path / "x.safetensors")


def test_convolutions(tmp_path: Path) -> None:
    stem = "unet.down_blocks.0.resnets.0.conv1.lora."
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    save_file({f"{stem}down.weight": down, f"{stem}up.weight": up}, tmp_path / "x.safetensors")
    vector = read_adapter(tmp_path / "x.safetensors")
    name = vector.names()[0]
    assert vector.layouts[name] == Layout((5, 3, 3, 3))
    image = torch.randn(1, 3, 8, 8)
    twice = torch.nn.functional.conv2d(torch.nn.functional.conv2d(image, down), up)
    once = torch.nn.functional.conv2d(image, vector.layouts[name].to_stored(vector.deltas[name].dense()))
    assert torch.allclose(twice, once, atol=1e-4)


def test_a_base_without_the_components_name_and_with_1x1_convolutions(tmp_path: Path) -> None:
    base = checkpoint_from_state_dict(
        {f"{ATTENTION}.to_q.weight": torch.ones(4, 6), "proj_in.weight": torch.ones(4, 6, 1, 1)}
    )
    path = lora(tmp_path / "x.safetensors", f"unet.{ATTENTION}.to_q.lora.", "unet.proj_in.lora.")
    vector = read_adapter(path, base=base)
    assert vector.layouts["unet.proj_in.weight"].shape == (4, 6, 1, 1)
    other = checkpoint_from_state_dict(
        {f"{ATTENTION}.to_q.weight": torch.ones(4, 7), "proj_in.weight": torch.ones(4, 6)}
    )
    with pytest.raises(IncompatibleError, match=r"\(4, 6\).*\(4, 7\)"):
        read_adapter(path, base=other)


@pytest.mark.parametrize(
    ("key", "dialect"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya"),
        ("lora_unet_unet_down_blocks_0_attentions_0_to_k_lora_down.weight", "kohya"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "kohya"),
        ("unet:0:up", "cloneofsimo"),
        ("text_encoder:47:down", "cloneofsimo"),
        ("lora_unet_down_blocks_0.hada_w1_a", "LyCORIS"),
        ("lora_unet_down_blocks_0.lokr_w1", "LyCORIS"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "ComfyUI"),
    ],
)
def test_other_dialects_are_refused_by_name(key: str, dialect: str, tmp_path: Path) -> None:
    save_file({key: DOWN}, tmp_path / "x.safetensors")
    assert is_adapter(tmp_path / "x.safetensors") and is_adapter(tmp_path)
    with pytest.raises(RefusedError, match=f"{dialect}.*not read yet"):
        read_adapter(tmp_path / "x.safetensors")


def test_files_that_do_not_add_up(tmp_path: Path) -> None:
    stem = f"unet.{ATTENTION}.to_q.lora."
    path = tmp_path / "x.safetensors"
    save_file({f"{stem}down.weight": DOWN}, path)
    with pytest.raises(IncompatibleError, match="no up factor"):
        read_adapter(path)
    save_file({f"{stem}down.weight": DOWN, f"{stem}up.weight": UP[:, :1].contiguous()}, path)
    with pytest.raises(IncompatibleError, match="ranks differ"):
        read_adapter(path)
    for key, error, message in (
        (f"unet.{ATTENTION}.to_q.bias", IncompatibleError, "not a LoRA factor"),
        ("elsewhere.to_q.lora.down.weight", IncompatibleError, "which part of the model"),
        (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", IncompatibleError, "two tensors are the down factor"),
        (f"unet.{ATTENTION}.to_q.lora_magnitude_vector", RefusedError, "DoRA"),
        (f"unet.{ATTENTION}.to_q.dora_scale", RefusedError, "DoRA"),
        (f"unet.{ATTENTION}.to_q.alpha", InputError, "alpha is not one number"),
    ):
        with pytest.raises(error, match=message):
            read_adapter(lora(path, stem, **{key: DOWN}))
    with pytest.raises(InputError, match="NaN or Inf"):
        read_adapter(lora(path, stem, **{f"unet.{ATTENTION}.to_q.alpha": torch.tensor(float("nan"))}))


def test_the_data_pack() -> None:
    root = os.environ.get("DEVEC_DATA")
    if root is None:
        pytest.skip("DEVEC_DATA does not point to the data pack")
    folder = Path(root) / "adapters" / "stable-diffusion-v1"
    vectors = [read_adapter(folder / n) for n in ("edinsl_imva", "jettooss_satellite", "wellchn_pokemon")]
    assert all(len(v.deltas) == 128 and set(v.deltas) == set(vectors[0].deltas) for v in vectors)
    for other in ("cloneofsimo_disney", "cloneofsimo_analog", "timohavdk_kohya_2100"):
        with pytest.raises(RefusedError, match="not read yet"):
            read_adapter(folder / other)
