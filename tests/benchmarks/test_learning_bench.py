"""The benchmark of learning runs at tiny shapes and says what it measured. Never a timing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.learning import BEGIN, END, SIZES, build, markdown, measured, shapes  # noqa: E402

from devec.evaluate.linear_model import LinearModel  # noqa: E402
from devec.io.generated import Change  # noqa: E402


def test_a_case_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, SIZES["quick"], 3, Change(rank=4, shared=2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LinearModel, "write", LinearModel.write)  # the benchmark puts a clock around it
    found = {**measured("synthetic", 3, 1), "originals": 3}
    assert found["vectors"] == 6 and found["directions"] > 0 and len(found["loss"]) == 1
    page = markdown({"cpu": "c", "cores": 1, "cpu_capability": "x", "memory_gib": 1, "gpu": None, "system": "s",
                     "python": "3", "torch": "2", "blas": "b", "load": 0}, [found])  # fmt: skip
    assert "| synthetic | 6 |" in page and "T dense float32 copies" in page


def test_shapes_are_those_of_clips_image_tower() -> None:
    transformers = pytest.importorskip("transformers")
    size = SIZES["quick"]
    config = transformers.CLIPVisionConfig(
        hidden_size=size["hidden"], intermediate_size=size["inner"], num_hidden_layers=size["layers"],
        patch_size=size["patch"], image_size=size["image"], projection_dim=size["out"], num_attention_heads=1,
    )  # fmt: skip
    own = transformers.CLIPVisionModelWithProjection(config).state_dict()
    assert {n: tuple(t.shape) for n, t in own.items()} == shapes(**size)


def test_the_page_has_a_place_for_it() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert BEGIN in text and END in text
