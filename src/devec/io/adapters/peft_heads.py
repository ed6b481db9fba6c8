"""Whole tensors that ride along in a PEFT adapter: ``modules_to_save`` and trained biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from devec.core.errors import IncompatibleError, RefusedError

_PREFIX = "base_model.model."
_IMPLIED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft expects in the file for these task types, whether or not the configuration lists them."""


def saved_modules(
    heads: Mapping[str, Tensor], config: Mapping[str, object], targets: Sequence[str]
) -> tuple[list[str], dict[str, Tensor], bool]:
    """``modules_to_save``, the tensors under PEFT's keys, and whether some are lone trained biases.

    A module is named as the input adapter named it, where it did: peft wraps that module as a whole (a
    classification head of several layers is one module), and may imply its name from the task type.
    """
    listed = config.get("modules_to_save")
    known = [str(m) for m in listed] if isinstance(listed, (list, tuple)) else []
    known += _IMPLIED.get(str(config.get("task_type")), ())
    parameters: dict[str, set[str]] = {}
    for name in heads:
        module, _, parameter = name.rpartition(".")
        if not module:
            raise RefusedError(
                "a bare parameter cannot be saved beside a LoRA", tensor=name, remedy="Leave it out with --exclude."
            )
        parameters.setdefault(module, set()).add(parameter)
    saved: dict[str, None] = {}
    tensors: dict[str, Tensor] = {}
    trained_bias = False
    for name, value in heads.items():
        module, _, parameter = name.rpartition(".")
        owner = next((m for m in known if f".{m}." in f".{module}."), None)
        if owner is None and parameters[module] == {"bias"}:
            trained_bias = True
            inner = ".base_layer" if module in targets else ""  # peft moves a wrapped layer's own bias there
            tensors[f"{_PREFIX}{module}{inner}.{parameter}"] = value
            continue
        saved[owner or module] = None
        tensors[f"{_PREFIX}{name}"] = value
    for target in targets:
        clash = next((m for m in saved if f".{m}." in f".{target}."), None)
        if clash is not None:
            raise IncompatibleError(
                "a module has both a LoRA and a whole replacement, and peft would drop the LoRA",
                tensor=f"{target}.weight",
                values={"modules_to_save": clash},
                remedy="Leave one out: --exclude, or write no heads.",
            )
    return list(saved), tensors, trained_bias


def usable_task_type(task_type: object, saved: Sequence[str]) -> str | None:
    """The task type, unless peft would then look for a head that this adapter does not hold."""
    if not isinstance(task_type, str):
        return None
    implied = _IMPLIED.get(task_type)
    if implied is not None and not any(m.rpartition(".")[2] in implied for m in saved):
        return None
    return task_type
