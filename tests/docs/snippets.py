"""Fenced blocks of a Markdown file, and how each kind is run.

python             executed; blocks of one file share their names, as a reader at a prompt would have it
sh, console, bash  each line that starts with ``devec`` (after an optional ``$``) is run; ``# exit 4`` at the end of
                   a line states an exit code other than 0
yaml, json         written to the file that the first line names, as ``# recipe.yaml``; left alone otherwise
text, others       left alone
"""

from __future__ import annotations

import glob
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import click

from devec.cli.main import run

SHELL = ("sh", "console", "bash")
LONG = ("demo",)
"""Commands whose options are parsed here, but which run in tests of their own."""

FENCE = re.compile(r"^( *)```([a-z]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        indent = len(match.group(1))
        body = "\n".join(row[indent:] for row in match.group(3).splitlines())
        found.append(Block(match.group(2), body, text.count("\n", 0, match.start()) + 2))
    return found


def command_lines(body: str) -> list[str]:
    rows = body.replace("\\\n", " ").splitlines()
    rows = [row.strip().removeprefix("$").strip() for row in rows]
    return [row for row in rows if row.split(" ", 1)[0] == "devec"]


def run_command(line: str, cli: click.Group) -> None:
    """Run one line in the present folder and compare its exit code with the one that the document states."""
    stated = re.search(r"#\s*exit (\d+)\s*$", line)
    wanted = int(stated.group(1)) if stated else 0
    line = re.sub(r"\s+#\s.*$", "", line)  # a part's # stands inside a word: parts#unique:poetry
    words = shlex.split(line)
    if words[1:2] and words[1] in LONG:
        command = cli.get_command(click.Context(cli), words[1])
        assert command is not None
        command.make_context(words[1], words[2:]).close()
        return
    code, printed = in_shell(line) if re.search(r"[|<>;&$`]", line) else in_process(words[1:])
    assert code == wanted, f"{line}\nexit code {code}, the document says {wanted}\n{printed}"


def in_shell(line: str) -> tuple[int, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def in_process(words: list[str]) -> tuple[int, str]:
    args: list[str] = []
    for word in words:
        args += sorted(glob.glob(word)) or [word]  # noqa: PTH207 - a word of a command line, as the shell expands it
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = run(args)
    return code, printed.getvalue()


def run_block(block: Block, names: dict[str, object], cli: click.Group, document: str) -> None:
    if block.language == "python":
        # Blank lines put an error at the line of the document.
        exec(compile("\n" * (block.line - 1) + block.body, document, "exec"), names)
    elif block.language in SHELL:
        for line in command_lines(block.body):
            run_command(line, cli)
    elif block.language in ("yaml", "json"):
        first, _, rest = block.body.partition("\n")
        if named := re.fullmatch(r"(?:#|//)\s*([\w./-]+\.(?:ya?ml|json))", first.strip()):
            Path(named.group(1)).write_text(rest)
