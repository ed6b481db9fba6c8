"""Factoring a pool on a GPU: tensors of one shape together, as many at once as fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from devec.core.block import Block
from devec.core.delta import LowRankDelta
from devec.core.errors import RefusedError
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.core.vectors import Pool
from devec.engine.threads import default_workers
from devec.linalg.batched_iteration import Products
from devec.linalg.numerics import one_blas_thread
from devec.methods.decompose.shared_unique import shared_unique
from devec.methods.decompose.shared_unique_batch import shared_unique_batch

BATCH_BYTES = 2**33
"""Working memory of a batch. A fixed number, because products of another batch size may round otherwise: with 12 GiB
free, what else lies on the GPU changes no byte. Twenty matrices of 4096 x 4096 fill it; each alone keeps a GPU busy."""

FREE_FRACTION = 0.7
"""Of the memory that is free, where that is less: the allocator's gaps and the libraries' workspaces need the rest."""

DENSE_BYTES = 24
"""Per entry of a dense delta: itself, the part of the batch that has not converged, both in bfloat16, and panels of
3/32 of the short side in float64 (4 + 8 + 4 + 6), rounded up."""

FACTOR_BYTES = 48
"""Per entry of a factor: itself, and twice Q and once the panel in float64 with their products."""

CPU = torch.device("cpu")


def factored_in_batches(
    pool: Pool,
    names: Sequence[str],
    factoring: Factoring,
    device: torch.device,
    *,
    budget: int | None = None,
    products: Products | None = None,
    workers: int | None = None,
) -> Iterator[TensorFactors]:
    """Factors of each named tensor, on the CPU, in the order in which they are done (shape by shape).

    ``budget``    bytes of working memory a batch; ``None`` asks the device
    ``products``  "bfloat16" for the power steps of dense deltas; ``None``: where the device multiplies it natively
    ``workers``   threads for the cores; ``None``: every core

    A batch that does not fit after all is halved, down to one vector at a time. Raises RefusedError when a single
    tensor does not fit, InputError for a delta with NaN or infinity.
    """
    limit = available(device) if budget is None else budget
    chosen = native_products(device) if products is None else products
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in names:
        shapes.setdefault(pool.layout(name).matrix_shape, []).append(name)

    for alike in shapes.values():
        for batch in batches((pool.block(name) for name in alike), limit, factoring.dtype):
            with one_blas_thread():
                found = _factored(batch, factoring, device, chosen, workers or default_workers())
            yield from found


def batches(blocks: Iterable[Block], limit: int, dtype: str = "float32") -> Iterator[list[Block]]:
    """Blocks in order, as many together as keep within ``limit`` bytes of working memory, at least one."""
    batch: list[Block] = []
    held = 0
    for block in blocks:
        need = working_bytes(block, dtype)
        if batch and held + need > limit:
            yield batch
            batch, held = [], 0
        batch.append(block)
        held += need
    if batch:
        yield batch


def available(device: torch.device) -> int:
    """Bytes that a batch may use on ``device``."""
    if device.type != "cuda":
        return BATCH_BYTES  # the CPU, for tests
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(BATCH_BYTES, int(FREE_FRACTION * free))


def native_products(device: torch.device) -> Products:
    """bfloat16 where tensor cores multiply it (compute capability 8.0 on): it replaces two thirds and more of an
    iteration's float32 products and costs no accuracy (benchmarks/RESULTS.md)."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if native else "float32"


def working_bytes(block: Block, dtype: str = "float32") -> int:
    """What one block adds to the working memory of its batch."""
    n, m = block.layout.matrix_shape
    need = 0
    for i in block.present:
        delta = block.deltas[i]
        if isinstance(delta, LowRankDelta):
            need += FACTOR_BYTES * delta.B.shape[1] * (n + m)
        else:
            need += DENSE_BYTES * n * m
    return 2 * need if dtype == "float64" else need


def _factored(
    batch: Sequence[Block], factoring: Factoring, device: torch.device, products: Products, workers: int
) -> list[TensorFactors]:
    try:
        found = shared_unique_batch(batch, factoring, device=device, products=products, workers=workers)
        return [factors.on(CPU) for factors in found]
    except torch.cuda.OutOfMemoryError:
        pass  # handled below, where the traceback no longer holds the batch's tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(batch) > 1:
        half = len(batch) // 2
        parts = (batch[:half], batch[half:])
        return [t for part in parts for t in _factored(part, factoring, device, products, workers)]
    (block,) = batch
    try:
        return [shared_unique(block.on(device), factoring).on(CPU)]
    except torch.cuda.OutOfMemoryError:
        raise RefusedError(
            f"{device} has too little free memory to factor {len(block.present)} vectors",
            tensor=block.name,
            values={"shape": block.layout.matrix_shape, "bytes for the deltas": _delta_bytes(block)},
            remedy="Free it, or use --device cpu.",
        ) from None


def _delta_bytes(block: Block) -> int:
    n, m = block.layout.matrix_shape
    return sum(d.dtype.itemsize * n * m for d in block.deltas if d is not None)
