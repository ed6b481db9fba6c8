"""How fast each part of a machine is, and where the figure comes from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Literal

import torch
from blake3 import blake3

from benchmarks.clock import threads
from devec.engine.threads import ordered_map
from devec.linalg.lowrank import inner_of_many_dense, inner_of_products, svd_of_dense, svd_of_product
from devec.linalg.subspace import overlaps, pair_spectrum, union_coefficients

Source = Literal["measured here", "published", "vendor figure", "assumption"]


@dataclass(frozen=True)
class Rate:
    """``value`` in ``unit``; ``note`` says of what, and why this figure."""

    value: float
    unit: str
    source: Source
    note: str

    def __str__(self) -> str:
        for prefix, size in SMALL if self.unit == "s" else LARGE:
            if self.value >= size:
                return f"{self.value / size:.3g} {prefix}{self.unit}"
        return f"{self.value:.3g} {self.unit}"


HERE: Source = "measured here"
LARGE = (("T", 1e12), ("G", 1e9), ("M", 1e6))
SMALL = (("", 1.0), ("m", 1e-3), ("µ", 1e-6), ("n", 1e-9))


@dataclass(frozen=True)
class Rates:
    """Of one core, one card, one coordinator and one disk. Every field may be replaced: ``replace(rates, ...)``.

    Cores elsewhere are taken to be as fast as those of the machine that was measured.
    """

    hash: Rate = Rate(3.8e9, "B/s", HERE, "BLAKE3 of a tensor's bytes, one core")
    hash_file: Rate = Rate(1.6e9, "B/s", HERE, "SHA-256 of a finished file, one core")
    subtract: Rate = Rate(3.0e8, "entries/s", HERE, "bf16 to float32 and W_i - W_0, one core")
    dense_flops: Rate = Rate(4.2e10, "FLOP/s", HERE, "subspace iteration of a dense delta, one core, float32")
    factor_flops: Rate = Rate(1.9e10, "FLOP/s", HERE, "core form of a LoRA delta (two QR, one small SVD), one core")
    factor_call: Rate = Rate(7.0e-4, "s", HERE, "fixed part of factoring one LoRA delta")
    overlap_flops: Rate = Rate(5.0e10, "FLOP/s", HERE, "U_i^T U_j in float32, one core")
    product_flops: Rate = Rate(1.7e10, "FLOP/s", HERE, "inner products of LoRA deltas in float64, one core")
    product_entries: Rate = Rate(1.5e9, "entries/s", HERE, "inner products of 10 dense deltas, of a pair, one core")
    pair_call: Rate = Rate(1.2e-4, "s", HERE, "fixed part of a pair: SVD of the overlap and union")
    svd_cube: Rate = Rate(2.6e-9, "s", HERE, "SVD of an r x r overlap in float64, divided by r^3, one core")
    union_cube: Rate = Rate(4.0e-9, "s", HERE, "one vector's share of a union (r/4 shared), divided by r^3, one core")
    dispatch_threads: Rate = Rate(2.4e-5, "s", HERE, "one job through the engine's thread pool")
    record: Rate = Rate(7.0e-5, "s", HERE, "one finished tensor in a journal: JSON, append and flush")
    record_sync: Rate = Rate(3.0e-3, "s", HERE, "the same with fsync, for comparison; the simulation flushes")
    disk_read: Rate = Rate(2.0e9, "B/s", HERE, "this machine's disk, read after its cache was dropped")
    disk_write: Rate = Rate(4.5e8, "B/s", HERE, "this machine's disk, write and fsync")
    dispatch_ray: Rate = Rate(1.7e-3, "s", "published", "Ray's release logs: 440 to 600 tasks a second, 10,000 tasks")
    gpu_flops: Rate = Rate(1.0e13, "FLOP/s", "assumption", "dense iteration on one H200: 15 % of 67 TFLOP/s float32")
    pcie: Rate = Rate(6.4e10, "B/s", "vendor figure", "host to card, PCIe 5 x16")
    nvme_read: Rate = Rate(6.0e9, "B/s", "assumption", "one local NVMe drive")
    nvme_write: Rate = Rate(3.0e9, "B/s", "assumption", "one local NVMe drive")
    network: Rate = Rate(1.25e10, "B/s", "vendor figure", "100 Gbit/s a node")
    shared_read: Rate = Rate(4.0e10, "B/s", "assumption", "shared file system, all nodes together")
    shared_write: Rate = Rate(2.0e10, "B/s", "assumption", "shared file system, all nodes together")
    gpu_hour: Rate = Rate(3.5, "USD", "assumption", "one H200 and its share of a host for an hour")

    def lines(self) -> list[tuple[str, str, str, str]]:
        """Name, value with unit, source, note."""
        rows = []
        for field in fields(self):
            rate: Rate = getattr(self, field.name)
            rows.append((field.name, str(rate), rate.source, rate.note))
        return rows


def _seconds(call: Callable[[], object], clock: Callable[[], float] = process_time, repeats: int = 5) -> float:
    call()
    taken = []
    for _ in range(repeats):
        began = clock()
        call()
        taken.append(clock() - began)
    return median(taken)


def measured(rates: Rates | None = None, *, side: int = 4096, rank: int = 64, size: int = 1 << 28) -> Rates:
    """The rates with every figure "measured here" measured anew on this machine, on one thread: matrices of ``side``,
    a file of ``size`` bytes."""
    rates = rates or Rates()
    with threads(1):
        found = _arithmetic(side, rank) | _bytes(size) | _coordinator()
    return replace(rates, **{name: replace(getattr(rates, name), value=value) for name, value in found.items()})


def _arithmetic(side: int, rank: int) -> dict[str, float]:
    gen = torch.Generator().manual_seed(0)
    few = 8
    bf16 = torch.randn(side, side, generator=gen).bfloat16()
    W = torch.randn(side, side, generator=gen)
    low = torch.linalg.qr(torch.randn(side, 2 * rank, generator=gen)).Q
    dense = (low[:, :rank] * 100.0) @ low[:, rank:].T + W / side**0.5
    B, A = low[:, :rank], low[:, rank:].T.contiguous()
    small_B, small_A = low[:, :few].contiguous(), A[:few].contiguous()
    bases = [low[:, :rank], low[:, rank:]]
    M = bases[0].T @ torch.linalg.qr(torch.randn(side, rank, generator=gen)).Q
    shared = [torch.linalg.qr(torch.randn(rank, rank // 4, generator=gen, dtype=torch.float64)).Q for _ in range(9)]
    tiny = [torch.linalg.qr(torch.randn(few, few // 4, generator=gen, dtype=torch.float64)).Q for _ in range(9)]

    several = [torch.randn(side // 4, side // 4, generator=gen) for _ in range(10)]

    steps = _steps_of(lambda: svd_of_dense(dense, rank))
    call = _seconds(lambda: svd_of_product(small_B, small_A))
    svd, svd_small = (_seconds(lambda X=X: pair_spectrum(X), repeats=25) for X in (M, M[:few, :few]))
    union, union_small = (_seconds(lambda X=X: union_coefficients(X, [0.15] * 9, X[0].shape[0])) / 9
                          for X in (shared, tiny))  # fmt: skip
    return {
        "subtract": side * side / _seconds(lambda: bf16.float() - W),
        "dense_flops": dense_flops(side, side, rank, steps) / _seconds(lambda: svd_of_dense(dense, rank), repeats=3),
        "factor_call": call,
        "factor_flops": 6 * 2 * side * rank**2 / max(_seconds(lambda: svd_of_product(B, A)) - call, 1e-9),
        "overlap_flops": 2 * side * rank**2 / _seconds(lambda: overlaps(bases), repeats=25),
        "product_flops": 4 * side * rank**2 / _seconds(lambda: inner_of_products(B, A, B, A)),
        "product_entries": 55 * several[0].numel() / _seconds(lambda: inner_of_many_dense(several), repeats=3),
        "pair_call": svd_small + union_small,
        "svd_cube": max(svd - svd_small, 0.0) / rank**3,
        "union_cube": max(union - union_small, 0.0) / rank**3,
    }


def dense_flops(n: int, m: int, rank: int, steps: float) -> float:
    """Subspace iteration: a first image, then two products with the matrix and two QRs a step; 1.5 r columns."""
    w = 1.5 * rank
    return 2 * n * m * w + steps * (4 * n * m * w + 4 * (n + m) * w * w)


def _steps_of(call: Callable[[], object]) -> int:
    """How many steps the iteration took: one spectrum is asked for in each."""
    inner, count = torch.linalg.svdvals, 0

    def counting(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return inner(x)

    torch.linalg.svdvals = counting  # type: ignore[assignment]
    try:
        call()
    finally:
        torch.linalg.svdvals = inner  # type: ignore[assignment]
    return count


def _bytes(size: int) -> dict[str, float]:
    data = os.urandom(min(size, 1 << 24))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes"

        def write() -> None:
            with path.open("wb") as file:
                for _ in range(size // len(data)):
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())

        written = _seconds(write, perf_counter, 3)
        read = median(_cold_read(path) for _ in range(3))
    return {
        "hash": len(data) / _seconds(lambda: blake3(data).digest()),
        "hash_file": len(data) / _seconds(lambda: hashlib.sha256(data).digest()),
        "disk_write": size / written,
        "disk_read": size / read,
    }


def _cold_read(path: Path) -> float:
    fd = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        began = perf_counter()
        while os.read(fd, 1 << 24):
            pass
        return perf_counter() - began
    finally:
        os.close(fd)


RECORD = {
    "name": "model.layers.17.mlp.down_proj.weight", "state": "done", "digest": "0" * 64, "bytes": 123_456_789,
    "norms": {str(i): 1.234 for i in range(10)}, "eigenvalues": [0.1234] * 64,
}  # fmt: skip
"""About what one finished tensor leaves in a journal."""


def _coordinator(count: int = 200) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"

        def append(sync: bool) -> None:
            with path.open("a") as file:
                for _ in range(count):
                    file.write(json.dumps(RECORD) + "\n")
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())

        return {
            "record": _seconds(lambda: append(False), perf_counter) / count,
            "record_sync": _seconds(lambda: append(True), perf_counter, 3) / count,
            "dispatch_threads": _seconds(lambda: ordered_map(abs, range(10 * count), workers=2)) / (10 * count),
        }
