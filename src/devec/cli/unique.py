"""``negate``, ``mix``: what is unique to vectors, taken away or put together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from devec.cli import options, show
from devec.cli.options import Printing
from devec.cli.vectors import dry, of_matrices, saving_of, show_errors


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
    from devec.api.decompose import choose
    from devec.api.negate import negate as run
    from devec.api.negate import negate_inputs, save_negated, written_negated
    from devec.api.output import check_adapter_place
    from devec.core.summary import all_findings, as_dict
    from devec.io.names import Selection

    pool = [ref for item in (*pools, *more) for ref in pool_members(item)]
    options.refuse_unused(o, part)
    there = options.check_place(output, o, [base, target, *pool])
    choices = {**options.fixed(o), **options.read_time(o)}
    selection = Selection(o["include"], o["exclude"])
    saving = saving_of(
        "negate", o,
        {"target": target, "pool": pool, "part": part, "coefficient": coefficient, "heads_from": o["heads_from"],
         **choices},
    )
    if base is None:
        saving.engine.alone("an adapter")
    options.download(base, [target, *pool])

    def inputs() -> Any:
        return negate_inputs(
            target, pool, base=base, part=part, coefficient=coefficient, selection=selection,  # type: ignore[arg-type]
            dtype=o["dtype"], one_d=o["one_d"],
        )

    def written() -> None:
        whole, vectors, _ = inputs()
        found = written_negated(whole, vectors, output, saving, part=part, heads=o["heads_from"])
        show.complete(output, how, found)

    if there and not o["strict"]:  # with --strict it takes the decomposition to see that there is no warning
        return written()
    if o["dry_run"] or saving.engine.memory is not None:
        from devec.api.plan_verbs import plan_negate

        whole, vectors, notes = inputs()
        factoring = None if part == "all" else choose({**choices, "mode": "target", "target": vectors[0].name})[0]
        budget = saving.engine.memory is not None
        stages = plan_negate(whole, vectors, factoring, saving, heads=o["heads_from"], bound=budget)
        if o["dry_run"]:
            if base is None:
                check_adapter_place(output, whole.removed)
            show.warn([n.as_dict() for n in notes], strict=o["strict"])
            name = whole.removed.name if part == "all" else f"unique-{whole.removed.name}"
            return dry(output, how, stages, part=name, tensors=len(whole.removed.deltas))
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
    if there:
        return written()
    with show.progress("write", how) as advance:
        done = save_negated(negated, output, replace(saving, progress=advance), heads=o["heads_from"])
    show.wrote(output, done, how, {"decomposition": summary})


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
    from devec.api.decompose import choose
    from devec.api.merge import Compression
    from devec.api.mix import mix as run
    from devec.api.mix import mix_inputs, save_mix, written_mix
    from devec.api.output import check_adapter_place
    from devec.core.summary import all_findings, as_dict
    from devec.io.names import Selection

    options.refuse_unused(o, part)
    there = options.check_place(output, o, adapters)
    compression = Compression(o["rank"], o["energy"], o["error"])
    choices = {**options.fixed(o), **options.read_time(o)}
    options.download(None, adapters)
    saving = saving_of(
        "mix", o,
        {"adapters": list(adapters), "part": part, "weights": weights, "rank": o["rank"], "energy": o["energy"],
         "error": o["error"], "heads_from": o["heads_from"], **choices},
    )
    saving.engine.alone("a mix")
    selection = Selection(o["include"], o["exclude"])

    def written() -> None:
        pool, _ = mix_inputs(adapters, selection=selection, dtype=o["dtype"])
        show.complete(output, how, written_mix(pool, output, saving))

    if there and not o["strict"]:
        return written()
    if o["dry_run"] or saving.engine.memory is not None:
        from devec.api.plan_verbs import plan_mix

        pool, notes = mix_inputs(adapters, selection=selection, dtype=o["dtype"])
        factoring = None if part == "all" else choose(choices)[0]
        budget = saving.engine.memory is not None
        stages = plan_mix(
            pool, factoring, saving, compression, heads=o["heads_from"], one_d=o["one_d"], bound=budget
        )
        if o["dry_run"]:
            check_adapter_place(output, pool[0])
            show.warn([n.as_dict() for n in notes], strict=o["strict"])
            return dry(output, how, stages, adapters=len(adapters), tensors=stages[-1].tensors)
    with show.progress("mix", how) as advance:
        mixed = run(adapters, part=part, weights=weights, selection=selection,  # type: ignore[arg-type]
                    progress=advance, engine=saving.engine, **choices)
    summary = None
    if mixed.decomposition is not None:
        findings = all_findings(mixed.decomposition)
        summary = as_dict(mixed.decomposition, findings)
        show.decomposition(summary, how)
        show.warn(summary["warnings"], strict=o["strict"])
        if any(f.code == "nothing-shared" for f in findings) and part != "shared":
            show.note("this mix equals the plain sum of the adapters", how)
    if there:
        return written()
    done, errors = save_mix(mixed, output, saving, compression=compression, heads=o["heads_from"])
    show_errors(errors, *of_matrices(mixed.vector), how)
    show.wrote(output, done, how, {"error": errors, "decomposition": summary})
