"""The way over batches, forced on the CPU: a decomposition is the same to rounding, memory limits are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from devec.api import decompose as verb
from devec.api import factor, gpu
from devec.api.gpu import available, batches, factored_in_batches, native_products, working_bytes
from devec.api.run import Engine
from devec.core.block import Block
from devec.core.decomposition import Decomposition
from devec.core.errors import RefusedError
from devec.core.options import Factoring
from devec.core.results import TensorFactors
from devec.core.vectors import Pool
from pools import dense, pool
from reference.planted import bases_at_common_angle, factors_on, generator, matrix_on

CPU = torch.device("cpu")


def planted_pool() -> Pool:
    """Three vectors that share directions: two shapes of dense tensors, one large enough to iterate, and factors."""
    vectors: list[dict[str, Any]] = [{}, {}, {}]
    for t, (n, m, r) in enumerate([(320, 300, 12), (320, 300, 10), (60, 40, 6), (60, 40, 5)]):
        for i, U in enumerate(bases_at_common_angle(n, 3, [8.0] * 3, r - 3, t)):
            W = matrix_on(U, m, seed=10 * t + i, spread=3.0)
            noise = torch.randn(n, m, generator=generator(99 + 10 * t + i), dtype=torch.float64)
            vectors[i][f"dense{t}"] = (W + noise * (0.1 / (n**0.5 + m**0.5))).float()
            B, A = factors_on(U, m, seed=10 * t + i, spread=3.0)
            vectors[i][f"lora{t}"] = (B.float(), A.float())
    return pool(*vectors)


def held(p: Pool, factoring: Factoring, **choices: Any) -> Decomposition:
    found = {t.name: t for t in factored_in_batches(p, p.tensors(), factoring, CPU, **choices)}
    assert set(found) == set(p.tensors())
    return Decomposition(p, factoring, {n: found[n] for n in p.tensors()})


@pytest.mark.parametrize(("products", "near"), [("float32", 1e-5), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("side", ["left", "both"])
@pytest.mark.parametrize("budget", [1, 10**9])
def test_a_decomposition_over_batches_is_the_decomposition(products: str, near: float, side: str, budget: int) -> None:
    """Ranks equal, spectra within rounding (bfloat16 products: within the iteration's own tolerance), parts close."""
    p, factoring = planted_pool(), Factoring(side=side)  # type: ignore[arg-type]
    one = verb.decompose(p, side=side, device="cpu", engine=Engine(workers=1))
    ours = held(p, factoring, budget=budget, products=products, workers=2)
    for name in p.tensors():
        for i in range(3):
            assert ours.tensors[name].svd[i].rank == one.tensors[name].svd[i].rank > 0
            assert ours.tensors[name].norms[i] == pytest.approx(one.tensors[name].norms[i], rel=1e-6)
    assert ours.spectra.keys() == one.spectra.keys()
    for key, spectrum in one.spectra.items():
        assert float((ours.spectra[key].eigenvalues - spectrum.eigenvalues).abs().max()) < near
        assert ours.spectra[key].count == spectrum.count
    assert one.spectra["dense0", "left", (0, 1)].count == 3
    for name in p.tensors():
        x, y = dense(ours.unique("A"), name), dense(one.unique("A"), name)
        assert float((x - y).norm()) < 10 * near * float(y.norm())


def test_decompose_hands_pools_for_a_gpu_to_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook itself: order, progress and the layout of the factors are those of the CPU's way."""
    p, factoring = planted_pool(), Factoring()
    one = factor.factor_all(p, factoring, p.tensors(), Engine(workers=1), CPU)
    asked: list[torch.device] = []

    def on_the_cpu(pool: Pool, names: Sequence[str], factoring: Factoring, device: torch.device, **more: Any) -> Any:
        asked.append(device)
        return factored_in_batches(pool, names, factoring, CPU, **more)

    monkeypatch.setattr(factor, "factored_in_batches", on_the_cpu)
    seen: list[tuple[int, int]] = []
    progress: Callable[[int, int, str], None] = lambda done, total, name: seen.append((done, total))  # noqa: E731
    ours = factor.factor_all(p, factoring, p.tensors(), Engine(workers=1), torch.device("cuda"), progress)
    assert asked == [torch.device("cuda")] and list(ours) == list(one)
    assert seen == [(i + 1, 8) for i in range(8)]
    for name, factors in ours.items():
        for i, s in factors.svd.items():
            assert s.U.is_contiguous() and s.U.stride() == one[name].svd[i].U.stride()


def test_batches_keep_within_their_memory() -> None:
    p = planted_pool()
    dense_blocks = [p.block(n) for n in ("dense2", "dense3")] * 4
    one = working_bytes(dense_blocks[0])
    assert one == 3 * gpu.DENSE_BYTES * 60 * 40
    assert 2 * one == working_bytes(dense_blocks[0], "float64")
    assert working_bytes(p.block("lora2")) == 3 * gpu.FACTOR_BYTES * 6 * 100
    for limit, sizes in ((1, [1] * 8), (3 * one, [3, 3, 2]), (3 * one - 1, [2] * 4), (100 * one, [8])):
        assert [len(batch) for batch in batches(iter(dense_blocks), limit)] == sizes
    assert list(batches([], 1)) == []
    assert available(CPU) == gpu.BATCH_BYTES and native_products(CPU) == "float32"


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    p, factoring = planted_pool(), Factoring()
    names = ["dense2", "dense3"]
    whole = held(pool(*({n: v.deltas[n] for n in names} for v in p)), factoring)
    sizes: list[int] = []
    plain = gpu.shared_unique_batch

    def cramped(blocks: Sequence[Block], *args: Any, **more: Any) -> list[TensorFactors]:
        sizes.append(len(blocks))
        if len(blocks) > 1 or blocks[0].name == "dense3":
            raise torch.cuda.OutOfMemoryError("too large")
        return plain(blocks, *args, **more)

    monkeypatch.setattr(gpu, "shared_unique_batch", cramped)
    ours = {t.name: t for t in factored_in_batches(p, names, factoring, CPU)}
    assert sizes == [2, 1, 1]
    for name in names:
        assert torch.allclose(ours[name].svd[0].S, whole.tensors[name].svd[0].S, rtol=1e-5)

    def never(block: Block, factoring: Factoring) -> TensorFactors:
        raise torch.cuda.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu, "shared_unique", never)
    refusal = r"too little free memory to factor 3 vectors \[tensor dense3\].*--device cpu"
    with pytest.raises(RefusedError, match=refusal):
        list(factored_in_batches(p, names, factoring, CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    p = planted_pool()
    one, ours = (verb.decompose(p, device=device) for device in ("cpu", "cuda"))
    for key, spectrum in one.spectra.items():
        assert float((ours.spectra[key].eigenvalues - spectrum.eigenvalues).abs().max()) < 3e-3
        assert ours.spectra[key].count == spectrum.count
