"""Checkpoints that real transformers loads, byte-identical on repeat, whole or not at all."""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from devec.core.contracts import TensorInfo
from devec.core.errors import DevecError, IncompatibleError, RefusedError, SideStepError
from devec.core.provenance import InputRecord, Provenance
from devec.io import model_folder
from devec.io.card import public_name
from devec.io.model_folder import WrittenModel, plan_model
from devec.io.shards import DEFAULT_SHARD_SIZE, put_all
from devec.io.verify import verify_output

BASE_RECORD = InputRecord("org/base", "/x/base", "ab" * 32)
PROVENANCE = Provenance("merge", {"method": "average"}, (BASE_RECORD,), {"devec": "1"})


def write_model_folder(
    out, source, tensors, *, provenance, out_dtype=None, infos=None, shard_size=DEFAULT_SHARD_SIZE, metadata=None,
    **more,
) -> WrittenModel:
    plan = plan_model(
        out, source, provenance, out_dtype=out_dtype, infos=infos, shard_size=shard_size, metadata=metadata
    )
    return model_folder.write_model_folder(
        plan, source, put_all(tensors), provenance=lambda: provenance, out_dtype=out_dtype, **more
    )


@dataclass
class Source:
    """A base in memory, in the shape of :class:`ModelSource`."""

    tensors: dict[str, torch.Tensor]
    config: Mapping[str, object] | None = None
    folder: Path | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    reference: str = "org/base"

    def names(self):
        return list(self.tensors)

    def info(self, name):
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def get(self, name):
        return self.tensors[name]

    def file_of(self, name):
        return "memory"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama saved by transformers, with tokenizer-like files, code and foreign weights beside it."""
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                 "merges.txt", "vocab.json", "tokenizer.model", "preprocessor_config.json"):
        (folder / name).write_text(f"{{}} {name}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for name in ("modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", "other.safetensors"):
        (folder / name).write_bytes(b"no")
    tensors = load_file(folder / "model.safetensors")
    return Source(tensors, json.loads((folder / "config.json").read_text()), folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("shard_size", [10**9, 6000])
def test_transformers_loads_it_with_the_same_logits(base, tmp_path, shard_size):
    done = write_model_folder(tmp_path / "out", base, base.get, provenance=PROVENANCE, shard_size=shard_size)
    assert torch.equal(_logits(tmp_path / "out"), _logits(base.folder))
    assert (len(done.files) > 1) == (shard_size == 6000)
    assert done.tensors == len(base.tensors)
    files = _files(tmp_path / "out")
    if shard_size == 6000:
        index = json.loads(files["model.safetensors.index.json"])
        assert index["metadata"]["total_size"] == done.bytes == sum(t.nbytes for t in base.tensors.values())
        assert set(index["weight_map"]) == set(base.tensors)
        assert set(index["weight_map"].values()) == set(done.files)
        assert done.files[0] == f"model-00001-of-{len(done.files):05d}.safetensors"
        big = {n for n, t in base.tensors.items() if t.nbytes > shard_size}
        for f in done.files:
            held = [n for n, where in index["weight_map"].items() if where == f]
            assert sum(base.tensors[n].nbytes for n in held) <= shard_size or (len(held) == 1 and held[0] in big)
    else:
        assert done.files == ("model.safetensors",) and "model.safetensors.index.json" not in files


def test_companions_are_copied_and_nothing_else(base, tmp_path):
    write_model_folder(tmp_path / "out", base, base.get, provenance=PROVENANCE)
    files = _files(tmp_path / "out")
    records = {f".devec/{n}" for n in ("recipe.yaml", "lock.json", "journal.jsonl", "summary.json", "manifest.json")}
    assert set(files) == records | {
        "model.safetensors", "README.md", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt", "vocab.json",
        "tokenizer.model", "preprocessor_config.json", "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    original = _files(base.folder)
    for name in set(files) - records - {"README.md", "model.safetensors"}:
        assert files[name] == original[name], name


def test_records_tell_inputs_tensors_and_summary(base, tmp_path):
    write_model_folder(tmp_path / "out", base, base.get, provenance=PROVENANCE, summary={"shared": 0.5})
    records = tmp_path / "out" / ".devec"
    assert yaml.safe_load((records / "recipe.yaml").read_text())["parameters"] == {"method": "average"}
    lock = json.loads((records / "lock.json").read_text())
    assert lock["inputs"] == [{"reference": "org/base", "kind": "checkpoint", "file": "base", "sha256": "ab" * 32}]
    assert json.loads((records / "summary.json").read_text()) == {"shared": 0.5}
    lines = [json.loads(line) for line in (records / "journal.jsonl").read_text().splitlines()]
    assert {line["name"]: line["bytes"] for line in lines} == {n: t.nbytes for n, t in base.tensors.items()}
    assert verify_output(tmp_path / "out").ok


def test_two_runs_write_identical_bytes_whatever_the_order(base, tmp_path):
    def pairs(names):
        return ((n, base.tensors[n]) for n in names)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_model_folder(tmp_path / "a" / "out", base, base.get, provenance=PROVENANCE, shard_size=6000)
    write_model_folder(tmp_path / "b" / "out", base, pairs(reversed(base.names())), provenance=PROVENANCE,
                       shard_size=6000)
    assert _files(tmp_path / "a" / "out") == _files(tmp_path / "b" / "out")


def test_card_has_front_matter_and_no_path_of_this_machine(base, tmp_path):
    provenance = Provenance(
        "merge", {"base": "/home/someone/models/llama", "list": ["../x/y"]},
        (InputRecord("a=/home/someone/fine-tune", "/home/someone/fine-tune"), InputRecord("org/other@main")),
    )
    write_model_folder(tmp_path / "out", base, base.get, provenance=provenance,
                       base_models=["/home/someone/models/llama", "org/base"], tags=["text"])
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": ["llama", "org/base"], "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["devec", "merge", "text"],
    }  # fmt: skip
    assert "/home" not in card and "../" not in card and str(tmp_path) not in card
    assert "fine-tune" in card and "org/other@main" in card


@pytest.mark.parametrize(
    ("reference", "public"),
    [
        ("gpt2", "gpt2"), ("org/name@rev", "org/name@rev"), ("/a/b/c", "c"), ("./x", "x"), ("..", "local"),
        ("../up/x#unique:A", "x#unique:A"), ("n=/a/b", "n=b"), ("org/base+/a/lora", "org/base+lora"),
        ("C:\\models\\x", "x"), ("a/b/c", "c"), ("~/x", "x"),
    ],
)  # fmt: skip
def test_public_names(reference, public):
    assert public_name(reference) == public


def test_out_dtype_casts_floats_last_and_edits_the_config(base, tmp_path):
    source = Source(
        {**base.tensors, "steps": torch.tensor([1, 2, 3])},
        {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "quantization_config": {"dtype": "int8"}},
    )
    write_model_folder(tmp_path / "out", source, source.get, provenance=PROVENANCE, out_dtype=torch.bfloat16)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(back["steps"], source.tensors["steps"])
    assert all(torch.equal(back[n], t.to(torch.bfloat16)) for n, t in base.tensors.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert config["quantization_config"] == {"dtype": "int8"}


def test_default_dtype_is_the_bases_per_tensor(base, tmp_path):
    source = Source({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}, {"dtype": "bfloat16"})
    write_model_folder(tmp_path / "out", source, lambda n: torch.full((2,), 1 / 3), provenance=PROVENANCE)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back["a"].dtype == torch.bfloat16 and back["b"].dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_tied_weights_are_written_once_and_load(tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    source = Source(state, config.to_dict(), ties={"lm_head.weight": "model.embed_tokens.weight"})
    write_model_folder(tmp_path / "out", source, source.get, provenance=PROVENANCE)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata()["lm_head.weight"] == "model.embed_tokens.weight"
    with torch.no_grad():
        assert torch.equal(_logits(tmp_path / "out"), model(torch.arange(12)[None]).logits)


def test_one_file_holds_recipe_and_hashes(base, tmp_path):
    out = tmp_path / "x.safetensors"
    done = write_model_folder(out, base, base.get, provenance=PROVENANCE)
    assert done.files == ("x.safetensors",)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    with safe_open(out, "pt") as f:
        metadata = f.metadata()
    assert yaml.safe_load(metadata["devec.recipe"])["command"] == "merge"
    assert set(json.loads(metadata["devec.blake3"])) == set(base.tensors)
    assert all(torch.equal(v, base.tensors[n]) for n, v in load_file(out).items())
    assert verify_output(out).checked == len(base.tensors)


def test_a_base_without_a_folder_gives_weights_alone(tmp_path):
    source = Source({"w": torch.ones(3)})
    write_model_folder(tmp_path / "out", source, source.get, provenance=PROVENANCE)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "README.md", ".devec"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_interrupt_mid_write_leaves_nothing(base, tmp_path, error, name):
    seen = []

    def tensors(n):
        seen.append(n)
        if len(seen) == 5:
            raise error
        return base.tensors[n]

    with pytest.raises(type(error)):
        write_model_folder(tmp_path / name, base, tensors, provenance=PROVENANCE, shard_size=6000)
    assert len(seen) == 5 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "call"), [("out", "pwrite"), ("out", "write"), ("out.safetensors", "pwrite")])
def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch, name, call):
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RefusedError, match="no space left"):
        write_model_folder(tmp_path / name, base, base.get, provenance=PROVENANCE, shard_size=6000, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_bad_values_leave_nothing(base, tmp_path):
    name = base.names()[3]

    def with_value(value):
        return lambda n: value if n == name else base.tensors[n]

    shape = base.tensors[name].shape
    for value, kind in (
        (torch.full(shape, float("nan")), IncompatibleError),
        (torch.zeros(1), IncompatibleError),
        (torch.zeros(shape, dtype=torch.int64), IncompatibleError),
        (torch.full(shape, 1e30), RefusedError),
    ):
        with pytest.raises(kind, match=name):
            write_model_folder(
                tmp_path / "out", base, with_value(value), provenance=PROVENANCE, out_dtype=torch.float16
            )
    with pytest.raises(DevecError, match=f"never written.*{name}"):
        pairs = ((n, t) for n, t in base.tensors.items() if n != name)
        write_model_folder(tmp_path / "out", base, pairs, provenance=PROVENANCE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_side_step_keeps_the_weights_unless_strict(base, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ValueError("no card today")

    monkeypatch.setattr(model_folder, "model_card", broken)
    with pytest.raises(RefusedError, match="--strict"):
        write_model_folder(tmp_path / "out", base, base.get, provenance=PROVENANCE, strict=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SideStepError, match=r"README\.md: no card today") as error:
        write_model_folder(tmp_path / "out", base, base.get, provenance=PROVENANCE)
    assert error.value.exit_code == 6
    assert torch.equal(_logits(tmp_path / "out"), _logits(base.folder))
    assert verify_output(tmp_path / "out").ok


def test_an_unreadable_tokenizer_is_a_side_step(base, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(tmp_path / "gone")
    source = Source({"w": torch.ones(2)}, {"model_type": "x"}, folder)
    with pytest.raises(SideStepError, match=r"tokenizer\.json"):
        write_model_folder(tmp_path / "out", source, source.get, provenance=PROVENANCE)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_base_itself_is_never_written_over(base):
    before = _files(base.folder)
    for out in (base.folder, base.folder / "out", base.folder / "model.safetensors", base.folder.parent):
        with pytest.raises(RefusedError, match="would change an input"):
            write_model_folder(out, base, base.get, provenance=PROVENANCE, overwrite=True)
    assert _files(base.folder) == before


def test_a_resized_tensor(base, tmp_path):
    source = Source({"w": torch.ones(2, 2)})
    write_model_folder(
        tmp_path / "out", source, lambda n: torch.zeros(3, 2), provenance=PROVENANCE,
        infos={"w": TensorInfo((3, 2), torch.float32)},
    )
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (3, 2)
