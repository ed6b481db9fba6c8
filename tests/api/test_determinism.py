"""Same inputs, same bytes: across runs, workers and processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fixtures_models import Models, Runner


def bytes_of(folder: str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_two_runs_and_two_workers_write_identical_folders(devec: Runner, llama: Models, work: Path) -> None:
    sources = [llama.a, llama.b, llama.c]
    for place, workers in (("one", 1), ("two", 2), ("three", 2)):
        (work / place).mkdir()
        devec("decompose", *sources, "--base", llama.base, "--workers", workers, "-o", f"{place}/parts")
    one = bytes_of("one/parts")
    assert {"manifest.json", "spectra.json", "factors.safetensors", ".devec/manifest.json"} <= set(one)
    assert one == bytes_of("two/parts") == bytes_of("three/parts")


@pytest.mark.parametrize(
    "command",
    [
        ("mix", "{la}", "{lb}", "{lc}"),
        ("negate", "--base", "{base}", "--target", "{a}", "--pool", "{b}"),
        ("merge", "--method", "average", "{a}", "{b}"),
        ("extract", "--base", "{base}", "--model", "{a}", "--rank", "2"),
        ("apply", "--base", "{base}", "--add", "0.5", "{la}"),
    ],
)
def test_two_runs_write_identical_outputs(command: tuple[str, ...], devec: Runner, llama: Models, work: Path) -> None:
    words = [w.format(**{n: getattr(llama, n) for n in ("base", "a", "b", "c", "la", "lb", "lc")}) for w in command]
    for place in ("one", "two"):
        (work / place).mkdir()
        devec(*words, "-o", f"{place}/out")
        if command[0] in ("merge", "apply"):
            devec(*words, "-o", f"{place}/out.safetensors")
    assert bytes_of("one") == bytes_of("two")


def test_another_process_writes_the_same_bytes(devec: Runner, llama: Models, work: Path) -> None:
    (work / "x").mkdir()
    devec("decompose", llama.la, llama.lb, "-o", "parts")
    words = ["decompose", llama.la, llama.lb, "-o", "x/parts"]
    subprocess.run([sys.executable, "-m", "devec.cli.main", *words], check=True, capture_output=True)
    assert bytes_of("parts") == bytes_of("x/parts")


def test_outputs_name_no_machine_path(devec: Runner, llama: Models, work: Path) -> None:
    """Records and cards hold what was typed; the card, which gets published, not even that."""
    devec("mix", llama.la, llama.lb, "-o", "out")
    assert str(llama.folder) not in Path("out/README.md").read_text()
    assert str(llama.folder) not in Path("out/.devec/lock.json").read_text().replace(llama.la, "").replace(llama.lb, "")
    assert str(work) not in "".join(p.read_text() for p in Path("out/.devec").iterdir())
