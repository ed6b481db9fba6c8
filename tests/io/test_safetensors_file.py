"""The reader against the reference implementation, and against files that lie."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from devec.core.errors import InputError
from devec.io.safetensors_file import DTYPES, SafetensorsFile

DATA = b"\x00" * 16
GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
}


def write(path: Path, header: Any, data: bytes = DATA, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def refused(path: Path, message: str) -> InputError:
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    line = str(caught.value)
    assert path.name in line and "\n" not in line
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_reads_as_the_reference_reads_it(code: str, tmp_path: Path) -> None:
    dtype = DTYPES[code]
    raw = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 4 * dtype.itemsize), dtype=torch.uint8)
    tensors = {"x": raw.view(dtype), "scalar": raw[0, : dtype.itemsize].view(dtype)[0], "none": raw[:0].view(dtype)}
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    for name, expected in load_file(tmp_path / "t.safetensors").items():
        got = file.get(name)
        assert got.dtype == expected.dtype == file.info(name).dtype
        assert got.shape == expected.shape == torch.Size(file.info(name).shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_names_in_file_order_metadata_and_closing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", {"__metadata__": {"k": "v"}, "b": GOOD["b"], "a": GOOD["a"]})
    with SafetensorsFile(path) as file:
        assert file.names() == ["a", "b"] and file.metadata == {"k": "v"} and not file.ties
        with pytest.raises(InputError, match=r"no such tensor.*tensor c"):
            file.get("c")
    with pytest.raises(ValueError, match="closed"):
        file.get("a")


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", GOOD)
    broken = write(tmp_path / "broken.safetensors", GOOD, DATA + b"x")
    gc.collect()
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(20):
        SafetensorsFile(good).get("a")
        with pytest.raises(InputError):
            SafetensorsFile(broken)
    gc.collect()
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_what_is_read_is_our_own(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "t.safetensors", GOOD))
    file.get("a").fill_(7)
    assert file.get("a").tolist() == [0, 0]


def test_threads_read_the_same_file(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(50)}
    save_file(tensors, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    with ThreadPoolExecutor(8) as pool:
        for name, value in zip(file.names() * 4, pool.map(file.get, file.names() * 4), strict=True):
            assert torch.equal(value, tensors[name])


def test_missing_empty_folder_and_pipe(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no such file")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "empty")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "a folder was given")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a regular file")


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"1")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}, 2), "looks like a Python pickle"),
        (zip_bytes(), "looks like a zip archive"),
        (b"GGUF" + b"\x03" + b"\x00" * 60, "a GGUF file, which devec does not read.*original safetensors"),
        (b"<!DOCTYPE html><html>not found</html>", "looks like an HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b'{"error": "no such model"}', "looks like JSON"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'}", "NumPy"),
        (b"\x01\x02", "too short"),
        (b"garbage that is nothing at all", "longer than the file"),
    ],
)
def test_other_files_are_refused_by_what_they_are(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 2**63, 10**9, 1000])
def test_a_header_length_beyond_the_file(length: int, tmp_path: Path) -> None:
    refused(write(tmp_path / "t.safetensors", GOOD, length=length), "header is longer")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', "'dtype' appears twice"),
        ({"__metadata__": {"a": 1}, **GOOD}, "__metadata__"),
        ({"__metadata__": [], **GOOD}, "__metadata__"),
        ({**GOOD, "a": [1]}, "exactly dtype, shape"),
        ({**GOOD, "a": {"dtype": "F32", "shape": [2]}}, "exactly dtype, shape"),
        (changed("a", dtype="F33"), "dtype = 'F33'"),
        (changed("a", dtype=["F32"]), "unknown or unsupported dtype"),
        (changed("a", shape=[-2]), "shape is not"),
        (changed("a", shape=[2.0]), "shape is not"),
        (changed("a", shape=[True, 2]), "shape is not"),
        (changed("a", shape=2), "shape is not"),
        (changed("a", shape=[2**64, 0], data_offsets=[0, 0]), "shape is not"),
        (changed("a", shape=[3]), "bytes wanted = 12, bytes given = 8"),
        (changed("a", shape=[2**40, 2**40]), "bytes wanted"),
        (changed("a", data_offsets=[8, 0]), "bytes given = -8"),
        (changed("a", data_offsets=[0]), "not a pair"),
        (changed("a", data_offsets=[-8, 0]), "not a pair"),
        (changed("a", data_offsets=["0", "8"]), "not a pair"),
        (changed("b", data_offsets=[4, 12]), "overlap: a and b"),
        (changed("b", data_offsets=[0, 8]), "overlap: a and b"),
        (changed("b", shape=[1], data_offsets=[12, 16]), "leave a hole: a and b"),
        ({"b": GOOD["b"]}, "leave a hole: the header and b"),
        (changed("b", shape=[3], data_offsets=[8, 20]), "beyond the end of the file.*truncated"),
        (changed("b", data_offsets=[2**62, 2**62 + 8]), "beyond the end"),
        ({"a": GOOD["a"]}, "bytes after the last tensor"),
    ],
)
def test_headers_that_lie(header: Any, message: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "t.safetensors", header), message)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "t.safetensors", GOOD).read_bytes()
    for size in range(1, len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "t.safetensors", GOOD))
    os.truncate(tmp_path / "t.safetensors", 40)
    with pytest.raises(InputError, match=r"ends inside a tensor.*tensor b"):
        file.get("b")


def test_a_boolean_that_is_neither(tmp_path: Path) -> None:
    header = {"a": {"dtype": "BOOL", "shape": [16], "data_offsets": [0, 16]}}
    file = SafetensorsFile(write(tmp_path / "t.safetensors", header, b"\x02" * 16))
    with pytest.raises(InputError, match="other than 0 and 1"):
        file.get("a")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 140), byte=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(place: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Never a crash; and nothing is accepted that the reference reader refuses."""
    path = tmp_path_factory.mktemp("f") / "t.safetensors"
    content = bytearray(write(path, GOOD).read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        tensors = {name: file.get(name) for name in file.names()}
    except InputError:
        return
    try:
        with safe_open(path, "pt") as reference:
            assert set(reference.keys()) == set(tensors)
    except SafetensorError as error:
        pytest.fail(f"accepted what the reference refuses: {error}")
