"""The toy experiment at a size that takes seconds: same code, same behaviour."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "experiments" / "toy_recovery"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"toy_recovery_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return {
        "runs": 3,
        "seed": 0,
        "shared": 15,
        "tau": 0.85,
        "clusters": {"sizes": [[150, 30], [150, 75]]},
        "noise": {"sizes": [[150, 30]], "mixed": [[150, 30]], "sigmas": [0.1, 0.4]},
        "angles": {"size": [60, 30], "sigma": 0.05},
    }


@pytest.fixture(scope="module")
def results(config: dict[str, Any]) -> dict[str, list[Any]]:
    return load("run").run_all(config)


@pytest.fixture(scope="module")
def summary(config: dict[str, Any], results: dict[str, list[Any]]) -> dict[str, Any]:
    return load("toy_tables").summarise(config, results)


def test_two_clusters_where_chance_stays_under_the_threshold(summary: dict[str, Any]) -> None:
    clear, crowded = summary["clusters 150x30"], summary["clusters 150x75"]
    assert clear["at_one"] == clear["above_tau"] == 15
    assert clear["largest_private"] < 0.6
    assert crowded["private_edge"] > 0.85 and crowded["above_tau"] > 15


def test_noise_turns_directions_and_the_threshold_loses_them(summary: dict[str, Any]) -> None:
    low, high = (summary["noise 150x30"][s] for s in ("0.1", "0.4"))
    assert low["first/top"]["angle"] == pytest.approx(5.7, abs=0.7)
    assert high["first/top"]["angle"] == pytest.approx(21.8, abs=2.0)
    assert high["bisector/top"]["angle"] < high["first/top"]["angle"] - 2
    assert low["first/tau"]["recall"] > 0.95
    # The angle of what passes is still moderate; what is lost shows in the recall alone.
    assert high["first/tau"]["angle"] < high["first/top"]["angle"]
    assert high["first/tau"]["recall"] < 0.6
    mixed = summary["mixed 150x30"]["0.4"]
    assert mixed["first/top"]["angle"] > high["first/top"]["angle"] + 8


def test_projection_and_principal_angles_give_one_subspace(summary: dict[str, Any]) -> None:
    noisy, clean = summary["angles 0.05"], summary["angles 0"]
    assert noisy["same/float32"]["max"] < 0.01
    assert noisy["same/float64"]["max"] < 1e-9
    assert noisy["acos/float32"]["max"] > 10 * noisy["same/float32"]["max"]
    assert 1.0 < noisy["other/float64"]["mean"] < 4.0
    assert clean["literal/float64"]["max"] > 5.0  # eigenvectors of one repeated eigenvalue are no basis


def test_runs_are_repeatable(config: dict[str, Any], results: dict[str, list[Any]]) -> None:
    run = load("run")
    assert run.clusters(config, 150, 30, 1) == results["clusters 150x30"][1]
    assert run.clusters(config, 150, 30, 2) != results["clusters 150x30"][1]


def test_expectations_are_compared(config: dict[str, Any], summary: dict[str, Any]) -> None:
    compare = load("toy_tables").compare
    path = "clusters 150x30|above_tau"
    assert compare(summary, {path: {"value": 15, "tolerance": 0}, "angles 0|same/float64|max": {"at_most": 1}}) == []
    assert len(compare(summary, {path: {"value": 14, "tolerance": 0.5}})) == 1
    assert len(compare(summary, {path: {"at_least": 16}})) == 1


def test_expected_figures_belong_to_the_configuration() -> None:
    config = yaml.safe_load((FOLDER / "config.yaml").read_text())
    names = {name for name, _, _ in load("run").jobs(config)}
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert len(expected) > 20
    assert {path.split("|")[0] for path in expected} <= names


def test_tables_and_pictures_are_written(
    config: dict[str, Any], results: dict[str, list[Any]], summary: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    load("toy_figures").draw(config, results, summary, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"fig7.png", "fig8a.png", "fig8b.png"}
    text = load("toy_tables").markdown(config, summary)
    assert "| 150 x 30 | 15.0 | 15.0 |" in text and "### 150 x 30, columns mixed" in text
