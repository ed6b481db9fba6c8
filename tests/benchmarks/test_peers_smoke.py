"""The pieces of the comparison with mergekit, at tiny sizes and without mergekit. Never a timing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from benchmarks.peers import compare, report  # noqa: E402
from benchmarks.peers.cache import evict, resident, resident_of, warm  # noqa: E402
from benchmarks.peers.models import TASKS, Llama, llama_of, weight_files, write_family  # noqa: E402
from benchmarks.peers.plain_copy import plain_copy  # noqa: E402
from benchmarks.peers.session import Record, Session, run_session, turn  # noqa: E402
from benchmarks.peers.tools import MERGEKIT_SETTINGS, WEIGHTS, Case, cases, command, environment  # noqa: E402
from benchmarks.peers.watch import CommandFailed, watch  # noqa: E402
from benchmarks.report import write_results  # noqa: E402

from devec.cli.main import run  # noqa: E402

TINY = Llama(hidden=32, intermediate=48, layers=2, vocab=64, heads=4, kv_heads=2)
MB = 1 << 20


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_family(TINY, tmp_path_factory.mktemp("family") / "models", shard_size=20_000)


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1_000_000, 60_000_000, 500_000_000, 2_000_000_000])
def test_a_model_of_a_size_has_at_least_that_many_bytes(size: int) -> None:
    shape = llama_of(size)
    assert size <= shape.bytes <= 1.1 * size + 2_000_000


def test_generated_folders_are_what_transformers_loads(family: list[Path]) -> None:
    from transformers import AutoModelForCausalLM

    assert [f.name for f in family] == ["base", *TASKS] and all(len(weight_files(f)) > 1 for f in family)
    for folder in family[:2]:
        network, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(network).__name__ == "LlamaForCausalLM" and network.dtype == torch.bfloat16
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        stored = {name: t for file in weight_files(folder) for name, t in load_file(file).items()}
        assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())


def test_a_family_is_generated_once(tmp_path: Path) -> None:
    said: list[str] = []
    first = write_family(TINY, tmp_path / "models", say=said.append)
    assert len(said) == 5 and write_family(TINY, tmp_path / "models", say=said.append) == first and len(said) == 5
    (tmp_path / "models" / "generated.json").unlink()  # as an interrupted run leaves it
    assert write_family(TINY, tmp_path / "models", say=said.append) == first and len(said) == 10


# --- the page cache, the copy, the watch -----------------------------------------------------------------------------


def test_the_page_cache_is_filled_emptied_and_looked_at(tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_bytes(os.urandom(2 * MB + 5))
    empty.touch()
    warm(file)
    assert resident(file) == 1.0 and resident(empty) == 0.0
    evict(file)
    if resident(file) == 1.0:
        pytest.skip("this file system lives in the page cache")
    assert resident(file) == 0.0
    assert resident_of([file, empty]) == 0.0
    with file.open("rb") as opened:
        opened.read(1)
    assert resident(file) > 0.0


def test_the_copy_reads_everything_and_writes_the_wanted_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.plain_copy.PIECE", 1000)
    parts = [os.urandom(n) for n in (2500, 0, 1700, 10)]
    for i, part in enumerate(parts):
        (tmp_path / str(i)).write_bytes(part)
    inputs = [str(tmp_path / str(i)) for i in range(4)]
    for size in (0, 999, 2500, 4000, 4210):
        out = tmp_path / f"out{size}"
        assert plain_copy(str(out), size, inputs) == 4210
        assert out.read_bytes() == b"".join(parts)[:size]
    with pytest.raises(ValueError, match="4210"):
        plain_copy(str(tmp_path / "more"), 4211, inputs)


def test_memory_is_summed_over_the_tree_and_mapped_files_count(tmp_path: Path) -> None:
    alone = watch(python("import time; x = b'1' * (80 << 20); time.sleep(0.3)"))
    assert 80 * MB < alone.anonymous <= alone.peak < 120 * MB
    child = python("import time; x = b'1' * (50 << 20); time.sleep(0.5)")
    both = watch(python(f"import subprocess; x = b'1' * (60 << 20); subprocess.run({child!r})"))
    assert 110 * MB < both.peak < 160 * MB
    file = tmp_path / "file"
    file.write_bytes(bytes(40 * MB))
    mapped = watch(python(
        f"import mmap, time; f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ);"
        "sum(m[::4096]); time.sleep(0.3)"
    ))  # fmt: skip
    assert mapped.peak - mapped.anonymous > 40 * MB


def test_a_peak_between_two_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.watch.PERIOD", 0.4)
    run = watch(python("import time; time.sleep(0.1); x = b'1' * (80 << 20); del x; time.sleep(0.8)"))
    assert run.anonymous < 80 * MB < run.peak


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(CommandFailed, match=r"exit code 3(.|\n)*the reason"):
        watch(python("import sys; print('the reason'); sys.exit(3)"))


def test_children_choose_their_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in environment() and environment()["HF_HUB_OFFLINE"] == "1"


# --- the merges and their outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["task-arithmetic", "average"])
def test_devec_is_called_right_and_its_output_is_the_nearest(family: list[Path], tmp_path: Path, which: int) -> None:
    case, out = cases(family)[which], tmp_path / "out"
    words = command("devec", case, out)
    assert run(words[words.index("merge") :]) == 0
    found = compare.accuracy(out, case)
    assert found.most_ulps < 0.51 and found.not_nearest < 0.001 * found.entries and found.entries > 1000
    assert compare.agreement(out, out) == compare.Agreement(TINY.bytes // 2, 0, 0.0)


def test_mergekit_gets_the_same_merges(family: list[Path], tmp_path: Path) -> None:
    settings = MERGEKIT_SETTINGS["small shards, one thread"]
    for case, method in zip(cases(family), ("task_arithmetic", "linear"), strict=True):
        words = command("mergekit", case, tmp_path / "out", settings)
        document = json.loads(Path(words[1]).read_text())
        assert document["merge_method"] == method and tuple(words[-4:]) == settings
        assert [m["parameters"]["weight"] for m in document["models"]] == list(WEIGHTS)
        assert [m["model"] for m in document["models"]] == [str(f) for f in family[1:]]
        assert document.get("base_model") == (str(family[0]) if method == "task_arithmetic" else None)
        assert (document["dtype"], document["out_dtype"]) == ("float32", "bfloat16")


def test_weights_have_no_ties() -> None:
    """Neighbouring bfloat16 numbers averaged with these weights never lie half-way."""
    hundredths = [round(100 * w) for w in WEIGHTS]
    assert sum(hundredths) % 2 == 1


def test_one_wrong_entry_is_found(tmp_path: Path) -> None:
    value = torch.linspace(0.5, 1.0, 600).reshape(30, 20).bfloat16()
    other = value.clone()
    other[7, 3] = torch.nextafter(value[7, 3], torch.tensor(2.0).bfloat16())
    for name, weights in (("a", value), ("b", other)):
        (tmp_path / name).mkdir()
        save_file({"w": weights, "v": weights[0].clone()}, tmp_path / name / "model.safetensors")
    assert compare.agreement(tmp_path / "a", tmp_path / "b") == compare.Agreement(620, 1, 1.0)
    # four equal models average to themselves
    case = Case("average", None, (tmp_path / "a",) * 4)
    right, wrong = (compare.accuracy(tmp_path / name, case) for name in "ab")
    assert (right.not_nearest, wrong.not_nearest) == (0, 1)
    assert right.most_ulps < 1e-6 and wrong.most_ulps == pytest.approx(1.0)
    save_file({"w": value}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="other tensors"):
        compare.agreement(tmp_path / "a", tmp_path / "b")


# --- a session and what is said of it --------------------------------------------------------------------------------


def test_a_session_of_the_copy_alone(tmp_path: Path) -> None:
    session = run_session([("tiny", 1)], tmp_path, tools=("copy",), repeats=2)
    warm_runs = [r for r in session.records if r.cache == "warm"]
    assert [(r.method, r.repeat) for r in warm_runs] == [
        ("task-arithmetic", 0), ("average", 0), ("task-arithmetic", 1), ("average", 1),
    ]  # fmt: skip
    assert all(r.wall > 0 and r.peak > 0 and r.resident == 1.0 for r in warm_runs)
    cold = [r for r in session.records if r.cache == "cold"]
    assert all(r.resident <= 0.001 for r in cold) and len(cold) == (0 if session.notes else 4)
    assert list(tmp_path.iterdir()) == []


def test_each_tool_comes_first_equally_often() -> None:
    tools = ("mergekit", "devec", "copy")
    orders = [turn(tools, repeat) for repeat in range(6)]
    assert all(sorted(order.index(tool) for order in orders) == [0, 0, 1, 1, 2, 2] for tool in tools)


def made_up() -> Session:
    session = Session(("mergekit", "devec", "copy"), {"2GB": 2 * 10**9}, {"mergekit": 4.0, "devec": 1.0, "copy": 0.0})
    walls = {"mergekit": (40.0, 44.0, 42.0), "devec": (11.0, 12.0, 13.0), "copy": (10.0, 8.0, 6.0)}
    peaks = {"mergekit": 9 * 10**9, "devec": 10**9, "copy": 10**7}
    for cache in ("warm", "cold"):
        for tool, seconds in walls.items():
            for i, wall in enumerate(seconds):
                session.records.append(
                    Record("2GB", cache, "average", tool, i, wall, wall, peaks[tool] + i, 10**6, 0.0, 1.0)
                )
    return session


def test_ratios_are_those_of_medians() -> None:
    warm_ones, cold_ones = report.ratios(made_up())
    assert warm_ones.faster == pytest.approx(3.5) and warm_ones.faster_work == pytest.approx(38 / 11)
    assert warm_ones.memory == pytest.approx(1 / 9, rel=1e-6) and warm_ones.copy == pytest.approx(1.5)
    assert warm_ones.met() == {"faster": True, "memory": True, "copy": True}
    slow = report.Ratios("2GB", "cold", "average", 2.9, 0.34, 1.6, None, None)
    assert slow.met() == {"faster": False, "memory": False, "copy": False}
    assert cold_ones.met()["copy"] is True


def test_both_sections_of_the_results_are_written_apart(tmp_path: Path) -> None:
    session = made_up()
    text = report.markdown(session, machine(), {"mergekit": "0.1.5"})
    path = tmp_path / "RESULTS.md"
    path.write_text((ROOT / "benchmarks" / "RESULTS.md").read_text())
    before = path.read_text().partition(report.MARKERS[0])[0]
    write_results(text, path, report.MARKERS)
    assert path.read_text().startswith(before) and text in path.read_text()
    assert "| 2GB | cold | average | 3.50 ok | 0.11 ok | 1.50 ok |" in text
    document = json.loads(report.as_json(session, machine(), {"mergekit": "0.1.5"}))
    assert len(document["records"]) == 18 and document["ratios"][0]["met"]["faster"] is True
    assert document["mergekit"] == {"mergekit": "0.1.5"}
