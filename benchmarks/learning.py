"""``python -m benchmarks.learning``: seconds a step and peak memory of learning coefficients at ViT-B/32's shapes.

Eight generated fp16 fine-tunes of CLIP's image tower and what each pair of them shares: 36 vectors, a coefficient per
vector and tensor. Each case is a fresh process on one thread:

``synthetic``  a loss that only touches every weight: what merging and inner products take by themselves
``network``    entropy through the tower itself, one task of 32 generated pictures a step
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import combinations
from math import prod
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import click
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import report
from benchmarks.machine import in_words, machine
from benchmarks.peers.models import write_folder
from devec.io.generated import Change, GeneratedModel
from devec.io.writer import save_file

BEGIN, END = "<!-- learning: begin -->", "<!-- learning: end -->"
LIMIT = 4e9
"""Bytes of resident memory that the larger case may take."""
ROOT = Path(__file__).parents[1]
COLUMNS = ("case", "vectors", "shared directions", "steps", "start", "a step", "of it W(c)", "peak memory", "limit")


def shapes(hidden: int, inner: int, layers: int, patch: int, image: int, out: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' ``CLIPVisionModelWithProjection``."""
    at = "vision_model."
    found: dict[str, tuple[int, ...]] = {
        f"{at}embeddings.class_embedding": (hidden,),
        f"{at}embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{at}embeddings.position_embedding.weight": ((image // patch) ** 2 + 1, hidden),
    }
    norms = [f"{at}pre_layrnorm", f"{at}post_layernorm"]
    for i in range(layers):
        here = f"{at}encoder.layers.{i}"
        matrices = {f"self_attn.{p}_proj": (hidden, hidden) for p in "kvq"} | {
            "self_attn.out_proj": (hidden, hidden), "mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner),
        }  # fmt: skip
        for name, shape in matrices.items():
            found |= {f"{here}.{name}.weight": shape, f"{here}.{name}.bias": shape[:1]}
        norms += [f"{here}.layer_norm1", f"{here}.layer_norm2"]
    found |= {f"{n}.{part}": (hidden,) for n in norms for part in ("weight", "bias")}
    return found | {"visual_projection.weight": (out, hidden)}


SIZES = {
    "ViT-B/32": {"hidden": 768, "inner": 3072, "layers": 12, "patch": 32, "image": 224, "out": 512},
    "quick": {"hidden": 64, "inner": 128, "layers": 2, "patch": 8, "image": 16, "out": 32},
}  # fmt: skip


def build(folder: Path, size: Mapping[str, int], vectors: int, change: Change) -> None:
    """Base, fine-tunes, their decomposition, a task of pictures, suite and recipe, below ``folder``."""
    config = {
        "model_type": "clip_vision_model", "hidden_size": size["hidden"], "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"], "num_attention_heads": max(size["hidden"] // 64, 1),
        "patch_size": size["patch"], "image_size": size["image"], "projection_dim": size["out"],
    }  # fmt: skip
    base = GeneratedModel(shapes(**size), dtype=torch.float16, config=config)
    names = [f"t{i}" for i in range(vectors)]
    for name, model in [("base", base), *((n, base.fine_tune(n, change)) for n in names)]:
        write_folder(model, folder / name)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, size["image"], size["image"], 3)).astype(np.uint8)
    np.savez(folder / "task.npz", x_test=x, y_test=np.arange(64) % 10)
    save_file(folder / "heads.safetensors", {"task": torch.randn(10, size["out"])})
    head = {"file": "heads.safetensors", "weight": "task", "cosine": True, "scale": 100.0}
    suite = {
        "model": {"transformers": "clip-image"}, "select": {"from": "test"},
        "tasks": [{"name": "task", "data": "task.npz", "head": head}],
    }  # fmt: skip
    (folder / "suite.yaml").write_text(json.dumps(suite))
    command = [sys.executable, "-m", "devec.cli.main", "decompose", *names, "--base", "base", "-o", "parts", "-q"]
    subprocess.run([*command, "--rank", str(change.rank), "--workers", "1"], cwd=folder, check=True, env=_env())


def _env() -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def sources(vectors: int) -> list[str]:
    names = [f"t{i}" for i in range(vectors)]
    return [*names, *(f"s-{a}-{b}=parts#shared:{a}+{b}" for a, b in combinations(names, 2))]


def measured(case: str, vectors: int, steps: int) -> dict[str, Any]:
    """One case in this process, in the folder of :func:`build`."""
    from devec.api.eval import network_of, tasks_of
    from devec.api.learn import linear_model
    from devec.api.references import load_pool, open_model
    from devec.evaluate.learning import Schedule, learn
    from devec.evaluate.linear_model import LinearModel
    from devec.evaluate.objectives import FunctionObjective, Sampling, SuiteObjective
    from devec.evaluate.suite import read_suite

    began = process_time()
    base = open_model("base")
    pool, _ = load_pool(sources(vectors), base=base)
    model = linear_model(base, pool, torch.float32, 1)
    objective: Any
    if case == "network":
        suite = read_suite("suite.yaml")
        network = network_of(suite, base)
        objective = SuiteObjective(network, tasks_of(suite, network, base), "entropy", Sampling(batch=32), model.names)
    else:
        objective = FunctionObjective({n: base.get(n).float() for n in model.names}, touched)
    writing = [0.0]
    write = LinearModel.write

    def timed(self: LinearModel, name: str, c: Tensor, out: Tensor) -> None:
        at = process_time()
        write(self, name, c, out)
        writing[0] += process_time() - at

    LinearModel.write = timed  # type: ignore[method-assign]
    start, wall = process_time(), perf_counter()
    result = learn(objective, model, Schedule(steps=steps), grain="tensor")
    taken = process_time() - start
    merges = writing[0] / (steps + 1)  # one more, of the result
    return {
        "case": case, "vectors": len(pool), "steps": steps, "start": start - began,
        "step": (taken - merges) / steps, "write": merges, "wall": (perf_counter() - wall) / (steps + 1),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(prod(base.info(n).shape) for n in model.names),
        "directions": sum(model._held[n].B.shape[1] for n in model.names), "loss": list(result.history),
        "factors": sum(4 * (h.B.numel() + h.A.numel()) for h in model._held.values()),
    }  # fmt: skip


def touched(weights: Mapping[str, Tensor], step: int) -> Tensor:
    """Half the mean square over all tensors: each gets a gradient of its own size, and nothing else is computed."""
    return torch.stack([w.square().mean() for w in weights.values()]).mean() * 0.5


def lines(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            f["case"], str(f["vectors"]), f"{f['directions']:,}", str(f["steps"]), report.duration(f["start"]),
            report.duration(f["step"]), report.duration(f["write"]), f"{f['peak'] / 1e9:.2f} GB",
            "ok" if f["peak"] <= LIMIT else "EXCEEDED",
        )
        for f in found
    ]  # fmt: skip


def markdown(facts: dict[str, Any], found: list[dict[str, Any]]) -> str:
    f = found[0]
    stored = f["parameters"] * 2
    originals, merged, dense = stored * (1 + f["originals"]), 2 * stored, 2 * stored * f["vectors"]
    sizes = {"base and originals in float16": originals, "W(c) in float32": merged, "factors of parts": f["factors"]}
    held = f"{f['parameters'] / 1e6:.1f}M parameters. Of the peak: "
    held += ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in sizes.items())
    held += "; in *network* a whole gradient besides, and activations of 8 pictures. "
    held += f"T dense float32 copies would be {dense / 1e9:.1f} GB."
    head = f"Machine: {in_words(facts)}. 1 thread, processor time.\n"
    return "\n".join([head, report.grid(COLUMNS, lines(found)), held + "\n"])


@click.command()
@click.option("--quick", is_flag=True, help="Tiny shapes: shows that it runs, measures nothing.")
@click.option("--steps", default=3, show_default=True, help="Steps that the seconds are the mean of.")
@click.option("--write", is_flag=True, help="Write the table into benchmarks/RESULTS.md.")
@click.option("--child", nargs=2, default=None, hidden=True)
def main(quick: bool, steps: int, write: bool, child: tuple[str, int] | None) -> None:
    """Measure learning on 36 vectors at the shapes of ViT-B/32; JSON goes to benchmarks/out/learning.json."""
    if child is not None:
        return print(json.dumps(measured(child[0], int(child[1]), steps)))
    if quick and write:
        raise click.UsageError("--quick measures nothing that is worth writing")
    console, facts = Console(), machine()
    console.print(in_words(facts), style="dim")
    vectors, size = (3, SIZES["quick"]) if quick else (8, SIZES["ViT-B/32"])
    change = Change(rank=4, shared=2) if quick else Change(rank=32, shared=16)
    found = []
    with tempfile.TemporaryDirectory() as folder, console.status("generating and decomposing") as status:
        build(Path(folder), size, vectors, change)
        for case in ("synthetic", "network"):
            status.update(case)
            command = ["-m", "benchmarks.learning", "--steps", str(steps), "--child", case, str(vectors)]
            words = [sys.executable, *command]
            done = subprocess.run(words, cwd=folder, env=_env(), check=True, stdout=subprocess.PIPE, text=True)
            found.append({**json.loads(done.stdout), "originals": vectors})
    out = report.HERE / "out"
    out.mkdir(exist_ok=True)
    (out / "learning.json").write_text(json.dumps({"machine": facts, "cases": found}, indent=1) + "\n")
    console.print(markdown(facts, found), markup=False, soft_wrap=True)
    if write:
        report.write_results(markdown(facts, found), markers=(BEGIN, END))


if __name__ == "__main__":
    main()
