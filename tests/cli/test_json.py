"""--json: one document on stdout that fits the documented schema, and nothing else there. -q: warnings and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures_models import Models, Outcome, Runner

TOP = {"schema", "vectors", "mode", "threshold", "side", "tensors", "totals", "warnings"}
TENSOR = {
    "shape", "rank", "energy_kept", "eigenvalues", "applied_threshold", "edge", "p_value", "shared_directions",
    "shared_energy",
}  # fmt: skip
CODES = {
    "nothing-shared", "everything-shared", "edge-above-threshold", "shared-seed", "zero-vector", "norm-outlier",
    "near-duplicate", "negative-overlap", "base-is-mean", "base-name-differs", "missing-module", "head-kept-apart",
    "integer-copied", "threshold-tie",
}  # fmt: skip


def document(said: Outcome) -> Any:
    """The one JSON document; standard output holds no second line."""
    assert said.out.count("\n") == 1 and said.out.endswith("\n")
    return json.loads(said.out, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))


def check_schema(found: dict[str, Any], keys: set[str], both: bool) -> None:
    assert set(found) >= TOP and found["schema"] == 1
    names = found["vectors"]
    for name, t in found["tensors"].items():
        assert set(t) == TENSOR, name
        n, m = t["shape"]
        assert set(t["rank"]) == set(t["energy_kept"]) <= set(names)
        assert all(0 < r <= min(n, m) for r in t["rank"].values())
        assert all(0 < e <= 1 + 1e-6 for e in t["energy_kept"].values())
        assert all(0 <= e <= 1 for e in t["shared_energy"].values())
        for label in ("eigenvalues", "applied_threshold", "edge", "p_value", "shared_directions"):
            assert set(t[label]) == keys, (name, label)
        for key in keys:
            for side in ("left", "right") if both else (None,):
                pick = [t[x][key] if side is None else t[x][key][side] for x in ("eigenvalues", "p_value")]
                assert not both or set(t["eigenvalues"][key]) == {"left", "right"}
                values, p = pick
                assert len(values) == len(p) and values == sorted(values, reverse=True)
                lowest = -1.0 if key == "joint" else -1e-6  # a chain's eigenvalues are real parts
                assert all(lowest <= x <= 1 + 1e-5 for x in values) and all(0 < x <= 1 for x in p)
                count = t["shared_directions"][key] if side is None else t["shared_directions"][key][side]
                assert isinstance(count, int) and count <= len(values)
    assert set(found["totals"]) >= {"shared_directions", "directions", "shared_energy"}
    for w in found["warnings"]:
        assert set(w) == {"code", "tensors", "message"} and w["code"] in CODES


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mode", ["pairwise", "joint", "target"])
def test_decompose(mode: str, side: str, devec: Runner, llama: Models) -> None:
    words = ["--target", "lb"] if mode == "target" else []
    said = devec(
        "decompose", llama.la, llama.lb, llama.lc, "--mode", mode, *words, "--side", side, "--json", "-o", "parts"
    )
    found = document(said)
    pairs = {"la+lb", "lb+lc"} | ({"la+lc"} if mode != "target" else set())
    check_schema(found, pairs | ({"joint"} if mode == "joint" else set()), side == "both")
    assert found == json.loads(Path("parts/spectra.json").read_text())
    assert found["mode"] == mode and found["side"] == side
    assert set(found["totals"]["shared_energy"]) == ({"lb"} if mode == "target" else {"la", "lb", "lc"})


@pytest.mark.parametrize("options", [["--joint", "chain"], ["--threshold", "chance"], ["--paper"], ["--angles"]])
def test_decompose_joint_under_every_view(options: list[str], devec: Runner, llama: Models) -> None:
    found = document(devec("decompose", llama.la, llama.lb, llama.lc, "--mode", "joint", *options, "--json"))
    check_schema(found, {"la+lb", "lb+lc", "la+lc", "joint"}, False)
    if options == ["--threshold", "chance"]:
        assert found["threshold"] == "chance" and found["fdr"] == 0.01


def test_dense_with_warnings(devec: Runner, llama: Models) -> None:
    said = devec("decompose", llama.a, llama.b, "--base", llama.base, "--json")
    found = document(said)
    check_schema(found, {"a+b"}, False)
    assert "integer-copied" in [w["code"] for w in found["warnings"]] and said.warnings == ["integer-copied"] * 2


def test_every_other_command(devec: Runner, llama: Models) -> None:
    devec("decompose", llama.la, llama.lb, "-o", "parts", "-q")
    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "tv", "-q")
    runs: dict[str, list[str]] = {
        "export": ["parts#unique:la", "-o", "o1"],
        "apply": ["--base", llama.base, "--add", "1", llama.la, "-o", "o2"],
        "merge": ["--method", "average", llama.la, llama.lb, "--rank", "2", "-o", "o3"],
        "negate": ["--target", llama.la, "--pool", llama.lb, "-o", "o4"],
        "mix": [llama.la, llama.lb, "-o", "o5"],
        "extract": ["--base", llama.base, "--model", llama.b, "--rank", "2", "-o", "o6"],
        "verify": ["parts"],
        "methods": [],
        "inspect": [llama.la, llama.lb],
        "compare": [llama.la, llama.lb, llama.lc],
    }
    found = {name: document(devec(name, *words, "--json")) for name, words in runs.items()}
    for name in ("export", "apply", "merge", "negate", "mix", "extract"):
        assert found[name]["output"].startswith("o") and found[name]["bytes"] > 0 and found[name]["files"], name
    assert set(found["merge"]["error"]) == set(found["mix"]["decomposition"]["tensors"])
    check_schema(found["negate"]["decomposition"], {"la+lb"}, False)
    assert found["verify"]["ok"] is True
    assert {m["name"] for m in found["methods"]} >= {"average", "task-arithmetic", "shared-unique"}
    assert [s["ranks"] for s in found["inspect"]["sources"]] == [{"4": 6}, {"5": 6}]
    assert found["inspect"]["compatible"] is True
    assert len(found["compare"]["pairs"]) == 3 and found["compare"]["pairs"][0]["shared_directions"] > 0


def test_json_of_failures(devec: Runner, llama: Models) -> None:
    """A failure says nothing on stdout, but for verify and inspect, whose result is the failure."""
    assert devec("mix", llama.la, "--json", "-o", "out", code=2).out == ""
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    Path("parts/spectra.json").write_text("{}")
    assert document(devec("verify", "parts", "--json", code=7))["changed"] == ["spectra.json"]
    found = document(devec("inspect", llama.la, llama.a, "--json", code=2))
    assert found["compatible"] is False and found["problems"][0]["exit_code"] == 2


def test_verbose_json_is_json(devec: Runner, llama: Models) -> None:
    for words in (["inspect", llama.a, "--base", llama.base], ["compare", llama.la, llama.lb]):
        document(devec(*words, "--json", "-v"))
    rows = document(devec("inspect", llama.la, "--json", "-v"))["sources"][0]["per_tensor"]
    assert len(rows) == 6 and rows[0]["rank"] == 4


def test_quiet_prints_warnings_alone(devec: Runner, llama: Models) -> None:
    for words in (
        ["decompose", llama.la, llama.lb, "--paper", "-o", "parts"],
        ["export", "parts#unique:la", "-o", "e"],
        ["mix", llama.la, llama.lb, "--threshold", "1", "-o", "m"],
        ["extract", "--base", llama.base, "--model", llama.a, "--rank", "1", "-o", "x"],
        ["inspect", llama.la, llama.lb],
        ["compare", llama.la, llama.lb, "-v"],
        ["verify", "e"],
        ["methods"],
    ):
        said = devec(*words, "-q")
        assert said.out == ""
        assert all(line.startswith("warning (") for line in said.err.splitlines()), said.err
    assert devec("mix", llama.la, llama.lb, "--threshold", "1", "-o", "n", "-q").warnings == ["nothing-shared"]


def test_tables_hold_what_they_promise(devec: Runner, llama: Models) -> None:
    shown = devec("decompose", llama.la, llama.lb, "-v").out
    for word in ("rank per tensor", "energy kept", "chance edge", "largest cos^2", "energy called shared", "down_proj"):
        assert word in shown
    assert "of 24 directions in 6 tensors are called shared" in " ".join(shown.split())
    shown = devec("inspect", llama.la, "-v").out
    assert "self_attn.v_proj.weight" in shown and "16x32" in shown


def test_an_adapter_that_lacks_a_module(devec: Runner, llama: Models) -> None:
    found = document(
        devec("decompose", llama.la, llama.lb, "--exclude", "nothing", "--include", "q_proj", "--json")
    )
    assert len(found["tensors"]) == 2


def test_zero_vectors_are_reported_and_stay_json(devec: Runner, llama: Models) -> None:
    """Division by a zero norm is where NaN would come from."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama.la, "zero")
    path = Path("zero/adapter_model.safetensors")
    save_file({k: torch.zeros_like(t) for k, t in load_file(path).items()}, path, {"format": "pt"})
    for words in (
        ["compare", "zero", llama.lb], ["decompose", "zero", llama.lb, "-o", "z"], ["mix", "zero", llama.lb, "-o", "m"],
        ["inspect", "zero", llama.lb], ["negate", "--target", "zero", "--pool", llama.lb, "-o", "n"],
    ):  # fmt: skip
        said = devec(*words, "--json")
        document(said)
        assert "zero-vector" in said.warnings, words
    same = devec("inspect", llama.base, "--base", llama.base)
    assert same.warnings == ["zero-vector"] and "changes nothing" in same.err
