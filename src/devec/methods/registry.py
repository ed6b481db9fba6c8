"""Where methods are found. Registering leaves a function callable; its signature is the only schema.

Other packages add methods through the entry-point group ``devec.methods``: loading the entry imports a module that
calls :func:`register`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar, get_args, get_origin

from devec.core.contracts import Grain, Measure
from devec.core.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

Memory = Callable[[tuple[int, int], int, Mapping[str, Any]], int]
"""``memory((n, m), T, parameters)``: bytes that a method of whole matrices takes for one of T dense deltas, those
included that it holds at a time."""

BUILT_IN = (
    "devec.methods.decompose.shared_unique",
    "devec.methods.merge.average",
    "devec.methods.merge.breadcrumbs",
    "devec.methods.merge.consensus",
    "devec.methods.merge.dare",
    "devec.methods.merge.della",
    "devec.methods.merge.emr",
    "devec.methods.merge.fisher",
    "devec.methods.merge.iso_c",
    "devec.methods.merge.iso_cts",
    "devec.methods.merge.knots",
    "devec.methods.merge.lines",
    "devec.methods.merge.model_stock",
    "devec.methods.merge.pcb",
    "devec.methods.merge.regmean",
    "devec.methods.merge.slerp",
    "devec.methods.merge.star",
    "devec.methods.merge.tall_masks",
    "devec.methods.merge.task_arithmetic",
    "devec.methods.merge.ties",
    "devec.methods.merge.tsv_c",
    "devec.methods.merge.tsv_m",
    "devec.methods.merge.wudi",
)


@dataclass(frozen=True)
class Method:
    """A registered function and what the engine must know of it.

    ``grain``       smallest piece it may be given (elements, rows, matrix, tensor)
    ``needs``       statistics it wants in ``Block.stats``
    ``needs_base``  False if it also works on weights without a base (deltas against zero)
    ``keeps_rank``  True if factored deltas in give a factored delta out
    ``source``      where it was published
    ``measure``     a first pass over the whole (see ``core.contracts.Measure``), for methods that are given parts
    ``whole``       of what: each tensor, or the model. A parameter ``scope`` of the method comes before this
    ``looks``       how often it reads everything, by the parameters (float32 inputs): for plans
    ``per_task``    True if the result is one task's model of several, not one model for all
    ``memory``      what one whole matrix takes, where that is not a few copies of each delta
    """

    kind: str
    name: str
    call: Callable[..., Any]
    grain: Grain
    source: str
    needs: tuple[str, ...] = ()
    needs_base: bool = True
    keeps_rank: bool = False
    measure: Measure | None = None
    whole: Literal["tensor", "model"] = "tensor"
    looks: Callable[[Mapping[str, Any]], int] = lambda _: 0
    per_task: bool = False
    memory: Memory | None = None

    def measures_model(self, bound: Mapping[str, Any]) -> bool:
        """Whether the first pass, with these parameters, goes over the whole model."""
        return self.measure is not None and self.filled(bound).get("scope", self.whole) == "model"

    def grain_with(self, bound: Mapping[str, Any]) -> Grain:
        """The grain, which the parameter ``scope=row`` makes rows."""
        return "rows" if self.grain == "elements" and self.filled(bound).get("scope") == "row" else self.grain

    def filled(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter: what is bound, else its default."""
        return {**{name: p.default for name, p in self.parameters.items()}, **bound}

    def working_bytes(self, shape: tuple[int, int], tasks: int, parameters: Mapping[str, Any]) -> int:
        """Bytes that one ``n x m`` matrix of T deltas takes, if they are dense; factored ones take less."""
        if self.memory is not None:
            return self.memory(shape, tasks, parameters)
        return (tasks + 2) * shape[0] * shape[1] * 8  # the deltas, and two matrices of the method's own

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Everything after the block: name -> parameter, with its default and annotation."""
        items = list(inspect.signature(self.call).parameters.items())
        return dict(items[1:])

    def takes_list(self, name: str) -> bool:
        """Whether the parameter may have a value per vector."""
        hint = inspect.get_annotations(self.call, eval_str=True).get(name, Any)
        return any(get_origin(x) is list for x in (hint, *get_args(hint)))

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.call).split("\n", 1)[0] if inspect.getdoc(self.call) else ""  # type: ignore[union-attr]


_methods: dict[tuple[str, str], Method] = {}
_loaded = False


def register(
    kind: str,
    *,
    grain: Grain,
    source: str,
    name: str | None = None,
    needs: tuple[str, ...] = (),
    needs_base: bool = True,
    keeps_rank: bool = False,
    measure: Measure | None = None,
    whole: Literal["tensor", "model"] = "tensor",
    looks: Callable[[Mapping[str, Any]], int] = lambda _: 0,
    per_task: bool = False,
    memory: Memory | None = None,
) -> Callable[[F], F]:
    """Decorator: enter a function under ``(kind, name)``. A name taken by another function is an error."""

    def enter(function: F) -> F:
        key = (kind, name or function.__name__.replace("_", "-"))
        taken = _methods.get(key)
        if taken is not None and taken.call.__module__ != function.__module__:
            raise ValueError(f"method {key} is defined in {taken.call.__module__} and {function.__module__}")
        _methods[key] = Method(
            kind, key[1], function, grain, source, needs, needs_base, keeps_rank, measure, whole, looks, per_task,
            memory,
        )
        return function

    return enter


def load() -> None:
    """Import the built-in methods and those of other packages, once."""
    global _loaded
    if _loaded:
        return
    for module in BUILT_IN:
        import_module(module)
    for entry in entry_points(group="devec.methods"):
        entry.load()
    _loaded = True


def all_methods(kind: str | None = None) -> list[Method]:
    load()
    return sorted((m for m in _methods.values() if kind in (None, m.kind)), key=lambda m: (m.kind, m.name))


def get(kind: str, name: str) -> Method:
    from difflib import get_close_matches

    load()
    wanted = name.replace("_", "-")
    if (kind, wanted) in _methods:
        return _methods[kind, wanted]
    known = [m.name for m in all_methods(kind)]
    near = get_close_matches(wanted, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There is: {', '.join(known)}."
    raise UsageError(f"no {kind} method is called {name!r}", remedy=hint)


def bind(method: Method, values: dict[str, Any]) -> dict[str, Any]:
    """Check ``key=value`` parameters against the signature and convert strings to the annotated type."""
    bound: dict[str, Any] = {}
    for key, value in values.items():
        parameter = parameter_of(method, key)
        bound[parameter.name] = convert(method, parameter, value)
    missing = [
        p.name for p in method.parameters.values() if p.default is inspect.Parameter.empty and p.name not in bound
    ]
    if missing:
        raise UsageError(f"{method.name} needs {', '.join(missing)}", remedy="Give it with --set KEY=VALUE.")
    return bound


def parameter_of(method: Method, key: str) -> inspect.Parameter:
    """The parameter called ``key``. Raises UsageError, with the nearest name there is."""
    from difflib import get_close_matches

    parameter = method.parameters.get(key.replace("-", "_"))
    if parameter is None:
        near = get_close_matches(key, list(method.parameters), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It takes: {', '.join(method.parameters) or 'nothing'}."
        raise UsageError(f"{method.name} has no parameter {key!r}", remedy=hint)
    return parameter


def convert(method: Method, parameter: inspect.Parameter, value: Any) -> Any:
    """``value`` as the type that the parameter is annotated with. Raises UsageError if it does not fit."""
    from pydantic import TypeAdapter, ValidationError

    hints = inspect.get_annotations(method.call, eval_str=True)
    wanted = hints.get(parameter.name, Any)
    if isinstance(value, str) and wanted is not str and "," in value:
        value = [item.strip() for item in value.split(",")]
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(f"{method.name}: {parameter.name}={value!r} does not fit: {reason}") from None
