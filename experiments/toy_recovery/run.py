"""Figures 7 and 8 of arXiv:2512.22511 (appendices 6 and 7) at stated sizes, with what they leave out beside them.

    python experiments/toy_recovery/run.py [--runs N] [--workers N] [--config FILE] [--update]

Writes out/results.json and out/*.png; compares with expected.json (exit 1 if a figure moved). --update also writes
RESULTS.md and the pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from math import degrees
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from devec.linalg.lowrank import svd_of_dense
from devec.linalg.numerics import generator
from devec.linalg.subspace import PairBasis, assemble, overlaps, pair_coefficients, pair_spectrum, principal_angles

HERE = Path(__file__).parent
Config = dict[str, Any]


def toy_pair(
    n: int, m: int, shared: int, sigma: float, key: tuple[object, ...], dtype: torch.dtype, mixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``(W_1, W_2, S)``. The key gives the same S and X_i at every sigma, so curves move for one reason only."""
    gen = generator("toy", n, m, *key)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=gen, dtype=torch.float64)

    S = normal(n, shared)
    W = [torch.cat([S, normal(n, m - shared)], dim=1) for _ in range(2)]
    if mixed:
        W = [X @ (normal(m, m) / m**0.5) for X in W]
    W = [X + sigma * normal(n, m) for X in W]
    return W[0].to(dtype), W[1].to(dtype), S


# --- figure 8(a): eigenvalues without noise --------------------------------------------------------------------------


def clusters(config: Config, n: int, m: int, run: int) -> dict[str, Any]:
    W1, W2, _ = toy_pair(n, m, config["shared"], 0.0, (config["seed"], run), torch.float32)
    U1, U2 = (svd_of_dense(W, "none").U for W in (W1, W2))
    values = pair_spectrum(overlaps([U1, U2]).block(0, 1)).eigenvalues
    return {
        "eigenvalues": [round(float(v), 6) for v in values],
        "at_one": int((values > 1 - 1e-4).sum()),
        "above_tau": int((values > config["tau"]).sum()),
        "largest_private": float(values[config["shared"]]) if values.numel() > config["shared"] else 0.0,
    }


# --- figure 8(b): angle to the truth against noise -------------------------------------------------------------------


def noise(config: Config, n: int, m: int, mixed: bool, run: int) -> list[dict[str, Any]]:
    rows = []
    for sigma in config["noise"]["sigmas"]:
        W1, W2, S = toy_pair(n, m, config["shared"], sigma, (config["seed"], run), torch.float32, mixed)
        truth = torch.linalg.qr(S).Q
        bases = [svd_of_dense(W, "none").U for W in (W1, W2)]
        spectrum = pair_spectrum(overlaps(bases).block(0, 1))
        above = int((spectrum.eigenvalues > config["tau"]).sum())
        row: dict[str, Any] = {"sigma": sigma, "above_tau": above}
        choices: tuple[tuple[PairBasis, str, int], ...] = (
            ("first", "top", config["shared"]),
            ("first", "tau", above),
            ("bisector", "top", config["shared"]),
            ("bisector", "tau", above),
        )
        for basis, rule, keep in choices:
            row[f"{basis}/{rule}"] = recovery(assemble(bases, pair_coefficients(spectrum, keep, basis)), truth)
        rows.append(row)
    return rows


def recovery(Z: Tensor, truth: Tensor) -> dict[str, float | None]:
    """Mean principal angle (over the ``min(d, shared)`` that exist), recall ``|Z^T S|_F^2 / shared`` and precision
    ``|Z^T S|_F^2 / d``. The angle says nothing of directions that were not found; the recall does."""
    if Z.shape[1] == 0:
        return {"angle": None, "recall": 0.0, "precision": None}
    angles = principal_angles(Z, truth)
    captured = float((torch.cos(angles) ** 2).sum())
    return {
        "angle": degrees(float(angles.mean())),
        "recall": captured / truth.shape[1],
        "precision": captured / Z.shape[1],
    }


# --- figure 7: projection (SVD) against principal vectors (QR) -------------------------------------------------------


def angles(config: Config, sigma: float, run: int) -> dict[str, Any]:
    """Principal angles, in degrees, between what the two readings call shared, for several ways of comparing."""
    n, m = config["angles"]["size"]
    result: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        W1, W2, _ = toy_pair(n, m, config["shared"], sigma, (config["seed"], run), dtype)
        U1, U2 = (svd_of_dense(W, "none").U for W in (W1, W2))
        projection = pair_spectrum(overlaps([U1, U2]).block(0, 1))
        keep = int((projection.eigenvalues > config["tau"]).sum())
        Z = assemble([U1, U2], pair_coefficients(projection, keep, "first"))
        Q = [torch.linalg.qr(W).Q for W in (W1, W2)]
        principal = pair_spectrum(overlaps(Q).block(0, 1))
        F = assemble(Q, pair_coefficients(principal, keep, "first"))
        G = assemble(Q, pair_coefficients(principal, keep, "own", owner=1))
        result[f"same/{name}"] = in_degrees(principal_angles(Z, F))
        result[f"acos/{name}"] = in_degrees(acos_angles(Z, F))
        result[f"literal/{name}"] = in_degrees(acos_angles(literal_shared(W1, W2, keep), F))
        result[f"other/{name}"] = in_degrees(principal_angles(Z, G))
    return result


def acos_angles(Z: Tensor, F: Tensor) -> Tensor:
    """The textbook read-out: acos of the singular values of ``Z^T F``, in the dtype at hand."""
    return torch.acos(torch.linalg.svdvals(Z.T @ F).clamp(max=1.0))


def literal_shared(W1: Tensor, W2: Tensor, keep: int) -> Tensor:
    """Eq. (6)-(10) as printed: ``eig(P_1 P_2)``, real parts of the leading eigenvectors, not orthonormalised."""
    P = []
    for W in (W1, W2):
        U = torch.linalg.svd(W, full_matrices=False).U
        P.append(U @ U.T)
    values, vectors = torch.linalg.eig(P[0] @ P[1])
    return vectors[:, torch.argsort(values.real, descending=True)[:keep]].real


def in_degrees(x: Tensor) -> list[float]:
    return [float(v) for v in torch.rad2deg(x.double())]


# --- all of it -------------------------------------------------------------------------------------------------------


def jobs(config: Config) -> Iterable[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    for n, m in config["clusters"]["sizes"]:
        yield f"clusters {n}x{m}", clusters, (config, n, m)
    for kind in ("sizes", "mixed"):
        for n, m in config["noise"][kind]:
            label = "noise" if kind == "sizes" else "mixed"
            yield f"{label} {n}x{m}", noise, (config, n, m, kind == "mixed")
    for sigma in (0.0, config["angles"]["sigma"]):
        yield f"angles {sigma:g}", angles, (config, sigma)


def _call(task: tuple[Callable[..., Any], tuple[Any, ...], int]) -> Any:
    function, arguments, run = task
    torch.set_num_threads(1)
    return function(*arguments, run)


def run_all(config: Config, workers: int = 1, say: Callable[[str], None] = lambda _: None) -> dict[str, list[Any]]:
    """Job name -> one entry per run. The same for every number of workers: each run has its own generator."""
    results: dict[str, list[Any]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        mapper: Callable[..., Iterable[Any]] = map if workers == 1 else pool.map
        for name, function, arguments in jobs(config):
            start = time.perf_counter()
            results[name] = list(mapper(_call, [(function, arguments, run) for run in range(config["runs"])]))
            say(f"{name}: {config['runs']} runs in {time.perf_counter() - start:.0f} s")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="instead of the number in the configuration")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--update", action="store_true", help="also write RESULTS.md and its pictures")
    options = parser.parse_args()
    import toy_figures  # here and not above: workers need no matplotlib
    import toy_tables

    config = yaml.safe_load(options.config.read_text())
    config["runs"] = options.runs or config["runs"]
    start = time.perf_counter()
    results = run_all(config, options.workers, say=lambda line: print(line, file=sys.stderr))
    summary = toy_tables.summarise(config, results)
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps({"config": config, "summary": summary}, indent=1) + "\n")
    toy_figures.draw(config, results, summary, out)
    expected = json.loads((HERE / "expected.json").read_text())
    moved = toy_tables.compare(summary, expected)
    if options.update:
        toy_figures.draw(config, results, summary, HERE)
        (HERE / "RESULTS.md").write_text(toy_tables.markdown(config, summary))
    print(f"{len(expected) - len(moved)} of {len(expected)} expected figures met, {time.perf_counter() - start:.0f} s")
    for line in moved:
        print(line)
    return 1 if moved else 0


if __name__ == "__main__":
    raise SystemExit(main())
