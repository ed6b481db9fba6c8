"""``--max-memory`` for large tensors: read anew rather than held, the same bytes, or a refusal that names the least."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devec.api.needs import plan_needs
from devec.api.references import load_pool
from devec.api.run import Engine
from devec.cli.main import run
from devec.core.options import Factoring
from devec.linalg import rows
from devec.linalg.subspace import principal_angles
from reference.planted import bases_at_common_angle, generator, orthonormal

SHAPES = {"tall": (9000, 280), "wide": (280, 3000)}
NOW = 300 << 20


@pytest.fixture(autouse=True)
def large_and_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a test are large; the process is of a known size."""
    for name, value in {"LARGE": 1 << 16, "HELD": 1 << 18}.items():
        monkeypatch.setattr(rows, name, value)
    monkeypatch.setattr("devec.engine.memory.resident", lambda: NOW)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models: four shared directions and four own ones over noise."""
    folder = tmp_path_factory.mktemp("models")
    g = generator(0)
    base = {n: torch.randn(shape, generator=g).bfloat16() for n, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    planted = {n: bases_at_common_angle(shape[0], 2, [5.0] * 4, 4, 3) for n, shape in SHAPES.items()}
    for i, name in enumerate("ab"):
        tuned = {}
        for n, (rows_, columns) in SHAPES.items():
            W = planted[n][i] @ orthonormal(columns, 8, g).T * 8 * (rows_**0.5 + columns**0.5)
            W += torch.randn(rows_, columns, generator=g, dtype=torch.float64)
            tuned[n] = (base[n].double() + 0.1 * W).float()
        save_file(tuned, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def decompose(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., int]]:
    def command(out: str, *options: str) -> int:
        words = [str(models / f"{n}.safetensors") for n in "ab"]
        capsys.readouterr()
        return run(
            ["decompose", *words, "--base", str(models / "base.safetensors"), "-o", str(tmp_path / out), "-q",
             "--device", "cpu", *options]
        )  # fmt: skip

    yield command


def least_named(text: str) -> int:
    found = re.search(r"Give --max-memory (\d+)MiB or more", text)
    assert found is not None
    return int(found[1])


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "spectra.json"}


@pytest.mark.parametrize("rule", ["auto", "4", "none"])
def test_the_same_bytes_in_the_least_memory(
    rule: str, decompose: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decompose("much", "--rank", rule) == 0
    assert decompose("least", "--rank", rule, "--max-memory", "1MiB") == 5
    least = least_named(capsys.readouterr().err)
    assert decompose("least", "--rank", rule, "--max-memory", f"{least - 1}MiB") == 5
    assert decompose("least", "--rank", rule, "--max-memory", f"{least}MiB", "--workers", "2") == 0
    assert files(tmp_path / "least") == files(tmp_path / "much")


def test_nothing_is_held_in_the_least_memory_and_everything_where_there_is_room(models: Path) -> None:
    pool, _ = load_pool(
        [str(models / f"{n}.safetensors") for n in "ab"], base=str(models / "base.safetensors"), dtype=torch.float32
    )
    needs = plan_needs(pool, Factoring(), list(SHAPES), Engine(workers=1, memory=NOW + (200 << 20)))
    assert {(need.whole, need.held) for need in needs.of.values()} == {(True, True)}
    least = min(NOW + (extra << 18) for extra in range(400) if fits(pool, NOW + (extra << 18)))
    needs = plan_needs(pool, Factoring(), list(SHAPES), Engine(workers=1, memory=least))
    assert (False, False) in {(need.whole, need.held) for need in needs.of.values()}


def fits(pool: object, memory: int) -> bool:
    from devec.core.errors import RefusedError

    try:
        plan_needs(pool, Factoring(), list(SHAPES), Engine(workers=1, memory=memory))  # type: ignore[arg-type]
    except RefusedError:
        return False
    return True


def test_a_rank_that_only_the_numbers_tell_is_refused_or_given_what_it_needs(
    decompose: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``energy`` keeps most of the short side of noise: more than there is memory for in the smallest budget."""
    words = ["--rank", "energy=0.9", "--exclude", "wide"]
    assert decompose("much", *words) == 0
    assert decompose("least", *words, "--max-memory", "1MiB") == 5
    first = least_named(capsys.readouterr().err)
    assert decompose("least", *words, "--max-memory", f"{first}MiB") == 5
    said = capsys.readouterr().err
    second = least_named(said)
    assert second > first and re.search(r"--rank energy=0.9 keeps \d+ directions of a vector", said)
    assert "tensor tall" in said
    assert [p.name for p in tmp_path.iterdir()] == ["much"], "nothing is left behind"
    assert decompose("least", *words, "--max-memory", f"{second}MiB") == 0
    assert files(tmp_path / "least") == files(tmp_path / "much")


def test_blocks_of_rows_agree_with_whole_matrices(
    decompose: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subspaces within 0.01 degrees, spectra to 1e-5: rounding of float32."""
    assert decompose("rows") == 0
    monkeypatch.setattr(rows, "LARGE", 1 << 30)
    assert decompose("whole") == 0
    a, b = (load_file(tmp_path / n / "factors.safetensors") for n in ("rows", "whole"))
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".U"):
            assert a[name].shape == b[name].shape and a[name].shape[1] == 8
            assert float(principal_angles(a[name], b[name]).max()) < 2e-4
        if name.endswith(".S"):
            assert torch.allclose(a[name], b[name], rtol=1e-6)
