"""What a pool costs, in bytes and operations, as jobs for the simulation: one job a tensor, or a tensor and a group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.events import Job, Stage, Station
from benchmarks.rates import Rate, Rates, dense_flops

Shape = tuple[int, int]

STEPS = 8
"""Subspace iterations of a dense delta: 4 to 5 measured on planted signals, 8 on a tail j^-1/2 (side 2048, r = 64)."""


def llama_70b(embeddings: bool = True) -> list[tuple[str, Shape]]:
    """Shapes of Llama-3-70B: 80 blocks of seven matrices, and two tables of 128,256 rows."""
    block = {
        "q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192),
        "gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672),
    }  # fmt: skip
    shapes = [(f"layer {i} {name}", shape) for i in range(80) for name, shape in block.items()]
    tables = [("embedding", (128_256, 8192)), ("head", (128_256, 8192))]
    return shapes + (tables if embeddings else [])


def many_experts(count: int = 10_000) -> list[tuple[str, Shape]]:
    """A mixture of experts cut into ``count`` matrices of 3584 x 2048: 73 billion parameters at 10,000."""
    return [(f"expert {i}", (3584, 2048)) for i in range(count)]


@dataclass(frozen=True)
class Cluster:
    """``local`` nodes read their own disk, others a shared file system through their network."""

    name: str
    nodes: int
    cores: int
    cards: int
    memory: float
    read: Rate
    write: Rate
    local: bool
    dispatch: Rate

    def stations(self) -> dict[str, Station]:
        found = {
            "coordinator": Station(1, "cluster"), "shared read": Station(1, "cluster"), "node read": Station(1),
            "cpu": Station(self.cores), "pcie": Station(max(self.cards, 1)), "gpu": Station(max(self.cards, 1)),
            "node write": Station(1), "shared write": Station(1, "cluster"),
        }  # fmt: skip
        if self.local:
            del found["shared read"], found["shared write"]
        if not self.cards:
            del found["pcie"], found["gpu"]
        return found


GIB = 2.0**30


def this_machine(rates: Rates) -> Cluster:
    return Cluster("2 cores, no GPU", 1, 2, 0, 23.5 * GIB, rates.disk_read, rates.disk_write, True,
                   rates.dispatch_threads)  # fmt: skip


def one_h200(rates: Rates) -> Cluster:
    return Cluster("one H200", 1, 16, 1, 128 * GIB, rates.nvme_read, rates.nvme_write, True, rates.dispatch_threads)


def eight_h200(rates: Rates) -> Cluster:
    """One box: eight cards, 128 cores, 1 TiB, four drives striped."""
    drives = [
        Rate(4 * r.value, r.unit, r.source, f"four times: {r.note}") for r in (rates.nvme_read, rates.nvme_write)
    ]
    return Cluster("eight H200", 1, 128, 8, 1024 * GIB, drives[0], drives[1], True, rates.dispatch_threads)


def ray_cluster(rates: Rates, nodes: int) -> Cluster:
    """``nodes`` nodes of one H200, 16 cores and 128 GiB on a shared file system."""
    return Cluster(f"Ray, {nodes} nodes", nodes, 16, 1, 128 * GIB, rates.network, rates.network, False,
                   rates.dispatch_ray)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A pool of ``k`` vectors on the given tensors.

    ``target``: one vector against all others, whose unique part is written (dense: the edited model);
    ``pairwise``: every pair, whose factors are written. Files hold bf16, factors are float32. A quarter of ``rank``
    is taken to be shared.
    """

    name: str
    shapes: tuple[tuple[str, Shape], ...]
    kind: Literal["dense", "low-rank"]
    k: int
    rank: int
    mode: Literal["target", "pairwise"] = "target"

    @property
    def pairs(self) -> int:
        return self.k - 1 if self.mode == "target" else self.k * (self.k - 1) // 2

    @property
    def unions(self) -> int:
        """(vector, other) pairs whose shared directions enter a union."""
        return self.k - 1 if self.mode == "target" else self.k * (self.k - 1)

    def effective_rank(self, shape: Shape) -> int:
        return min(self.rank, *shape)

    # -- bytes of one tensor

    def read_bytes(self, shape: Shape, vectors: int | None = None) -> float:
        """The base once and every vector, or factors of every vector."""
        n, m = shape
        k = self.k if vectors is None else vectors
        return 2.0 * (k + 1) * n * m if self.kind == "dense" else 2.0 * k * (n + m) * self.effective_rank(shape)

    def write_bytes(self, shape: Shape) -> float:
        n, m = shape
        r = self.effective_rank(shape)
        if self.mode == "target":
            return 2.0 * (n * m if self.kind == "dense" else (n + m) * r)
        return 4.0 * self.k * (n if self.kind == "dense" else n + m) * r

    def memory(self, shape: Shape, vectors: int | None = None) -> float:
        """Inputs in float32 and the factors beside them."""
        n, m = shape
        k = self.k if vectors is None else vectors
        factors = 4.0 * k * (n + m) * self.effective_rank(shape)
        return factors + (4.0 * (k + 1) * n * m if self.kind == "dense" else factors)

    # -- operations of one tensor

    def factor_flops(self, shape: Shape) -> float:
        """Eq. (6) of every vector: subspace iteration, or the core form 6 (n + m) r^2."""
        n, m = shape
        r = self.effective_rank(shape)
        return self.k * (dense_flops(n, m, r, STEPS) if self.kind == "dense" else 6.0 * (n + m) * r * r)

    def overlap_flops(self, shape: Shape) -> float:
        return self.pairs * 2.0 * shape[0] * self.effective_rank(shape) ** 2

    def product_flops(self, shape: Shape) -> float:
        """Inner products of the deltas; the norms come with the factors."""
        n, m = shape
        return self.pairs * (2.0 * n * m if self.kind == "dense" else 2.0 * (n + m) * self.effective_rank(shape) ** 2)

    def apply_flops(self, shape: Shape) -> float:
        """``W - Z (Z^T W)`` of the vectors whose unique part is written."""
        n, m = shape
        d = self.effective_rank(shape) / 4
        parts = 1 if self.mode == "target" else 0
        return parts * 4.0 * n * d * (m if self.kind == "dense" else self.effective_rank(shape))

    # -- seconds of one core

    def algebra_seconds(self, shape: Shape, rates: Rates) -> float:
        """Overlaps, their SVDs and the unions, in float64 on a core."""
        cube = float(self.effective_rank(shape)) ** 3
        return (
            self.overlap_flops(shape) / rates.overlap_flops.value
            + self.pairs * (rates.pair_call.value + rates.svd_cube.value * cube)
            + self.unions * rates.union_cube.value * cube
        )

    def product_seconds(self, shape: Shape, rates: Rates) -> float:
        if self.kind == "dense":
            return self.product_flops(shape) / 2.0 / rates.product_entries.value
        return self.product_flops(shape) / rates.product_flops.value

    def total(self, quantity: str) -> float:
        """Sum over tensors of ``read_bytes``, ``write_bytes``, ``factor_flops``, ..."""
        return float(sum(getattr(self, quantity)(shape) for _, shape in self.shapes))


Order = Literal["largest first", "as in the file"]


def jobs(
    work: Work, cluster: Cluster, rates: Rates, *, group: int | None = None, order: Order = "largest first"
) -> list[Job]:
    """One job a tensor; where half a node's memory does not hold all its vectors (or more than ``group`` are there),
    one a tensor and group of vectors, and one more a tensor that brings the groups' factors together."""
    found: list[Job] = []
    shapes = list(work.shapes)
    if order == "largest first":
        shapes.sort(key=lambda item: -item[1][0] * item[1][1])
    for name, shape in shapes:
        most = min(group or work.k, _fitting(work, shape, cluster.memory / 2))
        if most >= work.k:
            found.append(Job(name, tuple(_whole(work, shape, cluster, rates)), work.memory(shape)))
            continue
        parts = [min(most, work.k - start) for start in range(0, work.k, most)]
        first = len(found)
        found += [
            Job(f"{name}, group {i}", tuple(_factoring(work, shape, size, cluster, rates)), work.memory(shape, size))
            for i, size in enumerate(parts)
        ]
        needs = tuple(range(first, len(found)))
        together = tuple(_together(work, shape, cluster, rates))
        found.append(Job(f"{name}, together", together, _bases(work, shape) + 2 * _again(work, shape), needs))
    return found


def _fitting(work: Work, shape: Shape, memory: float) -> int:
    """The most vectors of one tensor that ``memory`` holds, at least one."""
    one, two = work.memory(shape, 1), work.memory(shape, 2)
    return max(1, int((memory - one) / (two - one)) + 1)


def _stages(cluster: Cluster, rates: Rates, *middle: Stage, read: float, write: float) -> Iterator[Stage]:
    """From dispatch to record; stages of no length are left out."""
    yield Stage("coordinator", cluster.dispatch.value)
    if not cluster.local:
        yield Stage("shared read", read / rates.shared_read.value)
    yield Stage("node read", read / cluster.read.value)
    yield from (stage for stage in middle if stage.seconds)
    if write:
        yield Stage("node write", write / cluster.write.value)
        if not cluster.local:
            yield Stage("shared write", write / rates.shared_write.value)
    yield Stage("coordinator", rates.record.value)


def _intake(work: Work, shape: Shape, vectors: int, rates: Rates) -> float:
    """Hash what was read; dense: widen and subtract the base."""
    seconds = work.read_bytes(shape, vectors) / rates.hash.value
    if work.kind == "dense":
        seconds += vectors * shape[0] * shape[1] / rates.subtract.value
    return seconds


def _factor(work: Work, shape: Shape, vectors: int, cluster: Cluster, rates: Rates) -> Iterator[Stage]:
    """Dense deltas on a card where there is one; factors of adapters on cores, which are as fast at these sizes."""
    flops = work.factor_flops(shape) * vectors / work.k
    if work.kind == "low-rank":
        yield Stage("cpu", flops / rates.factor_flops.value + vectors * rates.factor_call.value)
    elif cluster.cards:
        yield Stage("pcie", 4.0 * vectors * shape[0] * shape[1] / rates.pcie.value)
        yield Stage("gpu", flops / rates.gpu_flops.value)
    else:
        yield Stage("cpu", flops / rates.dense_flops.value)


def _hashed(written: float, rates: Rates) -> float:
    """Seconds to hash an output: its tensors as they are written, and the finished file."""
    return written / rates.hash.value + written / rates.hash_file.value


def _ending(work: Work, shape: Shape, cluster: Cluster, rates: Rates) -> Iterator[Stage]:
    """Inner products, algebra, the parts that are written, and the hash of what is written."""
    on_card = work.kind == "dense" and cluster.cards
    cpu = work.algebra_seconds(shape, rates) + _hashed(work.write_bytes(shape), rates)
    if on_card:
        yield Stage("gpu", (work.product_flops(shape) + work.apply_flops(shape)) / rates.gpu_flops.value)
    else:
        cpu += work.product_seconds(shape, rates) + work.apply_flops(shape) / rates.overlap_flops.value
    yield Stage("cpu", cpu)


def _whole(work: Work, shape: Shape, cluster: Cluster, rates: Rates) -> Iterator[Stage]:
    yield from _stages(
        cluster, rates,
        Stage("cpu", _intake(work, shape, work.k, rates)),
        *_factor(work, shape, work.k, cluster, rates),
        *_ending(work, shape, cluster, rates),
        read=work.read_bytes(shape), write=work.write_bytes(shape),
    )  # fmt: skip


def _bases(work: Work, shape: Shape) -> float:
    """Left bases of all vectors in float32."""
    return 4.0 * work.k * shape[0] * work.effective_rank(shape)


def _again(work: Work, shape: Shape) -> float:
    """Bytes of base and target, which a dense target's unique part needs once more after its groups."""
    return 4.0 * shape[0] * shape[1] if work.kind == "dense" and work.mode == "target" else 0.0


def _factoring(work: Work, shape: Shape, vectors: int, cluster: Cluster, rates: Rates) -> Iterator[Stage]:
    written = _bases(work, shape) * vectors / work.k
    yield from _stages(
        cluster, rates,
        Stage("cpu", _intake(work, shape, vectors, rates)),
        *_factor(work, shape, vectors, cluster, rates),
        Stage("cpu", _hashed(written, rates)),
        read=work.read_bytes(shape, vectors), write=written,
    )  # fmt: skip


def _together(work: Work, shape: Shape, cluster: Cluster, rates: Rates) -> Iterator[Stage]:
    yield from _stages(
        cluster, rates, *_ending(work, shape, cluster, rates),
        read=_bases(work, shape) + _again(work, shape), write=work.write_bytes(shape),
    )  # fmt: skip
