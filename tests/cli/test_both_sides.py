"""``--side both`` recompresses adapters, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devec.cli.main import run


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(2)
    left, right = torch.randn(32, 2, generator=g), torch.randn(2, 24, generator=g)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["proj"], "base_model_name_or_path": "b"}
    for name in "ab":
        B = torch.cat([left, torch.randn(32, 2, generator=g)], dim=1)
        A = torch.cat([right, torch.randn(2, 24, generator=g)], dim=0)
        Path(name).mkdir()
        # Mixed by an orthogonal matrix: what the sides share does not pair up, so P_L W P_R touches both factors.
        Q = torch.linalg.qr(torch.randn(4, 4, generator=g)).Q
        factors = {"lora_B": (B @ Q).contiguous(), "lora_A": A}
        tensors = {f"base_model.model.proj.{n}.weight": t for n, t in factors.items()}
        save_file(tensors, Path(name) / "adapter_model.safetensors")
        (Path(name) / "adapter_config.json").write_text(json.dumps(config))


def test_it_is_said_and_the_rank_may_grow(adapters: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["decompose", "a", "b", "--side", "both", "-o", "parts"]) == 0
    assert "recompressed" in capsys.readouterr().err
    assert run(["export", "parts#unique:a", "-o", "unique"]) == 0
    assert "up to twice the rank" in capsys.readouterr().err
    written = load_file("unique/adapter_model.safetensors")
    assert 4 <= written["base_model.model.proj.lora_A.weight"].shape[0] <= 8


def test_nothing_of_it_on_one_side(adapters: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["decompose", "a", "b", "-o", "parts"]) == 0
    assert run(["export", "parts#unique:a", "-o", "unique"]) == 0
    assert "recompressed" not in capsys.readouterr().err
    assert load_file("unique/adapter_model.safetensors")["base_model.model.proj.lora_A.weight"].shape[0] == 4
