"""LiNeS: the coefficient of every block, and what is refused."""

from __future__ import annotations

import pytest
import torch

from devec.core.errors import UsageError
from devec.methods import registry
from devec.methods.merge.lines import depth, lines
from devec.methods.merge.task_arithmetic import task_arithmetic
from devec.methods.merge.tsv_m import tsv_m
from methods.spectral_cases import error, full
from pools import block


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.7.mlp.experts.3.w1.weight", 7),  # not the expert's 3
        ("visual.transformer.resblocks.11.attn.in_proj_weight", 11),
        ("encoder.block.5.layer.1.DenseReluDense.wi.weight", 5),
        ("h.4.attn.c_attn.weight", 4),
        ("4.weight", 4),
        ("model.embed_tokens.weight", None),
        ("conv1.weight", None),
        ("layer10.weight", None),
    ],
)
def test_the_coefficient_follows_the_first_number_in_the_name(name: str, number: int | None) -> None:
    """lambda_l = alpha + beta (l - 1) / (L - 1), l - 1 counted from 0; alpha outside the blocks."""
    values = full(8, 6)
    coefficient = 0.2 + 0.6 * (0 if number is None else number / 11)
    found = lines(block(values, name), blocks=12, beta=0.6, alpha=0.2)
    assert error(found, coefficient * sum(values)) < 1e-14  # type: ignore[arg-type]


def test_from_alpha_in_the_first_block_to_alpha_plus_beta_in_the_last() -> None:
    assert [depth(f"h.{i}.w", 5) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_alpha_is_one_over_the_tasks_for_a_sum_and_must_be_given_for_others() -> None:
    values = full(8, 6)
    assert error(lines(block(values), blocks=2, beta=0.5), sum(values) / 3) < 1e-14  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lines needs alpha for tsv-m"):
        lines(block(values), blocks=2, beta=0.5, inner="tsv-m")


def test_any_inner_method_at_scale_one() -> None:
    values = full(24, 16)
    found = lines(block(values, "h.2.w"), blocks=3, beta=0.5, alpha=0.3, inner="tsv_m")
    assert torch.allclose(found.dense(), 0.8 * tsv_m(block(values)).dense(), rtol=1e-12)
    found = lines(block(values, "h.2.w"), blocks=3, beta=0.0, alpha=0.4)
    assert torch.allclose(found.dense(), task_arithmetic(block(values), scale=0.4).dense(), rtol=1e-12)
    found = lines(block(values, "h.2.w"), blocks=3, beta=0.5, alpha=0.3, inner="average")
    assert error(found, 0.8 * sum(values) / 3) < 1e-12  # type: ignore[arg-type]


def test_what_cannot_be_is_refused() -> None:
    b = block(full(8, 6), "h.12.w")
    with pytest.raises(UsageError, match=r"deeper than the blocks counted \[tensor h.12.w\].* = 12, blocks = 12"):
        lines(b, blocks=12, beta=0.5)
    with pytest.raises(UsageError, match="blocks from 2 on"):
        lines(b, blocks=1, beta=0.5)
    with pytest.raises(UsageError, match="its own inner"):
        lines(b, blocks=13, beta=0.5, inner="lines")
    with pytest.raises(UsageError, match="Did you mean iso-c"):
        lines(b, blocks=13, beta=0.5, inner="iso-cc")
    with pytest.raises(UsageError, match="tsv-c needs task"):
        lines(b, blocks=13, beta=0.5, alpha=0.1, inner="tsv-c")


def test_its_memory_is_that_of_the_inner_method() -> None:
    method = registry.get("merge", "lines")
    inner = registry.get("merge", "tsv-m")
    needed = method.working_bytes((768, 768), 8, {"inner": "tsv-m"})
    assert needed == inner.working_bytes((768, 768), 8, {}) + 8 * 768 * 768
