"""Factors of one tensor in a file: what comes back is what went in, to the last bit and in the same order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from devec.core.errors import InputError
from devec.core.layout import Layout
from devec.core.results import TensorFactors
from devec.io.parts import is_sound, part_name, read_part, write_part
from devec.linalg.lowrank import ThinSVD
from reference.planted import generator


def factors(
    members: dict[int, int], *, n: int = 6, m: int = 5, right: bool = True, layout: Layout | None = None, seed: int = 0
) -> TensorFactors:
    """``members``: vector -> rank."""
    g = generator(seed)
    svd = {
        i: ThinSVD(
            torch.randn(n, r, generator=g), torch.rand(r, generator=g, dtype=torch.float64),
            torch.randn(m, r if right else 0, generator=g), float(torch.rand(1, generator=g, dtype=torch.float64)),
        )
        for i, r in members.items()
    }  # fmt: skip
    norms = {i: float(torch.rand(1, generator=g, dtype=torch.float64)) for i in [*members, 7]}
    gram = {(i, j): 0.1 * i - j / 3 for i in norms for j in norms if i <= j}
    return TensorFactors("some.weight", layout or Layout((n, m)), svd, norms, gram, frozenset(list(members)[:1]))


def same(a: TensorFactors, b: TensorFactors) -> None:
    assert (a.name, a.norms, a.gram, a.low_rank) == (b.name, b.norms, b.gram, b.low_rank)
    assert a.layout == b.layout and a.layout.embedding == b.layout.embedding
    assert list(a.svd) == list(b.svd) and a.members == b.members
    for i, x in a.svd.items():
        y = b.svd[i]
        assert x.total == y.total
        for one, other in ((x.U, y.U), (x.S, y.S), (x.V, y.V)):
            assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@given(st.dictionaries(st.integers(0, 6), st.integers(1, 4), max_size=4), st.booleans(), st.integers(0, 99))
@settings(max_examples=20)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, members: dict[int, int], right: bool, seed: int) -> None:
    path = tmp_path_factory.mktemp("parts") / part_name(3)
    made = factors(members, right=right, seed=seed)
    digest, size = write_part(path, made)
    same(read_part(path), made)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() and size == path.stat().st_size
    assert is_sound(path, digest)


@pytest.mark.parametrize(
    "layout",
    [
        Layout((5, 6), transposed=True), Layout((6, 5, 1, 1)), Layout((6, 5), embedding=True),
        Layout((6, 5), embedding=False),
    ],
    ids=str,
)  # fmt: skip
def test_layouts(layout: Layout, tmp_path: Path) -> None:
    write_part(tmp_path / "x", factors({0: 2, 3: 1}, layout=layout))
    same(read_part(tmp_path / "x"), factors({0: 2, 3: 1}, layout=layout))


def test_columns_come_back_row_major(tmp_path: Path) -> None:
    """Products with them round alike, whoever factored them."""
    turned = factors({0: 3})
    svd = turned.svd[0]
    write_part(
        tmp_path / "x",
        TensorFactors("w", Layout((6, 5)), {0: ThinSVD(svd.U.T.contiguous().T, svd.S, svd.V, 1.0)}),
    )
    U = read_part(tmp_path / "x").svd[0].U
    assert U.is_contiguous() and torch.equal(U, svd.U)


def test_a_part_is_replaced_and_what_changed_is_noticed(tmp_path: Path) -> None:
    first, _ = write_part(tmp_path / "x", factors({0: 2}))
    second, _ = write_part(tmp_path / "x", factors({0: 2}, seed=1))
    assert first != second and is_sound(tmp_path / "x", second) and not is_sound(tmp_path / "x", first)
    raw = bytearray((tmp_path / "x").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "x").write_bytes(raw)
    assert not is_sound(tmp_path / "x", second) and not is_sound(tmp_path / "nowhere", second)


def test_what_is_no_part_is_refused(tmp_path: Path) -> None:
    save_file({"v0.U": torch.ones(2, 1)}, tmp_path / "x")
    with pytest.raises(InputError, match="not a part of a decomposition"):
        read_part(tmp_path / "x")
    save_file({"v0.U": torch.ones(2, 1)}, tmp_path / "x", {"devec.row": '{"name": "w"}'})
    with pytest.raises(InputError, match="not a part of a decomposition"):
        read_part(tmp_path / "x")


def test_parts_lie_in_the_order_of_their_tensors() -> None:
    names = [part_name(i) for i in (0, 9, 10, 99_999, 100_000)]
    assert names == sorted(names) and len(set(names)) == len(names)
