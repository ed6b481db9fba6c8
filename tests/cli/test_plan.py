"""``--dry-run``: the bytes that a plan names are the bytes that a run reads and writes; and what a budget refuses."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults.world import Size, build
from fixtures_models import Runner, refused

WIDE = Size(400, 1, "1MB", 4)
"""Matrices of more than one block of rows (2^17 elements), and vectors and an embedding beside them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build(folder, WIDE)
    return folder


@pytest.fixture
def here(models: Path, work: Path) -> Path:
    for path in models.iterdir():
        (work / path.name).symlink_to(path)
    return work


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Bytes of tensors read from the files of each folder, by whomever."""
    found: Counter[str] = Counter()
    preadv = os.preadv

    def counting(fd: int, *rest: Any) -> int:
        got = preadv(fd, *rest)
        found[Path(f"/proc/self/fd/{fd}").readlink().parent.name] += got
        return got

    monkeypatch.setattr(os, "preadv", counting)
    yield found


def stages(devec: Runner, words: str) -> dict[str, dict[str, Any]]:
    document = devec(*words.split(), "-o", "planned", "--dry-run", "--json").json
    assert not Path("planned").exists()
    found = {stage["name"]: stage for stage in document["stages"]}
    for stage in found.values():
        assert stage["memory"] > 0 and stage["seconds"] >= 0 and stage["tensors"] > 0, stage
    return found


def total(planned: dict[str, dict[str, Any]], key: str) -> int:
    return sum(int(stage[key]) for name, stage in planned.items() if name != "overlaps")


def tensor_bytes(place: Path) -> int:
    """Bytes of the tensors in an output, from the files themselves."""
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    return sum(t.nbytes for file in files for t in load_file(file).values())


MODELS = {
    "apply": "apply --base base --add 0.5 a --subtract 0.3 b",
    "apply without some": "apply --base base --add 0.5 a --exclude q_proj",
    "merge": "merge --method task-arithmetic --base base a b --set scale=0.4",
    "decompose": "decompose a b --base base --rank 4",
    "decompose without some": "decompose a b --base base --rank 4 --exclude q_proj",
    "decompose in turn": "decompose a b --base base --rank 4 --exact",
    "extract": "extract --base base --model a",
    "extract without some": "extract --base base --model a --exclude q_proj",
    "extract in other numbers": "extract --base base --model a --out-dtype bfloat16",
    "extract a LoRA": "extract --base base --model a --rank 4",
    "negate": "negate --base base --target a --pool b --rank 4",
    "negate all": "negate --base base --target a --part all",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_read_and_written_as_planned(
    name: str, here: Path, devec: Runner, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: every part of every model that is read, as often as it is read, for hashes too."""
    words = MODELS[name]
    if name == "decompose in turn":  # no room for two deltas at once
        monkeypatch.setattr("devec.api.needs.available", lambda: 0)
    planned = stages(devec, words)
    reads.clear()
    devec(*words.split(), "-o", "out", "--workers", "1")
    # What a LoRA's factoring leaves in the temporary folder is read again when the LoRA is written.
    between = planned["factor"]["bytes_written"] if {"factor", "write"} <= planned.keys() else 0
    assert sum(reads[n] for n in ("base", "a", "b")) == total(planned, "bytes_read") - between
    assert tensor_bytes(Path("out")) == total(planned, "bytes_written") - between


ADAPTERS = {
    "mix": "mix la lb",
    "mix all": "mix la lb --part all",
    "mix to a rank": "mix la lb --rank 3",
    "mix in other numbers": "mix la lb --out-dtype bfloat16",
    "mix a third time": "mix la lb again=la --part all",
    "mix into one file": "mix style.safetensors ink.safetensors",
    "merge": "merge --method average la lb",
    "merge to rank": "merge --method average la lb --rank 3",
    "negate": "negate --target la --pool lb",
    "negate all": "negate --target la --part all",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_read_and_written_as_planned(name: str, here: Path, devec: Runner) -> None:
    """Files are read whole; ranks add up."""
    words = ADAPTERS[name]
    planned = stages(devec, words)
    files = [Path(w) if w.endswith("rs") else Path(w, "adapter_model.safetensors") for w in words.split()]
    read = {file.resolve(): file.stat().st_size for file in files if file.is_file()}
    assert total(planned, "bytes_read") == sum(read.values())
    out = Path("out.safetensors" if name.endswith("file") else "out")
    devec(*words.split(), "-o", out)
    assert tensor_bytes(out) == total(planned, "bytes_written")
    expected = {"mix to a rank": "recompress", "mix": "overlaps", "merge to rank": "factor"}
    assert expected.get(name, "write") in planned


def test_an_adapter_that_is_taken_from_a_model_counts_once(here: Path, devec: Runner, reads: Counter[str]) -> None:
    words = "negate --base base --target la --pool lb"
    planned = stages(devec, words)
    reads.clear()
    devec(*words.split(), "-o", "out")
    files = sum(Path(n, "adapter_model.safetensors").stat().st_size for n in ("la", "lb"))
    assert total(planned, "bytes_read") == reads["base"] + files
    assert tensor_bytes(Path("out")) == total(planned, "bytes_written")


def test_parts_are_written_as_planned(here: Path, devec: Runner) -> None:
    devec("decompose", "la", "lb", "-o", "parts")
    planned = stages(devec, "export parts#unique:la")
    devec("export", "parts#unique:la", "-o", "out")
    assert tensor_bytes(Path("out")) == planned["write"]["bytes_written"]
    assert planned["write"]["bytes_read"] > 0


@pytest.mark.parametrize(
    "words",
    ["mix la lb --part shared", "mix la lb --energy 0.5", "mix la lb --side both",
     "extract --base base --model a --error 0.3"],
)  # fmt: skip
def test_where_the_numbers_decide_a_plan_names_the_most(words: str, here: Path, devec: Runner) -> None:
    planned = stages(devec, words)
    devec(*words.split(), "-o", "out")
    assert 0 < tensor_bytes(Path("out")) <= total(planned, "bytes_written")


def test_more_work_costs_more(here: Path, devec: Runner) -> None:
    """FLOPs of an exact factoring, from its definition; what is asked for on top is not free."""
    shapes = {n: t.shape for n, t in load_file("a/model.safetensors").items() if t.ndim == 2}
    planned = stages(devec, "extract --base base --model a --energy 0.9")["factor"]
    assert planned["tensors"] == len(shapes)
    gram = sum(2 * n * m * min(n, m) for n, m in shapes.values())
    assert gram <= planned["flops"] <= 8 * gram
    cheap = stages(devec, "negate --base base --target a --part all")
    dear = stages(devec, "negate --base base --target a --pool b")
    assert cheap.keys() == {"write"} and dear.keys() == {"factor", "overlaps", "write"}
    assert total(dear, "flops") > gram > total(cheap, "flops")
    assert dear["write"]["memory"] > cheap["write"]["memory"]


@pytest.mark.parametrize(
    "words",
    ["negate --base base --target a --pool b", "mix la lb", "extract --base base --model a",
     "extract --base base --model a --rank 4"],
)  # fmt: skip
def test_a_budget_that_is_too_small_is_refused_with_one_that_is_not(words: str, here: Path, devec: Runner) -> None:
    for more in (["--dry-run"], []):
        line = refused(devec(*words.split(), "-o", "out", "--max-memory", "1MB", *more, code=5), "--max-memory")
        (least,) = re.findall(r"Give --max-memory (\d+)MiB", line)
        assert int(least) > 1
    room = f"{int(least) + 64}MiB"  # the process itself may have grown
    devec(*words.split(), "-o", "out", "--max-memory", room, "--workers", "1")


def test_generated_models_are_planned_by_their_headers(reads: Counter[str]) -> None:
    import devec
    from devec.api.factor import factor_all
    from devec.api.plan import plan_decompose, plan_write
    from devec.api.run import Engine
    from devec.core.options import Factoring
    from devec.core.vectors import Pool
    from devec.io.generated import Change, GeneratedModel

    made: Counter[str] = Counter()

    class Counted(GeneratedModel):
        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            rows = super().rows(name, start, stop)
            made[self.name] += rows.nbytes
            return rows

        def get(self, name: str) -> torch.Tensor:
            raise AssertionError("models are read by rows")

    shapes = {"up.weight": (600, 300), "down.weight": (300, 600), "norm.weight": (300,)}
    base = Counted(shapes)
    pool = []
    for name in ("one", "two"):
        tuned = base.fine_tune(name, Change(rank=4))
        tuned.__class__ = Counted
        pool.append(devec.extract(base, tuned, name=name))
    engine, factoring = Engine(workers=1), Factoring(rank="8")
    factor, overlaps = plan_decompose(Pool(tuple(pool)), factoring, engine)
    assert made == {}, "a plan makes no number"
    factor_all(Pool(tuple(pool)), factoring, ["up.weight", "down.weight"], engine, torch.device("cpu"))
    assert factor.bytes_read == sum(made.values()) > 0
    assert factor.flops >= 2 * 2 * 8 * 2 * 600 * 300 and overlaps.flops > 0
    stored = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    model = devec.apply(base, [(0.5, pool[0]), (0.5, pool[1])])
    written = plan_write(model, engine)  # type: ignore[arg-type]
    assert (written.bytes_read, written.bytes_written) == (3 * stored, stored)
