"""Mistyped commands, options, names, parts and recipes: exit 2 (or 5 for output places), one line, a suggestion."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from fixtures_models import Models, Runner, refused


@pytest.fixture
def here(llama: Models, work: Path) -> Path:
    """base, a, b, la, lb and a decomposition, under short names."""
    for name in ("base", "a", "b", "la", "lb"):
        (work / name).symlink_to(getattr(llama, name))
    return work


WORDS: dict[str, tuple[str, str]] = {
    # command line: what the line must say
    "decompos la lb": ("Did you mean 'decompose'?", "devec --help"),
    "frobnicate": ("There is: inspect", ""),
    "decompose la lb --treshold 0.9": ("--threshold", "devec decompose --help"),
    "mix la lb --weigths 1,1 -o out": ("--weights", ""),
    "merge --method avrage a b -o out": ("Did you mean average?", ""),
    "merge --method average a b --set wieghts=1,1 -o out": ("Did you mean weights?", ""),
    "merge --method average a b --set weights -o out": ("not KEY=VALUE", ""),
    "merge --method average a b --set weights=one,two -o out": ("weights", "does not fit"),
    "merge --method average a b --set weights=1,2,3 -o out": ("3 weights for 2", ""),
    "merge --method task-arithmetic a b -o out": ("needs their base", "--base"),
    "merge --method average a la -o out": ("need the base", "--base"),
    "merge --method average la a -o out": ("need the base", "--base"),
    "merge a b -o out": ("--method", "recipe"),
    "merge --method average a b --rank 2 -o out": ("no adapter", "--base"),
    "methods avrage": ("Did you mean average?", ""),
    "mix la lb --part uniqe -o out": ("unique", "--part"),
    "mix la lb --weights 1 -o out": ("1 weights for 2 adapters", ""),
    "mix la lb --weights 1,x -o out": ("not a list of numbers", ""),
    "mix la lb --weights 1,nan -o out": ("finite", ""),
    "mix la lb --rank 2 --energy 0.9 -o out": ("give one of --rank, --energy and --error", ""),
    "mix la lb --energy 2 -o out": ("--energy wants a fraction", ""),
    "mix la lb --rank 0 -o out": ("--rank", ""),
    "mix la -o out": ("at least two", ""),
    "mix la la -o out": ("two vectors are called 'la'", "one=PATH two=PATH"),
    "mix la lb -o out.safetensors": ("PEFT adapter is a folder", ""),
    "mix la a -o out": ("--base", "full checkpoint"),
    "decompose la -o out": ("at least two", ""),
    "decompose -o out": ("SOURCE", ""),
    "decompose la lb --threshold 2 -o out": ("between 0 and 1", "--threshold"),
    "decompose la lb --threshold much -o out": ("neither a number nor 'chance'", ""),
    "decompose la lb --fdr 0 -o out": ("between 0 and 1", ""),
    "decompose la lb --rank foo -o out": ("foo", "rank"),
    "decompose la lb --rank energy=7 -o out": ("energy", ""),
    "decompose la lb --side top -o out": ("left", "--side"),
    "decompose la lb --mode target -o out": ("--target NAME", ""),
    "decompose la lb --mode target --target lx -o out": ("no vector is called 'lx'", "la, lb"),
    "decompose la lb --target la -o out": ("--mode target", ""),
    "decompose la lb --include ( -o out": ("not a regular expression", "--include"),
    "decompose la lb --include nothing -o out": ("leave nothing of la", ""),
    "decompose la lb --device tpu9 -o out": ("tpu9", ""),
    "decompose la lb --split-qkv -o out": ("no fused query/key/value tensor", "Leave it out"),
    "decompose a b -o out": ("--base", ""),
    "decompose la a -o out": ("--base", ""),
    "decompose la lb -o out.safetensors": ("a folder, not one file", ""),
    "export parts#uniqe:la -o out": ("unknown part #uniqe:la", "#unique:A"),
    "export parts#unique:lz -o out": ("no vector is called 'lz'", "la, lb"),
    "export parts#shared -o out": ("--mode joint", ""),
    "export parts#shared:la+la -o out": ("twice", ""),
    "export parts -o out": ("names no part", "#unique"),
    "export la#unique:la -o out": ("not a decomposition", ""),
    "apply --base base -o out": ("nothing to add", "--add W REF"),
    "apply --base base --add la -o out": ("-o", ""),  # --add takes two words, and takes -o
    "apply --base base --add la 1 -o out": ("finite number and a reference", "--add 0.5 REF"),
    "apply --base base --add inf la -o out": ("finite", ""),
    "apply --base base --add 1 parts -o out": ("several parts", "#unique:A"),
    "apply --base la --add 1 lb -o out": ("adapter", "BASE+ADAPTER"),
    "apply --base parts --add 1 lb -o out": ("an artifact is no model", ""),
    "apply --base base --add 1 la": ("-o", ""),
    "apply --base base --add 1 la --shard-size big -o out": ("not a size", ""),
    "apply --base base --add 1 la --shard-size 0 -o out": ("at least one byte", ""),
    "apply --base base --add 1 la --out-dtype float12 -o out": ("bfloat16", ""),
    "mix la lb --part all --threshold 0.5 --side right -o out": ("--threshold, --side", "--part all"),
    "negate --target la --pool lb --part all --paper -o out": ("--paper", "--part all"),
    "apply --base base --add 1 la --threshold 0.5 -o out": ("--threshold", "none is named"),
    "merge --method average la lb --joint chain -o out": ("--joint", "none is named"),
    "negate --target la -o out": ("--pool", "--part all"),
    "negate --pool lb -o out": ("--target", ""),
    "negate --target la --pool lb -c nan -o out": ("finite", ""),
    "negate --base base --target a --pool b --heads-from zz -o out": ("names no input", "a, b"),
    "extract --base base --model a --rank 2 -o out.safetensors": ("PEFT adapter is a folder", ""),
    "extract --base base --model a -o out.safetensors": ("a folder, not one file", ""),
    "inspect la a": ("need the base", "--base"),
    "inspect": ("SOURCE", ""),
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_usage_errors(words: str, here: Path, devec: Runner) -> None:
    if "parts" in words:
        devec("decompose", "la", "lb", "-o", "parts")
    said = devec(*words.split(), code=2)
    line = refused(said, *(w for w in WORDS[words] if w))
    assert not Path("out.safetensors").exists()
    assert said.out == "" or words.startswith(("mix", "negate", "inspect")), said.out
    assert len(line) < 500


def test_a_folder_whose_name_means_something_needs_a_name(here: Path, devec: Runner, llama: Models) -> None:
    shutil.copytree(llama.la, here / "p+q, r")
    refused(devec("decompose", "p+q, r", "lb", "-o", "out", code=2), "cannot name a vector", "name=PATH")
    devec("decompose", "pq=p+q, r", "lb", "-o", "parts")
    devec("export", "parts#unique:pq", "-o", "out")


RECIPES: dict[str, tuple[object, str]] = {
    "a misspelt key": ({"method": "average", "sources": ["a"], "parametres": {}}, "Did you mean 'parameters'?"),
    "a misspelt view": ({"method": "average", "sources": ["a"], "view": {"treshold": 1}}, "Did you mean 'threshold'?"),
    "no method": ({"sources": ["a"]}, "lacks 'method'"),
    "no sources": ({"method": "average"}, "lacks 'sources'"),
    "an empty list": ({"method": "average", "sources": []}, "no sources"),
    "a wrong type": ({"method": "average", "sources": "a"}, "'sources'"),
    "a wrong dtype": ({"method": "average", "sources": ["a"], "out_dtype": "float12"}, "'out_dtype'"),
    "an unknown method": ({"method": "avrage", "sources": ["a"]}, "Did you mean average?"),
    "an unknown parameter": (
        {"method": "average", "sources": ["a"], "parameters": {"weight": 1}}, "Did you mean weights?",
    ),
    "a list": (["average"], "mapping"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(kind: str, here: Path, devec: Runner) -> None:
    data, word = RECIPES[kind]
    Path("r.yaml").write_text(yaml.safe_dump(data))
    refused(devec("merge", "r.yaml", "-o", "out", code=2), word)


def test_a_recipe_that_is_no_yaml_and_one_that_would_build_an_object(here: Path, devec: Runner) -> None:
    Path("r.yaml").write_text("method: [average\nsources")
    refused(devec("merge", "r.yaml", "-o", "out", code=3), "not YAML")
    Path("r.yaml").write_text('!!python/object/apply:os.system ["touch ran"]')
    refused(devec("merge", "r.yaml", "-o", "out", code=3), "not YAML")
    assert not Path("ran").exists()


def test_output_places(here: Path, devec: Runner, llama: Models) -> None:
    for name in ("base", "la", "lb", "a", "b"):
        (here / name).unlink()
        shutil.copytree(getattr(llama, name), here / name)
    devec("decompose", "la", "lb", "-o", "parts")
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    mix = ["mix", "la", "lb", "-o"]
    (here / "there").mkdir()
    refused(devec(*mix, "there", code=5), "exists already", "--overwrite", out="out")
    refused(devec(*mix, "no/out", code=5), "parent folder does not exist", out="no")
    for words in (
        [*mix, "la", "--overwrite"],
        [*mix, "la/out"],
        [*mix, ".", "--overwrite"],
        ["export", "parts#unique:la", "-o", "parts", "--overwrite"],
        ["export", "parts#unique:la", "-o", "parts/x"],
        ["export", "parts#unique:la", "--base", "base", "-o", "base", "--overwrite"],
        ["apply", "--base", "base", "--add", "1", "la", "-o", "base", "--overwrite"],
        ["apply", "--base", "base", "--add", "1", "la", "-o", "base/x"],
        ["apply", "--base", "base", "--add", "1", "la", "-o", "base/model.safetensors", "--overwrite"],
        ["apply", "--base", "base+lb", "--add", "1", "la", "-o", "lb", "--overwrite"],
        ["apply", "--base", "base", "--add", "1", "parts#unique:la", "-o", "parts", "--overwrite"],
        ["merge", "--method", "average", "a", "b", "-o", "b", "--overwrite"],
        ["merge", "--method", "average", "n=a", "b", "-o", "a/x"],
        ["decompose", "a", "b", "--base", "base", "-o", "base", "--overwrite"],
        ["decompose", "a", "b", "--base", "base", "-o", "base/x"],
        ["extract", "--base", "base", "--model", "a", "-o", "a", "--overwrite"],
        ["negate", "--target", "la", "--pool", "lb", "-o", "lb", "--overwrite"],
        ["negate", "--base", "base", "--target", "a", "--pool", "p=a,b", "-o", "b", "--overwrite"],
    ):
        said = devec(*words, code=5)
        assert len(said.errors) == 1 and said.out == "", words
    assert before == {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}, "nothing lost, nothing added"


def test_the_library_refuses_the_same_places(here: Path, llama: Models) -> None:
    import devec
    from devec.core.errors import RefusedError

    d = devec.decompose(["a", "b"], base="base")
    with pytest.raises(RefusedError, match="would change an input"):
        devec.save_decomposition(d, "base/x")
    with pytest.raises(RefusedError, match="would change an input"):
        devec.apply("base", [(1.0, "la")], "la", saving=None)
    with pytest.raises(RefusedError, match=r"would change an input|exists already"):
        devec.save(devec.apply("base", devec.load("la")), "base")


def test_a_dry_run_checks_everything_and_writes_nothing(here: Path, devec: Runner) -> None:
    devec("decompose", "la", "lb", "-o", "parts")
    Path("there").mkdir()
    for words in (
        ["decompose", "a", "b", "--base", "base"],
        ["export", "parts#unique:la"],
        ["apply", "--base", "base", "--add", "1", "la"],
        ["merge", "--method", "average", "a", "b"],
        ["negate", "--target", "la", "--pool", "lb"],
        ["mix", "la", "lb"],
        ["extract", "--base", "base", "--model", "a"],
    ):
        assert "nothing was written" in devec(*words, "-o", "out", "--dry-run").out
        assert devec(*words, "-o", "out", "--dry-run", "--json").json["dry_run"] is True
        refused(devec(*words, "-o", "there", "--dry-run", code=5), "exists already")
    assert not Path("out").exists()


def test_strict_turns_warnings_into_an_error(here: Path, devec: Runner) -> None:
    for words in (
        ["decompose", "a", "b", "--base", "base"],
        ["merge", "--method", "task-arithmetic", "--base", "base", "a"],
        ["apply", "--base", "base", "--add", "1", "a"],
        ["extract", "--base", "base", "--model", "a"],
    ):
        said = devec(*words, "--strict", "-o", "out", code=4)
        refused(said, "--strict", "integer-copied")
        assert "integer-copied" in said.warnings


def test_every_command_explains_itself(devec: Runner) -> None:
    from devec.cli.main import COMMANDS

    listed = devec("--help").out
    for name in COMMANDS:
        assert f"  {name} " in listed
        assert devec(name, "--help").out.startswith(f"Usage: devec {name}")
    assert devec("--version").out.startswith("devec")
    bare = devec(code=2)
    assert "Usage" in bare.out + bare.err
