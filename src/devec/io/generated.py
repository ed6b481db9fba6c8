"""A generated source for tests and benchmarks: seeded signal plus noise of any shape, made tensor by tensor, full rank
(never zeros, never sparse files).

Every number follows from (seed, model name, tensor name) and the parameters, whatever was made before and on whichever
thread (:mod:`devec.io.planted` says how that is both cheap and exact).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devec.core.contracts import TensorInfo
from devec.core.errors import InputError, UsageError
from devec.io.planted import RIGHT_SCALE, Factor, Noise, Signal, left_scale

_CHUNK = 1 << 18
"""Elements of each of the two float32 buffers that a call needs beside its result."""

_LEAST = 4.0
"""Standard deviation that the weakest left column must keep, so that rounding leaves it a direction of its own."""


@dataclass(frozen=True)
class Change:
    """What fine-tuning adds to each matrix: ``rank`` planted directions and white noise.

    ``noise``     standard deviation of the white noise, in units of the base's
    ``strength``  largest planted singular value, in units of the noise's largest, ``sigma (sqrt(n) + sqrt(m))``
    ``decay``     planted singular values are ``strength j^-decay``; the columns are random, so this holds to about
                  ``sqrt(rank / min(n, m))`` relative
    ``shared``    so many of the directions, spread evenly from the strongest on, are the same (left and right) in all
                  models whose change has the same ``group`` and ``shared``

    The rank is cut at the matrix's own. Raises UsageError for parameters out of range.
    """

    rank: int = 16
    decay: float = 0.5
    strength: float = 16.0
    noise: float = 0.01
    shared: int = 0
    group: str = "common"

    def __post_init__(self) -> None:
        if not 0 <= self.shared <= self.rank:
            raise UsageError(
                "a change shares between none and all of its directions",
                values={"shared": self.shared, "rank": self.rank},
            )
        if self.noise <= 0.0 or self.strength <= 0.0 or self.decay < 0.0:
            raise UsageError(
                "a change needs noise and strength above 0 and a decay of at least 0",
                values={"noise": self.noise, "strength": self.strength, "decay": self.decay},
            )
        if self.rank and left_scale(self.rank, self.decay) * self.rank**-self.decay < _LEAST:
            raise UsageError(
                "so steep a signal of this rank cannot be made exactly",
                values={"rank": self.rank, "decay": self.decay}, remedy="Lower one of them.",
            )

    def common(self, rank: int) -> list[int]:
        """Columns of a signal of ``rank`` directions that the group shares."""
        count = min(self.shared, rank)
        return [k * (rank // count) for k in range(count)]


class GeneratedModel:
    """A model of given shapes whose tensors are made when they are asked for; a ``core.contracts.TensorSource``.

    ``shapes``  tensor name -> shape, in the order of :meth:`names`
    ``std``     standard deviation of matrices; 1-D tensors (norms) have mean 1 and the same deviation
    ``dtype``   what the numbers are rounded to (to nearest); ``config`` says so where it has a ``torch_dtype``

    A base holds white noise ``N(0, std^2)``, cut at five standard deviations. :meth:`fine_tune` gives models whose
    tensors are ``round(base + change)``: the change that a reader finds carries the planted directions, white noise and
    rounding, and has full numerical rank. 1-D tensors change by white noise of ``std``.

    Guarantees: the same bytes for the same parameters, whatever was made before, on any thread, in any split of the
    rows. Memory of a call: its result, two buffers of 1 MB (of a row in float32 where that is more), two right factors
    (``rank`` rows in float32), and 8 MB of pools that stay, for each of the last four seeds.
    """

    folder: Path | None = None

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        name: str = "base",
        seed: int = 0,
        std: float = 0.02,
        dtype: torch.dtype = torch.bfloat16,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise UsageError("a generated model holds floats of 16 bits or more", values={"dtype": dtype})
        self.name, self.seed, self.std, self.dtype = name, seed, std, dtype
        self.config = None if config is None else dict(config)
        if self.config is not None and "torch_dtype" in self.config:
            self.config["torch_dtype"] = str(dtype).removeprefix("torch.")
        self._shapes = {n: tuple(shape) for n, shape in shapes.items()}
        self.ties: Mapping[str, str] = {}
        self._base: GeneratedModel | None = None
        self._change = Change()

    def fine_tune(self, name: str, change: Change | None = None) -> GeneratedModel:
        """A model of the same shapes: this one plus a change that is ``name``'s own, rounded to the same dtype.

        Raises UsageError for a name that a model below bears already: its noise would come twice.
        """
        if name in [model.name for model in self._lineage()]:
            raise UsageError("a fine-tune needs a name of its own", values={"name": name, "base": self.name})
        tuned = GeneratedModel(
            self._shapes, name=name, seed=self.seed, std=self.std, dtype=self.dtype, config=self.config
        )
        tuned._base, tuned._change = self, change or Change()
        return tuned

    @property
    def reference(self) -> str:
        return f"generated:{self.name}"

    def names(self) -> list[str]:
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._shape(name), self.dtype)

    def file_of(self, name: str) -> str:
        self._shape(name)
        return self.reference

    def get(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        shape = self._shape(name)
        return self._made(name, 0, shape[0] if shape else 1).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """``get(name)[start:stop]``, made without the rest. Raises ValueError for rows that the tensor lacks."""
        shape = self._shape(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{name} of shape {shape} has no rows [{start}, {stop})")
        return self._made(name, start, stop).reshape(stop - start, *shape[1:])

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise InputError("no such tensor", tensor=name, file=self.reference) from None

    def _made(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as a matrix in the output dtype, made in chunks that a core's own cache holds.

        Only single multiplications and additions: a fused one rounds once instead of twice, and whether torch fuses
        depends on where in a buffer an element lies.
        """
        shape = self._shape(name)
        width, vector = prod(shape[1:]), len(shape) <= 1
        out = torch.empty(stop - start, width, dtype=self.dtype)
        if not out.numel():
            return out
        layers = [model._layer(name, start, stop) for model in self._lineage()]
        step = max(_CHUNK // width, 1)
        total, term = (torch.empty(min(step, stop - start), width) for _ in range(2))
        for at in range(start, stop, step):
            end = min(at + step, stop)
            rounded, here, now = (x[: end - at] for x in (out[at - start :], total, term))
            for k, (noise, scale, signal) in enumerate(layers):
                noise.fill(now.view(-1), at * width)
                now.mul_(scale)
                if k:
                    here.copy_(rounded).add_(now)
                else:
                    torch.add(now, 1.0 if vector else 0.0, out=here)
                if signal is not None:
                    here.add_(signal.rows(at, end, now))
                rounded.copy_(here)
        return out

    def _lineage(self) -> list[GeneratedModel]:
        return [self] if self._base is None else [*self._base._lineage(), self]

    def _layer(self, name: str, start: int, stop: int) -> tuple[Noise, float, Signal | None]:
        """What this model adds to the one below it: noise, its standard deviation, and planted directions."""
        shape, change = self._shape(name), self._change
        width, own = prod(shape[1:]), (self.seed, self.name, name)
        noise = Noise((*own, "noise"), start * width, stop * width)
        if self._base is None or len(shape) <= 1:
            return noise, self.std, None
        sigma, n, m = self.std * change.noise, shape[0], width
        rank = min(change.rank, n, m)
        if not rank:
            return noise, sigma, None
        group = (self.seed, "group of models", change.group, change.shared, name)
        scales = [left_scale(rank, change.decay) * j**-change.decay for j in range(1, rank + 1)]
        left = Factor((*own, "left"), (*group, "left"), scales, change.common(rank))
        right = Factor((*own, "right"), (*group, "right"), [RIGHT_SCALE] * rank, change.common(rank))
        largest = change.strength * sigma * (sqrt(n) + sqrt(m))
        unit = largest / (scales[0] * RIGHT_SCALE * sqrt(n) * sqrt(m))
        return noise, sigma, Signal(left, right.rows(0, m).T.contiguous(), unit)


def llama_shapes(
    hidden: int, intermediate: int, layers: int, vocab: int, heads: int, kv_heads: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Tensor names and shapes of a Llama model with untied embeddings, and the ``config.json`` that fits them.

    The names, orders and keys are those of transformers' ``LlamaForCausalLM``, so that a folder with both loads there.
    Raises UsageError where ``heads`` do not divide ``hidden`` into even parts or ``kv_heads`` do not divide ``heads``.
    """
    if hidden % heads or heads % kv_heads or (hidden // heads) % 2:
        raise UsageError(
            "heads must divide the hidden size into even parts, and kv_heads the heads",
            values={"hidden": hidden, "heads": heads, "kv_heads": kv_heads},
        )
    narrow = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (narrow, hidden),
            f"{at}.self_attn.v_proj.weight": (narrow, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{at}.mlp.up_proj.weight": (intermediate, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, intermediate),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }
    return shapes, config
