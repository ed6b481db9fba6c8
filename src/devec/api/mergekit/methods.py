"""Which methods and parameters of mergekit are carried over, and to what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()


def number(value: Any) -> float:
    if isinstance(value, bool):
        return float(value)
    return float(value)


def flag(value: Any) -> bool:
    words = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    return words[value.lower() if isinstance(value, str) else value]


@dataclass(frozen=True)
class Parameter:
    """One of mergekit's parameters: its name here (``None``: it changes no number), and what its values become.

    ``each``  every model has its own
    ``idle``  mergekit takes it for this method and does nothing with it, which is worth saying
    """

    ours: str | None
    default: Any = REQUIRED
    to: Callable[[Any], Any] = number
    each: bool = False
    idle: bool = False


@dataclass(frozen=True)
class Reading:
    """How a method of mergekit is called here. ``base``: its base model is what changes are taken against."""

    method: str
    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True


WEIGHT = Parameter("weights", each=True)
NOTHING = {"int8_mask": Parameter(None, False, flag)}


def reduce(normalize: bool) -> Parameter:
    return Parameter("reduce", normalize, lambda value: "mean" if flag(value) else "sum")


def sums(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    """What all methods that add changes have in common, with their defaults."""
    return {
        "weight": WEIGHT,
        "lambda": Parameter("scale", 1.0),
        "normalize": reduce(normalize),
        "rescale": Parameter("rescale", rescale, lambda value: "l1" if flag(value) else "none"),
        **NOTHING,
        **more,
    }


def each(ours: str, default: float, to: Callable[[Any], Any] = number) -> Parameter:
    return Parameter(ours, default, to, each=True)


KEPT, DROPPED = each("density", 1.0), each("p", 1.0, lambda value: 1.0 - number(value))
MIDDLE = {"density": each("beta", 1.0), "gamma": each("gamma", 0.01)}
LIKELY = {"density": KEPT, "epsilon": each("epsilon", 0.15)}
ADD, ELECT = {"then": "task-arithmetic"}, {"then": "ties"}
METHODS: Mapping[str, Reading] = {
    "linear": Reading("average", {"weight": WEIGHT, "normalize": reduce(True)}, base=False),
    "slerp": Reading("slerp", {"t": Parameter("t")}, base=False),
    "task_arithmetic": Reading("task-arithmetic", {
        **sums(False, False), "rescale": Parameter(None, False, flag, idle=True),
        "density": Parameter(None, 1.0, number, each=True, idle=True),
    }),
    "ties": Reading("ties", sums(True, False, density=KEPT), {"zero": "plus"}),
    "dare_linear": Reading("dare", sums(False, True, density=DROPPED), ADD),
    "dare_ties": Reading("dare", sums(False, True, density=DROPPED), ELECT),
    "breadcrumbs": Reading("breadcrumbs", sums(False, False, **MIDDLE), {**ADD, "scope": "tensor"}),
    "breadcrumbs_ties": Reading("breadcrumbs", sums(False, False, **MIDDLE), {**ELECT, "scope": "tensor"}),
    "della": Reading("della", sums(True, True, **LIKELY), ELECT),
    "della_linear": Reading("della", sums(False, True, **LIKELY), ADD),
    "model_stock": Reading("model-stock", {
        "filter_wise": Parameter("scope", False, lambda value: "row" if flag(value) else "tensor"),
    }),
}  # fmt: skip
