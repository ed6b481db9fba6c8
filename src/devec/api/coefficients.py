"""Files of learned coefficients: written by ``learn``, read and checked by ``merge``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from devec.api.output import base_record
from devec.api.records import input_record
from devec.api.references import ViewLike, rename
from devec.api.trim import agreeing
from devec.core.coefficients import Coefficients, check_names
from devec.core.contracts import TensorSource
from devec.core.errors import IncompatibleError, InputError, UsageError
from devec.core.options import View
from devec.core.vectors import Pool, TaskVector
from devec.io.disk import write_file
from devec.io.folder import output_file
from devec.io.names import Selection, resolve_names
from devec.io.records import dump_json
from devec.methods.registry import Method

METHOD = "task-arithmetic"
"""The one method whose coefficients these are: ``W_0 + sum_t c_t Delta_t``."""


def save_coefficients(c: Coefficients, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write ``coefficients.json``, whole or not at all; the same coefficients, the same bytes."""
    path = Path(out)
    with output_file(path, overwrite=overwrite) as place:
        write_file(place, dump_json(c.to_dict()))
    return path


def read_coefficients(path: str | Path) -> Coefficients:
    """What :func:`save_coefficients` wrote. Raises InputError (exit 3) for anything else."""
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the coefficients: {error.strerror}", file=file) from None
    except ValueError as error:
        raise InputError(f"the coefficients are not JSON: {error}", file=file) from None
    return Coefficients.from_dict(data, str(file))


TRANSDUCTIVE = "Transductive: the coefficients of this merge were learned on the inputs of the test split."


def described(c: Coefficients) -> dict[str, Any]:
    """What the output of a merge says of its coefficients."""
    about = {k: c.learned[k] for k in ("objective", "split", "seed") if c.learned.get(k) is not None}
    digest = hashlib.sha256(dump_json(c.to_dict())).hexdigest()
    return {"sha256": digest, "grain": c.grain, "transductive": c.transductive, **about}


def records(pool: Pool, base: TensorSource) -> tuple[tuple[dict[str, object], ...], dict[str, object]]:
    """The vectors and the base as inputs, with hashes (which reads what was not read before)."""
    return tuple(input_record(v).to_dict() for v in pool), base_record(base).to_dict()


def view_of(view: ViewLike) -> dict[str, Any]:
    """How parts were read, as plain data."""
    return asdict(view) if isinstance(view, View) else dict(view or {})


def selection_of(selection: Selection | None) -> dict[str, list[str]]:
    chosen = selection or Selection()
    return {"include": list(chosen.include), "exclude": list(chosen.exclude)}


def weighted(
    c: Coefficients,
    method: Method,
    parameters: Mapping[str, Any],
    pool: Pool,
    base: TensorSource | None,
    view: ViewLike,
    selection: Selection | None,
) -> tuple[Pool, dict[str, Any]]:
    """The pool with each vector times its coefficients, and the parameters with which the method only sums.

    Raises UsageError for another method or parameters beside the coefficients, IncompatibleError (exit 4) where
    vectors, their order, hashes, the base, the parts' view or the selection are not those of learning.
    """
    if method.name != METHOD:
        raise UsageError(
            "learned coefficients belong to another method", values={"method": method.name, "theirs": METHOD},
            remedy=f"Use --method {METHOD}, or leave out the coefficients.",
        )
    if parameters:
        raise UsageError(
            "learned coefficients take the place of scale and weights", values=dict(parameters),
            remedy="Leave these parameters out.",
        )
    check_names(c.vectors, pool.names)
    check_reading("coefficients were learned", c.learned, view, selection)
    check_inputs("coefficients were learned", c.inputs, c.base, pool, base)
    pool = pool if base is None else spelt(pool, base)
    trim = c.learned.get("trim")
    return c.scaled(pool if trim is None else agreeing(pool, float(trim))), {"scale": 1.0}


def spelt(pool: Pool, base: TensorSource) -> Pool:
    """The vectors under the base's tensor names, which coefficients per layer or tensor go by."""
    available = [*base.names(), *base.ties]

    def one(v: TaskVector) -> TaskVector:
        names = {own: base.ties.get(n, n) for own, n in resolve_names(v.deltas, available).items()}
        return v if all(own == n for own, n in names.items()) else rename(v, names)

    return replace(pool, vectors=tuple(map(one, pool)))


def check_reading(what: str, then: Mapping[str, Any], view: ViewLike, selection: Selection | None) -> None:
    """Raises IncompatibleError where parts or tensors are not read as they were when ``what`` happened."""
    for text, key, now in (
        ("the parts were read another way", "view", view_of(view)),
        ("other tensors were selected", "selection", selection_of(selection)),
    ):
        before = then.get(key, now)
        if before != now:
            raise IncompatibleError(
                f"when the {what}, {text}", values={"then": before or "as stored", "now": now or "as stored"},
                remedy="Merge with the recipe that they were learned with.",
            )


def check_inputs(
    what: str, inputs: Sequence[Mapping[str, Any]], under: Mapping[str, Any] | None, pool: Pool,
    base: TensorSource | None,
) -> None:
    """Raises IncompatibleError where a vector or the base is not, by its hash, the one recorded."""
    named: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        (f"vector {v.name}", then, input_record(v).to_dict()) for v, then in zip(pool, inputs, strict=False)
    ]
    if base is not None and under is not None:
        named.append(("base", under, base_record(base).to_dict()))
    for who, then, now in named:
        if "sha256" in then and "sha256" in now and then["sha256"] != now["sha256"]:
            raise IncompatibleError(
                f"the {who} is not what the {what} on",
                values={"then": then.get("reference"), "now": now.get("reference")},
                remedy="Give the inputs of learning, or learn again.",
            )
