"""``--resume`` over an output that stands already: the same command's is complete, any other is refused as ever."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.world import TINY, build
from fixtures_models import Outcome, Runner

MERGE = "merge --method task-arithmetic --base base a b --set scale=0.4"
COMMANDS = {
    "merge": f"{MERGE} --shard-size 3KB",
    "merge to a file": MERGE,
    "merge adapters": "merge --method average la lb --rank 2",
    "apply": "apply --base base --add 0.5 la --subtract 0.3 lb",
    "apply to BASE+ADAPTER": "apply --base base+la --add 0.5 lb",
    "decompose": "decompose a b --base base",
    "decompose LoRA": "decompose la lb --mode joint",
    "export": "export parts#unique:la",
    "export to a model": "export parts#unique:la --base base",
    "negate": "negate --base base --target a --pool b",
    "negate adapters": "negate --target la --pool lb",
    "negate all": "negate --base base --target a --part all",
    "mix": "mix la lb --part all",
    "mix to a file": "mix style.safetensors ink.safetensors",
    "extract": "extract --base base --model a",
    "extract a LoRA": "extract --base base --model a --rank 2",
}
OTHERWISE = {
    "merge": [f"{MERGE} --shard-size 5KB", f"{MERGE} --shard-size 3KB --exclude q_proj", MERGE.replace("a b", "b a")],
    "merge to a file": [f"{MERGE} --out-dtype bfloat16", f"{MERGE} --exclude q_proj", MERGE.replace("0.4", "0.5")],
    "decompose": ["decompose a b --base base --exclude q_proj", "decompose a b --base c", "decompose b a --base base"],
    "decompose LoRA": ["decompose la lb", "decompose la lb --mode joint --threshold 0.9"],
    "negate": ["negate --base base --target a --pool b -c 0.5", "negate --base base --target a --part all"],
    "mix": ["mix la lb", "mix la lb --part all --rank 1"],
    "extract": ["extract --base base --model b", "extract --base base --model a --rank 2"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build(folder, TINY)
    shutil.copytree(folder / "base", folder / "c")
    return folder


@pytest.fixture
def here(models: Path, work: Path, devec: Runner) -> Path:
    shutil.copytree(models, work, dirs_exist_ok=True)
    return work


def output_of(name: str) -> str:
    return "out.safetensors" if name.endswith("to a file") else "out"


def first(name: str, devec: Runner) -> list[str]:
    """The command's words, after it has run once."""
    words = [*COMMANDS[name].split(), "-o", output_of(name)]
    if words[0] == "export":
        devec("decompose", "la", "lb", "-o", "parts")
    devec(*words)
    return words


def state(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def exists(said: Outcome, *words: str) -> None:
    assert len(said.errors) == 1 and "the output exists already" in said.errors[0], said.err
    assert "--overwrite" in said.errors[0] and all(word in said.errors[0] for word in words), said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_same_command_wrote_is_complete(name: str, here: Path, devec: Runner) -> None:
    words = first(name, devec)
    before = state(here)
    said = devec(*words, "--resume")
    assert said.out == f"{output_of(name)} is complete already; nothing was done\n"
    document = devec(*words, "--resume", "--json").json
    assert document["schema"] == 1 and (document.get("complete") or document["tensors"])
    assert state(here) == before, "nothing may be touched"
    exists(devec(*words, code=5))


@pytest.mark.parametrize(("name", "other"), [(name, other) for name in OTHERWISE for other in OTHERWISE[name]])
def test_what_another_command_wrote_is_refused(name: str, other: str, here: Path, devec: Runner) -> None:
    if name == "decompose" and other.endswith("--base c"):  # the same names and shapes, one number is another
        tensors = {}
        for file in sorted(Path("c").glob("*.safetensors")):
            tensors |= load_file(file)
            file.unlink()
        Path("c/model.safetensors.index.json").unlink()
        next(iter(tensors.values()))[0, 0] += 1
        save_file(tensors, "c/model.safetensors")
    first(name, devec)
    before = state(here)
    exists(devec(*other.split(), "-o", output_of(name), "--resume", code=5), "not what this command writes")
    assert state(here) == before


@pytest.mark.parametrize("name", ["merge", "merge to a file", "decompose", "mix", "mix to a file", "extract"])
def test_an_input_or_output_that_changed_is_no_longer_it(name: str, here: Path, devec: Runner) -> None:
    words = first(name, devec)
    source = {"mix": "la/adapter_model.safetensors", "mix to a file": "style.safetensors"}.get(
        name, "a/model.safetensors"
    )
    kept, status = Path(source).read_bytes(), Path(source).stat()
    save_file({n: t + 1 for n, t in load_file(source).items()}, source, {"format": "pt"})
    exists(devec(*words, "--resume", code=5), "other inputs or versions")
    Path(source).write_bytes(kept)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    devec(*words, "--resume")
    file = Path(output_of(name)) if name.endswith("file") else next(Path("out").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    exists(devec(*words, "--resume", code=5), "changed since")


def test_what_a_side_step_left_out_is_still_missing(here: Path, devec: Runner) -> None:
    """The weights are whole, but the run had ended with exit 6: a tokenizer was lost."""
    words = first("merge", devec)
    Path("out/tokenizer.json").unlink()
    manifest = json.loads(Path("out/.devec/manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    Path("out/.devec/manifest.json").write_text(json.dumps(manifest))
    exists(devec(*words, "--resume", code=5), "tokenizer.json is missing")


def test_what_others_put_there_is_theirs(here: Path, devec: Runner) -> None:
    for name in ("merge", "merge to a file", "decompose", "mix", "extract"):
        out = Path(output_of(name))
        if out.suffix:
            save_file({"w": torch.zeros(2)}, out)
        else:
            out.mkdir(exist_ok=True)
        words = [*COMMANDS[name].split(), "-o", str(out)]
        exists(devec(*words, "--resume", code=5), "not what this command writes")


def test_a_loop_of_shards_and_their_join_ends(here: Path, devec: Runner) -> None:
    words = [*COMMANDS["merge"].split(), "-o", "out"]
    for part in ("1/2", "2/2"):
        devec(*words, "--shard-of", part)
    devec("join", "out")
    before = state(here)
    for part in ("1/2", "2/2"):
        assert "is complete already" in devec(*words, "--shard-of", part, "--resume").out
    assert "is complete already" in devec(*words, "--resume").out
    assert state(here) == before


def test_strict_still_wants_no_warning(here: Path, devec: Runner) -> None:
    """Warnings of a decomposition are known when it was made, or from what was written."""
    for words in (["decompose", "a", "b", "--base", "base"], ["mix", "la", "la2=lb", "--threshold", "0"]):
        said = devec(*words, "-o", "out")
        more = devec(*words, "-o", "out", "--resume", "--strict", code=4 if said.warnings else 0)
        assert bool(more.errors) == bool(said.warnings)
        shutil.rmtree("out")
