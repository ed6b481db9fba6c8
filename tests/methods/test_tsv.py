"""TSV-Merge and TSV-Compress: against the published algorithm, and every guarantee."""

from __future__ import annotations

import pytest
import torch

from devec.core.delta import LowRankDelta
from devec.core.errors import UsageError
from devec.methods.merge.tsv_c import tsv_c
from devec.methods.merge.tsv_m import tsv_m
from methods.spectral_cases import SHAPES, error, full, low, multiplied, rotation, turned, values_of
from pools import block
from reference import spectral_merges as plain
from reference.planted import generator, orthonormal


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_merge_is_the_published_algorithm(
    shape: tuple[int, int], tasks: int, dtype: torch.dtype, tolerance: float
) -> None:
    values = full(*shape, tasks, dtype=dtype)
    assert error(tsv_m(block(values), scale=0.7), plain.tsv_merge(values, 0.7)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_merge_of_adapters_is_that_of_their_products(dtype: torch.dtype, tolerance: float) -> None:
    for n, m, rank in ((30, 20, 4), (20, 30, 9), (40, 12, 12)):  # 9 and 12 are cut to 6 and 4
        factors = low(n, m, rank, dtype=dtype)
        merged = tsv_m(block(factors))
        assert isinstance(merged, LowRankDelta) and merged.B.shape[1] <= 3 * min(rank, min(n, m) // 3)
        wanted = plain.tsv_merge([B.double() @ A.double() for B, A in factors], rtol=1e-9)
        assert error(merged, wanted) < tolerance
        assert error(tsv_m(block(multiplied(factors))), wanted) < tolerance


def test_one_task_comes_back_exactly() -> None:
    for value in (full(12, 9)[0].float(), low(12, 9, 3)[0]):
        b = block([value])
        whole = b.deltas[0]
        assert whole is not None and torch.equal(tsv_m(b).dense(), whole.dense())


def test_equal_tasks_give_their_leading_triples() -> None:
    """The published code adds what its SVD returns for the missing half of the basis, with weights as large as S."""
    W = full(20, 14)[0].float()
    assert error(tsv_m(block([W, W])), plain.truncated(W, 7)) < 1e-6
    assert error(plain.tsv_merge([W, W]), plain.truncated(W, 7)) > 0.1


def test_orthogonal_tasks_are_summed_and_others_are_not() -> None:
    U, V = rotation(20, 1), rotation(15, 2)
    a, b = U[:, :5] @ V[:, :5].T, 2 * U[:, 5:10] @ V[:, 5:10].T
    assert error(tsv_m(block([a, b])), a + b) < 1e-12
    values = full(20, 15, 2)
    assert error(tsv_m(block(values)), sum(values)) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_turning_the_deltas_turns_the_merge(shape: tuple[int, int]) -> None:
    L, R = rotation(shape[0], 8), rotation(shape[1], 9)
    values = full(*shape)
    assert error(tsv_m(block(turned(values, L, R))), L @ tsv_m(block(values)).dense() @ R) < 1e-10


def test_scaling_one_entry_axis_does_not_turn_into_the_merge() -> None:
    """Equivariance is for orthogonal matrices: a stretch changes which directions lead."""
    values, stretch = full(12, 9), torch.diag(torch.linspace(0.1, 5.0, 12, dtype=torch.float64))
    stretched = tsv_m(block([stretch @ W for W in values])).dense()
    assert error(stretched, stretch @ tsv_m(block(values)).dense()) > 0.1


def test_equal_singular_values_that_are_not_cut_do_not_matter() -> None:
    g = generator(3)
    a = [orthonormal(24, 4, g) @ orthonormal(16, 4, g).T for _ in range(3)]
    turn = torch.block_diag(*[rotation(1, 0), rotation(23, 5)])
    merged = tsv_m(block(a)).dense()
    assert error(turn.T @ tsv_m(block([turn @ W for W in a])).dense(), merged) < 1e-10
    assert error(merged, plain.tsv_merge(a, rtol=1e-9)) < 1e-10


def test_more_tasks_than_directions_are_averaged() -> None:
    values = full(8, 3, 4)
    assert error(tsv_m(block(values), scale=2.0), 2 * sum(values) / 4) < 1e-12
    assert error(tsv_m(block(values), others="sum"), sum(values)) < 1e-12


def test_a_smaller_rank_on_request() -> None:
    values = full(24, 16)
    merged = tsv_m(block(values), rank=2)
    assert int((values_of(merged) > 1e-9).sum()) == 6
    assert torch.equal(tsv_m(block(values), rank=99).dense(), tsv_m(block(values)).dense())
    with pytest.raises(UsageError, match="rank from 1 on, got 0"):
        tsv_m(block(values), rank=0)


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_compression_keeps_the_best_share_of_one_task(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    values = full(*shape, dtype=dtype)
    kept = tsv_c(block(values), task="B")
    k = min(shape) // 3
    assert isinstance(kept, LowRankDelta) and kept.B.shape[1] == k
    assert error(kept, plain.truncated(values[1], k)) < tolerance
    rest = torch.linalg.svdvals(values[1].double())[k:]
    assert float((kept.dense().double() - values[1]).norm()) == pytest.approx(float(rest.norm()), rel=1e-5)


def test_the_other_tasks_decide_only_the_share() -> None:
    values = full(24, 16)
    other = full(24, 16, seed=7)
    assert torch.equal(tsv_c(block(values), "B").dense(), tsv_c(block([other[0], values[1], None]), "B").dense())
    assert error(tsv_c(block(values[:2]), "B"), tsv_c(block(values), "B").dense()) > 0.01


def test_compression_of_an_adapter_at_its_rank_is_the_adapter() -> None:
    factors = low(40, 30, 4)
    kept = tsv_c(block(factors), "A", scale=0.5)
    assert isinstance(kept, LowRankDelta) and kept.B.shape[1] == 4
    assert error(kept, 0.5 * factors[0][0] @ factors[0][1]) < 1e-12


def test_a_task_that_lacks_the_tensor_and_one_that_is_not_there() -> None:
    values = full(24, 16)
    assert float(tsv_c(block([values[0], None]), "B").norm()) == 0.0
    with pytest.raises(UsageError, match=r"task='D' is no vector: vectors = A, B, C"):
        tsv_c(block(values), "D")
    with pytest.raises(UsageError, match="rank from 1 on"):
        tsv_c(block(values), "A", rank=0)


def test_a_matrix_with_fewer_rows_than_tasks_keeps_one_triple() -> None:
    values = full(9, 2, 5)
    assert tsv_c(block(values), "A").rank_bound == 1
