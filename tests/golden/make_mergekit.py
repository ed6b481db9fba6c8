"""Run mergekit on every file of tests/golden/mergekit and store what it writes in tests/golden/mergekit.npz.

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    mergekit/bin/python tests/golden/make_mergekit.py

Random masks are those of devec.linalg.counter, which this script puts in the place of ``torch.bernoulli``: mergekit
draws from a global generator, so that its own masks depend on the order in which it happens to work.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "src")]

import numpy as np  # noqa: E402
import tiny_llama  # noqa: E402

SEED = 0


def with_our_masks() -> None:
    """``torch.bernoulli`` as a function of the tensor's and the model's name, while mergekit merges one tensor."""
    import torch
    from mergekit.merge_methods import generalized_task_arithmetic as module

    from devec.linalg.counter import key_of, uniform

    merge, sparsify = module.GeneralizedTaskArithmeticMerge.merge_group, module.sparsify
    at: dict[str, object] = {}

    def merge_group(self: object, group: object, /, **parameters: object) -> object:
        at["tensor"], at["models"] = group.metadata.name, iter([str(entry.id) for entry in group.non_base])
        return merge(self, group, **parameters)

    def one(*given: object, **more: object) -> object:
        at["model"] = next(at["models"])
        return sparsify(*given, **more)

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        rows, columns = (chances.shape[0], chances[0].numel()) if chances.ndim > 1 else (1, chances.numel())
        if is_vector(str(at["tensor"])):  # to devec a 1-D parameter is a column
            rows, columns = columns, rows
        drawn = uniform(key_of("mask", SEED, at["tensor"], at["model"]), rows, columns).reshape(chances.shape)
        return (drawn < chances).to(chances.dtype)

    module.GeneralizedTaskArithmeticMerge.merge_group, module.sparsify = merge_group, one
    torch.bernoulli = bernoulli


def is_vector(name: str) -> bool:
    return len(tiny_llama.shapes()[name]) == 1


def merged(file: Path) -> np.ndarray:
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    out = Path("out") / file.stem
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(file.read_text())), str(out),
        MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=SEED),
    )
    found: dict[str, torch.Tensor] = {}
    for part in sorted(out.glob("*.safetensors")):
        found |= load_file(part)
    return tiny_llama.flat({n: x.float().numpy() for n, x in found.items()})


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with_our_masks()
    with tempfile.TemporaryDirectory() as work, chdir(work):
        tiny_llama.write(Path())
        found = {file.stem: merged(file) for file in sorted((HERE / "mergekit").glob("*.yml"))}
    np.savez_compressed(HERE / "mergekit.npz", **found)
    print(f"{len(found)} merges, {(HERE / 'mergekit.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
