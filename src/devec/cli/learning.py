"""``learn``, ``eval``."""

from __future__ import annotations

from typing import Any

import click

from devec.cli import options, show
from devec.cli.options import Printing


@click.command()
@click.argument("recipe", metavar="RECIPE.yaml")
@click.option("--suite", metavar="SUITE.yaml", help="The tasks (default: the recipe's suite).")
@click.option("--objective", type=click.Choice(["entropy", "ce", "outputs"]), default="entropy", show_default=True,
              help="Entropy of unlabelled rows (AdaMerging), cross-entropy of labelled ones (aTLAS), or least squares "
                   "to the fine-tunes' outputs.")
@click.option("--grain", type=click.Choice(["vector", "layer", "tensor"]), default="vector", show_default=True,
              help="One coefficient per vector, per vector and layer, or per vector and tensor.")
@click.option("--transductive", is_flag=True, help="Learn on the test split's inputs, as published; marked everywhere.")
@click.option("--shots", type=click.IntRange(1), default=None, help="With ce: so many labelled rows a class.")
@click.option("--trim", type=float, default=None, metavar="F",
              help="Only this fraction of each vector's entries, where signs agree (0.2: AdaMerging++).")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task of the suite (repeatable).")
@click.option("--search", type=click.Choice(["adam", "cma"]), default="adam", show_default=True,
              help="Gradients (Adam), or none (CMA-ES; pip install devec[cma]).")
@click.option("--steps", type=click.IntRange(0), default=None,
              help="Steps of Adam or generations of CMA-ES (500); of least squares (5).")
@click.option("--lr", type=float, default=None,
              help="Learning rate (0.001; with --shots 0.1); of cma the first deviation (0.1).")
@click.option("--batch", type=click.IntRange(1), default=None,
              help="Rows a task and step (entropy 32, ce 16, outputs 128).")
@click.option("--init", type=options.Numbers(), default=None,
              help="Coefficient at the start, or one a vector: 0.3,0.3,0 (0.3; ce 0).")
@click.option("--clamp/--signed", default=None, help="Cut to [0, 1] (entropy), or free and signed (the others).")
@click.option("--weight-decay", type=float, default=None, help="Decoupled weight decay (0; ce 0.1).")
@click.option("--seed", type=int, default=None, help="Seed of batches and shots (default: the recipe's).")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default=None,
              help="Compute in this dtype (float32).")
@click.option("--workers", type=click.IntRange(1), default=None,
              help="Threads over tensors (all cores). Never changes a result.")
@click.option("-o", "--output", required=True, metavar="FILE.json", help="The coefficients, which devec merge reads.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@options.printing()
def learn(
    recipe: str, output: str, overwrite: bool, as_json: bool, quiet: bool, verbose: bool, **o: Any,
) -> None:
    """Learn the coefficients of a recipe's vectors and parts: W = W_0 + sum of c_t x vector t."""
    how = Printing(as_json, quiet, verbose)
    import torch

    from devec.api.coefficients import METHOD, save_coefficients
    from devec.api.learn import learn as run
    from devec.api.recipe import read_recipe
    from devec.core.errors import UsageError
    from devec.io.names import Selection

    r = read_recipe(recipe)
    suite = o["suite"] or r.suite
    if r.method.replace("_", "-") != METHOD or r.settings():
        raise UsageError(
            f"coefficients are learned for method {METHOD} without parameters",
            values={"method": r.method, "parameters": r.settings() or "none"}, file=recipe,
        )
    if suite is None or r.base is None:
        raise UsageError(
            f"learning needs a {'suite' if suite is None else 'base'}", file=recipe,
            remedy="Give --suite SUITE.yaml." if suite is None else "Write base: in the recipe.",
        )
    options.check_place(output, {"overwrite": overwrite}, [recipe, suite])
    view = options.read_view(r.view.model_dump(), r.references)
    schedule = {k: o[k] for k in ("steps", "lr", "init", "clamp", "weight_decay")}
    with show.progress("learn", how) as advance:
        c = run(
            r.references, base=r.base, suite=suite, objective=o["objective"], grain=o["grain"],
            transductive=o["transductive"], shots=o["shots"], batch=o["batch"], trim=o["trim"], search=o["search"],
            seed=r.seed if o["seed"] is None else o["seed"], tasks=o["tasks"] or None,
            selection=Selection(tuple(r.include), tuple(r.exclude)), view=view,
            dtype=getattr(torch, o["dtype"] or r.dtype), workers=o["workers"], progress=advance, **schedule,
        )
    show.warn(c.learned["warnings"])
    save_coefficients(c, output, overwrite=overwrite)
    if as_json:
        show.print_json({"output": output, **c.to_dict()})
    history = c.learned["history"]
    rows = [(v, min(row.values()), sum(row.values()) / len(row), max(row.values())) for v, row in c.values.items()]
    marked = " (TRANSDUCTIVE: on the test split's inputs)" if c.transductive else ""
    show.table(
        f"coefficients per {c.grain}, {c.learned['objective']} on the {c.learned['split']} split{marked}",
        ["vector", "least", "mean", "largest"], rows, how,
    )
    if verbose:
        show.table("rows", ["task", "learned on"], c.learned["rows"].items(), how)
    if history:
        show.say(f"loss {history[0]:.4g} at the start, {history[-1]:.4g} at step {len(history)} (of one batch)", how)
    show.say(f"wrote {output}", how)


@click.command("eval")
@click.argument("model", metavar="MODEL")
@click.option("--suite", required=True, metavar="SUITE.yaml", help="The network, tasks, heads and splits.")
@click.option("--split", type=click.Choice(["test", "select"]), default="test", show_default=True,
              help="The rows to score.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task of the suite (repeatable).")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Instead of the suite's metrics (repeatable).")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True,
              help="Compute in this dtype.")
@options.printing()
def eval_(model: str, suite: str, as_json: bool, quiet: bool, verbose: bool, **o: Any) -> None:
    """Score MODEL on the tasks of a suite."""
    how = Printing(as_json, quiet, verbose)
    import torch

    from devec.api.eval import evaluate

    with show.progress("eval", how) as advance:
        found = evaluate(
            model, suite, split=o["split"], tasks=o["tasks"] or None, metrics=o["metrics"] or None,
            dtype=getattr(torch, o["dtype"]), progress=advance,
        )
    if as_json:
        show.print_json(found.as_dict())
    scores = found.scores
    columns = [f"{m.name} (%)" if m.percent else m.name for m in found.metrics]
    per_task = [(t, *_shown(found.metrics, s), scores.rows[t]) for t, s in scores.per_task.items()]
    marked = " (TRANSDUCTIVE: coefficients learned on these inputs)" if found.transductive else ""
    show.table(
        f"{model} on the {scores.split} split{marked}", ["task", *columns, "rows"],
        [*per_task, ("mean", *_shown(found.metrics, scores.mean), "")], how,
    )


def _shown(metrics: Any, scores: dict[str, float]) -> list[str]:
    return [f"{100.0 * scores[m.name]:.2f}" if m.percent else f"{scores[m.name]:.4f}" for m in metrics]
