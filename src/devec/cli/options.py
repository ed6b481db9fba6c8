"""Options that several commands share, defined once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "float64", "bfloat16", "float16")


class Threshold(click.ParamType):  # type: ignore[type-arg]
    """A number from 0 to 1, or ``chance``."""

    name = "number|chance"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "chance" or isinstance(value, float):
            return value
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'chance'.", param, ctx)
        if not 0.0 <= number <= 1.0:
            self.fail(f"{value} is not between 0 and 1.", param, ctx)
        return number


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes with a unit: 5GB, 500MB, 1GiB."""

    name = "size"
    units: ClassVar = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        import re
        from fractions import Fraction

        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)\s*", str(value))
        unit = self.units.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            self.fail(f"{value!r} is not a size like 5GB or 500MB.", param, ctx)
        size = int(Fraction(match.group(1)) * unit)
        if size < 1:
            self.fail("a size is at least one byte.", param, ctx)
        return size


class ShardOf(click.ParamType):  # type: ignore[type-arg]
    """Part I of N, counted from 1: 2/4."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        one, sign, of = str(value).partition("/")
        if not sign or not one.isdecimal() or not of.isdecimal() or not 1 <= int(one) <= int(of):
            self.fail(f"{value!r} is no part like 2/4.", param, ctx)
        return int(one), int(of)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated numbers: 1,0.5,0.5."""

    name = "W,W,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return [float(x) for x in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 1,0.5.", param, ctx)


def _all(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


def _and_downloads(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:
    """Bars of downloads are shown where the command's own are: on a terminal, and not with --quiet."""
    import sys

    from devec.io import hub

    hub.bars = not quiet and sys.stderr.isatty()
    return quiet


def printing() -> Callable[[F], F]:
    """--json, -q, -v: what is printed."""
    return _all(
        click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout, and nothing else there."),
        click.option("-q", "--quiet", is_flag=True, callback=_and_downloads,
                     help="No progress, no tables; warnings and errors only."),
        click.option("-v", "--verbose", is_flag=True, help="One row per tensor."),
    )  # fmt: skip


def selecting() -> Callable[[F], F]:
    """--include, --exclude: which tensors."""
    return _all(
        click.option("--include", multiple=True, metavar="REGEX", help="Only tensors whose name matches (repeatable)."),
        click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out tensors that match (repeatable)."),
    )


def fixing(rank: str = "--rank") -> Callable[[F], F]:
    """Choices fixed when decomposing. ``mix`` calls the rank rule --decompose-rank: its --rank is the output's."""
    return _all(
        click.option("--side", type=click.Choice(["left", "right", "both"]), default=None,
                     help="Column space (left, default), row space (right), or both."),
        click.option(rank, "rank_rule", metavar="RULE", default=None,
                     help="auto (default) | none | N | energy=F | nuclear=F | noise | mp; per tensor and vector."),
        click.option("--exact", is_flag=True, help="No iterative factorisation of dense tensors."),
        click.option("--split-qkv", is_flag=True, help="Decompose query, key and value rows of fused tensors apart."),
        click.option("--one-d", is_flag=True, help="Decompose 1-D parameters too (biases, norms)."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of iterative factorisations."),
        click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True,
                     help="Compute in this dtype."),
    )  # fmt: skip


def running() -> Callable[[F], F]:
    """How the work is run: memory and workers."""
    return _all(
        click.option("--workers", type=click.IntRange(1), default=None,
                     help="Threads over tensors (all cores). Never changes a result."),
        click.option("--max-memory", type=Size(), default=None,
                     help="Most resident memory of the process, e.g. 8GB; refused if it cannot be kept."),
    )  # fmt: skip


def going_on() -> Callable[[F], F]:
    """--resume and where else work may run, for commands that write."""
    return _all(
        click.option("--resume", is_flag=True,
                     help="Go on where the same command stopped; begin if it never did, say so if it is complete."),
        click.option("--executor", type=click.Choice(["threads", "ray"]), default="threads", show_default=True,
                     help="Threads of this process, or the workers of a Ray cluster (checkpoints, decompositions)."),
        click.option("--address", metavar="ADDRESS", default=None,
                     help="The Ray cluster (default: one of this machine)."),
        click.option("--shard-of", type=ShardOf(), default=None, metavar="I/N",
                     help="Do part I of N, beside other processes; devec join OUT finishes."),
        click.option("--join", is_flag=True, hidden=True),
    )  # fmt: skip


def reading() -> Callable[[F], F]:
    """Read-time choices: changing them factorises nothing again."""
    return _all(
        click.option("--threshold", type=Threshold(), default=None,
                     help="Pairwise cos^2 above which a direction is shared (0.85), or chance."),
        click.option("--fdr", type=float, default=None, help="False discovery rate with --threshold chance (0.01)."),
        click.option("--pair-basis", type=click.Choice(["bisector", "first", "own"]), default=None,
                     help="Basis of #shared:A+B (bisector)."),
        click.option("--joint", type=click.Choice(["consensus", "chain"]), default=None,
                     help="What joint mode means (consensus)."),
        click.option("--target-rule", type=click.Choice(["union", "sequence"]), default=None,
                     help="How a vector is set against several others (union)."),
        click.option("--angles", is_flag=True, default=None, help="Decide pairs by principal angles (Theorem 6.1)."),
        click.option("--paper", is_flag=True, default=None,
                     help="The paper's reading: first, chain, sequence, raw threshold, rank none. Order-dependent."),
    )  # fmt: skip


def compressing() -> Callable[[F], F]:
    """--rank, --energy, --error of a low-rank output."""
    return _all(
        click.option("--rank", type=click.IntRange(1), default=None, help="Write factors of at most this rank."),
        click.option("--energy", type=float, default=None,
                     help="Write the lowest rank that keeps this fraction of each tensor's squared norm."),
        click.option("--error", type=float, default=None,
                     help="Write the lowest rank with at most this relative Frobenius error per tensor."),
    )  # fmt: skip


def writing() -> Callable[[F], F]:
    """Options of commands that write weights."""
    return _all(
        click.option("-o", "--output", required=True, metavar="OUT", help="Output folder, or FILE.safetensors."),
        click.option("--overwrite", is_flag=True, help="Replace OUT if it exists."),
        click.option("--dry-run", is_flag=True, help="Check everything, say what would be written, write nothing."),
        click.option("--out-dtype", type=click.Choice(DTYPES), default=None,
                     help="Dtype of float tensors written (default: the base's; float32 for adapters)."),
        click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Bytes per weight file."),
        click.option("--strict", is_flag=True, help="Warnings and failed side steps are errors; nothing is written."),
        running(),
        going_on(),
    )  # fmt: skip


@dataclass(frozen=True)
class Printing:
    """How a command speaks."""

    as_json: bool
    quiet: bool
    verbose: bool


def read_time(values: dict[str, Any]) -> dict[str, Any]:
    """The read-time choices that were given (``None`` means: not given)."""
    keys = ("threshold", "fdr", "pair_basis", "joint", "target_rule", "angles", "paper")
    return {k: values[k] for k in keys if values.get(k) is not None}


def read_view(values: dict[str, Any], references: Iterable[str]) -> Any:
    """How artifacts are to be read: as stored (``None``), with changes (a mapping), or as the paper reads (a View)."""
    from devec.core.errors import UsageError
    from devec.core.options import View

    given = read_time(values)
    if not given:
        return None
    if not any("#" in text for text in references):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise UsageError(
            f"{flags}: read-time options change parts of decompositions, and none is named",
            remedy="Name one as ARTIFACT#unique:NAME, or leave them out.",
        )
    if given.pop("paper", None):
        return View.of_paper(**given)
    View(**given)  # a value out of range is an error before anything is read
    return given


def finite(ctx: click.Context, param: click.Parameter, value: float | list[float] | None) -> Any:
    """NaN and infinity are numbers to Python and to no one else."""
    from math import isfinite

    if value is not None and not all(map(isfinite, value if isinstance(value, list) else [value])):
        raise click.BadParameter("every number must be finite.", ctx, param)
    return value


def refuse_unused(values: dict[str, Any], part: str) -> None:
    """``--part all`` decomposes nothing, so choices of a decomposition would be ignored in silence."""
    from devec.core.errors import UsageError

    given = [*read_time(values), *(k for k in fixed(values) if k not in ("seed", "dtype", "one_d"))]
    if part == "all" and given:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise UsageError(f"{flags}: nothing is decomposed with --part all", remedy="Leave them out.")


def engine_of(values: dict[str, Any]) -> Any:
    """The ``Engine`` of a command's options."""
    from devec.api.run import Engine
    from devec.core.errors import UsageError
    from devec.engine.memory import give_back

    if values.get("executor") == "ray" and values.get("shard_of"):
        raise UsageError("--executor ray and --shard-of are two ways to the same end", remedy="Give one of them.")
    if values.get("address") and values.get("executor") != "ray":
        raise UsageError("--address is of --executor ray", remedy="Give both, or neither.")
    words = tuple(click.get_current_context().find_root().meta.get("devec.words", ()))
    if values.get("max_memory"):
        give_back()
    return Engine(
        workers=values.get("workers"), memory=values.get("max_memory"), executor=values.get("executor") or "threads",
        address=values.get("address"), resume=bool(values.get("resume")), shard=values.get("shard_of"),
        join=bool(values.get("join")), words=words,
    )


def check_place(output: str, values: dict[str, Any], references: Iterable[str | None]) -> bool:
    """Refuse an output place before anything is read: it exists, its parent does not, or it is or lies in an input.

    True: something stands there that ``--resume`` takes for finished, if it turns out to be this command's own.
    """
    import os
    from pathlib import Path

    from devec.api.references import named_paths
    from devec.io.folder import check_output

    inputs = [path for text in references if text is not None for path in named_paths(text)]
    overwrite, going_on = values["overwrite"], bool(values.get("resume") or values.get("join"))
    check_output(Path(output), overwrite=overwrite, inputs=inputs, judged=going_on)
    return going_on and not overwrite and os.path.lexists(output)


def download(base: str | None, references: Iterable[str]) -> None:
    """Fetch what lies on the Hugging Face Hub now: downloads and the command's own progress are not shown at once."""
    from devec.api.references import parse
    from devec.api.sources import hub_id
    from devec.io.hub import fetch

    parsed = [parse(text) for text in references]
    models = [path for path in (base, *(ref.base for ref in parsed)) if path is not None]
    for path, model in [*((m, True) for m in models), *((ref.path, False) for ref in parsed)]:
        wanted = hub_id(path)
        if wanted is not None:
            fetch(wanted, model=model)


def fixed(values: dict[str, Any]) -> dict[str, Any]:
    """The fixed choices of a decomposition, under the names of ``Factoring``."""
    out: dict[str, Any] = {k: values[k] for k in ("side", "seed", "dtype") if values.get(k) is not None}
    if values.get("rank_rule") is not None:
        out["rank"] = values["rank_rule"]
    out.update({k: True for k in ("exact", "split_qkv", "one_d") if values.get(k)})
    return out
