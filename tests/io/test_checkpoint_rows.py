"""Rows of a tensor, from every kind of file and from memory: what slicing the whole tensor gives, and no more read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from devec.io import pread
from devec.io.checkpoint import Checkpoint, checkpoint_from_state_dict, open_checkpoint
from reference.planted import generator

STORE = torch.randn(20, 12, generator=generator(0))
TENSORS: dict[str, Tensor] = {
    "matrix": torch.randn(7, 5, generator=generator(1)),
    "half": torch.randn(6, 3, generator=generator(2)).to(torch.bfloat16),
    "convolution": torch.randn(4, 3, 2, 2, generator=generator(3)).half(),
    "vector": torch.arange(9, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "no rows": torch.zeros(0, 4),
    "no columns": torch.zeros(4, 0),
}
VIEWS: dict[str, Tensor] = {
    "transposed": STORE.T,
    "columns": STORE[:, 3:7],
    "rows": STORE[5:11],
    "every other": STORE[::2, ::3],
    "repeated": STORE[:1].expand(4, -1),
    "turned": STORE.reshape(4, 5, 12).permute(2, 0, 1),
}
"""Strided views: a pickle keeps the storage and how each view lies in it."""


def safetensors_file(folder: Path) -> Checkpoint:
    save_file({n: t.contiguous().clone() for n, t in {**TENSORS, **VIEWS}.items()}, folder / "x.safetensors")
    return open_checkpoint(folder / "x.safetensors")


def zip_pickle(folder: Path) -> Checkpoint:
    torch.save({**TENSORS, **VIEWS}, folder / "x.pt")
    return open_checkpoint(folder / "x.pt")


def old_pickle(folder: Path) -> Checkpoint:
    torch.save({**TENSORS, **VIEWS}, folder / "old.pt", _use_new_zipfile_serialization=False)
    return open_checkpoint(folder / "old.pt")


def memory(folder: Path) -> Checkpoint:
    return checkpoint_from_state_dict({**TENSORS, **VIEWS})


KINDS: list[Callable[[Path], Checkpoint]] = [safetensors_file, zip_pickle, old_pickle, memory]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    found: Checkpoint = request.param(tmp_path_factory.mktemp("rows"))
    return found


@given(st.sampled_from([*TENSORS, *VIEWS]), st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=150)
def test_rows_are_slices(checkpoint: Checkpoint, name: str, one: int, other: int) -> None:
    value = {**TENSORS, **VIEWS}[name]
    rows = value.shape[0] if value.ndim else 1
    start, stop = sorted((min(one, rows), min(other, rows)))
    if not value.ndim:
        start, stop = 0, 1
    found, expected = checkpoint.rows(name, start, stop), value.reshape(1) if not value.ndim else value[start:stop]
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    assert torch.equal(checkpoint.get(name), value)


def test_rows_read_only_their_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor in row-major order; rows of a transposed view lie spread over all of it."""
    asked: list[int] = []

    def counting(fd: int, offset: int, count: int, *, path: Path, tensor: str) -> Tensor:
        asked.append(count)
        return pread.read_bytes(fd, offset, count, path=path, tensor=tensor)

    for make in (safetensors_file, zip_pickle, old_pickle):
        found = make(tmp_path)
        for module in ("safetensors_file", "pickle_file"):
            monkeypatch.setattr(f"devec.io.{module}.read_bytes", counting)
        asked.clear()
        found.rows("matrix", 2, 4)
        found.rows("convolution", 3, 4)
        assert asked == [2 * 5 * 4, 12 * 2]
        monkeypatch.undo()


def test_a_place_is_where_the_bytes_lie(tmp_path: Path) -> None:
    for make in (safetensors_file, zip_pickle, old_pickle):
        found = make(tmp_path)
        for name, value in TENSORS.items():
            place = found.place(name)
            assert place is not None
            fd, offset, count = place
            raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            assert os.pread(fd, count, offset) == raw, name
    assert memory(tmp_path).place("matrix") is None


def test_rows_in_memory_are_the_tensors_own(tmp_path: Path) -> None:
    value = TENSORS["matrix"].clone().requires_grad_()
    rows = checkpoint_from_state_dict({"w": value}).rows("w", 1, 3)
    assert not rows.requires_grad and rows.data_ptr() == value[1:].data_ptr()  # no copy


def test_rows_under_a_tied_name(tmp_path: Path) -> None:
    value = TENSORS["matrix"]
    torch.save({"a": value, "b": value}, tmp_path / "tied.pt")
    for found in (open_checkpoint(tmp_path / "tied.pt"), checkpoint_from_state_dict({"a": value, "b": value})):
        assert found.ties == {"b": "a"} and torch.equal(found.rows("b", 1, 3), value[1:3])
        assert found.place("b") == found.place("a")
