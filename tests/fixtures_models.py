"""Tiny real models and adapters, built with transformers and peft: what the command is tried on.

``llama/``: base, three full fine-tunes (a, b, c) and three LoRAs (la, lb, lc: ranks 4, 5, 6; lb is rsLoRA). ``gpt2/``:
base, two LoRAs on Conv1D modules. Any two of a kind have two directions nearly in common per matrix (cos^2 about 0.97)
and otherwise their own, so that decompositions find both. The base carries a step counter (integers) and a tokenizer.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HIDDEN, HEADS, VOCABULARY = 32, 4, 48
NEAR = 0.15
"""How far the common directions of two tasks lie apart."""


@dataclass(frozen=True)
class Models:
    """Where everything lies; ``base`` and so on are strings, as a user would type them."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def build_llama(folder: Path) -> Models:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=32,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in base.parameters():
            if p.ndim == 2:
                p.mul_(5)
    common = {n: _normal(torch.Generator().manual_seed(99), p.shape[0], 2) for n, p in base.named_parameters()}
    _save(base, folder / "base")
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    for seed, task in enumerate("abc"):
        g = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(base)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.ndim == 1:
                    p.add_(0.01 * _normal(g, *p.shape))
                    continue
                columns = torch.cat([common[n] + NEAR * _normal(g, p.shape[0], 2), _normal(g, p.shape[0], 2)], dim=1)
                p.add_(columns @ (0.02 * _normal(g, 4, p.shape[1])))
        _save(model, folder / task)
        _add_counter(folder / task, seed + 1)
    _add_counter(folder / "base", 0)
    for seed, task in enumerate(("la", "lb", "lc")):
        g = torch.Generator().manual_seed(20 + seed)
        lora = LoraConfig(
            r=4 + seed, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=task == "lb",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(copy.deepcopy(base), lora)
        _fill(model, common, g)
        model.save_pretrained(folder / task)
    return Models(folder)


def build_gpt2(folder: Path) -> Models:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(6)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=32)
    base = GPT2LMHeadModel(config)
    _save(base, folder / "base")
    outs = {n: p.shape[1] if "c_" in n else p.shape[0] for n, p in base.named_parameters() if p.ndim == 2}
    common = {n: _normal(torch.Generator().manual_seed(98), out, 2) for n, out in outs.items()}
    for seed, task in enumerate(("la", "lb")):
        g = torch.Generator().manual_seed(40 + seed)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
        model = get_peft_model(copy.deepcopy(base), lora)
        _fill(model, common, g)
        model.save_pretrained(folder / task)
    for seed, task in enumerate("ab"):
        g = torch.Generator().manual_seed(50 + seed)
        model = copy.deepcopy(base)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n not in common or "wte" in n or "wpe" in n:
                    continue
                columns = torch.cat([common[n] + NEAR * _normal(g, outs[n], 2), _normal(g, outs[n], 2)], dim=1)
                p.add_((columns @ (0.02 * _normal(g, 4, p.shape[0]))).T)  # Conv1D stores in x out
        _save(model, folder / task)
    return Models(folder)


def _save(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "generation_config.json").unlink(missing_ok=True)


def _add_counter(folder: Path, steps: int) -> None:
    """An integer tensor beside the weights, as some checkpoints carry."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.steps": torch.tensor([steps])}, folder / "model.safetensors", {"format": "pt"})


def _fill(model: torch.nn.Module, common: dict[str, Tensor], g: torch.Generator) -> None:
    with torch.no_grad():
        for key, p in model.named_parameters():
            module = key.removeprefix("base_model.model.").split(".lora_")[0]
            if ".lora_B." in key:
                both = common[f"{module}.weight"]
                own = _normal(g, p.shape[0], p.shape[1] - 2)
                p.copy_(torch.cat([both + NEAR * _normal(g, *both.shape), own], dim=1) * 0.1)
            elif ".lora_A." in key:
                p.copy_(0.3 * _normal(g, *p.shape))


# --- the same numbers, computed another way ---------------------------------------------------------------------------


def weights(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint folder in float64."""
    path = Path(folder)
    tensors = load_file(path / "model.safetensors" if path.is_dir() else path)
    return {n: t.numpy().astype(np.float64) if t.is_floating_point() else t.numpy() for n, t in tensors.items()}


def deltas(folder: str | Path) -> dict[str, np.ndarray]:
    """What a PEFT LoRA adds to each weight, ``out x in``, from its raw file and configuration alone."""
    tensors = {k: v.double().numpy() for k, v in load_file(Path(folder) / "adapter_model.safetensors").items()}
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    found = {}
    for key, B in tensors.items():
        if ".lora_embedding_B" in key:
            module = key.removeprefix("base_model.model.").split(".lora_embedding_B")[0]
            assert not config["use_rslora"] and config["lora_alpha"] == config["r"]
            found[f"{module}.weight"] = (B @ tensors[key.replace("embedding_B", "embedding_A")]).T
        if ".lora_B." not in key:
            continue
        module = key.removeprefix("base_model.model.").split(".lora_B")[0]
        r = B.shape[1]
        alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
        scale = alpha / (r**0.5 if config["use_rslora"] else r)
        found[f"{module}.weight"] = scale * B @ tensors[key.replace("lora_B", "lora_A")]
    return found


def difference(model: str | Path, base: str | Path) -> dict[str, np.ndarray]:
    """Fine-tuned minus base of every float matrix."""
    W, W0 = weights(model), weights(base)
    return {n: W[n] - W0[n] for n in W0 if W0[n].ndim == 2}


def column_basis(W: np.ndarray, rank: int | None = None) -> np.ndarray:
    """Left singular vectors, all above rounding or the first ``rank``."""
    U, s, _ = np.linalg.svd(W, full_matrices=False)
    return U[:, : int((s > 1e-5 * s[0]).sum()) if rank is None else rank]


def shared_directions(W: np.ndarray, other: np.ndarray, threshold: float = 0.85, rank: int | None = None) -> np.ndarray:
    """Directions of W's own column space with cos^2 above ``threshold`` to the other's (Eq. 8-10, symmetric form)."""
    U1, U2 = column_basis(W, rank), column_basis(other, rank)
    A, c, _ = np.linalg.svd(U1.T @ U2)
    return U1 @ A[:, : int((c**2 > threshold).sum())]


def unique_part(W: np.ndarray, other: np.ndarray, threshold: float = 0.85, rank: int | None = None) -> np.ndarray:
    """Eq. (13) for two vectors, with the n x n projector written out."""
    Z = shared_directions(W, other, threshold, rank)
    return W - Z @ Z.T @ W


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    """Equal names, and values equal to ``tolerance`` relative to the largest wanted entry of each tensor."""
    assert set(found) == set(wanted)
    for n, w in wanted.items():
        assert found[n].shape == w.shape, n
        worst = float(np.abs(found[n] - w).max(initial=0.0))
        assert worst <= tolerance * max(float(np.abs(w).max(initial=0.0)), 1e-3), (n, worst)


# --- pytest ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("devec:")]

    @property
    def warnings(self) -> list[str]:
        return re.findall(r"^warning \(([\w-]+)\):", self.err, re.MULTILINE)


Runner = Callable[..., Outcome]


def refused(said: Outcome, *words: str, out: str = "out") -> str:
    """One line that says everything, and no trace of the output."""
    strange = [
        line for line in said.err.splitlines() if line and not line.startswith(("devec: ", "warning (", "note: "))
    ]
    assert strange == [] and len(said.errors) == 1, said.err
    line = said.errors[0]
    for word in words:
        assert word in line, line
    assert not Path(out).exists()
    leftovers = [p.name for p in Path.cwd().rglob("*") if ".partial-" in p.name or ".replaced-" in p.name]
    assert leftovers == []
    return line


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def devec(capsys: pytest.CaptureFixture[str], work: Path) -> Runner:
    """``devec("inspect", path, code=0)`` runs the command in this process, in an empty folder."""

    def call(*args: object, code: int = 0) -> Outcome:
        from devec.cli.main import run

        capsys.readouterr()
        found = run([str(a) for a in args])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err, printed.err
        assert found == code, f"exit code {found}, wanted {code}\n{printed.out}{printed.err}"
        return Outcome(found, printed.out, printed.err)

    return call
