"""``devec merge`` with spectral methods, on checkpoints and on adapters, against transcriptions on the raw files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import devec as devec_library
from devec.core.layout import Layout
from fixtures_models import Models, Runner, deltas, difference, same, weights
from reference import spectral_merges as plain

Transcription = Callable[[list[Tensor]], Tensor]
METHODS: dict[str, tuple[list[str], Transcription]] = {
    "tsv-m": (["scale=0.7"], partial(plain.tsv_merge, scale=0.7, rtol=1e-6)),
    "iso-c": (["scale=0.5"], partial(plain.isotropic, scale=0.5, rtol=1e-6)),
    "iso-cts": (
        ["scale=0.5", "common=0.5"],
        partial(plain.isotropic_common_and_task, scale=0.5, fraction=0.5, rtol=1e-6),
    ),
    "star": (["eta=0.6"], partial(plain.star, eta=0.6, rtol=1e-6)),
    "wudi": (["solver=ridge", "ridge=0.1"], partial(plain.wudi_ridge, ridge=0.1)),
    "knots": (["density=0.4"], partial(plain.knots, density=0.4, scale=0.6, rtol=1e-6)),
}
EACH = pytest.mark.parametrize("method", METHODS)


def merged(method: str, pool: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    _, call = METHODS[method]
    return {n: call([torch.from_numpy(v[n]) for v in pool]).numpy() for n in pool[0]}


def sets(method: str) -> list[str]:
    return [word for item in METHODS[method][0] for word in ("--set", item)]


@EACH
def test_checkpoints(method: str, devec: Runner, llama: Models) -> None:
    devec("merge", "--method", method, "--base", llama.base, llama.a, llama.b, *sets(method), "-o", "out")
    W0, found = weights(llama.base), weights("out")
    changes = merged(method, [difference(m, llama.base) for m in (llama.a, llama.b)])
    same({n: found[n] - W0[n] for n in changes}, changes, 2e-5)
    norm = "model.norm.weight"
    scale = {"tsv-m": 0.7, "iso-c": 0.5, "iso-cts": 0.5, "knots": 0.6}.get(method, 1.0)
    mean = (weights(llama.a)[norm] + weights(llama.b)[norm]) / 2 - W0[norm]
    assert np.allclose(found[norm] - W0[norm], scale * mean, atol=1e-6)


@EACH
def test_adapters_stay_an_adapter(method: str, devec: Runner, llama: Models) -> None:
    devec("merge", "--method", method, llama.la, llama.lb, *sets(method), "-o", "out")
    pool = [deltas(llama.la), deltas(llama.lb)]
    common = set(pool[0]) & set(pool[1])
    wanted = merged(method, [{n: v[n] for n in common} for v in pool])
    found = deltas("out")
    same({n: found[n] for n in common}, wanted, 2e-5)
    devec("merge", "--method", method, "--base", llama.base, llama.la, llama.lb, *sets(method), "-o", "model")
    W, W0 = weights("model"), weights(llama.base)
    same({n: W[n] - W0[n] for n in common}, wanted, 2e-5)


def test_compression_writes_one_task(devec: Runner, llama: Models) -> None:
    settings = ["--set", "task=mine", "--base", llama.base, f"mine={llama.a}", llama.b]
    devec("merge", "--method", "tsv-c", *settings, "-o", "out")
    W, W0 = weights("out"), weights(llama.base)
    wanted = {
        n: plain.truncated(torch.from_numpy(D), min(D.shape) // 2).numpy()
        for n, D in difference(llama.a, llama.base).items()
    }
    same({n: W[n] - W0[n] for n in wanted}, wanted, 2e-5)
    said = devec("merge", "--method", "tsv-c", "--base", llama.base, llama.a, "-o", "no", code=2)
    assert "tsv-c needs task. Give it with --set KEY=VALUE." in said.err
    said = devec("merge", "--method", "tsv-c", *settings[2:], "--set", "task=yours", "-o", "no", code=2)
    assert "task='yours' is no vector" in said.err and "mine" in said.err


def test_depth_scales_every_block(devec: Runner, llama: Models) -> None:
    settings = ["--set", "blocks=2", "--set", "beta=0.5", "--base", llama.base]
    devec("merge", "--method", "lines", *settings, llama.a, llama.b, "-o", "out")
    W, W0 = weights("out"), weights(llama.base)
    D = [difference(m, llama.base) for m in (llama.a, llama.b)]
    factor = {n: 0.5 + (0.5 if ".layers.1." in n else 0.0) for n in D[0]}
    assert set(factor.values()) == {0.5, 1.0}
    same({n: W[n] - W0[n] for n in factor}, {n: factor[n] * (D[0][n] + D[1][n]) for n in factor}, 2e-5)
    said = devec("merge", "--method", "lines", "--set", "blocks=1", *settings[2:], llama.a, "-o", "no", code=2)
    assert "blocks from 2 on" in said.err


def test_a_dense_result_of_adapters_wants_a_base_or_a_rank(devec: Runner, llama: Models) -> None:
    said = devec("merge", "--method", "wudi", "--set", "steps=3", llama.la, llama.lb, "-o", "no", code=2)
    assert "makes full matrices" in said.err
    devec("merge", "--method", "wudi", "--set", "steps=3", llama.la, llama.lb, "--rank", 4, "-o", "out")
    assert all(np.linalg.matrix_rank(W, tol=1e-5) <= 4 for W in deltas("out").values())


def test_the_callers_threads_change_no_byte() -> None:
    g = torch.Generator().manual_seed(0)
    pool = [
        devec_library.TaskVector(
            name, {"w": devec_library.DenseDelta(torch.randn(300, 260, generator=g))}, {"w": Layout((300, 260))}
        )
        for name in "abc"
    ]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            vectors = [devec_library.merge(m, pool).vector for m in ("tsv-m", "iso-cts", "knots")]
            found.append([vector.deltas["w"].dense() for vector in vectors])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_choice_that_is_none_is_refused(devec: Runner, llama: Models) -> None:
    for wrong, word in (("solver=newton", "adam"), ("others=max", "mean"), ("conv=1", "matrix")):
        said = devec("merge", "--method", "wudi", "--set", wrong, llama.la, llama.lb, "-o", "no", code=2)
        assert word in said.err
