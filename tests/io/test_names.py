"""Selections, name resolution and the rows of fused projections."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from devec.core.errors import IncompatibleError, UsageError
from devec.io.names import PREFIXES, Selection, did_you_mean, qkv_split, resolve_names


def test_selection() -> None:
    names = ["a.weight", "a.bias", "head.weight"]
    assert Selection().of(names) == names
    assert Selection(include=("weight$",)).of(names) == ["a.weight", "head.weight"]
    assert Selection(include=("weight$", "^a"), exclude=("^head",)).of(names) == ["a.weight", "a.bias"]
    with pytest.raises(UsageError, match=r"--exclude '\('"):
        Selection(exclude=("(",))


WANTED = ["h.0.c_attn.weight", "h.1.c_attn.weight"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_prefix_put_on_or_taken_away(prefix: str) -> None:
    longer = [prefix + n for n in WANTED]
    assert resolve_names(WANTED, [*longer, "other"]) == dict(zip(WANTED, longer, strict=True))
    assert resolve_names(longer, [*WANTED, "other"]) == dict(zip(longer, WANTED, strict=True))


def test_a_prefix_exchanged_and_names_that_fit_as_they_are() -> None:
    wanted = ["model.layers.0.q_proj.weight"]
    assert resolve_names(wanted, ["model.language_model.layers.0.q_proj.weight"]) == {
        wanted[0]: "model.language_model.layers.0.q_proj.weight"
    }
    assert resolve_names(wanted, [*wanted, "layers.0.q_proj.weight"]) == {wanted[0]: wanted[0]}
    assert resolve_names([], ["x"]) == {}


def test_a_renaming_must_explain_every_name() -> None:
    with pytest.raises(IncompatibleError, match=r"1 of 2 .*h\.1\.c_attn.*nearest = .*h\.0\.c_attn.*architecture"):
        resolve_names(WANTED, ["transformer.h.0.c_attn.weight", "h.1.c_fc.weight"])
    with pytest.raises(IncompatibleError, match=r"2 of 2 .*none is near"):
        resolve_names(WANTED, ["zzzz"])


def test_two_renamings_that_fit_are_ambiguous() -> None:
    with pytest.raises(IncompatibleError, match=r"more than one way.*candidates = .*transformer\.h\.0"):
        resolve_names(WANTED, [p + n for p in ("transformer.", "bert.") for n in WANTED])


def test_did_you_mean() -> None:
    assert did_you_mean("avrage", ["average", "ties"]) == "Did you mean average?"
    assert did_you_mean("zzz", ["average"]) is None


GQA = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


@pytest.mark.parametrize(
    ("name", "rows", "config", "sizes"),
    [
        ("transformer.h.0.attn.c_attn.weight", 12, {"model_type": "gpt2", "n_head": 2, "n_embd": 4}, (4, 4, 4)),
        ("transformer.h.0.attn.c_attn.bias", 12, None, (4, 4, 4)),
        ("h.0.attn.c_attn.weight", 10, {"n_head": 3, "n_embd": 6, "multi_query": True}, (6, 2, 2)),
        ("blocks.0.attn.qkv.weight", 9, None, (3, 3, 3)),
        ("layers.0.self_attn.qkv_proj.weight", 64, GQA, (32, 16, 16)),
        ("layers.0.self_attn.qkv_proj.weight", 48, {**GQA, "head_dim": 6}, (24, 12, 12)),
        ("attn.in_proj_weight", 24, None, (8, 8, 8)),
        ("attn.in_proj_bias", 24, {}, (8, 8, 8)),
        ("layers.0.attn.Wqkv.weight", 24, {"num_attention_heads": 2, "hidden_size": 8}, (8,) * 3),
        ("encoder.query_key_value.weight", 48, {"multi_query_attention": True, "num_attention_heads": 4, "head_dim": 8,
                                                "multi_query_group_num": 1}, (32, 8, 8)),
        # a vision tower whose heads the text configuration does not describe
        ("visual.blocks.0.qkv.weight", 30, {"num_attention_heads": 4, "hidden_size": 32}, (10, 10, 10)),
    ],
)  # fmt: skip
def test_rows_of_the_parts(name: str, rows: int, config: dict[str, Any] | None, sizes: tuple[int, ...]) -> None:
    parts = qkv_split(name, (rows, 5), config)
    assert parts is not None
    assert [p for p, _, _ in parts] == ["q", "k", "v"]
    assert tuple(stop - start for _, start, stop in parts) == sizes
    assert parts[0][1] == 0 and parts[-1][2] == rows
    assert all(a[2] == b[1] for a, b in pairwise(parts))


def test_cross_attention_of_gpt2_holds_two_parts() -> None:
    assert qkv_split("h.0.crossattention.c_attn.weight", (8, 4), None) == [("k", 0, 4), ("v", 4, 8)]


@pytest.mark.parametrize(
    "name",
    ["q_proj.weight", "c_proj.weight", "my_qkvs.weight", "qkv.lora", "mixer.in_proj.weight", "attn.c_attn_norm.weight"],
)
def test_what_is_not_fused(name: str) -> None:
    assert qkv_split(name, (12, 4), None) is None


@pytest.mark.parametrize("model", ["gpt_neox", "bloom", "falcon", "chatglm", ""])
def test_interleaved_heads_are_refused(model: str) -> None:
    with pytest.raises(UsageError, match=r"interleaved by head.*query_key_value"):
        qkv_split("h.0.query_key_value.weight", (12, 4), {"model_type": model})


def test_sizes_that_do_not_add_up() -> None:
    with pytest.raises(IncompatibleError, match=r"rows = 60, query \+ 2 x key rows = 64"):
        qkv_split("l.qkv_proj.weight", (60, 4), GQA)
    with pytest.raises(IncompatibleError, match="do not divide into 3"):
        qkv_split("l.qkv.weight", (10, 4), None)
