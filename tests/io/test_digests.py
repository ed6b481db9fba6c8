"""Hashes gathered in passing: the true BLAKE3 hash of every tensor, whoever reads what in which order."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from threading import Thread

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.lazy import BLOCK, row_blocks
from devec.io.checkpoint import Checkpoint, checkpoint_from_state_dict, open_checkpoint
from devec.io.digests import TensorDigests, bytes_of

ROWS = 6
TENSORS = {
    "matrix": torch.arange(ROWS * 3, dtype=torch.float32).reshape(ROWS, 3),
    "bytes": torch.arange(ROWS, dtype=torch.uint8),
    "half": torch.linspace(-1, 1, ROWS * 2).reshape(ROWS, 2).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "no rows": torch.zeros(0, 4),
    "no columns": torch.zeros(4, 0),
    "several blocks": torch.arange(3 * BLOCK // 4, dtype=torch.int32).reshape(-1, 1).expand(-1, 4).contiguous(),
}


def hash_of(value: Tensor) -> str:
    raw = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.zeros(0, dtype=torch.uint8)
    return blake3(bytes(raw.tolist()) if raw.numel() < 1000 else raw.numpy().tobytes()).hexdigest()


class Source:
    """Tensors behind digests; counts what the digests read by themselves."""

    def __init__(self, *, watching: bool = True) -> None:
        self.own = list[str]()
        self.digests = TensorDigests(self.info, self.rows)
        if watching:
            self.digests.watch()

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(TENSORS[name].shape), TENSORS[name].dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.own.append(name)
        return TENSORS[name][start:stop] if TENSORS[name].ndim else TENSORS[name].reshape(1)

    def read(self, name: str, start: int, stop: int) -> None:
        """Somebody else reads these rows."""
        rows = TENSORS[name][start:stop] if TENSORS[name].ndim else TENSORS[name].reshape(1)
        self.digests.feed(name, start, stop, rows)


stretches = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(lambda pair: tuple(sorted(pair)))


@given(st.lists(st.tuples(st.sampled_from(["matrix", "bytes", "half"]), stretches), max_size=25))
def test_any_readings_in_any_order(readings: list[tuple[str, tuple[int, int]]]) -> None:
    source = Source()
    for name, (start, stop) in readings:
        source.read(name, start, stop)
    assert all(found == hash_of(TENSORS[name]) for name, found in source.digests.take().items())
    for name in ("matrix", "bytes", "half"):
        assert source.digests.get(name) == hash_of(TENSORS[name])


@given(st.permutations([*range(ROWS)] * 2), st.randoms(use_true_random=False))
def test_two_readers_that_interleave(_: list[int], choice: random.Random) -> None:
    """Each goes through the tensor in order, in pieces of its own; one of them is overtaken at will."""
    source, at = Source(), [0, 0]
    while min(at) < ROWS:
        who = choice.choice([i for i in (0, 1) if at[i] < ROWS])
        stop = choice.randint(at[who] + 1, ROWS)
        source.read("matrix", at[who], stop)
        at[who] = stop
    assert source.digests.get("matrix") == hash_of(TENSORS["matrix"])


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_read_in_order_by_somebody_is_not_read_again(name: str) -> None:
    source = Source()
    for start, stop in row_blocks(tuple(TENSORS[name].shape)):
        source.read(name, start, stop)
    if name != "no rows":  # nothing was read of it
        assert source.digests.take() == {name: hash_of(TENSORS[name])}
    assert source.digests.get(name) == hash_of(TENSORS[name])
    assert source.own == []


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_nobody_read_is_read_once(name: str) -> None:
    source = Source()
    assert source.digests.get(name) == source.digests.get(name) == hash_of(TENSORS[name])
    assert source.own == [name] * len(list(row_blocks(tuple(TENSORS[name].shape))))
    assert source.digests.take() == {}  # not found in passing


def test_nothing_is_hashed_in_passing_before_it_is_asked_for() -> None:
    source = Source(watching=False)
    source.read("matrix", 0, ROWS)
    assert source.digests.take() == {}
    source.digests.watch()
    source.read("matrix", 3, ROWS)  # the start was not seen
    assert source.digests.take() == {}
    source.read("matrix", 0, ROWS)
    assert set(source.digests.take()) == {"matrix"} and source.digests.take() == {}


def test_hashes_that_others_found() -> None:
    source = Source()
    source.digests.learn({"matrix": "of another process"})
    source.read("matrix", 0, ROWS)
    assert source.digests.get("matrix") == "of another process"
    assert source.digests.take() == {} and source.own == []


def test_many_threads() -> None:
    source, names = Source(), ["matrix", "half", "several blocks"]

    def reader(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(10):
            name = choice.choice(names)
            blocks = list(row_blocks(tuple(TENSORS[name].shape)))
            if choice.random() < 0.3:
                choice.shuffle(blocks)
            for start, stop in blocks:
                source.read(name, start, stop)

    threads = [Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.digests.take() == {name: hash_of(TENSORS[name]) for name in names}


def test_the_fingerprint_is_over_names_shapes_dtypes_and_hashes() -> None:
    source, names = Source(), ["half", "matrix", "scalar"]
    expected = hashlib.sha256()
    for name in names:
        value = TENSORS[name]
        expected.update(json.dumps([name, list(value.shape), str(value.dtype), hash_of(value)]).encode())
    for order in (names, names[::-1]):
        assert source.digests.fingerprint(order) == expected.hexdigest()


@pytest.mark.parametrize("name", TENSORS)
def test_bytes_are_those_of_the_tensor_in_row_major_order(name: str) -> None:
    value = TENSORS[name]
    assert blake3(bytes_of(value)).hexdigest() == hash_of(value)
    if value.ndim == 2:
        assert blake3(bytes_of(value.T)).hexdigest() == hash_of(value.T.contiguous())


def checkpoints(folder: Path) -> list[Checkpoint]:
    save_file(TENSORS, folder / "x.safetensors")
    torch.save(TENSORS, folder / "x.pt")
    return [
        open_checkpoint(folder / "x.safetensors"), open_checkpoint(folder / "x.pt"),
        checkpoint_from_state_dict(TENSORS),
    ]  # fmt: skip


def test_a_checkpoint_hashes_what_is_read_of_it(tmp_path: Path) -> None:
    for checkpoint in checkpoints(tmp_path):
        checkpoint.digests.watch()
        checkpoint.get("matrix")
        checkpoint.get("scalar")
        for start, stop in row_blocks(tuple(TENSORS["several blocks"].shape)):
            checkpoint.rows("several blocks", start, stop)
        checkpoint.rows("half", 0, 3)
        assert checkpoint.digests.take() == {
            name: hash_of(TENSORS[name]) for name in ("matrix", "scalar", "several blocks")
        }
        assert checkpoint.digests.get("half") == hash_of(TENSORS["half"])


def test_a_tied_name_is_hashed_as_what_it_is_stored_as() -> None:
    value = TENSORS["matrix"]
    checkpoint = checkpoint_from_state_dict({"a": value, "b": value})
    checkpoint.digests.watch()
    checkpoint.rows("b", 0, 2)
    checkpoint.rows("a", 2, ROWS)
    assert checkpoint.digests.take() == {"a": hash_of(value)}
