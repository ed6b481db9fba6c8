"""``extract``, ``decompose``, ``export``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import click

from devec.cli import options, show
from devec.cli.options import Printing


@click.command()
@click.option("--base", required=True, metavar="B", help="The base that the model was fine-tuned from.")
@click.option("--model", required=True, metavar="M", help="The fine-tuned model.")
@options.compressing()
@options.writing()
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True,
              help="Subtract in this dtype.")
@options.selecting()
@options.printing()
def extract(base: str, model: str, output: str, as_json: bool, quiet: bool, verbose: bool, **o: Any) -> None:
    """Make a task vector (fine-tuned minus base); with --rank, --energy or --error a LoRA.

    Writes an artifact folder, or a PEFT adapter folder.
    """
    how = Printing(as_json, quiet, verbose)
    import torch

    from devec.api.lora import save_lora
    from devec.api.merge import Compression
    from devec.api.output import check_adapter_place, save_artifact, written_vector
    from devec.api.references import Reading, open_model, read_vector
    from devec.io.names import Selection

    compression = Compression(o["rank"], o["energy"], o["error"])
    saving = saving_of("extract", o, {"rank": o["rank"], "energy": o["energy"], "error": o["error"]})
    there = options.check_place(output, o, [base, model])
    under = open_model(base)
    reading = Reading(under, getattr(torch, o["dtype"]), Selection(o["include"], o["exclude"]))
    vector, notes = read_vector(model, reading)
    saving = saving.for_inputs([vector], under)
    if compression.asked:
        check_adapter_place(output, vector)
    saving.engine.alone("what extract writes")
    show.warn([n.as_dict() for n in notes], strict=o["strict"])
    if there:
        found = written_vector(output, saving, adapter=compression.asked)
        return show.complete(output, how, found if compression.asked else None)
    if o["dry_run"] or saving.engine.memory is not None:
        from devec.api.plan_verbs import plan_extract

        stages = plan_extract(vector, saving, compression)
        if o["dry_run"]:
            return dry(output, how, stages, tensors=len(vector.deltas))
    if not compression.asked:
        show.wrote(save_artifact(vector, output, saving), None, how, {"tensors": len(vector.deltas)})
        return
    with show.progress("extract", how) as advance:
        done = save_lora(vector, output, replace(saving, progress=advance), compression)
    show_errors(done.errors, done.ranks, done.ranks.__getitem__, how)
    show.wrote(output, done.written, how, {"error": done.errors})


def of_matrices(vector: Any) -> tuple[set[str], Callable[[str], int]]:
    """The matrices of a vector, and the rank of each."""
    return {n for n in vector.deltas if not vector.layouts[n].is_vector}, lambda n: vector.deltas[n].rank_bound


def show_errors(
    errors: Mapping[str, float], matrices: Collection[str], rank_of: Callable[[str], int], how: Printing
) -> None:
    """The relative Frobenius error of a compression, per tensor with -v, and its extremes."""
    left_out = [n for n in errors if n not in matrices]
    kept = {n: e for n, e in errors.items() if n not in left_out}
    if kept and how.verbose:
        rows = [(n, rank_of(n), e) for n, e in kept.items()]
        show.table("compression", ["tensor", "rank", "relative error"], rows, how)
    if kept:
        ordered = sorted(kept.values())
        middle = ordered[len(ordered) // 2]
        show.say(f"relative Frobenius error per tensor: median {middle:.3g}, largest {ordered[-1]:.3g}", how)


def saving_of(command: str, o: dict[str, Any], parameters: dict[str, Any]) -> Any:
    """The ``Saving`` of a command's options."""
    import torch

    from devec.api.output import Saving

    given = {k: v for k, v in parameters.items() if v is not None and v != () and v is not False}
    chosen = {k: list(o[k]) for k in ("include", "exclude") if o.get(k)}
    return Saving(
        command=command,
        parameters={**given, **chosen},
        overwrite=o["overwrite"],
        strict=o["strict"],
        shard_size=o.get("shard_size") or 5 * 10**9,
        seed=o.get("seed", 0),
        dtype=getattr(torch, o.get("dtype") or "float32"),
        out_dtype=getattr(torch, o["out_dtype"]) if o.get("out_dtype") else None,
        engine=options.engine_of(o),
    )


def dtypes(o: dict[str, Any]) -> dict[str, Any]:
    """Compute and output dtype by name, as other processes are told them."""
    return {"dtype": o.get("dtype") or "float32", "out_dtype": o.get("out_dtype")}


def dry(output: str | None, how: Printing, stages: Any = (), **facts: Any) -> None:
    """What --dry-run says: everything was checked, what each stage would cost, and that nothing was written."""
    if how.as_json:
        planned = {"stages": [s.as_dict() for s in stages]} if stages else {}
        show.print_json({"schema": 1, "dry_run": True, "output": output, **facts, **planned})
    else:
        show.stages(stages, how)
        listed = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in facts.items())
        what = "everything fits" if output is None else f"would write {output}"
        show.say(f"dry run: {what} ({listed}); nothing was written", how)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--base", metavar="B", help="Base of full checkpoints (adapters need none).")
@click.option("-o", "--output", metavar="OUT", help="Artifact folder to write (without it, results are only shown).")
@click.option("--mode", type=click.Choice(["pairwise", "joint", "target"]), default="pairwise", show_default=True,
              help="Every pair, all vectors at once, or one target against the others.")
@click.option("--target", metavar="NAME", help="The target of --mode target.")
@options.fixing()
@options.reading()
@options.selecting()
@options.running()
@options.going_on()
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Read headers, check that everything fits, compute and write nothing.")
@click.option("--device", default="auto", show_default=True, help="auto | cpu | cuda: where to factor.")
@click.option("--strict", is_flag=True, help="Warnings are errors; nothing is written.")
@options.printing()
def decompose(
    sources: tuple[str, ...], output: str | None, as_json: bool, quiet: bool, verbose: bool, **o: Any
) -> None:
    """Split task vectors into shared and unique parts; parts are read from OUT as OUT#unique:NAME and so on."""
    how = Printing(as_json, quiet, verbose)
    from devec.api.decompose import choose, decompose_to, written_decomposition
    from devec.api.decompose import decompose as run
    from devec.api.jobs import Job
    from devec.api.references import load_pool
    from devec.core.summary import all_findings, as_dict
    from devec.io.names import Selection

    choices = {**options.fixed(o), **options.read_time(o), "mode": o["mode"], "target": o["target"]}
    choose(choices)  # a wrong choice is an error before anything is read
    there = output is not None and options.check_place(output, o, [o["base"], *sources])
    import torch

    engine = options.engine_of(o)
    if output is None:
        engine.alone("a decomposition that is only shown")
    selection = Selection(o["include"], o["exclude"])
    pool, notes = load_pool(sources, base=o["base"], dtype=getattr(torch, o["dtype"]), selection=selection)
    if there:
        assert output is not None
        summary = written_decomposition(pool, output, base=o["base"], notes=notes, **choices)
        if o["strict"]:
            show.warn(summary["warnings"], strict=True)
        return show.print_json(summary) if as_json else show.complete(output, how)
    if o["dry_run"]:
        from devec.api.decompose import prepared
        from devec.api.plan import plan_decompose

        factoring = choose(choices)[0]
        stages = plan_decompose(prepared(pool, factoring, o["base"])[0], factoring, engine, stored=output is not None)
        return dry(output, how, stages, vectors=len(pool), tensors=len(pool.tensors()))

    def approve(findings: Any) -> None:
        if o["strict"]:
            show.warn([f.as_dict() for f in findings], strict=True)

    common: dict[str, Any] = dict(base=o["base"], engine=engine, device=o["device"], notes=notes, **choices)
    with show.progress("decompose", how) as advance:
        if output is None:
            d = run(pool, progress=advance, **common)
            findings = all_findings(d)
            approve(findings)
            summary = as_dict(d, findings)
        else:
            job = Job(
                "devec.api.factor.make_pool",
                {"factoring": choose(choices)[0], "base": o["base"], "references": sources, "selection": selection},
            )
            summary = decompose_to(
                pool, output, overwrite=o["overwrite"], progress=advance, job=job, approve=approve, **common
            )
    if not summary:
        return wrote_shard(output, engine.shard, how)
    if as_json:
        show.print_json(summary)
    show.decomposition(summary, how)
    show.warn(summary["warnings"])
    if output is not None:
        show.say(f"wrote {output}; read parts as {output}#unique:{summary['vectors'][0]}", how)


def wrote_shard(output: str | None, shard: Any, how: Printing) -> None:
    """The last line of one process of several."""
    if how.as_json:
        show.print_json({"schema": 1, "output": output, "shard": list(shard)})
    else:
        show.say(f"part {shard[0]} of {shard[1]} is written; devec join {output} finishes when all are", how)


@click.command()
@click.argument("output", metavar="OUT")
@options.printing()
def join(output: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Finish OUT once every --shard-of I/N of its command has written its part: check hashes, assemble, rename."""
    import os
    from pathlib import Path

    from devec.cli.main import run as run_command
    from devec.core.errors import InputError
    from devec.io.journal import read_plan

    place = Path(output).absolute()
    plan = read_plan(place.with_name(f"{place.name}.partial-run"))
    if plan is None:
        raise InputError(
            "there is nothing to join", file=output, remedy="Run the command with --shard-of I/N first, all N parts."
        )
    printing = [flag for flag, on in (("--json", as_json), ("--quiet", quiet), ("--verbose", verbose)) if on]
    os.chdir(plan["place"])
    return run_command([*without_shard(plan["words"]), "--join", *printing])


def without_shard(words: list[str]) -> list[str]:
    """A command line without its ``--shard-of``."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--shard-of":
            skip = True
        elif not word.startswith("--shard-of="):
            kept.append(word)
    return kept


@click.command()
@click.argument("part", metavar="ARTIFACT#PART")
@click.option("--base", metavar="B", help="Write base + part as a checkpoint instead of an adapter.")
@options.reading()
@options.writing()
@options.printing()
def export(part: str, base: str | None, output: str, as_json: bool, quiet: bool, verbose: bool, **o: Any) -> None:
    """Write one part in the input's own format (LoRA in, LoRA out), or base + part."""
    how = Printing(as_json, quiet, verbose)
    from devec.api.export import export as run
    from devec.api.export import written_export
    from devec.api.jobs import Job
    from devec.api.references import existing, load_vector, parse
    from devec.core.errors import UsageError
    from devec.io.artifact import decomposed_side

    if parse(part).part is None:
        raise UsageError(f"{part!r} names no part", remedy="Write ARTIFACT#unique:NAME, #shared:NAME or #shared:A+B.")
    there = options.check_place(output, o, [base, part])
    vector = load_vector(part, base=base, view=options.read_view(o, [part]))
    if vector.is_low_rank() and decomposed_side(existing(parse(part).path, part)) == "both":
        show.note(show.BOTH_SIDES, how)
    view = options.read_view(o, [part])
    job = Job("devec.api.apply.model_for", {"base": base, "terms": [(1.0, part)], "view": view, **dtypes(o)})
    saving = replace(saving_of("export", o, {"part": part.partition("#")[2], **options.read_time(o)}), job=job)
    if there:
        return show.complete(output, how, written_export(vector, output, base=base, saving=saving))
    if o["dry_run"]:
        if base is not None:
            from devec.api.apply import model_for
            from devec.api.plan import plan_write

            model = model_for(base, [(1.0, part)], view=view, **dtypes(o))
            stages = [plan_write(model, saving.engine, model.out_dtype)]
        else:
            from devec.api.merge import Compression
            from devec.api.output import check_adapter_place
            from devec.api.plan_verbs import plan_adapter

            stages = plan_adapter(vector, [vector], saving, Compression(), heads=vector.heads)
            check_adapter_place(output, vector)
        return dry(output, how, stages, part=vector.name, tensors=len(vector.deltas))
    with show.progress("write", how) as advance:
        written = run(vector, output, base=base, saving=replace(saving, progress=advance))
    show.wrote(output, written, how)
