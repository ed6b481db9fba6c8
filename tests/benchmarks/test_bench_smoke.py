"""The benchmark at tiny sizes: both sides must find the same. Never a timing."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.clock import Seconds  # noqa: E402
from benchmarks.family import family_seconds  # noqa: E402
from benchmarks.literal import literal_pair  # noqa: E402
from benchmarks.machine import in_words, machine  # noqa: E402
from benchmarks.pair import devec_pair, exact_eigenvalues  # noqa: E402
from benchmarks.planted import dense_pair, low_rank_pair  # noqa: E402
from benchmarks.rows import Row, deltas, difference_of_parts, low_rank_rows  # noqa: E402
from benchmarks.scaling import Timing, thread_timings  # noqa: E402

from benchmarks import report  # noqa: E402
from devec.linalg.lowrank import svd_of_dense  # noqa: E402


def test_the_literal_side_imports_torch_alone() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "literal.py").read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"__future__", "dataclasses", "torch"}


@pytest.mark.parametrize("dense_output", [False, True])
def test_low_rank_sides_agree(dense_output: bool) -> None:
    pair = low_rank_pair(96, 12)
    literal = literal_pair(*pair.matrices, 12)
    ours = devec_pair(*deltas(pair), "auto", dense_output=dense_output)
    assert ours.Z.shape[1] == literal.Z.shape[1] == 3
    assert torch.allclose(ours.eigenvalues.float(), literal.eigenvalues[:12], atol=1e-5)
    assert difference_of_parts(ours, literal) < 1e-4
    assert float(((ours.Z.T @ pair.directions) ** 2).sum(0).min()) > 0.999


@pytest.mark.parametrize("rule", ["16", "auto"])
def test_dense_sides_agree_on_the_iterative_path(rule: str) -> None:
    pair = dense_pair(256, rank=16, shared=4)
    literal = literal_pair(*pair.matrices, 16)
    first, second = deltas(pair)
    ours = devec_pair(first, second, rule, dense_output=True)
    assert (ours.rank, ours.Z.shape[1], literal.Z.shape[1]) == (16, 4, 4)
    assert torch.allclose(ours.eigenvalues.float(), literal.eigenvalues[:16], atol=3e-3)
    assert torch.allclose(ours.eigenvalues, exact_eigenvalues(first, second, 16), atol=3e-3)
    assert difference_of_parts(ours, literal) < 0.05
    assert float(((ours.Z.T @ pair.directions) ** 2).sum(0).min()) > 0.85


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("rule", ["auto", "mp", "energy=0.3"])
def test_iteration_finds_the_rank_that_the_full_spectrum_gives(level: float, rule: str) -> None:
    """Noise at half the weakest signal, as strong, and stronger: the rank must not depend on the path."""
    W = dense_pair(512, rank=24, shared=8, level=level).matrices[0]
    fast, exact = svd_of_dense(W, rule), svd_of_dense(W, rule, exact=True)
    assert fast.rank == exact.rank > 0
    assert torch.allclose(fast.S, exact.S, rtol=2e-3)


def test_rows_say_what_was_found_and_a_miss_is_no_pass() -> None:
    rows = list(low_rank_rows(64, (8,)))
    assert [(r.output, r.found, r.planted, r.surplus, r.verdict) for r in rows] == [
        ("factors", 2, 2, 0, ""),
        ("matrices", 2, 2, 0, ""),
    ]
    assert set(rows[0].stages) == {"factor", "overlap", "apply"}
    figures = {"case": "dense", "output": "matrices", "n": 2048, "rank": 64, "rule": "64", "literal_reused": False}
    figures |= {"devec": Seconds(1.0, 1.0), "literal_error": 0.0, "exact_error": 0.0, "parts": 0.0, "planted": 16}
    assert Row(**figures, literal=Seconds(20.0, 1.0), found=16, surplus=0).verdict == "PASS"
    assert Row(**figures, literal=Seconds(19.9, 99.0), found=16, surplus=0).verdict == "short"
    assert Row(**figures, literal=Seconds(99.0, 99.0), found=15, surplus=0).verdict == "missed"
    assert Row(**figures, literal=Seconds(99.0, 99.0), found=16, surplus=1).verdict == "missed"


def test_results_are_written_between_the_markers(tmp_path: Path) -> None:
    rows = list(low_rank_rows(64, (8,)))
    timings = thread_timings(256, (1,))
    figures = report.Figures(machine(), 1, rows, timings, family_seconds(2, 3, 2, 24, 16))
    assert isinstance(timings[0], Timing) and timings[0].difference == 0.0
    path = tmp_path / "RESULTS.md"
    path.write_text(f"above\n{report.BEGIN}\nstale figures\n{report.END}\nbelow\n")
    report.write_results(report.markdown(figures), path)
    text = path.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "stale" not in text
    assert in_words(figures.machine) in text and text.count("| low-rank | 64 | 8 |") == 4
    document = json.loads(report.as_json(figures))
    assert document["rows"][0]["exact_error"] is None and document["rows"][0]["found"] == 2
    path.write_text("no markers\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.write_results("x", path)
