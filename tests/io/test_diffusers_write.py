"""LoRA files in diffusers keys, written: the same product comes back, whole files or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from devec.core.delta import Delta, DenseDelta, LowRankDelta
from devec.core.errors import GuardError, RefusedError, SideStepError
from devec.core.layout import Layout
from devec.core.provenance import InputRecord, Provenance
from devec.core.vectors import Origin, TaskVector
from devec.io.adapters import adapter_folder, read_adapter
from devec.io.adapters.diffusers_write import to_diffusers, write_diffusers
from devec.io.adapters.write import write_adapter
from devec.io.verify import verify_output

ATTENTION = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn"
SHAPES = {
    f"{ATTENTION}.to_k.weight": (8, 6),
    f"{ATTENTION}.to_out.0.weight": (8, 8),
    "unet.down_blocks.0.attentions.1.proj_in.weight": (8, 6, 1, 1),
    "unet.conv_in.weight": (8, 4, 3, 3),
    f"{TEXT}.q_proj.weight": (6, 6),
}
PROVENANCE = Provenance("mix", {"part": "unique"}, (InputRecord("ink", kind="diffusers"),))


def vector(ranks: int | list[int] = 3, **more: Delta) -> TaskVector:
    deltas: dict[str, Delta] = {}
    for i, (n, shape) in enumerate(SHAPES.items()):
        rows, cols = Layout(shape).matrix_shape
        r = ranks if isinstance(ranks, int) else ranks[i]
        deltas[n] = LowRankDelta(torch.randn(rows, r), torch.randn(r, cols))
    layouts = {n: Layout(s) for n, s in SHAPES.items()}
    for n, d in more.items():
        deltas[n], layouts[n] = d, Layout((d.shape[0],) if d.shape[1] == 1 else d.shape)
    origin = Origin(dialect="diffusers", base_name="stable-diffusion-v1-5")
    return TaskVector("mixed", deltas, layouts, origin=origin)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    v = vector()
    written = write_adapter(tmp_path / "out", v, provenance=PROVENANCE)
    assert written.files == ("pytorch_lora_weights.safetensors",) and written.tensors == 10 and written.notes == ()
    again = read_adapter(tmp_path / "out")
    assert again.origin.dialect == "diffusers" and set(again.deltas) == set(SHAPES)
    for n, d in v.deltas.items():
        found = again.deltas[n]
        assert isinstance(found, LowRankDelta) and isinstance(d, LowRankDelta)
        assert torch.equal(found.B, d.B) and torch.equal(found.A, d.A) and again.layouts[n].shape == SHAPES[n], n
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert tensors["unet.conv_in.lora_A.weight"].shape == (3, 4, 3, 3)
    assert tensors["unet.conv_in.lora_B.weight"].shape == (8, 3, 1, 1)
    assert {k.rsplit(".", 2)[1] for k in tensors} == {"lora_A", "lora_B"}, "no alpha: the scale is in the factors"


def test_folder_has_card_and_records(tmp_path: Path) -> None:
    write_diffusers(tmp_path / "out", vector(), provenance=PROVENANCE, summary={"shared": 3}, card_text="Measured.")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card and "stable-diffusion-v1-5" in card and "Measured." in card
    assert json.loads((tmp_path / "out" / ".devec" / "summary.json").read_text()) == {"shared": 3}
    assert verify_output(tmp_path / "out").ok


def test_one_file_carries_recipe_and_hashes(tmp_path: Path) -> None:
    v = vector()
    out = tmp_path / "ink.safetensors"
    write_diffusers(out, v, provenance=PROVENANCE)
    with safe_open(out, "pt") as file:
        assert "command: mix" in file.metadata()["devec.recipe"]
    assert verify_output(out).checked == 10
    found = read_adapter(out)
    assert found.name == "ink"
    assert all(torch.equal(found.deltas[n].dense(), v.deltas[n].dense()) for n in SHAPES)
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    with pytest.raises(GuardError):
        verify_output(out)


def test_unlike_ranks_are_filled_with_zeros_within_a_component(tmp_path: Path) -> None:
    v = vector([2, 5, 3, 0, 4])
    written = write_diffusers(tmp_path / "out", v, provenance=PROVENANCE)
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k and k.startswith("unet")} == {5}
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k and k.startswith("text")} == {4}
    assert "unet.conv_in.lora_A.weight" not in tensors
    assert any("rank 0" in n for n in written.notes) and any("2 to 5" in n for n in written.notes)
    again = read_adapter(tmp_path / "out")
    for n in again.deltas:
        assert torch.allclose(again.deltas[n].dense(), v.deltas[n].dense(), atol=1e-6)


def test_all_zero_still_loads(tmp_path: Path) -> None:
    write_diffusers(tmp_path / "out", vector(0), provenance=PROVENANCE)
    again = read_adapter(tmp_path / "out")
    assert set(again.deltas) == set(SHAPES) and all(d.norm() == 0 for d in again.deltas.values())


def test_what_no_lora_can_hold_is_refused(tmp_path: Path) -> None:
    zero = vector(**{"unet.x.bias": DenseDelta(torch.zeros(4, 1)), "unet.y.weight": DenseDelta(torch.zeros(4, 4))})
    assert not any("unet.x" in k for k in to_diffusers(zero)[0])
    for name, value in (("unet.x.bias", torch.ones(4, 1)), ("unet.y.weight", torch.ones(4, 4))):
        with pytest.raises(RefusedError, match=name):
            write_diffusers(tmp_path / "out", vector(**{name: DenseDelta(value)}), provenance=PROVENANCE)
    with pytest.raises(RefusedError, match="too large"):
        big = LowRankDelta(torch.full((4, 1), 1e6), torch.ones(1, 4))
        write_diffusers(tmp_path / "out", vector(**{"unet.z.weight": big}), provenance=PROVENANCE, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_and_inputs(tmp_path: Path) -> None:
    for name in ("out", "out.safetensors"):
        write_diffusers(tmp_path / name, vector(), provenance=PROVENANCE)
        with pytest.raises(RefusedError, match="exists already"):
            write_diffusers(tmp_path / name, vector(), provenance=PROVENANCE)
        write_diffusers(tmp_path / name, vector(), provenance=PROVENANCE, overwrite=True)
        with pytest.raises(RefusedError, match="change an input"):
            write_diffusers(
                tmp_path / name, vector(), provenance=PROVENANCE, overwrite=True, inputs=[tmp_path / name]
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.safetensors"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_card_that_fails(strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise ValueError("no card today")

    monkeypatch.setattr(adapter_folder, "model_card", broken)
    with pytest.raises(RefusedError if strict else SideStepError, match="no card today"):
        write_diffusers(tmp_path / "out", vector(), provenance=PROVENANCE, strict=strict)
    assert (tmp_path / "out").exists() is not strict
    if not strict:
        assert verify_output(tmp_path / "out").ok


def test_same_bytes_every_time(tmp_path: Path) -> None:
    v = vector()
    for name in ("one", "two"):
        write_diffusers(tmp_path / f"{name}.safetensors", v, provenance=PROVENANCE)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_real_adapters_come_back(data_pack: Path, tmp_path: Path) -> None:
    """The files in diffusers keys of the data pack: read, written, read again."""
    seen = 0
    for folder in sorted((data_pack / "adapters" / "stable-diffusion-v1").iterdir()):
        try:
            v = read_adapter(folder)
        except RefusedError:
            continue  # other dialects
        write_diffusers(tmp_path / folder.name, v, provenance=PROVENANCE)
        again = read_adapter(tmp_path / folder.name)
        assert set(again.deltas) == set(v.deltas)
        for n in v.deltas:
            wanted = v.deltas[n].dense()
            assert torch.allclose(again.deltas[n].dense(), wanted, atol=1e-5 * float(wanted.abs().max() + 1e-9)), n
        seen += 1
    assert seen >= 3
