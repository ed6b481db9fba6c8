"""The command as a process: start-up, Ctrl-C, closed pipes, standard streams."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
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


def big_models(folder: Path) -> None:
    """A base and two fine-tunes large enough that a decomposition and a write take seconds."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(768, 768, generator=generator) for i in range(24)}
    save_file(base, folder / "base.safetensors")
    for name in "ab":
        tuned = {n: w + 0.01 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        save_file(tuned, folder / f"{name}.safetensors")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU time from /proc")
@pytest.mark.parametrize(
    "words",
    [
        ["decompose", "a.safetensors", "b.safetensors", "--base", "base.safetensors", "--rank", "none", "--exact"],
        ["extract", "--base", "base.safetensors", "--model", "a.safetensors", "--energy", "0.9"],
        ["negate", "--base", "base.safetensors", "--target", "a.safetensors", "--pool", "b.safetensors", "--rank",
         "none", "--exact"],
    ],
)  # fmt: skip
def test_ctrl_c_leaves_what_is_finished_or_nothing(words: list[str], tmp_path: Path) -> None:
    big_models(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*MAIN, *words, "-o", "out"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    cpu = Path(f"/proc/{process.pid}/stat")  # CPU time, so that a busy machine changes nothing
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:  # start-up takes about 1.5 s of CPU
        spent = cpu.read_text().rsplit(")", 1)[1].split()
        if (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK") > 3.0:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].startswith("devec: interrupted") and "Traceback" not in said
    assert [line for line in said.splitlines() if not line.strip()] == []
    assert_kept_or_nothing(tmp_path, said, ["a.safetensors", "b.safetensors", "base.safetensors"])
    if words[0] == "decompose":
        done = run(*words, "-o", "out", "--resume", "-q", cwd=tmp_path)
        assert done.returncode == 0 and not (tmp_path / "out.partial-run").exists(), done.stderr


def assert_kept_or_nothing(folder: Path, said: str, inputs: list[str]) -> None:
    """OUT never appears; finished tensors are kept, and the message says how to go on; or nothing is left."""
    left = sorted(p.name for p in folder.iterdir() if p.name not in inputs)
    assert left in ([], ["out.partial-run"])
    assert ("--resume" in said) == bool(left)


def test_ctrl_c_while_writing(tmp_path: Path) -> None:
    """Interrupted once the temporary folder stands: OUT never appears, and what is finished is kept."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(1024, 1024, generator=generator) for i in range(64)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({n: w * 1.01 for n, w in base.items()}, tmp_path / "a.safetensors")
    process = subprocess.Popen(
        [*MAIN, "merge", "--method", "average", "base.safetensors", "a.safetensors", "-o", "out"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None and not list(tmp_path.glob("out.partial-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert_kept_or_nothing(tmp_path, said, ["a.safetensors", "base.safetensors"])
    words = ["merge", "--method", "average", "base.safetensors", "a.safetensors", "-o", "out", "--resume"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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
