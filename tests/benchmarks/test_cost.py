"""The cost sweep: fits against scipy, pools that share what they say, and a run at tiny sizes. Never a timing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.cost import main  # noqa: E402
from benchmarks.cost_pools import dense_pool, first, low_rank_pool  # noqa: E402
from benchmarks.cost_report import BEGIN, END, K, claimed_power, exceeds  # noqa: E402
from benchmarks.cost_stages import MODES, STAGES, Cost, costs  # noqa: E402
from benchmarks.fits import Exponent, exponent  # noqa: E402

from benchmarks import cost_figure, report  # noqa: E402
from devec.core.options import View  # noqa: E402
from pools import decomposed  # noqa: E402


def test_an_exact_power_is_found_whatever_the_factors_of_the_curves() -> None:
    fit = exponent([[(x, a * x**1.7) for x in (2, 4, 8, 16)] for a in (1e-6, 3.0, 5e4)])
    assert fit.value == pytest.approx(1.7) and fit.last == pytest.approx(1.7)
    assert fit.error == pytest.approx(0.0, abs=1e-9)
    bent = exponent([[(x, 100 + x**2) for x in (1, 2, 1000, 2000)]])
    assert bent.last == pytest.approx(2.0, abs=1e-3) and bent.value < 1.6, "the last step is past the constant"


def test_slope_and_standard_error_are_those_of_a_regression() -> None:
    gen = np.random.default_rng(0)
    x = np.array([3.0, 6.0, 12.0, 24.0, 48.0])
    y = 0.01 * x**1.3 * np.exp(0.1 * gen.standard_normal(5))
    one = stats.linregress(np.log(x), np.log(y))
    fit = exponent([list(zip(x, y, strict=True))])
    assert fit.value == pytest.approx(one.slope) and fit.error == pytest.approx(one.stderr)
    # Several curves: a column per intercept, solved as one system.
    z = 7.0 * x**1.3 * np.exp(0.1 * gen.standard_normal(5))
    design = np.zeros((10, 3))
    design[:5, 0] = design[5:, 1] = 1.0
    design[:, 2] = np.log(np.concatenate([x, x]))
    target = np.log(np.concatenate([y, z]))
    solution, square, _, _ = np.linalg.lstsq(design, target, rcond=None)
    error = np.sqrt(square[0] / 7 * np.linalg.inv(design.T @ design)[2, 2])
    fit = exponent([list(zip(x, y, strict=True)), list(zip(x, z, strict=True))])
    assert fit.value == pytest.approx(solution[2]) and fit.error == pytest.approx(error)


def test_a_claim_is_held_against_its_own_power_on_the_same_pools() -> None:
    pools = [Cost("low-rank", "target", 8, 1, 2, k, 32, dict.fromkeys(STAGES, 1.0)) for k in (3, 6, 12, 24)]
    assert claimed_power(pools, "k") == pytest.approx(1.0)
    pairs = exponent([[(k, float(K["k (k - 1) / 2"](k))) for k in (3, 6, 12, 24)]])
    assert claimed_power(pools, "k (k - 1) / 2") == pytest.approx(pairs.value) and pairs.value > 2.1
    assert not exceeds(Exponent(1.05, 0.03, 1.0), 1.0) and exceeds(Exponent(1.07, 0.03, 1.0), 1.0)


@pytest.mark.parametrize(("kind", "rank"), [("low-rank", 8), ("dense", 16)])
def test_every_vector_of_a_pool_shares_a_quarter_with_every_other(kind: str, rank: int) -> None:
    whole = low_rank_pool(5, 2, 96, rank) if kind == "low-rank" else dense_pool(4, 256, rank)
    pool = first(whole, 4)
    rule = "auto" if kind == "low-rank" else str(rank)
    d = decomposed(pool, rank=rule)
    assert {s.count for s in d.spectra.values()} == {rank // 4} and len(d.spectra) == 6 * len(pool.tensors())
    for view in (View(), View(joint="chain")):
        joint = decomposed(pool, view, mode="joint", rank=rule)
        assert {s.count for key, s in joint.spectra.items() if key[2] is None} == {rank // 4}


def test_every_mode_is_timed_in_the_stages_that_it_has() -> None:
    found = {c.mode: c for c in costs("low-rank", low_rank_pool(3, 2, 32, 4), 4, "auto", 1)}
    assert tuple(found) == MODES
    for mode, c in found.items():
        assert set(c.seconds) == set(STAGES) and c.parameters == 2 * 64 * 4 and c.total == sum(c.seconds.values())
        assert (c.seconds["pairs"] > 0) == (mode in ("chain", "consensus"))
        assert all(c.seconds[s] > 0 for s in STAGES if s != "pairs")


def test_a_quick_run_writes_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HERE", tmp_path)
    done = CliRunner().invoke(main, ["--quick"])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(document["costs"]) == 2 * 2 * 2 * len(MODES) and len(document["exponents"]) == 2 * len(MODES) * 3
    made = [Cost(**{k: v for k, v in c.items() if k != "total"}) for c in document["costs"]]
    for kind, name in (("low-rank", "cost.svg"), ("dense", "cost-dense.svg")):
        path = cost_figure.draw([c for c in made if c.kind == kind], kind, tmp_path)
        assert path.name == name and path.read_text().startswith("<?xml")
    refused = CliRunner().invoke(main, ["--quick", "--write"])
    assert refused.exit_code == 2


def test_results_keep_a_place_for_the_section() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert text.index(BEGIN) < text.index(END) and text.count(BEGIN) == text.count(END) == 1
