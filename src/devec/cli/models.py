"""``apply``, ``merge``, ``negate``, ``mix``."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

import click

from devec.cli import options, show
from devec.cli.options import Printing
from devec.cli.vectors import dry, dtypes, saving_of, show_errors


def _weight(text: str, flag: str) -> float:
    from devec.core.errors import UsageError

    try:
        weight = float(text)
    except ValueError:
        weight = nan
    if not isfinite(weight):
        raise UsageError(f"{flag} wants a finite number and a reference, got {text!r}", remedy=f"Write {flag} 0.5 REF.")
    return weight


@click.command("apply")
@click.option("--base", required=True, metavar="B", help="The model to edit.")
@click.option("--add", nargs=2, multiple=True, metavar="W REF", help="Add W times a vector or part (repeatable).")
@click.option("--subtract", nargs=2, multiple=True, metavar="W REF", help="Subtract W times a vector or part.")
@click.option("--heads-from", metavar="NAME", help="Take the heads of this input; by default the base keeps its own.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True,
              help="Sum in this dtype.")
@options.reading()
@options.selecting()
@options.writing()
@options.printing()
def apply_(
    base: str, add: tuple[tuple[str, str], ...], subtract: tuple[tuple[str, str], ...], output: str, as_json: bool,
    quiet: bool, verbose: bool, **o: Any,
) -> None:
    """Write base + sum of W x REF, summed in float32 and rounded once, as a Hugging Face folder."""
    how = Printing(as_json, quiet, verbose)
    import torch

    from devec.api.apply import apply as run
    from devec.api.jobs import Job
    from devec.api.plan import plan_write
    from devec.api.references import Reading, open_model, read_vector
    from devec.core.errors import UsageError
    from devec.io.names import Selection

    wanted = [(_weight(w, "--add"), ref) for w, ref in add] + [(-_weight(w, "--subtract"), ref) for w, ref in subtract]
    if not wanted:
        raise UsageError("apply got nothing to add", remedy="Give --add W REF or --subtract W REF.")
    options.check_place(output, o["overwrite"], [base, *(ref for _, ref in wanted)])
    view = options.read_view(o, [ref for _, ref in wanted])
    under = open_model(base)
    terms, findings = [], []
    for weight, ref in wanted:
        reading = Reading(under, getattr(torch, o["dtype"]), Selection(o["include"], o["exclude"]), view)
        vector, notes = read_vector(ref, reading)
        terms.append((weight, vector))
        findings += notes
    show.warn([n.as_dict() for n in findings], strict=o["strict"])
    saving = saving_of(
        "apply", o,
        {"terms": [[w, r] for w, r in wanted], "heads_from": o["heads_from"], **options.read_time(o)},
    )
    selection = Selection(o["include"], o["exclude"])
    job = Job(
        "devec.api.apply.model_for",
        {"base": base, "terms": wanted, "view": view, "selection": selection, "heads": o["heads_from"], **dtypes(o)},
    )
    saving = replace(saving, job=job)
    if o["dry_run"]:
        model = run(base, terms, heads=o["heads_from"], saving=saving)
        stages = [plan_write(model, saving.engine, saving.out_dtype)]  # type: ignore[arg-type]
        return dry(output, how, stages, tensors=len(model.names()), changed=len(model.terms))  # type: ignore[union-attr]
    with show.progress("write", how) as advance:
        written = run(under, terms, output, heads=o["heads_from"], saving=replace(saving, progress=advance))
    show.wrote(output, written, how)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="RECIPE.yaml | SOURCE...")
@click.option("--method", metavar="M", help="A registered merge method (see devec methods).")
@click.option("--base", metavar="B", help="The base (average needs none).")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the method (repeatable).")
@click.option("--coefficients", metavar="FILE", help="What devec learn wrote, in place of scale and weights.")
@click.option("--heads-from", metavar="NAME", help="Take the heads of this input; by default none is written.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default=None,
              help="Compute in this dtype (float32).")
@options.compressing()
@options.reading()
@options.selecting()
@options.writing()
@options.printing()
def merge(
    sources: tuple[str, ...], method: str | None, base: str | None, settings: tuple[str, ...], output: str,
    as_json: bool, quiet: bool, verbose: bool, **o: Any,
) -> None:
    """Merge models or adapters: a recipe, or --method and sources. Adapters stay adapters when rank is kept."""
    how = Printing(as_json, quiet, verbose)
    import torch

    from devec.api.coefficients import TRANSDUCTIVE
    from devec.api.jobs import Job
    from devec.api.merge import Compression, model_for, save_merged
    from devec.api.merge import merge as run
    from devec.api.plan import plan_write
    from devec.core.errors import UsageError
    from devec.io.names import Selection

    parameters: dict[str, Any] = {}
    if method is None:
        sources, method, base, parameters, o = _from_recipe(sources, base, settings, o)
    for item in settings:
        key, sign, value = item.partition("=")
        if not sign:
            raise UsageError(f"--set {item!r} is not KEY=VALUE")
        parameters[key] = value
    options.check_place(output, o["overwrite"], [base, *sources, o["coefficients"]])
    compression = Compression(o["rank"], o["energy"], o["error"])
    o["dtype"] = o.get("dtype") or "float32"
    given: dict[str, Any] = {
        "method": method, "sources": sources, "base": base, "parameters": parameters,
        "view": options.read_view(o, sources), "selection": Selection(tuple(o["include"]), tuple(o["exclude"])),
        "coefficients": o["coefficients"],
    }
    merged = run(**given, dtype=getattr(torch, o["dtype"]))
    if merged.coefficients is not None and merged.coefficients.transductive:
        show.note(TRANSDUCTIVE, how)
    from devec.core.findings import pool_findings

    notes = [*merged.findings, *pool_findings(merged.pool)]
    show.warn([n.as_dict() for n in notes], strict=o["strict"])
    saving = saving_of(
        "merge", o,
        {"method": method, "parameters": parameters, "rank": o["rank"], "energy": o["energy"], "error": o["error"],
         "heads_from": o["heads_from"], **options.read_time(o)},
    )
    saving = replace(saving, job=Job("devec.api.merge.model_for", {**given, "heads": o["heads_from"], **dtypes(o)}))
    if o["dry_run"]:
        stages = []
        if merged.base is not None and not compression.asked:
            model = model_for(**given, heads=o["heads_from"], **dtypes(o))
            stages = [plan_write(model, saving.engine, saving.out_dtype)]
        return dry(output, how, stages, sources=len(merged.pool), tensors=len(merged.vector.deltas))
    with show.progress("merge", how) as advance:
        saving = replace(saving, progress=advance)
        written, errors = save_merged(merged, output, saving, compression=compression, heads=o["heads_from"])
    show_errors(merged.vector, errors, how)
    show.wrote(output, written, how, {"error": errors} if errors else None)


def _from_recipe(
    sources: tuple[str, ...], base: str | None, settings: tuple[str, ...], o: dict[str, Any]
) -> tuple[tuple[str, ...], str, str | None, dict[str, Any], dict[str, Any]]:
    """A recipe in place of --method; options on the command line win over the recipe's."""
    from devec.api.recipe import read_recipe
    from devec.core.errors import UsageError

    if len(sources) != 1 or not sources[0].endswith((".yaml", ".yml")):
        raise UsageError("merge needs --method, or one recipe file", remedy="Write devec merge RECIPE.yaml -o OUT.")
    recipe = read_recipe(sources[0])
    merged = dict(o)
    for key in ("rank", "energy", "error", "heads_from", "out_dtype", "dtype", "coefficients"):
        if merged.get(key) is None:
            merged[key] = getattr(recipe, key)
    merged["seed"] = recipe.seed
    for key in ("include", "exclude"):
        merged[key] = tuple(merged[key]) or tuple(getattr(recipe, key))
    for key, value in recipe.view.model_dump(exclude_none=True).items():
        if merged.get(key) is None:
            merged[key] = value
    return tuple(recipe.sources), recipe.method, base or recipe.base, dict(recipe.parameters), merged


@click.command()
@click.option("--base", metavar="B", help="The model to edit (adapters alone need none; then an adapter is written).")
@click.option("--target", required=True, metavar="T", help="The vector whose behaviour goes.")
@click.option("--pool", "pools", multiple=True, metavar="P|NAME=P,P",
              help="Vectors that the target is set against: --pool P P P, or repeated; NAME=P,P groups several.")
@click.argument("more", nargs=-1, metavar="[P...]")
@click.option("--part", type=click.Choice(["unique", "all"]), default="unique", show_default=True,
              help="Subtract the unique part, or the whole vector.")
@click.option("--coefficient", "-c", type=float, default=1.0, show_default=True, callback=options.finite,
              help="C in B - C x part.")
@click.option("--heads-from", metavar="NAME", help="Take the heads of this input; by default the base keeps its own.")
@options.fixing()
@options.reading()
@options.selecting()
@options.writing()
@options.printing()
def negate(
    base: str | None, target: str, pools: tuple[str, ...], more: tuple[str, ...], part: str, coefficient: float,
    output: str, as_json: bool, quiet: bool, verbose: bool, **o: Any,
) -> None:
    """Write B - C x part of the target: a checkpoint with --base, otherwise an adapter."""
    how = Printing(as_json, quiet, verbose)
    from devec.api.negate import negate as run
    from devec.api.negate import save_negated
    from devec.core.summary import all_findings, as_dict
    from devec.io.names import Selection

    pool = [ref for item in (*pools, *more) for ref in pool_members(item)]
    options.refuse_unused(o, part)
    options.check_place(output, o["overwrite"], [base, target, *pool])
    choices = {**options.fixed(o), **options.read_time(o)}
    selection = Selection(o["include"], o["exclude"])
    saving = saving_of(
        "negate", o, {"target": target, "pool": pool, "part": part, "coefficient": coefficient, **choices}
    )
    if base is None:
        saving.engine.alone("an adapter")
    options.download(base, [target, *pool])
    with show.progress("negate", how) as advance:
        negated = run(target, pool, base=base, part=part, coefficient=coefficient, selection=selection,  # type: ignore[arg-type]
                      progress=advance, engine=saving.engine, **choices)
    summary, d = None, negated.decomposition
    if d is not None:
        findings = all_findings(d)
        summary = as_dict(d, findings)
        show.decomposition(summary, how)
        show.warn(summary["warnings"], strict=o["strict"])
        saving = replace(saving, summary=summary["totals"])
    if o["dry_run"]:
        return dry(output, how, part=negated.removed.name, tensors=len(negated.removed.deltas))
    with show.progress("write", how) as advance:
        written = save_negated(negated, output, replace(saving, progress=advance), heads=o["heads_from"])
    show.wrote(output, written, how, {"decomposition": summary})


def pool_members(item: str) -> list[str]:
    """``P``, or ``NAME=P,P``: a named group of several. One path after ``=`` is a name for that vector."""
    if Path(item).exists():
        return [item]
    _, sign, rest = item.partition("=")
    if sign and "," in rest:
        return [part for part in rest.split(",") if part]
    return [item]


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--part", type=click.Choice(["unique", "shared", "all"]), default="unique", show_default=True,
              help="What of each adapter is summed.")
@click.option("--weights", "-w", type=options.Numbers(), default=None, callback=options.finite,
              help="One weight an adapter (1 each).")
@click.option("--heads-from", metavar="NAME", help="Take the heads of this input; by default none is written.")
@options.fixing(rank="--decompose-rank")
@options.reading()
@options.compressing()
@options.selecting()
@options.writing()
@options.printing()
def mix(
    adapters: tuple[str, ...], part: str, weights: list[float] | None, output: str, as_json: bool, quiet: bool,
    verbose: bool, **o: Any,
) -> None:
    """Sum the unique (or shared, or whole) parts of adapters into one, in the first one's dialect. No base needed."""
    how = Printing(as_json, quiet, verbose)
    from devec.api.merge import Compression
    from devec.api.mix import mix as run
    from devec.api.mix import save_mix
    from devec.core.summary import all_findings, as_dict
    from devec.io.names import Selection

    options.refuse_unused(o, part)
    options.check_place(output, o["overwrite"], adapters)
    compression = Compression(o["rank"], o["energy"], o["error"])
    choices = {**options.fixed(o), **options.read_time(o)}
    options.download(None, adapters)
    saving = saving_of(
        "mix", o,
        {"adapters": list(adapters), "part": part, "weights": weights, "rank": o["rank"], "energy": o["energy"],
         "error": o["error"], **choices},
    )
    saving.engine.alone("a mix")
    with show.progress("mix", how) as advance:
        mixed = run(adapters, part=part, weights=weights, selection=Selection(o["include"], o["exclude"]),  # type: ignore[arg-type]
                    progress=advance, engine=saving.engine, **choices)
    summary = None
    if mixed.decomposition is not None:
        findings = all_findings(mixed.decomposition)
        summary = as_dict(mixed.decomposition, findings)
        show.decomposition(summary, how)
        show.warn(summary["warnings"], strict=o["strict"])
        if any(f.code == "nothing-shared" for f in findings) and part != "shared":
            show.note("this mix equals the plain sum of the adapters", how)
    if o["dry_run"]:
        return dry(output, how, adapters=len(adapters), tensors=len(mixed.vector.deltas))
    written, errors = save_mix(mixed, output, saving, compression=compression, heads=o["heads_from"])
    show_errors(mixed.vector, errors, how)
    show.wrote(output, written, how, {"error": errors, "decomposition": summary})
