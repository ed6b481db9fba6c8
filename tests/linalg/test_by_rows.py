"""Matrices by blocks of rows: the products of the matrix, the same bytes from a file and from memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from devec.linalg import rows
from devec.linalg.lowrank import ThinSVD, TooManyDirections, svd_of_dense
from devec.linalg.numerics import NonFiniteError
from devec.linalg.rows import ByRows, block_of, group_of
from devec.linalg.subspace import principal_angles
from reference.planted import generator, orthonormal

SHAPES = [(700, 300), (300, 700), (301, 299)]
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_orientation = pytest.mark.parametrize("transposed", [False, True])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a test are large, lie in many blocks, and only a part of a wide one is held."""
    for name, value in {"LARGE": 1 << 16, "UNIT": 1 << 10, "HELD": 1 << 16, "WIDENED": 1 << 12}.items():
        monkeypatch.setattr(rows, name, value)


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """24 directions over white noise: a few past the first block would not stand out."""
    n, m = shape
    g = generator(seed)
    signal = (orthonormal(n, 24, g) * torch.linspace(4.0, 2.0, 24).double()) @ orthonormal(m, 24, g).T
    return (signal * (n**0.5 + m**0.5) + torch.randn(n, m, generator=g, dtype=torch.float64)).float()


class File:
    """A matrix as a file holds it, read by rows; counts the passes."""

    def __init__(self, W: Tensor, transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        self.F = (W.T if transposed else W).contiguous().to(dtype)
        self.read = 0
        self.matrix = ByRows((W.shape[0], W.shape[1]), self.rows, transposed)

    def rows(self, start: int, stop: int) -> Tensor:
        assert start % block_of(self.F.shape[1]) == 0
        self.read += stop - start
        return self.F[start:stop].clone()

    @property
    def passes(self) -> float:
        return self.read / self.F.shape[0]

    @property
    def in_memory(self) -> Tensor:
        return self.F.T if self.matrix.transposed else self.F


def same(a: ThinSVD, b: ThinSVD) -> bool:
    return a.total == b.total and all(torch.equal(x, y) for x, y in zip((a.U, a.S, a.V), (b.U, b.S, b.V), strict=True))


# --- products --------------------------------------------------------------------------------------------------------


@each_shape
@each_orientation
def test_products_gram_and_measure_are_those_of_the_matrix(shape: tuple[int, int], transposed: bool) -> None:
    file = File(matrix(shape), transposed)
    W, X = file.in_memory.double(), file.matrix
    g = generator(1)
    right, left = torch.randn(shape[1], 5, generator=g), torch.randn(shape[0], 5, generator=g)
    for found, truth in ((X @ right, W @ right.double()), (X.T @ left, W.T @ left.double())):
        assert float((found.double() - truth).norm() / truth.norm()) < 1e-6
    assert file.passes == 2.0
    gram = W.T @ W if shape[0] >= shape[1] else W @ W.T
    assert torch.allclose(X.gram(), gram, rtol=1e-12, atol=1e-10) and torch.equal(X.gram(), X.T.gram())
    top, norm = X.measure()
    assert top == float(W.abs().max()) and norm == pytest.approx(float(W.norm()), rel=1e-12)
    eighth = X.divided(8.0)
    assert torch.equal((eighth @ right) * 8.0, X @ right) and eighth.measure()[1] == pytest.approx(norm / 8, rel=1e-12)


def test_a_gram_matrix_costs_one_pass_of_a_tall_file_and_half_a_pass_a_group_of_a_wide_one() -> None:
    tall, wide = File(matrix((700, 300)), False), File(matrix((300, 700)), False)
    tall.matrix.gram()
    assert tall.passes == 1.0
    wide.matrix.gram()
    rows_left = range(300, 0, -group_of(700))  # when each group is taken up
    assert len(rows_left) > 3 and wide.passes == pytest.approx(sum(rows_left) / 300)


def test_bad_entries_of_all_blocks_are_counted() -> None:
    W = matrix((700, 300))
    W[3, 4], W[650, 1], W[651, 1] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(NonFiniteError, match="3 of 210000 entries"):
        File(W, False).matrix.measure()


# --- factorisations --------------------------------------------------------------------------------------------------


@each_shape
@each_orientation
@pytest.mark.parametrize("rule", ["auto", "none", "8", "energy=0.9"])
def test_the_same_bytes_from_a_file_and_from_memory(shape: tuple[int, int], transposed: bool, rule: str) -> None:
    file = File(matrix(shape), transposed)
    assert same(svd_of_dense(file.matrix, rule), svd_of_dense(file.in_memory, rule))


@each_shape
@pytest.mark.parametrize("rule", ["auto", "8", "energy=0.9", "noise"])
def test_agrees_with_the_whole_matrix(
    shape: tuple[int, int], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding of float32: values to 1e-6 of themselves, bases to 0.01 degrees (the spectrum has a gap at 8 only as
    wide as its steps)."""
    W = matrix(shape)
    ours = svd_of_dense(W, rule)
    monkeypatch.setattr(rows, "LARGE", W.numel())
    whole = svd_of_dense(W, rule)
    assert ours.rank == whole.rank > 0 and ours.total == pytest.approx(whole.total, rel=1e-12)
    assert torch.allclose(ours.S, whole.S, rtol=1e-6)
    for a, b in ((ours.U, whole.U), (ours.V, whole.V)):
        assert float(principal_angles(a, b).max()) < 2e-4
        assert torch.allclose(a.T @ a, torch.eye(ours.rank), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_entries_of_any_size(scale: float) -> None:
    W = matrix((700, 300))
    plain, scaled = svd_of_dense(W, "auto"), svd_of_dense(W * scale, "auto")
    assert plain.rank == scaled.rank and torch.allclose(plain.S * scale, scaled.S, rtol=1e-5)
    assert float(principal_angles(plain.U, scaled.U).max()) < 2e-4
    assert svd_of_dense(W * 0.0, "auto").rank == 0


def test_half_precision_is_widened_block_by_block() -> None:
    W = matrix((700, 300)).bfloat16()
    file = File(W, False, torch.bfloat16)
    assert same(svd_of_dense(file.matrix, "auto"), svd_of_dense(W.float(), "auto"))


def test_iteration_reads_a_file_twice_a_step_and_twice_before() -> None:
    file = File(matrix((700, 300)), False)
    svd_of_dense(file.matrix, "8")
    steps = (file.passes - 2) / 2  # measure, the image of noise; then two products a step, one in the last
    assert file.passes == int(file.passes) and 2 <= steps + 0.5 <= 8


@pytest.mark.parametrize("source", [lambda W: W, lambda W: File(W, False).matrix])
def test_more_directions_than_there_is_memory_for_are_told_before_their_bases_exist(
    source: Callable[[Tensor], Tensor | ByRows]
) -> None:
    W = source(matrix((700, 300)))
    with pytest.raises(TooManyDirections) as found:
        svd_of_dense(W, "energy=0.9", most=40)
    rank = found.value.rank
    assert rank > 40 and svd_of_dense(W, "energy=0.9", most=rank).rank == rank
