"""What is downloaded from the Hub, from which commit, and what is said when it cannot be."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from devec.core.errors import DevecError, InputError, RefusedError, UsageError
from devec.io import hub as devec_hub
from devec.io.checkpoint import open_checkpoint
from devec.io.hub import cached_folder, fetch
from devec.io.hub_files import needed
from devec.io.hub_id import HubId
from hub_stand_in import StandIn, hub, point_at

__all__ = ["hub"]

W = {f"layers.{i}.weight": torch.arange(64.0).reshape(8, 8) + i for i in range(3)}
LORA = {"base_model.model.layers.0.lora_A.weight": torch.ones(1, 8)}
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 8}',
    "special_tokens_map.json": b'{"pad_token": "x"}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": save(W),
}
NOT_NEEDED = {
    "README.md": b"# A model",
    ".gitattributes": b"",
    "modeling_llama.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "onnx/tokenizer.json": b"{}",
    "original/consolidated.00.pth": b"pth",
    "training_args.bin": b"pickle",
    "model-q4.gguf": b"GGUF",
    "vocab.bin": b"not a vocabulary that is text",
}
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


def sharded() -> dict[str, bytes]:
    where = dict(zip(W, SHARDS, strict=True))
    index = json.dumps({"metadata": {}, "weight_map": where}).encode()
    files = {shard: save({name: W[name]}) for name, shard in where.items()}
    stray = {"model-00004-of-00004.safetensors": save(W)}
    small = {n: data for n, data in MODEL.items() if n != "model.safetensors"}
    return {**small, **files, **stray, "model.safetensors.index.json": index}


def the(text: str) -> HubId:
    found = HubId.parse(text)
    assert found is not None
    return found


def again() -> None:
    """As another process would begin, with the same cache."""
    devec_hub._fetched.clear()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refused(kind: type[DevecError], text: str, *words: str, model: bool = False) -> str:
    with pytest.raises(DevecError) as caught:
        fetch(the(text), model=model)
    assert type(caught.value) is kind, caught.value
    line = caught.value.line()
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name-7B_v0.1", "org/name-7B_v0.1", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("hf://org/name@v1.0", "org/name", "v1.0"),
    ],
)
def test_ids(text: str, repo: str, revision: str | None) -> None:
    assert HubId.parse(text) == HubId(repo, revision)


@pytest.mark.parametrize(
    "text",
    ["name", "a/b/c", "./name", "../name", "~/name", "/org/name", "org/", "org/na me", "org/n--x", "org/n..x",
     "org/x.git", "org/name@", "org/name@a@b", "org/name@a b", "-org/name", "org/.name", "org/name.", "C:\\x", "", "hf://",
     "hf://name"],
)  # fmt: skip
def test_what_is_no_id(text: str) -> None:
    assert HubId.parse(text) is None


# --- only what is needed ----------------------------------------------------------------------------------------------


def test_a_model_is_its_weights_its_configuration_and_its_tokenizer(hub: StandIn) -> None:
    sha = hub.commit("org/base", MODEL | NOT_NEEDED)
    found = fetch(the("org/base"), model=True)
    assert hub.of("org/base") == sorted(MODEL)
    assert (found.commit, found.folder.name, found.reference) == (sha, sha, "org/base")
    assert {p.name: p.read_bytes() for p in found.folder.iterdir()} == MODEL
    again()
    fetch(the("org/base"))
    assert hub.of("org/base") == sorted(MODEL), "what is in the cache is not downloaded again"
    hub.requests.clear()
    assert fetch(the("org/base")) == fetch(the("org/base"), model=True) == found
    assert hub.requests == [], "nor looked up again"


def test_of_a_sharded_model_the_shards_that_its_index_names(hub: StandIn) -> None:
    files = sharded()
    hub.commit("org/big", files | NOT_NEEDED)
    found = fetch(the("org/big"))
    assert hub.of("org/big") == sorted(n for n in files if n != "model-00004-of-00004.safetensors")
    with open_checkpoint(found.folder, found) as model:
        assert model.reference == "org/big" and model.hub == found
        assert {n: model.get(n).tolist() for n in model.names()} == {n: w.tolist() for n, w in W.items()}


def test_an_adapter_is_two_files_and_its_base_is_left_alone(hub: StandIn) -> None:
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
    adapter = {"adapter_config.json": config, "adapter_model.safetensors": save(LORA)}
    others = {"tokenizer.json": b"{}", "adapter_model.bin": b"pickle", "checkpoint-5/adapter_model.safetensors": b"old"}
    hub.commit("org/lora", adapter | others | {"README.md": b"", "optimizer.pt": b""})
    hub.commit("org/base", MODEL)
    fetch(the("org/lora"))
    assert hub.of("org/lora") == sorted(adapter)
    assert not any("org/base" in line for line in hub.requests)


A, M, BIN = "adapter_model.safetensors", "model.safetensors", "pytorch_model.bin"


@pytest.mark.parametrize(
    ("names", "model", "expected"),
    [
        ([M, BIN, "config.json"], True, ["config.json", M]),
        ([BIN, "config.json"], True, ["config.json", BIN]),
        ([f"{BIN}.index.json", M], True, [M]),
        ([f"{M}.index.json", BIN], True, [f"{M}.index.json"]),
        (["diffusion_pytorch_model.safetensors", "config.json"], True,
         ["config.json", "diffusion_pytorch_model.safetensors"]),
        (["adapter_model.bin", "adapter_config.json"], False, ["adapter_config.json", "adapter_model.bin"]),
        (["pytorch_lora_weights.safetensors", "model_index.json"], False, ["pytorch_lora_weights.safetensors"]),
        (["style.safetensors", "sample.png"], False, ["style.safetensors"]),
        ([A, "adapter_config.json", M, "config.json", "vocab.json"], False, ["adapter_config.json", A]),
        ([A, "adapter_config.json", M, "config.json", "vocab.json"], True, ["config.json", "vocab.json", M]),
        (["manifest.json", "factors.safetensors", "spectra.json"], False, ["manifest.json", "factors.safetensors"]),
        (["manifest.json", "delta.safetensors"], False, ["manifest.json", "delta.safetensors"]),
        (["additional_chat_templates/tool.jinja", "x/tokenizer.json", "vocab.txt", M], True,
         ["additional_chat_templates/tool.jinja", "vocab.txt", M]),
    ],
)  # fmt: skip
def test_the_order_of_preference(names: list[str], model: bool, expected: list[str]) -> None:
    found = needed([*names, "README.md", ".gitattributes"], "org/name@abc", model=model)
    assert [*found.small, *found.weights] == expected


@pytest.mark.parametrize("model", [False, True])
def test_what_is_not_there_is_said(model: bool) -> None:
    with pytest.raises(InputError, match=r"holds no checkpoint.*a-00001\.gguf, b\.gguf.*in org/x@1.*give its path"):
        needed(["b.gguf", "a-00001.gguf", "README.md"], "org/x@1", model=model)
    with pytest.raises(InputError, match=r"weight files there = none.*Check the id"):
        needed(["README.md"], "org/x@1", model=model)
    with pytest.raises(InputError, match="2 more"):
        needed([f"{n}.safetensors" for n in "abcde"], "org/x@1", model=model)


def test_an_adapter_or_an_artifact_is_no_model() -> None:
    with pytest.raises(UsageError, match=r"this is an adapter.*in org/x@1"):
        needed([A, "adapter_config.json"], "org/x@1", model=True)
    with pytest.raises(UsageError, match="an artifact is no model"):
        needed(["manifest.json", "delta.safetensors"], "org/x@1", model=True)


def test_a_quantised_model_is_refused_before_its_weights_come(hub: StandIn) -> None:
    hub.commit("org/gptq", MODEL | {"config.json": b'{"quantization_config": {"quant_method": "gptq"}}'})
    refused(RefusedError, "org/gptq", "quantised by gptq", "org/gptq@")
    assert "model.safetensors" not in hub.of("org/gptq")


# --- revisions --------------------------------------------------------------------------------------------------------


def test_a_revision_is_resolved_to_its_commit(hub: StandIn) -> None:
    old = hub.commit("org/base", MODEL)
    hub.repos["org/base"] |= {"v1": old, "refs/pr/3": old}
    new = hub.commit("org/base", MODEL | {"model.safetensors": save({n: w + 1 for n, w in W.items()})})
    assert old != new
    for text, sha in [("org/base", new), ("org/base@v1", old), ("org/base@refs/pr/3", old), (f"org/base@{old}", old)]:
        found = fetch(the(text), model=True)
        assert (found.commit, found.reference, found.pinned) == (sha, text, f"hf://org/base@{sha}")
        assert (found.folder / "model.safetensors").read_bytes() == hub.files[sha]["model.safetensors"]
    assert fetch(the(f"hf://org/base@{old}")).folder == fetch(the("org/base@v1")).folder


def test_a_branch_that_moves_meanwhile_gives_one_commit(hub: StandIn) -> None:
    hub.commit("org/base", sharded())
    moved = {n: data if "safetensors" not in n or "index" in n else save({k: w * 2 for k, w in W.items()})
             for n, data in sharded().items()}  # fmt: skip

    def move() -> None:
        hub.after_lookup = lambda: None
        hub.commit("org/base", moved)

    hub.after_lookup = move
    found = fetch(the("org/base"))
    assert found.commit == hub.repos["org/base"]["main"]
    assert {p.name: p.read_bytes() for p in found.folder.iterdir()} == {
        n: data for n, data in moved.items() if n != "model-00004-of-00004.safetensors"
    }


def test_within_a_process_an_id_stays_one_commit(hub: StandIn) -> None:
    both = MODEL | {"adapter_config.json": b"{}", "adapter_model.safetensors": save(LORA)}
    first = hub.commit("org/both", both)
    assert fetch(the("org/both")).commit == first
    second = hub.commit("org/both", both | {"config.json": b'{"model_type": "gpt2"}'})
    assert fetch(the("org/both"), model=True).commit == first
    assert json.loads((fetch(the("org/both"), model=True).folder / "config.json").read_text())["model_type"] == "llama"
    again()
    assert fetch(the("org/both"), model=True).commit == second


# --- refusals of the Hub ----------------------------------------------------------------------------------------------


def test_no_such_repository_or_revision(hub: StandIn) -> None:
    hub.commit("org/base", MODEL)
    refused(InputError, "org/bass", "no path 'org/bass'", "no such repository", "HF_TOKEN")
    refused(InputError, "org/base@v9", "org/base has no revision 'v9'", hub.endpoint + "/org/base")
    refused(InputError, "org/base@" + "0" * 40, "no revision")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "GatedRepo", ["access to org/base must be asked for", "/org/base", "HF_TOKEN"]),
        (403, "GatedRepo", ["access to org/base must be asked for", "HF_TOKEN"]),
        (401, "", ["refuses access to org/base", "401", "HF_TOKEN"]),
        (403, "", ["refuses access to org/base", "403", "HF_TOKEN"]),
        (404, "RepoNotFound", ["no such repository", "HF_TOKEN"]),
    ],
)
def test_no_access(hub: StandIn, status: int, code: str, words: list[str]) -> None:
    hub.commit("org/base", MODEL)
    hub.refusals["org/base"] = (status, code)
    refused(InputError, "org/base", *words)
    assert hub.of("org/base") == []


def test_an_index_that_names_a_file_that_is_not_there(hub: StandIn) -> None:
    hub.commit("org/big", {n: data for n, data in sharded().items() if n != SHARDS[1]})
    refused(InputError, "org/big", "index names a file that the repository does not hold", SHARDS[1], "org/big@")
    assert SHARDS[0] not in hub.of("org/big"), "no shard is fetched of what cannot be read"


def test_an_answer_that_is_not_the_hubs(hub: StandIn) -> None:
    hub.nonsense = True
    refused(InputError, "org/base", hub.endpoint, "would not give", "HF_ENDPOINT")


# --- without a connection ---------------------------------------------------------------------------------------------


def nobody_listens(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    point_at("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)


def busy(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    hub.busy = True


Trouble = Callable[[StandIn, Path, pytest.MonkeyPatch], None]


@pytest.mark.parametrize("text", ["org/big", "org/big@v1", "org/big@COMMIT"])
def test_offline_the_cache_serves(hub: StandIn, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = hub.commit("org/big", sharded())
    hub.repos["org/big"]["v1"] = sha
    text = text.replace("COMMIT", sha)
    online = fetch(the(text))
    offline(monkeypatch)
    hub.requests.clear()
    assert fetch(the(text)) == online and online.commit == sha
    assert hub.requests == []


@pytest.mark.parametrize("trouble", [nobody_listens, busy])
def test_without_an_answer_the_cache_serves_and_says_so(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, caplog: pytest.LogCaptureFixture
) -> None:
    sha = hub.commit("org/base", MODEL)
    online = fetch(the("org/base"))
    trouble(hub, tmp_path, monkeypatch)
    assert fetch(the("org/base")) == online
    said = [record.getMessage() for record in caplog.records if record.name == "devec"]
    assert len(said) == 1 and f"org/base@{sha} is read from the cache" in said[0]


@pytest.mark.parametrize("trouble", [nobody_listens, busy])
def test_without_an_answer_and_without_the_cache(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble
) -> None:
    trouble(hub, tmp_path, monkeypatch)
    refused(InputError, "org/base", "no path 'org/base'", "cannot be asked", "Check the connection")


def test_offline_and_not_in_the_cache(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/base", MODEL)
    fetch(the("org/base"))
    offline(monkeypatch)
    refused(InputError, "org/other", "cannot be asked", "Unset HF_HUB_OFFLINE")
    refused(InputError, "org/base@v1", "cannot be asked", "Unset HF_HUB_OFFLINE")
    assert cached_folder(the("org/other")) is None


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("lost", [SHARDS[2], "model.safetensors.index.json", "tokenizer.json"])
def test_offline_a_part_is_not_taken_for_the_whole(
    hub: StandIn, lost: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``listed``: whether the cache keeps what files the commit has; without, a tokenizer cannot be missed."""
    if listed and not hasattr(huggingface_hub, "get_cached_repo_tree"):
        pytest.skip("this version of huggingface_hub keeps no list of a commit's files")
    hub.commit("org/big", sharded())
    folder = fetch(the("org/big")).folder
    (folder / lost).unlink()
    if not listed:
        shutil.rmtree(folder.parent.parent / "trees", ignore_errors=True)
        monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", None, raising=False)
    offline(monkeypatch)
    if not listed and lost == "tokenizer.json":
        assert fetch(the("org/big")).folder == folder
    else:
        missing = "its weights" if lost.endswith(".index.json") and not listed else lost
        refused(InputError, "org/big", "a part of this only", f"missing = {missing}", "Unset HF_HUB_OFFLINE")


# --- downloads that break off -----------------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    breaks = iter([200, 100])
    hub.cut = lambda name: next(breaks, None) if name == "model.safetensors" else None
    hub.commit("org/base", MODEL)
    found = fetch(the("org/base"))
    assert (found.folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert hub.of("org/base").count("model.safetensors") == 3


def test_what_is_complete_is_kept(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    hub.commit("org/big", sharded())
    hub.cut = lambda name: 0 if name == SHARDS[2] else None
    refused(InputError, "org/big", "the download of org/big@", "failed", "Run the same command again")
    hub.cut, before = lambda name: None, len(hub.asked)
    found = fetch(the("org/big"))
    assert SHARDS[2] in "".join(hub.asked[before:]) and "config.json" not in "".join(hub.asked[before:])
    assert (found.folder / SHARDS[2]).read_bytes() == sharded()[SHARDS[2]]


def test_a_disk_without_room_is_refused_before_the_download(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/base", MODEL)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage(10**9, 10**9, 100))
    refused(RefusedError, "org/base", "not enough space", "free = 100 bytes", "HF_HOME")
    assert hub.of("org/base") == []


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, ["no space left", "HF_HOME"]), (errno.EROFS, ["cannot be written", "HF_HOME"])]
)
def test_a_disk_that_fills_up_or_is_read_only(
    hub: StandIn, number: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/base", MODEL)

    def fails(*_: object, **__: object) -> str:
        raise OSError(number, "said by the system", "file")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    refused(RefusedError, "org/base", *words)
