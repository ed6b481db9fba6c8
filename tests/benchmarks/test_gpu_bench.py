"""The graphics-card benchmark at a sixteenth of its size, on the CPU: it counts right, checks right, and says what it
did not measure. Never a timing."""

from __future__ import annotations

import json
import sys
from math import cos, radians
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu import report  # noqa: E402
from benchmarks.gpu.__main__ import measure  # noqa: E402
from benchmarks.gpu.expected import expected  # noqa: E402
from benchmarks.gpu.layers import LAYERS, adapter_layer, dense_layer, shapes  # noqa: E402
from benchmarks.gpu.meter import CountedProducts, Roofline, Stage  # noqa: E402
from benchmarks.gpu.stages import CASES  # noqa: E402
from benchmarks.report import BEGIN, END, write_results  # noqa: E402

from devec.linalg.lowrank import svd_of_dense, svd_of_product  # noqa: E402
from devec.linalg.subspace import pair_spectrum  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def figures() -> report.Figures:
    return measure(1, 2, 16, "cpu", 5.0, Console(quiet=True))


def test_every_stage_of_every_case_is_measured_once(figures: report.Figures) -> None:
    assert [(s.case, s.stage) for s in figures.stages] == [
        (case.label, stage) for case in CASES for stage in ("factor", "overlaps", "pairs", "apply")
    ]
    assert all(s.layers == 1 and s.seconds > 0 for s in figures.stages)
    by = {(s.case, s.stage): s for s in figures.stages}
    low = by["dense, bfloat16 products", "factor"].flops
    assert low["bfloat16"] > low["float32"] > 0 and "bfloat16" not in by[CASES[0].label, "factor"].flops
    # One pair, both members: Z from two bases of rank 4, then Z (Z^T W), for W of every shape of the layer.
    needed = sum(2 * 2 * n * 4 * 4 + 2 * (2 * 2 * n * m * 4) for _, n, m in shapes(16))
    assert by[CASES[0].label, "apply"].flops == {"float32": needed}


def test_the_device_is_held_against_the_cpu(figures: report.Figures) -> None:
    assert len(figures.agreements) == 3 * len(CASES)
    for row in figures.agreements:
        assert row.ranks == row.cpu_ranks
        assert row.eigenvalues < (3e-3 if "bfloat16" in row.case else 1e-5)
        assert row.angle < (1.0 if "bfloat16" in row.case else 0.01)
    for accuracy in figures.accuracies:
        assert accuracy.found == accuracy.exact > 0 and accuracy.eigenvalues < 3e-3
        assert (accuracy.low_share > 0.5) == (accuracy.products == "bfloat16")
    taken = [c.what for c in figures.choices if c.taken]
    assert len(taken) == len(set(taken)) == len({c.what for c in figures.choices}) < len(figures.choices)


def test_counting_products() -> None:
    A, B, C = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    X, Y = torch.randn(2, 6, 7).bfloat16(), torch.randn(2, 7, 1).bfloat16()
    with CountedProducts() as counted:
        torch.addmm(C, A, B)
        A @ B
        C.addmm_(A, B)
        X @ Y
        A + A
    assert counted.flops == {"float32": 3 * 2 * 3 * 4 * 5, "bfloat16": 2 * 2 * 6 * 7}
    assert counted.bytes == 3 * 4 * (12 + 20 + 15) + 2 * (2 * 6 * 7 + 2 * 7 + 2 * 6)
    roof = Roofline({"float32": 10.0, "float64": 5.0}, 100.0)
    assert roof.floor(Stage("c", "s", flops={"float32": 20.0, "float64": 5.0}, bytes=50.0)) == 3.0
    assert roof.floor(Stage("c", "s", flops={"float32": 20.0}, bytes=500.0)) == 5.0


def test_layers_have_the_model_s_size_and_planted_spectra() -> None:
    assert LAYERS * sum(n * m for _, n, m in shapes()) == 6_476_005_376
    blocks = dense_layer(0, 2, 16, CPU)
    again = dense_layer(0, 2, 16, CPU)
    for block, twin in zip(blocks, again, strict=True):
        first, second = (delta.dense() for delta in block.deltas if delta is not None)
        assert first.dtype == torch.bfloat16 and torch.equal(first, twin.deltas[0].dense())  # type: ignore[union-attr]
        svds = [svd_of_dense(W, "auto", exact=True) for W in (first, second)]
        assert [svd.rank for svd in svds] == [4, 4]
        values = pair_spectrum(svds[0].U.T @ svds[1].U).eigenvalues
        assert float(values[0]) == pytest.approx(cos(radians(10)) ** 2, abs=0.15) and float(values[1]) < 0.5
    for block in adapter_layer(3, 2, 8, 16, CPU):
        pair = [svd_of_product(d.B, d.A) for d in block.deltas]  # type: ignore[union-attr]
        values = pair_spectrum(pair[0].U.T @ pair[1].U).eigenvalues
        assert [svd.rank for svd in pair] == [8, 8] and int((values > 0.85).sum()) == 2


def test_results_go_between_their_own_markers(figures: report.Figures, tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(f"{BEGIN}\nkept\n{END}\n{report.MARKERS[0]}\nstale\n{report.MARKERS[1]}\nbelow\n")
    write_results(report.markdown(figures), path, report.MARKERS)
    text = path.read_text()
    assert "kept" in text and "stale" not in text and text.endswith("below\n")
    assert "Roofline of the CPU" in text and "a smoke run, no benchmark" in text and "Not measured" not in text
    assert text.count("| LoRA r = 256 | ") == 4 + 3
    document = json.loads(report.as_json(figures))
    assert document["measured"] and document["stages"][0]["floor"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a card")
def test_without_a_card_nothing_is_claimed() -> None:
    figures = measure(1, 10, 16, "auto", 5.0, Console(quiet=True))
    text = report.markdown(figures)
    assert "**Not measured: no graphics card was present.**" in text and "arithmetic" in text and "Roofline" not in text
    assert figures.stages == figures.choices == figures.agreements == [] and figures.accuracies
    document = json.loads(report.as_json(figures))
    assert not document["measured"] and document["roofline"] is None
    rows = {(row.case, row.stage): row for row in expected(10)}
    # 90 unique parts with 64 directions of 6.476e9 weights: 4 operations a weight, direction and part.
    assert rows["dense", "apply"].teraflops == pytest.approx(90 * 4 * 64 * 6.476e9 / 1e12, rel=1e-3)
    assert all(row.seconds > 0 for row in rows.values())
