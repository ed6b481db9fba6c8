"""Tied weights: an adapter that changes one of two tied names is refused; checkpoints change the one stored tensor."""

from __future__ import annotations

import pytest
import torch

import devec
from devec.core.errors import IncompatibleError
from devec.core.layout import Layout

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def adapter(name: str) -> devec.TaskVector:
    g = torch.Generator().manual_seed(1)
    delta = devec.LowRankDelta(torch.randn(12, 2, generator=g), torch.randn(2, 8, generator=g))
    return devec.TaskVector("style", {name: delta}, {name: Layout((12, 8))})


def tied() -> dict[str, torch.Tensor]:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    return {EMBED: weight, HEAD: weight}


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_an_adapter_on_either_of_two_tied_weights_is_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match="tied") as caught:
        devec.apply(tied(), adapter(name))
    assert EMBED in str(caught.value) and HEAD in str(caught.value) and "--exclude" in str(caught.value)


def test_untied_weights_change_alone() -> None:
    base = {n: t.clone() for n, t in tied().items()}
    out = devec.apply(base, adapter(EMBED)).state_dict()  # type: ignore[union-attr]
    assert torch.equal(out[HEAD], base[HEAD]) and not torch.equal(out[EMBED], base[EMBED])


def test_a_configuration_that_ties_is_believed() -> None:
    from devec.io.checkpoint import checkpoint_from_state_dict

    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    base = checkpoint_from_state_dict({EMBED: tied()[EMBED]}, config)
    with pytest.raises(IncompatibleError, match="tied"):
        devec.apply(base, adapter(EMBED))
    without_head = checkpoint_from_state_dict(
        {EMBED: tied()[EMBED]}, {**config, "architectures": ["LlamaForSequenceClassification"]}
    )
    devec.apply(without_head, adapter(EMBED))


def test_a_tied_checkpoint_moves_both_names_together() -> None:
    tuned = tied()[EMBED] + 1.0
    vector = devec.extract(tied(), {EMBED: tuned, HEAD: tuned})
    out = devec.apply(tied(), vector).state_dict()  # type: ignore[union-attr]
    torch.testing.assert_close(out[EMBED], tuned)
    torch.testing.assert_close(out[HEAD], tuned)
    assert list(vector.deltas) == [EMBED]
