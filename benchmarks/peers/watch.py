"""One command as a fresh process: wall time, processor time, and the peak memory of it and all its children."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

PERIOD = 0.02
"""Seconds between two looks at the process tree; a look at a tool of ten threads takes a quarter of a millisecond."""


@dataclass(frozen=True)
class Run:
    """``wall`` and ``cpu`` in seconds; ``peak`` and ``anonymous`` in bytes.

    ``peak`` is the largest sum, over the process tree, of resident memory (mapped file pages count), and at least the
    largest peak that the system itself recorded for one process, so that nothing between two looks is lost where there
    is one. ``anonymous`` is the largest sum that no file stands behind, between looks unseen.
    """

    wall: float
    cpu: float
    peak: int
    anonymous: int
    output: str


class CommandFailed(RuntimeError):
    """A benchmarked command did not end with exit code 0; the message ends with what it printed last."""


def watch(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Run:
    """Run a command to its end. Raises CommandFailed if it fails, OSError where /proc lacks what is needed."""
    with tempfile.TemporaryFile() as printed:
        begin = perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, env=env, cwd=cwd
        )
        ended = threading.Event()
        end: list[float] = []
        status: list[int] = []
        used: list[float] = []

        def wait() -> None:  # in a thread of its own, so that the time of the end does not wait for the next look
            _, code, usage = os.wait4(process.pid, 0)
            end.append(perf_counter())
            status.append(os.waitstatus_to_exitcode(code))
            used.append(usage.ru_utime + usage.ru_stime)
            ended.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        peak = anonymous = 0
        try:
            while True:
                seen = [memory(pid) for pid in tree(process.pid)]
                peak = max(peak, sum(m[0] for m in seen), *(m[2] for m in seen), 0)
                anonymous = max(anonymous, sum(m[1] for m in seen))
                if ended.wait(PERIOD):
                    break
        except BaseException:
            if not ended.is_set():
                process.kill()
            raise
        finally:
            waiter.join()
            process.returncode = status[0]  # taken by wait4, so that Popen does not look for it
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if status[0] != 0:
        raise CommandFailed(f"exit code {status[0]}: {' '.join(command)}\n{output[-4000:]}")
    return Run(end[0] - begin, used[0], peak, anonymous, output)


def tree(pid: int) -> Iterator[int]:
    """A process and all its descendants that live now."""
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return
    for thread in threads:
        try:
            children = (thread / "children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children.split():
            yield from tree(int(child))


def memory(pid: int) -> tuple[int, int, int]:
    """Resident bytes of a process, those of them that no file stands behind, and the most it ever had resident;
    zeros once it is gone."""
    fields = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name] = value
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0, 0
    rss, anonymous, most = (int(fields.get(n, "0 kB").split()[0]) << 10 for n in ("VmRSS", "RssAnon", "VmHWM"))
    return rss, anonymous, most
