"""Networks of transformers by their configuration, whatever this version calls their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import devec
from devec.core.errors import IncompatibleError, InputError
from devec.evaluate.network import from_transformers
from devec.evaluate.suite import Suite
from devec.io.checkpoint import checkpoint_from_state_dict, open_checkpoint

transformers = pytest.importorskip("transformers")
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def saved(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


def vit(folder: Path, labels: int = 4) -> tuple[Any, Path]:
    torch.manual_seed(1)
    config = transformers.ViTConfig(**VISION, num_labels=labels)
    model = transformers.AutoModelForImageClassification.from_config(config)
    return model, saved(model, folder)


def data(folder: Path, classes: int = 4, count: int = 30) -> Tensor:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    y = np.arange(count) % classes
    np.savez(folder / "t.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return (torch.from_numpy(x).float() / 255).permute(0, 3, 1, 2)


def suite(folder: Path, kind: str, select: Any = None, **task: Any) -> Suite:
    tasks = [{"name": "t", "data": "t.npz", **task}]
    return Suite.model_validate({"model": {"transformers": kind}, "tasks": tasks, "select": select, "folder": folder})


def test_an_image_classifier_scores_as_transformers_own_model(tmp_path: Path) -> None:
    model, folder = vit(tmp_path / "vit")
    pixels = data(tmp_path)
    with torch.no_grad():
        wanted = model(pixels).logits
    found = devec.eval(folder, suite(tmp_path, "image-classification"), metrics=["loss", "accuracy"]).scores
    labels = torch.arange(30) % 4
    assert found.mean["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(wanted, labels)), rel=1e-5)
    assert found.mean["accuracy"] == pytest.approx(float((wanted.argmax(1) == labels).double().mean()))


def test_every_tensor_is_found_under_its_name_in_the_checkpoint(tmp_path: Path) -> None:
    """Versions of transformers rename modules; writing by the checkpoint's names must reach the right ones."""
    _, folder = vit(tmp_path / "vit")
    source = open_checkpoint(folder)
    network = from_transformers("image-classification", source.config, source)
    assert set(network.tensors) == set(source.names())
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(pixels, "t")
        for name in source.names():
            network.tensors[name].zero_()
        assert not torch.equal(network(pixels, "t"), before)
        network.load(source)
        assert torch.equal(network(pixels, "t"), before)


def test_coefficients_are_learned_through_a_transformer(tmp_path: Path) -> None:
    model, base = vit(tmp_path / "base")
    pixels = data(tmp_path)
    with torch.no_grad():  # one direction that answers, one that spoils
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    wrong = saved(model, tmp_path / "wrong")
    tuned, _ = vit(tmp_path / "again")
    optimiser = torch.optim.Adam([p for n, p in tuned.named_parameters() if "classifier" not in n], lr=2e-3)
    for _ in range(40):
        optimiser.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(tuned(pixels).logits, torch.arange(30) % 4))
        optimiser.step()
    right = saved(tuned.eval(), tmp_path / "right")
    c = devec.learn(
        [right, wrong], base=base, suite=suite(tmp_path, "image-classification", {"from": "train"}), objective="ce",
        steps=40, lr=0.05, selection=devec.Selection((), ("classifier",)),
    )  # fmt: skip
    assert c.of("right", "any") > 0.5 > c.of("wrong", "any")
    assert c.learned["history"][-1] < 0.8 * c.learned["history"][0]


def test_clips_image_tower_with_frozen_text_heads(tmp_path: Path) -> None:
    torch.manual_seed(2)
    text = {k: v for k, v in VISION.items() if "size" not in k or "hidden" in k or "intermediate" in k}
    config = transformers.CLIPConfig(
        vision_config=VISION, projection_dim=12,
        text_config={**text, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    folder, pixels = saved(model, tmp_path / "clip"), data(tmp_path)
    head = torch.nn.functional.normalize(torch.randn(4, 12, generator=torch.Generator().manual_seed(4)), dim=1)
    save_file({"t": head}, tmp_path / "heads.safetensors")
    with torch.no_grad():
        seen = model.get_image_features(pixels)
    features = seen if isinstance(seen, Tensor) else seen.pooler_output
    logits = 100.0 * torch.nn.functional.normalize(features, dim=1) @ head.T
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(30) % 4)
    heads = {"file": "heads.safetensors", "weight": "t", "cosine": True, "scale": 100.0}
    found = devec.eval(folder, suite(tmp_path, "clip-image", head=heads), metrics=["loss"]).scores
    assert found.mean["loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_token_ids_are_classified(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50, num_labels=3,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    folder = saved(model, tmp_path / "bert")
    x = np.random.default_rng(0).integers(1, 50, (12, 7))
    x[:, 5:] = 0
    np.savez(tmp_path / "t.npz", x_test=x, y_test=np.arange(12) % 3)
    with torch.no_grad():
        logits = model(torch.from_numpy(x[:, :5])).logits  # padding must make no difference
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(12) % 3)
    found = devec.eval(folder, suite(tmp_path, "sequence-classification"), metrics=["loss"]).scores
    assert found.mean["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_grey_picture_of_another_size_is_made_to_fit(tmp_path: Path) -> None:
    _, folder = vit(tmp_path / "vit")
    x = np.random.default_rng(0).integers(0, 256, (6, 9, 9)).astype(np.uint8)
    np.savez(tmp_path / "t.npz", x_test=x, y_test=np.arange(6) % 4)
    assert devec.eval(folder, suite(tmp_path, "image-classification")).scores.rows["t"] == "all 6 test rows"


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    _, folder = vit(tmp_path / "vit")
    source = open_checkpoint(folder)
    fewer = {n: source.get(n) for n in source.names() if n != "vit.layernorm.weight"}
    with pytest.raises(IncompatibleError, match=r"vit\.layernorm\.weight"):
        from_transformers("image-classification", source.config, checkpoint_from_state_dict(fewer))


def test_an_unknown_architecture_and_a_missing_configuration_are_errors(tmp_path: Path) -> None:
    _, folder = vit(tmp_path / "vit")
    source = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(IncompatibleError, match="has no image-classification network"):
        from_transformers("image-classification", {**config, "model_type": "vitt"}, source)
    with pytest.raises(IncompatibleError, match="has no image-classification network"):
        from_transformers("image-classification", {**config, "model_type": "bert"}, source)
    with pytest.raises(InputError, match=r"config\.json"):
        from_transformers("image-classification", None, source)
