"""Files of mergekit through ``devec merge``, against what mergekit itself has written (see make_mergekit.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import tiny_llama  # noqa: E402

from fixtures_models import Runner, devec, work  # noqa: E402, F401

FILES = sorted((HERE / "mergekit").glob("*.yml"))
DIFFERENT = ("bfloat16", "model_stock_opposed", "ties_negative")
"""Files whose results differ, and a test below that says how."""
TOLERANCE = 1e-6
"""Of weights of size 1: a few float32 roundings in another order."""
Tensors = dict[str, np.ndarray]


@pytest.fixture
def models(work: Path) -> dict[str, Tensors]:  # noqa: F811
    tiny_llama.write(work)
    return tiny_llama.models()


def mergekits(name: str) -> Tensors:
    with np.load(HERE / "mergekit.npz") as stored:
        return tiny_llama.parted(stored[name])


def ours(run: Runner, name: str, *more: str) -> Tensors:
    run("merge", str(HERE / "mergekit" / f"{name}.yml"), "-o", "out", *more)
    return {n: x.float().numpy() for n, x in load_file("out/model.safetensors").items()}


def apart(a: Tensors, b: Tensors) -> dict[str, float]:
    assert set(a) == set(b)
    return {n: float(np.abs(a[n].astype(np.float64) - b[n]).max()) for n in b}


def test_every_file_has_a_result() -> None:
    with np.load(HERE / "mergekit.npz") as stored:
        assert sorted(stored) == [file.stem for file in FILES]


@pytest.mark.parametrize("name", [file.stem for file in FILES if file.stem not in DIFFERENT])
def test_the_same_as_mergekit(devec: Runner, models: dict[str, Tensors], name: str) -> None:  # noqa: F811
    wanted = mergekits(name)
    found = apart(ours(devec, name), wanted)
    assert {n: error for n, error in found.items() if error > TOLERANCE} == {}
    changed = apart(models["base"], wanted)
    assert min(changed.values()) > 1e-3, "the case would pass without a merge"
