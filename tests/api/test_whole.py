"""The first pass of a merge: in the blocks of the second, once, on any number of threads, and told to others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from devec.api.merge import merge, merged_delta
from devec.core.block import Block
from devec.core.delta import LowRankDelta
from devec.core.layout import Layout
from devec.core.lazy import BLOCK, LazyDelta, once
from devec.methods import registry
from merges import merged, models, vector


def lazily(value: Tensor, reads: Counter[tuple[int, int]], transposed: bool = False) -> LazyDelta:
    def read(start: int, stop: int) -> Tensor:
        reads[start, stop] += 1
        return value[start:stop].clone()

    shape = (value.shape[1], value.shape[0]) if transposed else (value.shape[0], value.shape[1])
    return LazyDelta(shape, value.dtype, read, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("method", "given", "passes"),
    [("ties", {}, 3), ("ties", {"zero": "none"}, 2), ("dare", {}, 0), ("dare", {"rescale": "l1"}, 1), ("pcb", {}, 6),
     ("emr", {"task": "A"}, 1), ("slerp", {"t": 0.5}, 1), ("model-stock", {}, 1), ("consensus", {}, 0)],
)  # fmt: skip
def test_no_piece_is_larger_than_a_block(
    method: str, given: dict[str, Any], passes: int, transposed: bool
) -> None:
    g, reads = torch.Generator().manual_seed(0), Counter[tuple[int, int]]()
    values = [torch.randn(4 * BLOCK // 64 + 5, 64, generator=g) for _ in "AB"]
    deltas = tuple(lazily(v, reads, transposed) for v in values)
    layout = Layout(tuple(values[0].shape), transposed=transposed)
    found = merged_delta(registry.get("merge", method), Block("w", layout, ("A", "B"), deltas), given)
    assert isinstance(found, LazyDelta) and not reads, "nothing is read before it is asked for"
    found.dense()
    assert len(reads) == 5 and all((stop - start) * 64 <= BLOCK for start, stop in reads)
    each = reads.pop((0, BLOCK // 64))
    assert set(reads.values()) == {each}
    assert each == (passes + 1) * 2, "every pass reads both vectors once, and so does the merge"
    entered = registry.get("merge", method)
    assert entered.looks(entered.filled(given)) == passes


def test_a_pass_over_the_model_is_the_same_on_any_number_of_threads_and_taken_once() -> None:
    given = [vector(name, m) for name, m in zip("ABC", models(3), strict=True)]
    one, four = (merge("ties", given, parameters={"scope": "model"}, workers=n) for n in (1, 4))
    assert one.statistics is not None and four.statistics is not None
    assert one.statistics() == four.statistics()
    assert one.statistics() is one.statistics()
    assert merge("ties", given).statistics is None and merge("average", given).statistics is None


def test_what_another_process_found_is_used() -> None:
    given = [vector(name, m) for name, m in zip("ABC", models(3), strict=True)]
    told = merge("emr", given, parameters={"task": "A"}, statistics=[2.0, 1.0, 1.0])
    taken = merge("emr", given, parameters={"task": "A"})
    assert told.statistics is not None and told.statistics() == [2.0, 1.0, 1.0]
    assert taken.statistics is not None
    s = taken.statistics()[0]
    for n in told.vector.deltas:
        assert torch.allclose(told.vector.deltas[n].dense() * s, taken.vector.deltas[n].dense() * 2.0, rtol=1e-5)


def test_a_method_called_by_hand_takes_the_block_for_the_whole() -> None:
    values = {"w": torch.randn(9, 7, generator=torch.Generator().manual_seed(0))}
    for method, given in (("ties", {"scope": "model"}), ("pcb", {}), ("emr", {"task": "A"})):
        b = Block("w", Layout((9, 7)), ("A",), (vector("A", values).deltas["w"],))
        by_hand = registry.get("merge", method).call(b, **given).dense()
        assert torch.equal(by_hand, merged(method, [values], **given)["w"])


def test_factors_are_multiplied_out_block_by_block_for_methods_of_entries() -> None:
    """A product of factors may round otherwise in other blocks: both passes see the same."""
    g = torch.Generator().manual_seed(0)
    rows = 2 * BLOCK // 32 + 7
    factors = tuple(LowRankDelta(torch.randn(rows, 3, generator=g), torch.randn(3, 32, generator=g)) for _ in "AB")
    b = Block("w", Layout((rows, 32)), ("A", "B"), factors)
    found = merged_delta(registry.get("merge", "ties"), b, {"density": 0.1, "zero": "none"})
    assert isinstance(found, LazyDelta)
    kept = merged_delta(registry.get("merge", "slerp"), b, {"t": 0.5})
    assert isinstance(kept, LowRankDelta)
    alone = Block("w", b.layout, ("A",), factors[:1])
    single = merged_delta(registry.get("merge", "ties"), alone, {"density": 0.1})
    assert int((single.dense() != 0).sum()) == int(0.1 * rows * 32)


def test_once_makes_once_and_keeps_no_error() -> None:
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("not yet")
        return len(calls)

    get = once(make)
    with pytest.raises(ValueError, match="not yet"):
        get()
    assert get() == 2 and get() == 2 and len(calls) == 2
