"""Files of mergekit through ``devec merge``, against what mergekit itself has written (see make_mergekit.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_llama
from safetensors.torch import load_file

from fixtures_models import Runner

HERE = Path(__file__).parent
FILES = sorted((HERE / "mergekit").glob("*.yml"))
DIFFERENT = ("bfloat16", "model_stock_opposed", "model_stock_small", "ties_negative")
"""Files whose results differ, and a test below that says how."""
TOLERANCE = 1e-6
"""Of weights of size 1: a few float32 roundings in another order."""
Tensors = dict[str, np.ndarray]


@pytest.fixture
def models(work: Path) -> dict[str, Tensors]:
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
def test_the_same_as_mergekit(devec: Runner, models: dict[str, Tensors], name: str) -> None:
    wanted = mergekits(name)
    found = apart(ours(devec, name), wanted)
    assert {n: error for n, error in found.items() if error > TOLERANCE} == {}
    changed = apart(models["base"], wanted)
    assert min(changed.values()) > 1e-3, "the case would pass without a merge"


# Where the results differ, and how: each rule of mergekit's worked out from the models (docs/mergekit.md)


def changes(models: dict[str, Tensors], name: str, n: str) -> np.ndarray:
    return models[name][n].astype(np.float64) - models["base"][n]


def test_a_mean_of_signed_weights(devec: Runner, models: dict[str, Tensors]) -> None:
    """mergekit divides what agrees by the sum of its weights, which a negative weight makes a change of sign."""
    found, theirs = ours(devec, "ties_negative"), mergekits("ties_negative")
    for n, w in models["base"].items():
        a, b = changes(models, "a", n), -0.4 * changes(models, "b", n)
        kept = [np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-(x.size // 2)], x, 0.0) for x in (a, b)]
        elected = np.where(sum(kept) >= 0, 1.0, -1.0)
        agree = [x * elected > 0 for x in kept]
        total = sum(np.where(m, x, 0.0) for m, x in zip(agree, kept, strict=True))
        by = {name: agree[0] * 1.0 + agree[1] * weight for name, weight in (("size", 0.4), ("signed", -0.4))}
        size, signed = (w + total / np.where(d == 0, 1.0, d) for d in by.values())
        assert np.abs(found[n] - size).max() < TOLERANCE
        assert np.abs(theirs[n] - signed).max() < TOLERANCE
    alone = agree[1] & ~agree[0]
    assert alone.any()
    assert (np.sign(found[n] - models["base"][n])[alone] == -np.sign(theirs[n] - models["base"][n])[alone]).all()


def test_models_that_move_against_each_other(devec: Runner, models: dict[str, Tensors]) -> None:
    """A negative mean cosine: the base here, a step beyond it in mergekit."""
    found, theirs = ours(devec, "model_stock_opposed"), mergekits("model_stock_opposed")
    beyond = 0
    for n, w in models["base"].items():
        a, d = changes(models, "a", n), changes(models, "d", n)
        c = float((a * d).sum() / np.linalg.norm(a) / np.linalg.norm(d))
        assert c < 0
        assert np.array_equal(found[n], w)
        t = 2 * c / (1 + c)
        assert np.abs(theirs[n] - (w + t * (a + d) / 2)).max() < 1e-4 * max(1.0, abs(t))
        beyond += t < -1
    assert beyond > 10


def test_models_that_hardly_move(devec: Runner, models: dict[str, Tensors]) -> None:
    """mergekit's products of norms are at least 1e-6, which takes small changes for nearly orthogonal ones."""
    found, theirs = ours(devec, "model_stock_small"), mergekits("model_stock_small")
    for n, w in models["base"].items():
        h, i = changes(models, "h", n), changes(models, "i", n)
        inner, size = float((h * i).sum()), float(np.linalg.norm(h) * np.linalg.norm(i))
        assert size < 1e-7
        for made, c in ((found, inner / size), (theirs, inner / 1e-6)):
            wanted = w + 2 * c / (1 + c) * (h + i) / 2
            assert np.abs(made[n] - wanted).max() < 3e-7
        assert np.abs(found[n] - theirs[n]).max() > 3e-6


def test_dtype_is_where_mergekit_computes(devec: Runner, models: dict[str, Tensors]) -> None:
    """In bfloat16 it rounds inputs, changes and sums; here the sum is taken in float32 and rounded once."""
    import torch

    found, theirs = ours(devec, "bfloat16"), mergekits("bfloat16")
    assert load_file("out/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    wrong, entries = {"ours": 0, "theirs": 0}, 0
    for n, w in models["base"].items():
        exact = w + 0.4 * changes(models, "a", n) + 0.3 * changes(models, "b", n)
        rounded = torch.from_numpy(exact).to(torch.bfloat16).float().numpy()
        wrong["ours"] += int((found[n] != rounded).sum())
        wrong["theirs"] += int((theirs[n] != rounded).sum())
        entries += exact.size
    assert wrong["ours"] == 0
    assert wrong["theirs"] > 0.2 * entries
