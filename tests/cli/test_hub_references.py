"""Ids of the Hugging Face Hub wherever a command takes a reference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import devec as library
from devec.api.references import parse, pin
from devec.api.sources import hub_id
from devec.io import hub as devec_hub
from fixtures_models import Models, Runner, deltas, refused, same, weights
from hub_stand_in import StandIn, hub, serving

__all__ = ["hub"]


@pytest.fixture
def full(hub: StandIn, llama: Models) -> StandIn:
    """The llamas on the Hub: base (sharded), two fine-tunes and three adapters that name another base."""
    hub.commit("org/base", sharded(Path(llama.base)) | {"README.md": b"# base", "pytorch_model.bin": b"pickle"})
    for task in "ab":
        hub.commit(f"org/tuned-{task}", Path(llama.folder / task))
    for task in ("la", "lb", "lc"):
        hub.commit(f"org/{task}", adapter(Path(llama.folder / task)))
    return hub


def adapter(folder: Path) -> dict[str, bytes]:
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "someone/llama"}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
        "tokenizer.json": b'{"of": "the adapter"}',
    }


def sharded(folder: Path) -> dict[str, bytes]:
    """The same model in two weight files."""
    tensors = load_file(folder / "model.safetensors")
    names, files, where = sorted(tensors), {}, {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder.parent / "shard", {"format": "pt"})
        files[shard] = (folder.parent / "shard").read_bytes()
        where |= dict.fromkeys(part, shard)
    (folder.parent / "shard").unlink()
    others = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "model.safetensors"}
    return {**others, **files, "model.safetensors.index.json": json.dumps({"weight_map": where}).encode()}


def again() -> None:
    """As another process would begin, with the same cache."""
    devec_hub._fetched.clear()


def lock(out: str) -> dict[str, dict[str, str]]:
    return {row["reference"]: row for row in json.loads(Path(out, ".devec/lock.json").read_text())["inputs"]}


def card(out: str) -> dict[str, object]:
    found = yaml.safe_load(Path(out, "README.md").read_text().split("---")[1])
    assert isinstance(found, dict)
    return found


# --- from end to end --------------------------------------------------------------------------------------------------


def test_apply_an_adapter_to_a_base(devec: Runner, full: StandIn, llama: Models) -> None:
    said = devec("apply", "--base", "org/base@main", "--add", "1", "org/la", "-o", "out")
    assert said.err == "", "no bars off a terminal"
    W, delta = weights(llama.base), deltas(llama.la)
    same(weights("out"), {n: w + delta[n] if n in delta else w for n, w in W.items()})
    devec("verify", "out")
    base, added = full.repos["org/base"]["main"], full.repos["org/la"]["main"]
    assert (lock("out")["org/base@main"]["revision"], lock("out")["org/base@main"]["kind"]) == (base, "base")
    assert lock("out")["org/la"] | {"sha256": ""} == {
        "reference": "org/la", "kind": "peft", "file": "adapter_model.safetensors", "revision": added, "sha256": "",
    }  # fmt: skip
    assert card("out")["base_model"] == ["org/base"]
    text = Path("out/README.md").read_text()
    assert f"- `org/base@main` (base) at `{base}`" in text and f"- `org/la` (peft) at `{added}`" in text
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert full.of("org/base") == ["chat_template.jinja", "config.json", *shards, "tokenizer.json"]
    assert full.of("org/la") == ["adapter_config.json", "adapter_model.safetensors"]
    assert not any("someone/llama" in line for line in full.requests), "an adapter's base is not looked for"
    assert Path("out/tokenizer.json").read_bytes() == Path(llama.base, "tokenizer.json").read_bytes()
    assert Path("out/chat_template.jinja").read_bytes() == Path(llama.base, "chat_template.jinja").read_bytes()


def test_the_same_from_paths_and_from_the_hub(devec: Runner, full: StandIn, llama: Models) -> None:
    devec("negate", "--base", llama.base, "--target", llama.a, "--pool", llama.b, "-o", "here")
    devec("negate", "--base", "org/base", "--target", "org/tuned-a", "--pool", "org/tuned-b", "-q", "-o", "there")
    same(weights("there"), weights("here"), tolerance=0.0)
    assert [row.get("revision") for row in lock("there").values()] == [
        full.repos[f"org/{n}"]["main"] for n in ("base", "tuned-a", "tuned-b")
    ]


def test_base_plus_adapter(devec: Runner, full: StandIn, llama: Models) -> None:
    W, delta = weights(llama.base), {n: 2 * d for n, d in deltas(llama.la).items()}
    commits = {n: full.repos[f"org/{n}"]["main"] for n in ("base", "la")}
    bases = {"both": "org/base+org/la@main", "left": f"org/base+{llama.la}", "right": f"{llama.base}+org/la"}
    for out, base in bases.items():
        devec("apply", "--base", base, "--add", "1", "own=org/la", "-o", out)
        same(weights(out), {n: w + delta[n] if n in delta else w for n, w in W.items()})
        inputs = json.loads(Path(out, ".devec/lock.json").read_text())["inputs"]
        assert [(row["kind"], row.get("revision")) for row in inputs] == [
            ("base", None if out == "right" else commits["base"]),
            ("peft", None if out == "left" else commits["la"]),
            ("peft", commits["la"]),
        ]
    devec("extract", "--base", "org/base", "--model", "org/base+org/la", "-o", "vector")
    assert lock("vector")["org/base+org/la"]["revision"] == f"org/base@{commits['base']}+org/la@{commits['la']}"
    assert json.loads(Path("vector/manifest.json").read_text())["origin"]["base_name"] == "org/base"


def test_a_merge_names_all_its_models(devec: Runner, full: StandIn, llama: Models) -> None:
    devec("merge", "--method", "average", "org/tuned-a@main", "second=org/tuned-b", "-o", "out")
    a, b = weights(llama.a), weights(llama.b)
    wanted = {n: (a[n] + b[n]) / 2 if "steps" not in n else a[n] for n in a}
    same(weights("out"), wanted)
    assert card("out")["base_model"] == ["org/tuned-a", "org/tuned-b"]
    assert set(lock("out")) == {"org/tuned-a@main", "second=org/tuned-b"}
    assert all("file" not in row and len(row["revision"]) == 40 for row in lock("out").values())


def test_a_recipe_may_name_the_hub(devec: Runner, full: StandIn) -> None:
    Path("recipe.yaml").write_text("method: average\nsources: [org/la, again=org/lc]\nrank: 3\n")
    devec("merge", "recipe.yaml", "-o", "out")
    assert {row["revision"] for row in lock("out").values()} == {full.repos[f"org/{n}"]["main"] for n in ("la", "lc")}
    assert card("out")["base_model"] == ["someone/llama"]


def test_a_lora_of_a_hub_model_names_its_base(devec: Runner, full: StandIn) -> None:
    devec("extract", "--base", "org/base@main", "--model", "org/tuned-a", "--rank", "4", "-o", "lora")
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base" and card("lora")["base_model"] == ["org/base"]


def test_names_are_the_repositories(devec: Runner, full: StandIn) -> None:
    said = devec("inspect", "org/la@main", "short=org/lb", "--json").json
    assert [s["name"] for s in said["sources"]] == ["la", "short"]
    assert devec("inspect", "org/tuned-a", "--base", "org/base", "--json").json["sources"][0]["name"] == "tuned-a"
    pairs = devec("compare", "org/tuned-a", "org/tuned-b", "--base", "org/base", "--json").json["pairs"]
    assert (pairs[0]["a"], pairs[0]["b"]) == ("tuned-a", "tuned-b")
    full.commit("org/model-1.5", full.files[full.repos["org/tuned-a"]["main"]])
    assert library.extract("org/base", "org/model-1.5").name == "model-1.5"
    line = devec("mix", "org/la", "org/la@main", "-o", "out", code=2).err
    assert "la" in line and not Path("out").exists()


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_a_decomposition_of_hub_models_finds_their_commits_again(
    devec: Runner, full: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devec("decompose", "org/tuned-a", "org/tuned-b@main", "--base", "org/base", "-o", "parts")
    source = json.loads(Path("parts/manifest.json").read_text())["vectors"][0]["source"]
    commits = {n: full.repos[f"org/{n}"]["main"] for n in ("base", "tuned-a")}
    assert (source["model"], source["base"]) == (
        f"hf://org/tuned-a@{commits['tuned-a']}", f"hf://org/base@{commits['base']}",
    )  # fmt: skip
    devec("export", "parts#unique:tuned-a", "--base", "org/base", "-o", "before")
    for repo in ("org/tuned-a", "org/base"):  # branches move, and another machine has an empty cache
        full.commit(repo, {"README.md": b"gone"})
    again()
    shutil.rmtree(tmp_path / "cache")
    devec("export", "parts#unique:tuned-a", "--base", f"org/base@{commits['base']}", "-o", "after")
    assert Path("before/model.safetensors").read_bytes() == Path("after/model.safetensors").read_bytes()
    again()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(devec("inspect", "parts#unique:tuned-a", code=3), "org/base@", "HF_HUB_OFFLINE")


def test_artifacts_may_lie_on_the_hub(devec: Runner, full: StandIn, llama: Models) -> None:
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    devec("extract", "--base", llama.base, "--model", llama.a, "-o", "vector")
    full.commit("org/parts", Path("parts"))
    sha = full.commit("org/vector", Path("vector"))
    devec("export", "parts#unique:la", "-o", "here")
    devec("export", "org/parts#unique:la", "-o", "there")
    assert Path("here/adapter_model.safetensors").read_bytes() == Path("there/adapter_model.safetensors").read_bytes()
    assert full.of("org/parts") == ["factors.safetensors", "manifest.json"]
    devec("decompose", "org/vector", "b=org/tuned-b", "--base", "org/base", "-o", "more")
    first = json.loads(Path("more/manifest.json").read_text())["vectors"][0]
    assert (first["name"], first["source"]["model"]) == ("vector", f"hf://org/vector@{sha}")
    devec("inspect", "more#unique:vector")
    to_a = ["--add", "1", "org/la", "-o", "out"]
    refused(devec("apply", "--base", "org/vector", *to_a, code=2), "an artifact is no model")
    refused(devec("apply", "--base", "org/la", *to_a, code=2), "this is an adapter")


@pytest.mark.parametrize(
    ("text", "name", "base", "path", "part"),
    [
        ("org/base+org/lora", None, "org/base", "org/lora", None),
        ("x=org/base@v1+org/lora@refs/pr/2", "x", "org/base@v1", "org/lora@refs/pr/2", None),
        ("hf://org/base+hf://org/lora", None, "hf://org/base", "hf://org/lora", None),
        ("here+org/lora", None, "here", "org/lora", None),
        ("a+b+org/lora", None, "a+b", "org/lora", None),
        ("org/base+a+b", None, "org/base", "a+b", None),
        ("org/parts@v1#shared:A+B", None, None, "org/parts@v1", "shared:A+B"),
    ],
)
def test_references_are_split(
    text: str, name: str | None, base: str | None, path: str, part: str | None, work: Path
) -> None:
    for folder in ("here", "a+b"):
        (work / folder).mkdir()
    found = parse(text)
    assert (found.name, found.base, found.path, found.part) == (name, base, path, part)


def test_other_processes_can_be_given_the_same_commits(full: StandIn, work: Path, llama: Models) -> None:
    first, la = library.load("org/la"), full.repos["org/la"]["main"]
    under, base = library.open_model("org/base"), full.repos["org/base"]["main"]
    for text, wanted in {
        "org/la": f"hf://org/la@{la}",
        "x=org/base+org/la": f"x=hf://org/base@{base}+hf://org/la@{la}",
        f"{llama.base}+org/la": f"{llama.base}+hf://org/la@{la}",
        "org/parts#shared:A+B": "org/parts#shared:A+B",
        llama.la: llama.la,
    }.items():
        assert pin(text) == wanted and pin(pin(text)) == wanted
    for repo in ("org/la", "org/base"):
        full.commit(repo, {"README.md": b"gone"})
    again()
    second = library.load(f"hf://org/la@{la}")
    assert second.name == first.name == "la" and library.open_model(f"hf://org/base@{base}").names() == under.names()


# --- paths come first -------------------------------------------------------------------------------------------------


def test_a_misspelt_path_stays_on_this_machine(devec: Runner, hub: StandIn, llama: Models) -> None:
    shutil.copytree(llama.la, "adapters/poetry")
    hub.commit("adapters/poetri", adapter(Path(llama.lb)))
    assert "Did you mean adapters/poetry?" in refused(devec("inspect", "adapters/poetri", code=3))
    refused(devec("inspect", "adapters/law", code=3), "Check the path", "hf://adapters/law")
    refused(devec("inspect", "elsewhere/model.safetensors", code=3), "Check the path")
    refused(devec("inspect", "a/b/c", code=3), "Check the path")
    refused(devec("inspect", "model", code=3), "Check the path")
    assert hub.requests == []
    assert devec("inspect", "adapters/poetry", "--json").json["sources"][0]["ranks"] == {"4": 6}
    assert devec("inspect", "hf://adapters/poetri", "--json").json["sources"][0]["name"] == "poetri"


def test_a_path_that_exists_wins(devec: Runner, full: StandIn, llama: Models) -> None:
    shutil.copytree(llama.lb, "org/la")
    assert devec("inspect", "org/la", "--json").json["sources"][0]["ranks"] == {"5": 6}
    assert full.requests == [] and hub_id("org/la") is None
    devec("apply", "--base", "hf://org/base", "--add", "1", "hf://org/la", "-o", "out")
    assert card("out")["base_model"] == ["org/base"]
    delta, W = deltas(llama.la), weights(llama.base)
    same(weights("out"), {n: w + delta[n] if n in delta else w for n, w in W.items()})


def test_an_output_never_touches_the_cache(devec: Runner, full: StandIn, tmp_path: Path) -> None:
    devec("inspect", "org/la")
    inside = next((tmp_path / "cache").glob("models--org--la/snapshots/*"))
    said = devec("mix", "org/la", "org/lb", "-o", inside / "out", code=5)
    refused(said, "would change an input")
    said = devec("apply", "--base", "org/base", "--add", "1", "org/la", "-o", tmp_path / "cache", "--overwrite", code=5)
    assert "would change an input" in said.err and inside.is_dir()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_refusals_are_one_line(devec: Runner, full: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["--base", "org/base", "--add", "1"]
    refused(devec("apply", *base, "org/nothing", "-o", "out", code=3), "no path 'org/nothing'", "HF_TOKEN")
    refused(devec("apply", *base, "org/la@v2", "-o", "out", code=3), "no revision 'v2'")
    full.refusals["org/lc"] = (401, "GatedRepo")
    refused(devec("mix", "org/la", "org/lc", "-o", "out", code=3), "access to org/lc must be asked for", "HF_TOKEN")
    full.commit("org/sd", {"model.gguf": b"GGUF"})
    refused(devec("inspect", "org/sd", code=3), "holds no checkpoint", "model.gguf")
    big = full.files[full.repos["org/base"]["main"]]
    full.commit("org/torn", {n: data for n, data in big.items() if n != "model-00002-of-00002.safetensors"})
    refused(devec("inspect", "org/torn", code=3), "model-00002-of-00002.safetensors", "org/torn@")
    again()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(devec("inspect", "org/other", code=3), "HF_HUB_OFFLINE")
    devec("apply", *base, "org/la", "-o", "out")
    assert lock("out")["org/la"]["revision"] == full.repos["org/la"]["main"]


# --- a process of its own ---------------------------------------------------------------------------------------------

MAIN = [sys.executable, "-m", "devec.cli.main"]


def test_the_environment_decides(llama: Models, work: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME, then HF_HUB_OFFLINE and HF_HUB_CACHE: the same bytes, and no request."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    words = ["apply", "--base", "org/base", "--add", "1", "org/la", "--json", "-o"]

    def run(out: str, **environment: str) -> None:
        done = subprocess.run(
            [*MAIN, *words, out], cwd=work, env={**clean, "NO_PROXY": "127.0.0.1,localhost", **environment},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")

    with serving() as hub:
        hub.commit("org/base", Path(llama.base))
        hub.commit("org/la", adapter(Path(llama.la)))
        run("online", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"))
        asked = len(hub.requests)
        run("offline", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "home" / "hub"))
        assert len(hub.requests) == asked
    for name in ("model.safetensors", ".devec/lock.json"):
        assert (work / "online" / name).read_bytes() == (work / "offline" / name).read_bytes(), name


def test_the_hubs_library_is_loaded_when_it_is_needed(work: Path) -> None:
    check = (
        "import sys, devec; devec.load; from devec.cli.main import run; assert run(['apply', '--help']) == 0; "
        "assert run(['inspect', 'missing']) == 3; sys.exit('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_token_is_sent(devec: Runner, full: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    devec("inspect", "org/la")
    assert full.tokens == {"Bearer hf_something"}


def test_torch_modules_and_hub_ids_together(full: StandIn, work: Path, llama: Models) -> None:
    model = library.open_model("org/base")
    state = {n: model.get(n) for n in model.names()}
    found = library.apply("org/base", [(1.0, "org/la")])
    also = library.apply(state, [(1.0, "org/la")])
    assert all(torch.equal(found.get(n), also.get(n)) for n in model.names())  # type: ignore[union-attr]
