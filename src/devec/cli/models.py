"""``apply``, ``merge``."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, nan
from typing import Any

import click

from devec.cli import options, show
from devec.cli.options import Printing
from devec.cli.recipes import from_recipe, typed
from devec.cli.vectors import dry, dtypes, of_matrices, saving_of, show_errors


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
    from devec.api.output import written_model
    from devec.api.plan import plan_write
    from devec.api.references import Reading, open_model, read_vector
    from devec.core.errors import UsageError
    from devec.io.names import Selection

    wanted = [(_weight(w, "--add"), ref) for w, ref in add] + [(-_weight(w, "--subtract"), ref) for w, ref in subtract]
    if not wanted:
        raise UsageError("apply got nothing to add", remedy="Give --add W REF or --subtract W REF.")
    there = options.check_place(output, o, [base, *(ref for _, ref in wanted)])
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
    if there:
        given = saving.for_inputs([vector for _, vector in terms], under)
        model = run(under, terms, heads=o["heads_from"], saving=given)
        return show.complete(output, how, written_model(model, output, given))  # type: ignore[arg-type]
    if o["dry_run"]:
        model = run(under, terms, heads=o["heads_from"], saving=saving)
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
    from devec.api.merge import Compression, check_is_change, model_for, save_merged, written_merge
    from devec.api.merge import merge as run
    from devec.api.output import check_adapter_place, heads_from
    from devec.api.plan import plan_write
    from devec.core.errors import UsageError
    from devec.io.names import Selection
    from devec.methods import registry

    parameters: dict[str, Any] = {}
    if method is None:
        sources, method, base, parameters, o = from_recipe(sources, base, settings, o)
    for item in settings:
        key, sign, value = item.partition("=")
        if not sign:
            raise UsageError(f"--set {item!r} is not KEY=VALUE")
        parameters[key] = typed(key, value)
    if o.get("seed") and "seed" in registry.get("merge", str(method)).parameters:
        parameters.setdefault("seed", o["seed"])  # of the recipe
    there = options.check_place(output, o, [base, *sources, o["coefficients"]])
    compression = Compression(o["rank"], o["energy"], o["error"])
    o["dtype"] = o.get("dtype") or "float32"
    given: dict[str, Any] = {
        "method": method, "sources": sources, "base": base, "parameters": parameters,
        "view": options.read_view(o, sources), "selection": Selection(tuple(o["include"]), tuple(o["exclude"])),
        "coefficients": o["coefficients"],
    }
    workers = o["workers"] if o["max_memory"] is None else 1  # a pass over the model, beside what is being merged
    merged = run(**given, dtype=getattr(torch, o["dtype"]), workers=workers)
    if merged.coefficients is not None and merged.coefficients.transductive:
        show.note(TRANSDUCTIVE, how)
    from devec.core.findings import pool_findings

    notes = [*o.get("notes", ()), *merged.findings, *pool_findings(merged.pool)]
    show.warn([n.as_dict() for n in notes], strict=o["strict"])
    saving = saving_of(
        "merge", o,
        {"method": method, "parameters": parameters, "rank": o["rank"], "energy": o["energy"], "error": o["error"],
         "heads_from": o["heads_from"], "chat_template": o.get("chat_template"), **options.read_time(o)},
    )
    if o.get("chat_template") is not None:
        from devec.io.tokenizer import with_template

        if output.endswith(".safetensors") or compression.asked:
            raise UsageError("a chat template needs the folder of a whole model", file=output)
        saving = replace(saving, companions=with_template(o["chat_template"], getattr(merged.base, "folder", None)))

    def job(arguments: dict[str, Any]) -> Job:
        return Job("devec.api.merge.model_for", {**arguments, "heads": o["heads_from"], **dtypes(o)})

    saving = replace(saving, job=job(given))
    if there:
        found = written_merge(merged, output, saving, compression=compression, heads=o["heads_from"])
        return show.complete(output, how, found)
    adapter = merged.base is None or compression.asked
    if adapter and (o["dry_run"] or saving.engine.memory is not None):
        from devec.api.plan_verbs import plan_adapter

        check_is_change(merged, compression)
        heads = heads_from(o["heads_from"], list(merged.pool))
        stages = plan_adapter(merged.vector, list(merged.pool), saving, compression, heads=heads)
        check_adapter_place(output, merged.vector)
    if o["dry_run"]:
        if not adapter:
            model = model_for(**given, heads=o["heads_from"], **dtypes(o))
            stages = [plan_write(model, saving.engine, saving.out_dtype, looks=merged.looks)]
        return dry(output, how, stages, sources=len(merged.pool), tensors=len(merged.vector.deltas))
    if saving.engine.executor == "ray" and merged.statistics is not None:  # found once, not by every worker
        given["statistics"] = merged.statistics()
        saving = replace(saving, job=job(given))
    with show.progress("merge", how) as advance:
        saving = replace(saving, progress=advance)
        written, errors = save_merged(merged, output, saving, compression=compression, heads=o["heads_from"])
    show_errors(errors, *of_matrices(merged.vector), how)
    show.wrote(output, written, how, {"error": errors} if errors else None)


