"""The command as a process: start-up, Ctrl-C, closed pipes, standard streams."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fixtures_models import Models

MAIN = [sys.executable, "-m", "devec.cli.main"]


def run(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAIN, *words], capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("words", [["--help"], ["decompose", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_rich(words: list[str]) -> None:
    code = (
        "import sys; from devec.cli.main import run; import devec; devec.__all__; "
        f"assert run({words!r}) == 0; "
        "heavy = {'torch', 'numpy', 'rich', 'yaml', 'pydantic', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """0.3 s of CPU is the aim; the bound leaves room for a busy machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_exit_codes_reach_the_shell(llama: Models, tmp_path: Path) -> None:
    done = run("mix", llama.la, llama.lb, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0 and "wrote out" in done.stdout
    done = run("mix", llama.la, llama.lb, "-o", "out", cwd=tmp_path)
    assert done.returncode == 5 and done.stderr.splitlines()[-1].startswith("devec: the output exists already")
    assert run("mix", "nowhere", llama.lb, "-o", "x", cwd=tmp_path).returncode == 3


def models(folder: Path, size: int, count: int) -> list[str]:
    """A base and two fine-tunes; returns what is in the folder then."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(size, size, generator=generator) for i in range(count)}
    save_file(base, folder / "base.safetensors")
    for name in "ab":
        tuned = {n: w + 0.01 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        save_file(tuned, folder / f"{name}.safetensors")
    return names_in(folder)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MAIN, *words], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    """Until it is time to interrupt."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None and not until():
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be interrupted"


def interrupted(process: subprocess.Popen[str]) -> str:
    """Ctrl-C; returns the last line, after a look at all of them."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and [line for line in said.splitlines() if not line.strip()] == []
    last = said.splitlines()[-1]
    assert last.startswith("devec: interrupted; ")
    return last


def left_as_said(last: str, words: list[str], folder: Path, before: list[str]) -> None:
    """Either nothing is left, or what is finished is kept, the last line says so, and --resume finishes it."""
    if names_in(folder) == before:
        assert last.endswith("nothing unfinished stands under a final name")
        return
    assert names_in(folder) == sorted([*before, "out.partial-run"])
    assert re.search(r"; \d+ tensors are finished and kept: give the same command with --resume to go on$", last)
    resumed = run(*words, "--resume", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert names_in(folder) == sorted([*before, "out"])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU time from /proc")
def test_ctrl_c_while_nothing_is_written_leaves_nothing(tmp_path: Path) -> None:
    before = models(tmp_path, 768, 24)
    words = ["negate", "--base", "base.safetensors", "--target", "a.safetensors", "--pool", "b.safetensors"]
    process = start([*words, "--rank", "none", "--exact", "-o", "out"], tmp_path)
    cpu = Path(f"/proc/{process.pid}/stat")  # CPU time, so that a busy machine changes nothing

    def computing() -> bool:  # start-up takes about 1.5 s of CPU
        spent = cpu.read_text().rsplit(")", 1)[1].split()
        return (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK") > 3.0

    wait(process, computing)
    assert interrupted(process).endswith("nothing unfinished stands under a final name")
    assert names_in(tmp_path) == before


DECOMPOSE = ["decompose", "a.safetensors", "b.safetensors", "--base", "base.safetensors", "--rank", "none", "--exact"]
MERGE = ["merge", "--method", "average", "base.safetensors", "a.safetensors"]


@pytest.mark.parametrize(
    ("words", "size", "count"), [(DECOMPOSE, 400, 10), (MERGE, 900, 48)], ids=["decompose", "merge"]
)
def test_ctrl_c_keeps_finished_tensors_for_resume(words: list[str], size: int, count: int, tmp_path: Path) -> None:
    words = [*words, "-o", "out", "--workers", "1"]
    before = models(tmp_path, size, count)
    process = start(words, tmp_path)
    journal = tmp_path / "out.partial-run" / ".run" / "journal.jsonl"
    wait(process, lambda: journal.exists() and b"\n" in journal.read_bytes())
    last = interrupted(process)
    assert names_in(tmp_path) == sorted([*before, "out.partial-run"])
    left_as_said(last, words, tmp_path, before)


def test_ctrl_c_as_soon_as_the_temporary_folder_stands(tmp_path: Path) -> None:
    """Whatever is finished by then: OUT does not appear, and what is left is what is said."""
    before = models(tmp_path, 900, 48)
    process = start([*MERGE, "-o", "out"], tmp_path)
    wait(process, lambda: bool(list(tmp_path.glob("out.partial-*"))))
    left_as_said(interrupted(process), [*MERGE, "-o", "out"], tmp_path, before)


def test_a_closed_pipe_is_no_error_message(llama: Models, tmp_path: Path) -> None:
    for words in (["methods", "--json"], ["inspect", llama.la, "-v"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([*MAIN, *words], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        os.close(writer)
        assert done.returncode == 141 and done.stderr == "", done.stderr


def test_a_bug_says_so_with_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import devec.methods.registry as registry
    from devec.cli.main import run as inside

    def broken() -> None:
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr(registry, "all_methods", broken)
    assert inside(["methods"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "internal error: ZeroDivisionError: one over nothing" in said.splitlines()[-1]
