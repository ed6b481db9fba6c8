"""``demo``."""

from __future__ import annotations

import time

import click

from devec.cli import show
from devec.cli.options import Printing


@click.command()
@click.option("-o", "--output", default="devec-demo", show_default=True, metavar="OUT", help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of data splits, training and controls.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout, and nothing else there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no tables; warnings and errors only.")
def demo(output: str, overwrite: bool, seed: int, as_json: bool, quiet: bool) -> None:
    """Train, decompose and merge seven small tasks on real data, with controls; write a report (under 3 minutes)."""
    how = Printing(as_json, quiet, False)
    from devec.api.demo import demo as run

    begun = time.monotonic()

    def stage(text: str) -> None:
        if not quiet:
            click.echo(f"[{time.monotonic() - begun:5.1f} s] {text}", err=True)

    result = run(output, overwrite=overwrite, seed=seed, stage=stage)
    table = result.pop("table_object")
    if as_json:
        show.print_json(result)
        return
    if not quiet:
        from rich.console import Console

        console = Console()
        table.print(console if console.is_terminal else Console(width=170))
    for line in result["reading"]:
        show.say(line, how)
    show.say(f"wrote {output}: open {output}/report.html", how)
