"""The tests' end of the fork server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a trial ended: exit ``code``, or the ``signal`` that killed it, or ``stopped`` where it was told to wait;
    ``hung`` if it had to be killed because it did not end.

    ``marks`` seconds from its start to each mark; ``calls`` the calls that changed the disk, if they were counted;
    ``said`` what it printed, standard output and error together.
    """

    code: int | None = None
    signal: int | None = None
    stopped: bool = False
    hung: bool = False
    marks: dict[str, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""

    @property
    def line(self) -> str:
        """The last line printed: of a failure, the error."""
        return (self.said.strip().splitlines() or [""])[-1]


class Server:
    """A fork server, for as long as the ``with`` block lasts. See ``faults.server`` for what a trial may be told."""

    def __enter__(self) -> Server:
        # A thread in the parent would be a lock that nobody opens in the child.
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **alone, "PYTHONPATH": path},
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    @property
    def threads(self) -> int:
        """Threads of the server: one, or forking from it would be unsafe."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Threads:")))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, words: list[str], folder: Path, *, out: str = "out", **more: Any) -> int:
        """Begin a command in ``folder``; returns what :meth:`wait` and :meth:`go` know it by."""
        return int(self._ask(op="start", words=words, folder=str(folder), out=out, **more)["id"])

    def wait(self, trial: int) -> Ended:
        """Until it ends, or stops."""
        ended = Ended(**self._ask(op="wait", id=trial))
        assert not ended.hung, f"a run did not end: {ended}"
        return ended

    def go(self, trial: int) -> None:
        """Let a stopped trial go on."""
        self._ask(op="go", id=trial)

    def run(self, words: list[str], folder: Path, **more: Any) -> Ended:
        """Begin a command and wait for it."""
        return self.wait(self.start(words, folder, **more))
