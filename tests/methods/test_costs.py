"""The memory that is planned for a tensor bounds what factoring it takes, whatever the numbers and the choices are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devec.core.block import Block
from devec.core.layout import Layout
from devec.core.lazy import LazyDelta
from devec.core.options import Factoring
from devec.linalg import rows
from devec.linalg.lowrank import TooManyDirections
from devec.methods.decompose.costs import first_directions, most_directions, working_bytes
from devec.methods.decompose.shared_unique import shared_unique
from reference.live_memory import peak_memory
from reference.planted import generator, orthonormal

SHAPES = {"tall": (2000, 288), "wide": (288, 2000), "square": (512, 512)}
RULES = {"auto": "noise", "none": "planted", "16": "planted", "energy=0.9": "heavy", "noise": "heavy", "mp": "noise"}
HELD_AND_LARGE = {"whole": (True, False), "held": (True, True), "in its file": (False, True)}


def numbers(kind: str, n: int, m: int, seed: int) -> Tensor:
    g = generator(seed)
    W = torch.randn(n, m, generator=g)
    if kind == "planted":
        W += ((orthonormal(n, 16, g) * 4 * (n**0.5 + m**0.5)) @ orthonormal(m, 16, g).T).float()
    if kind == "heavy":
        W *= torch.arange(1, m + 1).float() ** -2.0
    return W


def pair(kind: str, n: int, m: int, transposed: bool = False) -> Block:
    """Two deltas in files."""
    stored = [numbers(kind, m, n, i) if transposed else numbers(kind, n, m, i) for i in range(2)]
    deltas = tuple(
        LazyDelta((n, m), torch.float32, lambda a, b, F=F: F[a:b].clone(), transposed=transposed) for F in stored
    )
    layout = Layout((m, n), transposed=True) if transposed else Layout((n, m))
    return Block("w", layout, ("a", "b"), deltas)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether matrices are held; how large they count follows."""
    held, large = HELD_AND_LARGE[request.param]
    small = {"LARGE": 1 << 16, "UNIT": 1 << 13, "HELD": 1 << 18, "WIDENED": 1 << 16} if large else {}
    for name, value in small.items():
        monkeypatch.setattr(rows, name, value)
    return held


def planned_and_taken(block: Block, factoring: Factoring, held: bool) -> tuple[int, int]:
    """Bytes, of the second try if one was needed."""
    shape = block.layout.matrix_shape

    def bytes_for(directions: int) -> int:
        return working_bytes(
            shape, factoring, vectors=2, directions=directions, held=held, transposed=block.layout.transposed
        )

    most = first_directions(shape, factoring)
    while True:
        try:
            taken = peak_memory(lambda: shared_unique(block, factoring, held=held, most=most))  # noqa: B023
            return bytes_for(most), taken
        except TooManyDirections as found:
            assert found.rank > most
            most = found.rank


@pytest.mark.parametrize("way", HELD_AND_LARGE, indirect=True)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rule", "kind"), RULES.items())
def test_what_is_planned_bounds_what_is_taken(way: bool, shape: tuple[int, int], rule: str, kind: str) -> None:
    planned, taken = planned_and_taken(pair(kind, *shape), Factoring(rank=rule), way)
    assert taken <= planned


@pytest.mark.parametrize("way", HELD_AND_LARGE, indirect=True)
@pytest.mark.parametrize(
    "choices", [{"side": "right"}, {"side": "both"}, {"exact": True}, {"dtype": "float64"}], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_other_choices_and_transposed_files(way: bool, choices: dict[str, object], transposed: bool) -> None:
    for rule, shape in (("none", SHAPES["tall"]), ("auto", SHAPES["wide"])):
        factoring = Factoring(rank=rule, **choices)  # type: ignore[arg-type]
        held = way or factoring.dtype == "float64"
        planned, taken = planned_and_taken(pair("planted", *shape, transposed=transposed), factoring, held)
        assert taken <= planned, rule


def test_a_matrix_in_its_file_needs_less_than_itself() -> None:
    """The embedding of a model with 32,000 and with 128,256 words."""
    for words, limit in ((32_000, 0.6), (128_256, 0.5)):
        matrix = 4 * words * 2048
        needed = working_bytes((words, 2048), Factoring(), vectors=2, held=False)
        assert needed < limit * matrix + 32 * 2048**2
        assert working_bytes((words, 2048), Factoring(), vectors=2) == needed + matrix


def test_only_large_matrices_whose_numbers_decide_begin_with_less_than_all() -> None:
    assert first_directions((4096, 4096), Factoring()) == most_directions((4096, 4096), Factoring()) == 1024
    assert first_directions((65_536, 2048), Factoring()) == 128
    assert most_directions((65_536, 2048), Factoring()) == 2048
    for rule, count in (("none", 2048), ("nuclear=0.5", 2048), ("300", 300), ("5000", 2048)):
        assert first_directions((65_536, 2048), Factoring(rank=rule)) == count
