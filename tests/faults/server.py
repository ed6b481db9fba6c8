"""Forks trials from a process that has imported everything and runs no thread: each starts within milliseconds.

One request a line on standard input, one answer a line on standard output, both JSON:

    {"op": "start", "words", "folder", "out", "kill", "fault", "short", "swap", "limit", "stop_at"} -> {"id"}
    {"op": "wait", "id"} -> {"code" | "signal" | "stopped", "marks", "calls", "seconds", "said"}
    {"op": "go", "id"}   (a stopped trial goes on; wait for it again)

``kill`` is {"after": seconds} from the start, or {"mark", "after"}: seconds after a mark. Everything else: ``child``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from faults.child import play

LIMIT = 60.0
"""Seconds after which a trial counts as hung: it is killed, and its answer says "hung"."""


@dataclass
class Trial:
    """A forked process, the pipe on which it speaks, and what was heard."""

    pid: int
    pipe: int
    said: int
    kill: dict[str, Any]
    begun: float
    marks: dict[str, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    text: bytes = b""
    hung: bool = False

    def listen(self) -> bool:
        """Read what has come; False at the end."""
        data = os.read(self.pipe, 1 << 16)
        now = time.monotonic() - self.begun
        *lines, self.text = (self.text + data).split(b"\n")
        for line in lines:
            kind, _, name = line.decode().partition(" ")
            if kind == "mark":
                self.marks[name] = now
            else:
                self.calls.append(name)
        return bool(data)

    def deadline(self) -> float | None:
        """When it is to be killed, in seconds after its start; None if not yet known, or never."""
        if not self.kill:
            return None
        mark = self.kill.get("mark")
        start = 0.0 if mark is None else self.marks.get(mark)
        return None if start is None else start + float(self.kill["after"])

    def wait(self) -> dict[str, Any]:
        while True:
            now = time.monotonic() - self.begun
            at = self.deadline()
            if at is not None and now >= at:
                os.kill(self.pid, signal.SIGKILL)
                self.kill = {}
                at = None
            if now > LIMIT and not self.hung:
                os.kill(self.pid, signal.SIGKILL)
                self.hung = True
            pause = 0.02 if at is None else min(max(at - now, 0.0), 0.02)
            ready, _, _ = select.select([self.pipe], [], [], pause)
            if ready and not self.listen():
                _, status = os.waitpid(self.pid, 0)
                return self._ended(status)
            if not ready:
                pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
                if pid and os.WIFSTOPPED(status):
                    return {"stopped": True, "marks": self.marks}
                if pid:
                    while self.listen():
                        pass
                    return self._ended(status)

    def _ended(self, status: int) -> dict[str, Any]:
        seconds = time.monotonic() - self.begun
        how = {"code": os.WEXITSTATUS(status)} if os.WIFEXITED(status) else {"signal": os.WTERMSIG(status)}
        text = os.pread(self.said, 1 << 20, 0).decode(errors="replace")
        os.close(self.said)
        os.close(self.pipe)
        return {**how, "hung": self.hung, "marks": self.marks, "calls": self.calls, "seconds": seconds, "said": text}


def start(request: dict[str, Any]) -> Trial:
    reader, writer = os.pipe()
    said, name = tempfile.mkstemp()
    os.unlink(name)  # noqa: PTH108
    begun = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Trial(pid, reader, said, dict(request.get("kill") or {}), begun)
    code = 98
    try:
        os.close(reader)
        write = os.write  # before it is replaced
        counting = bool(request.get("counting"))

        def say(kind: str, text: str) -> None:
            if kind == "mark" or counting:
                write(writer, f"{kind} {text}\n".encode())

        code = play(request, say, said)
    finally:
        os._exit(code)
    raise AssertionError


def warm() -> None:
    """Import what commands import when they are called."""
    from importlib import import_module

    for name in ("cli.main", "cli.vectors", "cli.models", "cli.unique", "cli.look", "api.decompose", "api.export",
                 "api.apply", "api.lora", "api.merge", "api.mix", "api.negate", "api.extract", "api.references",
                 "core.findings", "io.folder"):
        import_module(f"devec.{name}")
    for name in ("torch", "yaml", "rich.console", "rich.table", "rich.progress"):
        import_module(name)


def main() -> None:
    warm()
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    trials: dict[int, Trial] = {}
    os.write(answer, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any] = {}
        if request["op"] == "start":
            trial = start(request)
            trials[trial.pid] = trial
            reply = {"id": trial.pid}
        elif request["op"] == "go":
            os.kill(request["id"], signal.SIGCONT)
        else:
            reply = trials[request["id"]].wait()
            if "stopped" not in reply:
                del trials[request["id"]]
        os.write(answer, (json.dumps(reply) + "\n").encode())
    for pid in trials:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
