"""``devec.save`` writes what any verb returns; every verb of the command is a function of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import devec
from devec.cli.main import COMMANDS
from devec.core.errors import RefusedError, UsageError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(24, 16, generator=g), "b": torch.randn(24, generator=g)}
    save_file(state, "base.safetensors")
    for name in "abc":
        low = torch.randn(24, 2, generator=g) @ torch.randn(2, 16, generator=g)
        save_file({"w": state["w"] + low, "b": state["b"] + 1.0}, f"{name}.safetensors")
    return state


def test_every_command_is_a_function() -> None:
    for name in COMMANDS:
        if name not in ("demo", "methods", "join"):  # join finishes a command line that is recorded
            assert callable(getattr(devec, name))


def test_a_negated_model(base: dict[str, torch.Tensor]) -> None:
    negated = devec.negate("a.safetensors", ["b.safetensors"], base="base.safetensors", coefficient=2.0)
    devec.save(negated, "out.safetensors")
    out = load_file("out.safetensors")
    expected = base["w"] - 2.0 * negated.removed.deltas["w"].dense()
    torch.testing.assert_close(out["w"], expected)
    assert torch.equal(out["b"], base["b"])  # 1-D parameters stay in the base


def test_a_merge_and_its_dtype(base: dict[str, torch.Tensor]) -> None:
    merged = devec.merge("average", ["a.safetensors", "b.safetensors"])
    devec.save(merged, "mean.safetensors", out_dtype=torch.float64)
    a, b, out = (load_file(f"{n}.safetensors") for n in ("a", "b", "mean"))
    assert out["w"].dtype == torch.float64
    torch.testing.assert_close(out["w"].float(), (a["w"] + b["w"]) / 2)


def test_a_decomposition_and_a_part_read_back(base: dict[str, torch.Tensor]) -> None:
    d = devec.decompose(["a.safetensors", "b.safetensors"], base="base.safetensors")
    devec.save(d, "parts")
    part = devec.load("parts#unique:a")
    torch.testing.assert_close(part.deltas["w"].dense(), d.unique("a").deltas["w"].dense())
    devec.save(d.unique("a"), "unique")
    torch.testing.assert_close(devec.load("unique").deltas["w"].dense(), part.deltas["w"].dense())


def test_nothing_is_overwritten_unasked(base: dict[str, torch.Tensor]) -> None:
    model = devec.apply("base.safetensors", [(1.0, devec.load("a.safetensors", base="base.safetensors"))])
    devec.save(model, "out.safetensors")
    with pytest.raises(RefusedError, match="exists"):
        devec.save(model, "out.safetensors")
    devec.save(model, "out.safetensors", overwrite=True)
    with pytest.raises(RefusedError):
        devec.save(model, "a.safetensors", overwrite=True)  # an input
    with pytest.raises(UsageError, match="int"):
        devec.save(3, "x")
