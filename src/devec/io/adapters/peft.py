"""PEFT LoRA, read exactly (the format of ``huggingface/peft``'s ``save_pretrained``).

=========================================  ==============================================================
tensor in the file                         what it is here
=========================================  ==============================================================
``M.lora_A.weight``, ``M.lora_B.weight``   ``M.weight``: ``s B A``, ``s = alpha/r`` or ``alpha/sqrt(r)``
``M.lora_embedding_A``, ``..._B``          ``M.weight``: ``s (B A)^T``, rows are the vocabulary
``M.lora_magnitude_vector``                DoRA (arXiv:2402.09353, Eq. 5): ``W' = m (W + s B A) / ||W + s B A||``
``M.lora_B.bias``                          ``M.bias``: ``s b``
``M.base_layer.weight``                    a copy of the base's own weight: checked against a given base
anything else                              a head: a whole tensor that replaces the base's
=========================================  ==============================================================

Names lose ``base_model.model.`` and the adapter's own name (``.default``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from devec.core.delta import Delta, DenseDelta
from devec.core.errors import IncompatibleError, InputError, RefusedError
from devec.core.layout import Layout
from devec.core.vectors import LazyMap, Origin, TaskVector
from devec.io.adapters.factors import Fit, check_rank, product, read_finite
from devec.io.adapters.peft_config import PeftConfig
from devec.io.checkpoint import CONV1D_WEIGHT, Checkpoint
from devec.io.dialect import CONFIG_FILE, TensorFile
from devec.io.shard_index import read_json

_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<rest>(\.[^.]+)*)$"
)
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.|$)")


@dataclass
class _Module:
    """The file's names of one module's parts; ``copy`` is the base's own weight, saved beside its LoRA."""

    parts: dict[str, str] = field(default_factory=dict)
    bias: str | None = None
    copy: str | None = None


def read_peft(
    file: TensorFile, *, name: str, reference: str, base: Checkpoint | None, dtype: torch.dtype
) -> TaskVector:
    """The task vector of one PEFT LoRA file, whose ``adapter_config.json`` lies beside it."""
    path = file.path.parent / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"no {CONFIG_FILE} beside the adapter, so its scale (alpha / r) is unknown",
            file=file.path,
            remedy="Give the adapter's whole folder.",
        )
    config = PeftConfig(read_json(path), path)
    modules, heads = _group(file)
    reader = _Reader(file, config, modules, dtype)
    reader.read(base)
    return TaskVector(
        name=name,
        deltas=LazyMap(list(reader.makers), lambda n: reader.makers[n]()),
        layouts=reader.layouts,
        heads={canonical: read_finite(file, key) for canonical, key in heads.items()},
        origin=Origin(
            reference=reference,
            file=str(file.path),
            dialect="peft",
            base_name=config.base_name,
            base_fingerprint=base.fingerprint() if base is not None and reader.needs_base else None,
            config=config.raw,
        ),
        partial=True,
    )


def _strip(key: str) -> str:
    return key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.") else key


def _group(file: TensorFile) -> tuple[dict[str, _Module], dict[str, str]]:
    """Parts by module, and heads by canonical name."""
    modules: dict[str, _Module] = {}
    heads: dict[str, str] = {}
    adapters: set[str] = set()
    for key in file.names():
        stripped = _strip(key)
        match = _PART.match(stripped)
        if match is None:
            if re.search(r"(^|\.)lora_", stripped):
                raise IncompatibleError("a LoRA tensor of an unknown kind", tensor=key, file=file.path)
            canonical = _SAVED.sub("", stripped).replace(".base_layer.bias", ".bias")
            if canonical in heads:
                raise IncompatibleError(
                    "two tensors of the adapter replace the same one", tensor=key, values={"also": heads[canonical]},
                    file=file.path,
                )  # fmt: skip
            heads[canonical] = key
            continue
        rest = [piece for piece in match["rest"].split(".") if piece]
        kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
        if len(rest) > 1 or (kind == "bias" and match["part"] != "lora_B"):
            raise IncompatibleError("a LoRA tensor of an unknown kind", tensor=key, file=file.path)
        adapters.update(rest)
        module = modules.setdefault(match["module"], _Module())
        if kind == "bias":
            module.bias = key
        elif match["part"] in module.parts:
            raise IncompatibleError("the same LoRA factor appears twice", tensor=key, file=file.path)
        else:
            module.parts[match["part"]] = key
    for path, found in modules.items():
        found.copy = heads.pop(f"{path}.base_layer.weight", None)
    if len(adapters) > 1:
        raise IncompatibleError(
            "the file holds several adapters", values={"adapters": ", ".join(sorted(adapters))}, file=file.path,
            remedy="Save each adapter by itself.",
        )  # fmt: skip
    if not modules:
        raise IncompatibleError("the file holds no LoRA factors", values={"tensors": len(heads)}, file=file.path)
    return modules, heads


class _Reader:
    """Deltas of every module: cheap ones made now, DoRA's dense ones each time they are asked for."""

    def __init__(self, file: TensorFile, config: PeftConfig, modules: dict[str, _Module], dtype: torch.dtype) -> None:
        self.file, self.config, self.modules, self.dtype = file, config, modules, dtype
        self.makers: dict[str, Callable[[], Delta]] = {}
        self.layouts: dict[str, Layout] = {}
        self.needs_base = False

    def read(self, base: Checkpoint | None) -> None:
        names = {module: self._weight_name(module) for module in self.modules}
        biases = {m: re.sub(r"weight$", "bias", names[m]) for m, p in self.modules.items() if p.bias is not None}
        wanted = [*names.values(), *biases.values()]
        if len(set(wanted)) < len(wanted):
            twice = next(n for n in wanted if wanted.count(n) > 1)
            raise IncompatibleError("two modules of the adapter are the same tensor", tensor=twice, file=self.file.path)
        fit = Fit(base, wanted, self.file.path)
        for module, parts in self.modules.items():
            self._read_module(module, names[module], parts, fit)
            if parts.bias is not None:
                self._read_bias(biases[module], parts.bias, self.config.scale(module), fit)

    def _weight_name(self, module: str) -> str:
        if module.endswith(".base_layer.out_proj"):
            raise RefusedError(
                "LoRA on torch's MultiheadAttention is not read: peft applies its out_proj delta twice",
                tensor=self.modules[module].parts.get("lora_B"),
                file=self.file.path,
                remedy="Merge it into its base with peft, and extract the difference.",
            )
        return f"{module.replace('.base_layer.', '.')}.weight"

    def _read_module(self, module: str, name: str, parts: _Module, fit: Fit) -> None:
        embedding = "lora_embedding_A" in parts.parts or "lora_embedding_B" in parts.parts
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for part, other in ((a, b), (b, a)):
            if part not in parts.parts:
                raise IncompatibleError(
                    f"{module} has {other if other in parts.parts else 'a magnitude'} but no {part}",
                    tensor=next(iter(parts.parts.values()), name),
                    file=self.file.path,
                    remedy="The adapter is incomplete; get it again.",
                )
        if set(parts.parts) - {a, b, "lora_magnitude_vector"}:
            raise IncompatibleError("a module is both embedding and linear", tensor=parts.parts[a], file=self.file.path)
        key_a, key_b = parts.parts[a], parts.parts[b]
        info_a, info_b = check_rank(self.file, key_a, key_b, self.config.rank(module))
        A, B = (read_finite(self.file, key, self.dtype) for key in (key_a, key_b))
        delta = product(A, B, self.config.scale(module))
        if embedding:
            # stored (vocabulary, width) is the transpose of B A; the scale moves with the factor that B becomes
            delta = delta.transpose()
            guess = Layout((info_a.shape[1], info_b.shape[0]))
        elif len(info_a.shape) > 2:
            guess = Layout((info_b.shape[0], *info_a.shape[1:]))
        else:
            out, width = info_b.shape[0], info_a.shape[1]
            transposed = self.config.fan_in_fan_out and self._may_be_conv1d(name)
            guess = Layout((width, out) if transposed else (out, width), transposed=transposed)
        self.layouts[name] = replace(fit.layout(name, guess), embedding=embedding)
        if parts.copy is not None and fit.base is not None:
            self._check_copy(name, parts.copy, fit)
        magnitude = parts.parts.get("lora_magnitude_vector")
        if magnitude is None and not self.config.use_dora:
            self.makers[name] = lambda: delta
            return
        if magnitude is None:
            raise IncompatibleError(
                "a DoRA adapter lacks a module's magnitude", tensor=key_b, file=self.file.path,
                remedy="The adapter is incomplete; get it again.",
            )  # fmt: skip
        if fit.base is None:
            raise RefusedError(
                "a DoRA adapter's delta depends on its base (W' = m (W + s B A) / ||W + s B A||)",
                tensor=magnitude,
                file=self.file.path,
                remedy="Give the base with --base.",
            )
        self.needs_base = True
        file, layout = self.file, self.layouts[name]
        m = read_finite(self.file, magnitude, self.dtype).reshape(-1)
        wide = layout.matrix_shape[1 if embedding else 0]
        if m.numel() != wide:
            raise IncompatibleError(
                "DoRA's magnitude does not fit the module", tensor=magnitude,
                values={"magnitudes": m.numel(), "wanted": wide}, file=self.file.path,
            )  # fmt: skip

        def make() -> Delta:
            weight = layout.to_matrix(fit.weight(name)).to(self.dtype)
            changed = _dora(weight, delta.dense(), m, embedding)
            if not bool(torch.isfinite(changed).all()):
                raise InputError(
                    "DoRA divides by the norm of a direction that is zero or not finite", tensor=name, file=file.path
                )
            return DenseDelta(changed)

        self.makers[name] = make

    def _check_copy(self, name: str, key: str, fit: Fit) -> None:
        copy, own = self.file.get(key), fit.weight(name)
        if copy.shape != own.shape or not (
            torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(own.dtype), own)
        ):
            raise IncompatibleError(
                "the adapter carries a copy of its base's weight, and the given base has another",
                tensor=key,
                values={"adapter": tuple(copy.shape), "base": tuple(own.shape)},
                file=self.file.path,
                remedy="Give the base that the adapter was trained on.",
            )

    def _may_be_conv1d(self, name: str) -> bool:
        """``fan_in_fan_out`` is one flag for a whole adapter; a linear head among Conv1D modules is not transposed."""
        return CONV1D_WEIGHT.search(name) is not None or not any(
            CONV1D_WEIGHT.search(f"{m}.weight") for m in self.modules
        )

    def _read_bias(self, name: str, key: str, scale: float, fit: Fit) -> None:
        value = read_finite(self.file, key, self.dtype) * scale
        self.layouts[name] = fit.layout(name, Layout(tuple(value.shape)))
        delta = DenseDelta(value.reshape(-1, 1))
        self.makers[name] = lambda: delta


def _dora(weight: Tensor, update: Tensor, magnitude: Tensor, embedding: bool) -> Tensor:
    """``W' - W`` with ``W' = m (W + D) / ||W + D||``; the norm runs over the inputs of each output.

    For an embedding (rows are tokens) the outputs are the columns.
    """
    changed = weight + update
    side = 0 if embedding else 1
    norm: Tensor = torch.linalg.vector_norm(changed, dim=side)
    rescaled: Tensor = changed * (magnitude / norm).unsqueeze(side)
    return rescaled - weight
