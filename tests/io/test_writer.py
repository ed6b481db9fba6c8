"""The streamed writer against the reference implementation of the format."""

import errno
import hashlib
import json
import os

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from devec.core.contracts import TensorInfo
from devec.core.errors import DevecError, IncompatibleError, RefusedError
from devec.io import disk
from devec.io.rounding import cast, is_finite
from devec.io.writer import DTYPE_NAMES, TENSOR_HASHES, SafetensorsWriter, bytes_of, save_file


def _one_of_each() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, name in DTYPE_NAMES.items():
        if dtype.is_floating_point or dtype.is_complex:
            value = torch.randn(3, 5, generator=g).to(dtype)
        else:
            value = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=g).to(dtype)
        tensors[f"t.{name}"] = value
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    tensors["strided"] = torch.randn(6, 4, generator=g).T
    tensors['a "quoted" nämé'] = torch.ones(2, dtype=torch.int8)
    return tensors


def _entries(tensors):
    return [(n, TensorInfo(tuple(t.shape), t.dtype)) for n, t in tensors.items()]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(bytes_of(a)) == bytes(bytes_of(b))


def test_the_reference_reader_reads_every_dtype_and_shape(tmp_path):
    tensors = _one_of_each()
    save_file(tmp_path / "x.safetensors", tensors, {"note": "kept"})
    back = load_file(tmp_path / "x.safetensors")
    assert set(back) == set(tensors)
    assert all(_same(back[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "kept"}


def test_header_and_tensors_are_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(path, _one_of_each())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    sizes = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, name


def test_tensors_of_one_dtype_lie_in_the_announced_order(tmp_path):
    tensors = {n: torch.full((2,), float(i)) for i, n in enumerate("zaqb")}
    writer = save_file(tmp_path / "x.safetensors", tensors)
    assert writer.order == list("zaqb")
    assert (tmp_path / "x.safetensors").read_bytes()[-32:] == bytes(bytes_of(torch.cat(list(tensors.values()))))


def test_hashes_hold_and_any_order_of_puts_gives_the_same_bytes(tmp_path):
    tensors = _one_of_each()
    digests = []
    for i, names in enumerate((list(tensors), sorted(tensors), list(tensors)[::-1])):
        path = tmp_path / f"{i}.safetensors"
        with SafetensorsWriter(path, _entries(tensors)) as writer:
            for n in names:
                writer.put(n, tensors[n])
        assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert writer.size == path.stat().st_size
        assert writer.tensor_hashes["strided"] == blake3(bytes(bytes_of(tensors["strided"]))).hexdigest()
        digests.append(writer.sha256)
    assert len(set(digests)) == 1


def test_tensor_hashes_can_be_in_the_header(tmp_path):
    tensors = _one_of_each()
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, _entries(tensors), {"devec.recipe": "a: 1\n"}, hashes_in_header=True) as writer:
        for n, t in tensors.items():
            writer.put(n, t)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        assert all(_same(f.get_tensor(n), t) for n, t in tensors.items())
    assert json.loads(metadata[TENSOR_HASHES]) == writer.tensor_hashes
    assert metadata["devec.recipe"] == "a: 1\n"
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_tensors_at_all(tmp_path):
    save_file(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize(
    "value", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16), torch.zeros(6)], ids=["shape", "dtype", "rank"]
)
def test_a_tensor_other_than_announced_is_refused_by_name(tmp_path, value):
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(IncompatibleError, match=r"\[tensor w\].*\(2, 3\)"),
        SafetensorsWriter(path, [("w", TensorInfo((2, 3), torch.float32))]) as writer,
    ):
        writer.put("w", value)
    assert not path.exists()


def test_unknown_twice_and_never_written_tensors_are_errors(tmp_path):
    entries = [("a", TensorInfo((1,), torch.float32)), ("b", TensorInfo((1,), torch.float32))]
    with SafetensorsWriter(tmp_path / "x", entries) as writer:
        with pytest.raises(ValueError, match="not announced"):
            writer.put("c", torch.zeros(1))
        writer.put("a", torch.zeros(1))
        with pytest.raises(ValueError, match="twice"):
            writer.put("a", torch.zeros(1))
        writer.put("b", torch.zeros(1))
    with (
        pytest.raises(DevecError, match=r"never written \[tensor b\]"),
        SafetensorsWriter(tmp_path / "y", entries) as writer,
    ):
        writer.put("a", torch.zeros(1))
    assert not (tmp_path / "y").exists()
    with pytest.raises(ValueError, match="announced twice"):
        SafetensorsWriter(tmp_path / "z", entries + entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, dtype, bad):
    value = torch.ones(4, 4)
    value[2, 3] = bad
    assert is_finite(torch.ones(4, 4).to(dtype)) and not is_finite(value.to(dtype))
    with pytest.raises(IncompatibleError, match=r"not finite.*\[tensor layer\.w\]"):
        save_file(tmp_path / "x.safetensors", {"layer.w": value.to(dtype)})
    assert list(tmp_path.iterdir()) == []


def test_cast_at_the_edge_of_the_range_is_what_torch_rounds_to():
    for value in (65504.0, 65519.0, -65519.0):  # 65520 is the midpoint to the next power, which is infinity
        assert cast("w", torch.tensor([value]), torch.float16).item() == (65504.0 if value > 0 else -65504.0)
    with pytest.raises(RefusedError):
        cast("w", torch.tensor([1.0, -65520.0]), torch.float16)
    assert cast("w", torch.tensor([448.0]), torch.float8_e4m3fn).float().item() == 448.0
    with pytest.raises(RefusedError, match="too large for bfloat16"):
        cast("w", torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16)
    assert cast("w", torch.zeros(0), torch.float16).shape == (0,)


def test_cast_rounds_to_nearest_and_refuses_overflow():
    value = torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-9])
    assert cast("w", value, torch.bfloat16).tolist() == [1.0, 1.0, 1 + 2**-7]
    with pytest.raises(RefusedError, match=r"float16 \[tensor w\]: largest = 70000, limit = 65504.*--out-dtype"):
        cast("w", torch.tensor([70000.0]), torch.float16)
    with pytest.raises(RefusedError, match="too large for float8_e4m3fn"):
        cast("w", torch.tensor([70000.0]), torch.float8_e4m3fn)
    with pytest.raises(IncompatibleError, match="not finite"):
        cast("w", torch.tensor([float("inf")]), torch.float16)
    with pytest.raises(IncompatibleError, match="float and integer"):
        cast("w", torch.tensor([1.0]), torch.int64)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_refusal_and_leaves_no_file(tmp_path, monkeypatch, code):
    real, calls = os.pwrite, []

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RefusedError, match="no space left") as error:
        save_file(tmp_path / "x.safetensors", {"w": torch.ones(10)})
    assert error.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    tensors = {"w": torch.randn(50)}
    save_file(tmp_path / "x.safetensors", tensors)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], tensors["w"])


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "PIECE", 64)
    tensors = {"w": torch.randn(1000), "v": torch.arange(77)}
    writer = save_file(tmp_path / "x.safetensors", tensors)
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    assert writer.sha256 == disk.sha256_of(tmp_path / "x.safetensors")
