"""``python -m benchmarks.peers``: devec, mergekit and a plain copy by turns, each run a fresh process."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from benchmarks.machine import in_words, machine
from benchmarks.peers import report
from benchmarks.peers.session import run_session
from benchmarks.peers.setup import HOME, is_ready, versions
from benchmarks.peers.tools import MERGEKIT_SETTINGS
from benchmarks.peers.watch import CommandFailed
from benchmarks.report import HERE, write_results
from devec.cli.options import Size

SIZES = "0.5GB,2GB"


def run(
    sizes: str = SIZES, repeats: int = 3, work: Path = HOME / "work", without_mergekit: bool = False,
    settings: str | None = None, keep: bool = False, write: bool = False,
) -> list[report.Ratios]:  # fmt: skip
    """Measure, print, and write benchmarks/out/peers.json; returns the ratios that the goals are about."""
    console = Console()
    console.width = max(console.width, 170)  # a squeezed table hides figures
    facts = machine()
    console.print(in_words(facts), style="dim")
    tools = ("devec", "copy") if without_mergekit else ("mergekit", "devec", "copy")
    wanted = [(label, Size().convert(label, None, None)) for label in sizes.split(",")]
    with console.status("starting") as status:
        say = status.update if console.is_terminal else console.print
        try:
            session = run_session(
                wanted, work, tools=tools, repeats=repeats, settings=settings, keep=keep, say=lambda text: say(text)
            )
        except (CommandFailed, OSError) as error:
            raise click.ClickException(str(error)) from error
    report.print_session(console, session)
    peer = {} if without_mergekit else versions()
    (HERE / "out").mkdir(exist_ok=True)
    (HERE / "out" / "peers.json").write_text(report.as_json(session, facts, peer))
    if write:
        write_results(report.markdown(session, facts, peer), markers=report.MARKERS)
    return report.ratios(session)


@click.command()
@click.option("--sizes", default=SIZES, show_default=True, help="Bytes of one model, 60MB or 2GB; several by commas.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs of each kind.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=HOME / "work",
              show_default="below benchmarks/out",
              help="Where models and outputs lie meanwhile: eight times the largest size.")
@click.option("--settings", type=click.Choice(list(MERGEKIT_SETTINGS)), help="mergekit's settings (the fastest tried).")
@click.option("--without-mergekit", is_flag=True, help="devec and the copy alone.")
@click.option("--keep", is_flag=True, help="Leave the generated models for the next run.")
@click.option("--write", is_flag=True, help="Write the tables into benchmarks/RESULTS.md.")
def main(
    sizes: str, repeats: int, work: Path, settings: str | None, without_mergekit: bool, keep: bool, write: bool
) -> None:  # fmt: skip
    """Time merges of generated Llama checkpoints; JSON goes to benchmarks/out/peers.json."""
    if not without_mergekit and not is_ready():
        raise click.ClickException(
            "mergekit's environment is missing: run `python -m benchmarks.peers.setup`, or give --without-mergekit"
        )
    run(sizes, repeats, work.resolve(), without_mergekit, settings, keep, write)


if __name__ == "__main__":
    main()
