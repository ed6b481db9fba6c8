"""``inspect``, ``compare``, ``verify``, ``methods``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from devec.cli import options, show
from devec.cli.options import Printing


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--base", metavar="B", help="Base of full checkpoints; their deltas are then measured too.")
@options.selecting()
@options.printing()
def inspect(
    sources: tuple[str, ...], base: str | None, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool,
    quiet: bool, verbose: bool,
) -> int:
    """Show format, tensors, ranks, norms and outliers; with several sources, whether they fit one another (exit 4)."""
    how = Printing(as_json, quiet, verbose)
    from devec.api.inspect import inspect as run
    from devec.io.names import Selection

    report = run(sources, base=base, selection=Selection(include, exclude), details=verbose)
    if as_json:
        show.print_json(report)
    entries = report["sources"]
    if verbose:
        for e in entries:
            rows = [
                (t["tensor"], "x".join(map(str, t["shape"])) or "scalar", t["dtype"], t["rank"], t["norm"])
                for t in e.get("per_tensor", ())
            ]
            show.table(e["name"], ["tensor", "stored shape", "dtype", "rank bound", "norm"], rows, how)
    show.table(
        "sources",
        ["name", "kind", "format", "tensors", "parameters", "rank (tensors)", "norm of the change", "heads", "base"],
        [_source_row(e) for e in entries],
        how,
    )
    for e in entries:
        if e["kind"] == "decomposition":
            part = f"{e['reference']}#unique:{e['target'] or e['vectors'][0]}"
            listed = ", ".join(e["vectors"])
            show.say(f"{e['name']}: {e['mode']} decomposition of {listed}, side {e['side']}; parts: {part}", how)
    show.warn(report["warnings"])
    for problem in report["problems"]:
        click.echo(f"devec: {problem['message']}", err=True)
    if len(entries) > 1 and report["compatible"]:
        show.say("these sources fit one another", how)
    return int(report["problems"][0]["exit_code"]) if report["problems"] else 0


def _source_row(e: dict[str, Any]) -> tuple[object, ...]:
    ranks = ", ".join(f"{r} ({c})" for r, c in e.get("ranks", {}).items()) or None
    norm = e.get("norm", e.get("delta", {}).get("norm"))
    heads = len(e.get("heads", [])) or None
    return (
        e["name"], e["kind"], e.get("format"), e.get("tensors"), e.get("parameters"), ranks, norm, heads, e.get("base"),
    )  # fmt: skip


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--base", metavar="B", help="Base of full checkpoints (adapters need none).")
@click.option("--plot", metavar="FILE", help="Write a picture of spectra and overlaps (png, svg or pdf).")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@options.fixing()
@options.running()
@options.reading()
@options.selecting()
@options.printing()
def compare(
    sources: tuple[str, ...], base: str | None, plot: str | None, as_json: bool, quiet: bool, verbose: bool, **o: Any
) -> None:
    """Cosines, Gram, overlaps against chance, and spectra of every pair. Writes nothing but the --plot."""
    how = Printing(as_json, quiet, verbose)
    from devec.api.inspect import compare as run
    from devec.core.summary import all_findings, as_dict
    from devec.io.names import Selection

    options.download(base, sources)
    with show.progress("compare", how) as advance:
        d, result = run(
            sources, base=base, selection=Selection(o["include"], o["exclude"]), engine=options.engine_of(o),
            progress=advance, **options.fixed(o), **options.read_time(o),
        )
    result["warnings"] = [f.as_dict() for f in all_findings(d)]
    if as_json:
        show.print_json(result)
    if verbose:
        show.per_tensor(as_dict(d, []), how)
    rows = [
        (
            f"{p['a']} + {p['b']}", p["cosine"], p["tensors"], p["median_largest"], p["median_over_edge"], p["largest"],
            p["shared_directions"], f"{p['above_chance']} / {p['directions']}",
        )
        for p in result["pairs"]
    ]
    show.table(
        "pairs",
        ["pair", "cosine", "tensors", "median top cos^2", "over chance edge", "largest", "shared", "above chance"],
        rows, how,
    )
    if plot is not None:
        from devec.api.plot import plot_comparison

        plot_comparison(d, result, plot, overwrite=o["overwrite"])
        show.say(f"wrote {plot}", how)
    show.warn(result["warnings"])


@click.command()
@click.argument("output", metavar="OUT")
@options.printing()
def verify(output: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Check an output of devec against the hashes that it carries (exit 7 if anything differs)."""
    how = Printing(as_json, quiet, verbose)
    from pathlib import Path

    from devec.io.verify import verify_output

    report = verify_output(Path(output), check=False)
    if as_json:
        show.print_json({"schema": 1, **report.to_dict()})
    if report.ok:
        show.say(f"{output}: {report.checked} hashes agree", how)
        return 0
    verify_output(Path(output))  # raises, naming what differs
    return 7


@click.command()
@click.argument("name", required=False)
@options.printing()
def methods(name: str | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the registered methods and what each needs; with NAME, its page."""
    how = Printing(as_json, quiet, verbose)
    import inspect as reflection

    from devec.core.errors import UsageError
    from devec.methods import registry

    listed = registry.all_methods()
    if name is not None:
        wanted = name.replace("_", "-")
        listed = [m for m in listed if m.name == wanted]
        if not listed:
            from difflib import get_close_matches

            known = [m.name for m in registry.all_methods()]
            near = get_close_matches(wanted, known, n=1)
            raise UsageError(f"no method is called {name!r}", remedy=f"Did you mean {near[0]}?" if near else
                             f"There is: {', '.join(known)}.")
    if as_json:
        show.print_json(
            [
                {
                    "kind": m.kind, "name": m.name, "grain": m.grain, "data": data_of(m.needs), "needs": list(m.needs),
                    "needs_base": m.needs_base, "keeps_rank": m.keeps_rank, "per_task": m.per_task, "source": m.source,
                    "summary": m.summary,
                    "parameters": {k: _default(p) for k, p in m.parameters.items()},
                    **({"page": reflection.getdoc(m.call)} if name is not None else {}),
                }
                for m in listed
            ]
        )
        return
    if name is not None:
        for m in listed:
            show.say(f"{m.kind} {m.name}  ({m.source})\n\n{reflection.getdoc(m.call)}", how)
        return
    rows = [
        (m.name, m.kind, m.grain, data_of(m.needs), "yes" if m.needs_base else "no", "yes" if m.keeps_rank else "no",
         "parts" if m.kind == "decompose" else "one per task" if m.per_task else "one", m.source)
        for m in listed
    ]  # fmt: skip
    show.table("methods", ["name", "kind", "grain", "data", "needs base", "keeps rank", "result", "source"], rows, how)


def data_of(needs: Sequence[str]) -> str:
    """What a method must be given besides weights, in words."""
    return ", ".join(needs) or "none"


def _default(parameter: Any) -> Any:
    value = parameter.default
    return value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)
