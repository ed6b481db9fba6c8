"""PyTorch checkpoints: what torch saves is read exactly; what a pickle would run is refused by name and not run."""

from __future__ import annotations

import argparse
import builtins
import functools
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from devec.core.errors import DevecError, InputError, RefusedError
from devec.io import unpickle
from devec.io.pickle_file import PickleFile
from devec.io.unpickle_globals import Inert

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])


def save(value: Any, path: Path, legacy: bool = False, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> PickleFile:
    file = PickleFile(path)
    assert set(file.names()) | set(file.ties) == set(expected)
    for name, value in expected.items():
        got = file.get(name)
        assert got.dtype == value.dtype == file.info(name).dtype
        assert tuple(got.shape) == tuple(value.shape) == file.info(name).shape
        assert torch.equal(got, value.detach()), name
        assert got.is_contiguous()
    return file


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(3, 2), nn.GELU()))


@LEGACY
def test_every_kind_of_view_and_dtype(legacy: bool, tmp_path: Path) -> None:
    a = torch.randn(6, 4)
    tensors = {
        "plain": a, "transposed": a.T, "rows": a[1:3], "column": a[:, 2], "step": a[::2, 1::2],
        "expanded": a[0].expand(3, 4),
        "parameter": nn.Parameter(a + 1), "scalar": torch.tensor(3), "empty": torch.empty(0, 3), "bool": a > 0,
        "half": a.half(), "bf16": a.bfloat16(), "double": a.double(), "int8": (a * 9).to(torch.int8),
        "uint8": (a.abs() * 9).to(torch.uint8), "int16": (a * 9).to(torch.int16), "int32": (a * 9).to(torch.int32),
    }  # fmt: skip
    if not legacy:
        tensors["float8"] = a.to(torch.float8_e4m3fn)
        tensors["uint16"] = torch.tensor([1, 60000], dtype=torch.uint16)
    assert_reads(save(tensors, tmp_path / "x.pt", legacy), tensors)


@LEGACY
def test_ties_are_equal_views_of_one_storage(legacy: bool, tmp_path: Path) -> None:
    a = torch.randn(4, 4)
    state = OrderedDict(wte=a, other=a.clone(), lm_head=a, flipped=a.T, again=a[:])
    file = assert_reads(save(state, tmp_path / "x.pt", legacy), dict(state))
    assert file.ties == {"lm_head": "wte", "again": "wte"}
    assert set(file.names()) == {"wte", "other", "flipped"}


@LEGACY
def test_order_is_that_of_the_file(legacy: bool, tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((100,), float(i)) for i in range(12)}
    file = PickleFile(save(state, tmp_path / "x.pt", legacy))
    starts = [file._places[file._views[n].storage.key][0] for n in file.names()]
    assert starts == sorted(starts) and len(set(starts)) == 12


@LEGACY
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "ema", "params"])
def test_wrappers_and_prefixes(wrapper: str | None, legacy: bool, network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    assert hasattr(state, "_metadata")
    for prefix in ("", "module.", "_orig_mod."):
        value: Any = OrderedDict((prefix + n, v) for n, v in state.items())
        if wrapper:
            momenta = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
            value = {"epoch": 3, wrapper: value, "optimizer": momenta, "loss": torch.tensor(1.0).item()}
        assert_reads(save(value, tmp_path / "x.pth", legacy), dict(state))


def test_several_sets_of_weights_are_not_guessed_at(tmp_path: Path) -> None:
    one, two = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for value in ({"model": one, "ema": two}, {"generator": one, "discriminator": two}):
        with pytest.raises(InputError, match="not clear which.*" + ", ".join(value)):
            PickleFile(save(value, tmp_path / "x.pt"))
    with pytest.raises(InputError, match=r"both at the top and in a nested part.*sub"):
        PickleFile(save({"w": torch.ones(2), "sub": one}, tmp_path / "x.pt"))
    with pytest.raises(InputError, match="not text"):
        PickleFile(save({1: torch.ones(2)}, tmp_path / "x.pt"))


def test_what_training_leaves_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    value = {
        "state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1, out=pathlib.Path("x")), "date": None,
        "accuracy": np.float64(0.9), "curve": np.arange(3), "names": {0: "cat"}, "seen": {1, 2}, "both": frozenset({3}),
        "device": torch.device("cpu"), "dtype": torch.float16, "size": torch.Size([1, 2]), "big": 2**80, "raw": b"ab",
        "flags": (True, False, None, 1.5, -7), "many": list(range(2000)), "text": "x" * 70000,
    }  # fmt: skip
    for legacy in (False, True):
        for protocol in (2, 4):
            assert_reads(save(value, tmp_path / "x.pt", legacy, pickle_protocol=protocol), {"w": torch.ones(2)})


# whole modules


@LEGACY
def test_a_module_pickled_whole(legacy: bool, network: nn.Module, tmp_path: Path) -> None:
    network.register_buffer("scratch", torch.ones(2), persistent=False)
    assert "scratch" not in network.state_dict()
    for value in (network, {"model": network, "ema": None, "epoch": -1, "optimizer": None}):
        assert_reads(save(value, tmp_path / "x.pt", legacy), dict(network.state_dict()))


@pytest.fixture
def vanished() -> Iterator[types.ModuleType]:
    """A module ``models.yolo`` with classes, importable only while a test writes its file."""
    package, module = types.ModuleType("models"), types.ModuleType("models.yolo")

    class Detect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 3, 1)
            self.register_buffer("anchors", torch.arange(4.0))
            self.activation = nn.SiLU()
            self.names = {0: "duck"}

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("code of the pickled class ran")

    Detect.__module__, Detect.__qualname__ = "models.yolo", "Detect"
    module.Detect = Detect  # type: ignore[attr-defined]
    sys.modules.update({"models": package, "models.yolo": module})
    yield module
    for name in ("models", "models.yolo"):
        sys.modules.pop(name, None)


@LEGACY
def test_classes_that_are_not_installed_become_stubs(legacy: bool, vanished: Any, tmp_path: Path) -> None:
    model = vanished.Detect().half()
    state = dict(model.state_dict())
    save({"epoch": -1, "model": model, "ema": None}, tmp_path / "yolo.pt", legacy)
    for name in ("models", "models.yolo"):
        del sys.modules[name]
    assert_reads(tmp_path / "yolo.pt", state)
    assert "models.yolo" not in sys.modules


# hostile pickles


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def canary(_: str) -> None:
    raise AssertionError("the pickle was run")


@LEGACY
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch ran", r"posix\.system"),
        (builtins.eval, "open('ran', 'w')", r"builtins\.eval"),
        (builtins.exec, "open('ran', 'w')", r"builtins\.exec"),
        (builtins.getattr, "x", r"builtins\.getattr"),
        (subprocess.Popen, "touch ran", r"(subprocess|commands)\.Popen"),
        (torch.load, "x", r"torch\.serialization\.load"),
        (functools.partial, print, r"functools\.partial|builtins\.print"),
        (torch.hub.load, "x", r"torch\.hub\.load"),
        (canary, "x", r"canary"),
        (pathlib.Path.unlink, "x", r"builtins\.getattr|pathlib\.Path\.unlink"),
    ],
)
def test_a_pickle_that_would_run_code(
    function: Any, argument: Any, name: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save({"w": torch.ones(2), "x": Calls(function, argument)}, tmp_path / "bad.pt", legacy)
    with pytest.raises(RefusedError, match=name) as caught:
        PickleFile(tmp_path / "bad.pt")
    assert caught.value.exit_code == 5 and "bad.pt" in str(caught.value) and "not run" in str(caught.value)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Calls(function, argument)))
    with pytest.raises(RefusedError, match=name):
        PickleFile(tmp_path / "plain.bin")
    assert not (tmp_path / "ran").exists()


def run(code: bytes) -> Any:
    return unpickle.load(io.BytesIO(code), unpickle.storage_of, Path("x.pt"))


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x05\x97.",  # NEXT_BUFFER
    ],
)
def test_opcodes_that_reach_for_code(code: bytes) -> None:
    with pytest.raises(RefusedError):
        run(code)


def test_a_stub_only_records() -> None:
    """Calling, building and filling a stub leaves text; dotted names and attributes of it are never looked up."""
    value = run(b"ctorch.nn.modules.linear\nLinear\n(I1\ntR}(S'__class__'\nI2\nS'__setstate__'\nI3\nub.")
    assert isinstance(value, Inert) and type(value).__name__ == "Inert"
    assert value.args == (1,) and value.state == {"__class__": 2, "__setstate__": 3}
    made = run(b"\x80\x02cmodels.common\nConv\nI1\n\x85\x81.")
    assert isinstance(made, Inert) and str(made.source) == "models.common.Conv"
    dotted = run(b"\x80\x04\x8c\x08torch.nn\x8c\x1aModule.forward.__globals__\x93)R.")
    assert isinstance(dotted, Inert)


@pytest.mark.parametrize(
    "code",
    [
        b"ctorch.nn\nModule\n}(S'a'\nI1\nub.",  # state put into a name
        b"ctorch._utils\n_rebuild_tensor_v2\n}(S'__code__'\nI1\nub.",  # ... into a function of ours
        b"ctorch.nn\nModule\n)R)R.",  # what a stub made is called
        b"I1\n)R.", b"(I1\nI2\ns.", b"0.", b".", b"", b"(.", b"h\x05.", b"t.", b"]I1\nI2\ns.", b"\x80\x02Q.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\ntR.",
        b"ccollections\nOrderedDict\n(I3\ntR.",
        b"ccollections\nOrderedDict\n((lI1\natR.",
        b"}]I1\ns.",  # a list as a key
        b"I" + b"9" * 10000 + b"\n.",
        b"\x8e" + (2**62).to_bytes(8, "little") + b"x.",
    ],
)  # fmt: skip
def test_broken_pickles_are_one_clear_error(code: bytes) -> None:
    with pytest.raises(InputError, match=r"x\.pt"):
        run(code)


def test_a_key_whose_hash_would_take_for_ever() -> None:
    nested = b"(" + b"I1\n" + b"t" + b"2\x86" * 60
    with pytest.raises(InputError, match="used as a key"):
        run(b"\x80\x02}" + nested + b"I1\ns.")


def test_a_global_cannot_write_to_the_terminal() -> None:
    with pytest.raises(RefusedError) as caught:
        run(b"\x80\x04\x8c\x04os\x1b[\x8c\x06\x1b[2Jsx\x93.")
    assert "\x1b" not in str(caught.value)


def test_a_module_that_contains_itself(tmp_path: Path) -> None:
    inner = b"(S'_modules'\n}(S'me'\nh\x00u" + b"S'_parameters'\n}"
    code = b"\x80\x02ctorch.nn\nModule\n)Rq\x00}" + inner + b"ub."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", code)
    with pytest.raises(InputError, match="contains itself"):
        PickleFile(tmp_path / "x.pt")


def rebuild(storage: bytes, offset: int, shape: bytes, stride: bytes) -> bytes:
    pid = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n" + storage + b"tQ"
    return b"}S'w'\nctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"I%d\n(%st(%stI00\nNtRs." % (offset, shape, stride)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (rebuild(b"I4\n", 0, b"I4\n", b"I1\n"), None),
        (rebuild(b"I4\n", 1, b"I4\n", b"I1\n"), "beyond its storage"),
        (rebuild(b"I4\n", 0, b"I1099511627776\n", b"I0\n"), "too often"),
        (rebuild(b"I4\n", 0, b"I2\nI2\n", b"I3\nI1\n"), "beyond its storage"),
        (rebuild(b"I4\n", 0, b"I4\n", b"I-1\n"), "shape or stride"),
        (rebuild(b"I4\n", -1, b"I4\n", b"I1\n"), "without a storage"),
        (rebuild(b"I4\n", 0, b"I4\n", b"I1\nI1\n"), "differ in length"),
        (rebuild(b"I400\n", 0, b"I400\n", b"I1\n"), "has 16 of 1600 bytes"),
        (rebuild(b"I-4\n", 0, b"I4\n", b"I1\n"), "malformed storage"),
    ],
)
def test_views_stay_inside_their_storage(code: bytes, message: str | None, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", code)
        archive.writestr("a/data/0", torch.arange(4.0).numpy().tobytes())
    if message is None:
        assert PickleFile(tmp_path / "x.pt").get("w").tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(InputError, match=message):
        PickleFile(tmp_path / "x.pt")


# files


@LEGACY
def test_every_truncation_is_noticed(legacy: bool, tmp_path: Path) -> None:
    whole = save({"a": torch.arange(40.0), "b": torch.ones(3)}, tmp_path / "x.pt", legacy).read_bytes()
    for size in [*range(1, 400), *range(400, len(whole), 37), len(whole) - 1]:
        if size < len(whole):
            (tmp_path / "cut.pt").write_bytes(whole[:size])
            with pytest.raises(InputError):
                PickleFile(tmp_path / "cut.pt")


@LEGACY
def test_wrong_bytes_are_refused_or_harmless(legacy: bool, tmp_path: Path) -> None:
    whole = bytearray(save({"a": torch.arange(4.0)}, tmp_path / "x.pt", legacy).read_bytes())
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(whole), (400,), generator=generator).tolist():
        bad = bytearray(whole)
        bad[place] ^= 0x41
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            file = PickleFile(tmp_path / "bad.pt")
            for name in file.names():
                file.get(name)
        except DevecError as error:
            assert error.exit_code in (3, 5)


def test_other_files(tmp_path: Path) -> None:
    cases = {
        "html.bin": (b"<html>oops</html>", "HTML"),
        "gguf.bin": (b"GGUF" + b"\x00" * 40, "GGUF"),
        "noise.pt": (b"\x00\x01" * 30, "something else"),
        "plain.pt": (pickle.dumps({"a": [1, 2]}), "plain pickle"),
        "empty.pt": (b"", "empty"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            PickleFile(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", b"hello")
    with pytest.raises(InputError, match=r"not one that torch\.save wrote"):
        PickleFile(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}) * 50)
    with pytest.raises(InputError, match="compressed"):
        PickleFile(tmp_path / "small.pt")
    with pytest.raises(InputError, match="no tensors"):
        PickleFile(save({"epoch": 3}, tmp_path / "none.pt"))


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"a/{name}", b"\x80\x02}.")
    with pytest.raises(RefusedError, match="TorchScript"):
        PickleFile(tmp_path / "x.pt")


def test_sparse_and_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="_rebuild_sparse_tensor"):
        PickleFile(save({"w": torch.eye(3).to_sparse()}, tmp_path / "x.pt"))


def test_a_checkpoint_from_another_device(tmp_path: Path) -> None:
    path = save({"w": torch.arange(3.0)}, tmp_path / "x.pt", legacy=True)
    path.write_bytes(path.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert PickleFile(path).get("w").tolist() == [0, 1, 2]
