"""Inside a forked trial: marks of progress for whoever measures, and faults in the calls that change the disk.

A call is named by what it does to which file and for which time (``pwrite out.partial-run/model.safetensors #2``), not
by its number in the run, so that threads may overtake one another and it is still the same call.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

WRITES = ("write", "pwrite")
PATHS = ("mkdir", "rename", "replace", "unlink", "rmdir")
FILES = ("fsync", "ftruncate")

Say = Callable[[str, str], None]


class Disk:
    """Takes the place of the calls of ``os`` that change the disk; one of them, or from one on all, may fail.

    ``renamed()`` is called once something stands under the name ``out``.
    """

    def __init__(
        self, say: Say, renamed: Callable[[], None], out: str, fault: dict[str, Any] | None, short: bool
    ) -> None:
        self._say, self._renamed, self._out = say, renamed, out
        self._fault, self._short = fault or {}, short
        self._seen: Counter[str] = Counter()
        self._names: dict[int, str] = {}
        self._full = False
        self._lock = Lock()
        self._here = str(Path.cwd())

    def install(self, swap: bool) -> None:
        from devec.io import temporary

        temporary.exchange = self._exchange(temporary.exchange) if swap else lambda one, other: False
        self._open, self._close = os.open, os.close
        os.open, os.close = self._opened, self._closed  # type: ignore[assignment]
        for name in WRITES:
            setattr(os, name, self._writing(name, getattr(os, name)))
        for name in PATHS:
            setattr(os, name, self._moving(name, getattr(os, name)))
        for name in FILES:
            setattr(os, name, self._flushing(name, getattr(os, name)))

    def _path(self, path: Any, dir_fd: int | None = None) -> str:
        """A path as a trial knows it: from its folder, without what differs from run to run."""
        text = os.fspath(path)
        if dir_fd is not None:
            text = os.path.join(self._names.get(dir_fd, "?"), text)  # noqa: PTH118
        text = os.path.relpath(os.path.join(self._here, text), self._here)  # noqa: PTH118
        return re.sub(r"(plan\.json\.)\d+|(\.replaced-)[0-9a-f]+", lambda m: f"{m[1] or m[2]}N", text)

    def _meet(self, what: str, half: Callable[[], object] | None = None) -> None:
        """Called before each call: the fault that is planned for it, if any."""
        with self._lock:
            self._seen[what] += 1
            call = f"{what} #{self._seen[what]}"
            self._say("call", call)
            mine = call == self._fault.get("call")
            self._full = self._full or (mine and self._fault["kind"] == "full")
        if mine:
            self._say("mark", "met")
        kind = self._fault.get("kind", "")
        if mine and kind.startswith("kill"):
            if kind == "kill half" and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._full and half is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if mine and kind in ("ENOSPC", "EIO"):
            number = getattr(errno, kind)
            raise OSError(number, os.strerror(number))

    def _opened(self, path: Any, flags: int, *more: Any, dir_fd: int | None = None, **named: Any) -> int:
        name = self._path(path, dir_fd)
        if flags & os.O_CREAT:
            self._meet(f"open {name}")
        fd = self._open(path, flags, *more, dir_fd=dir_fd, **named)
        self._names[fd] = name
        return fd

    def _closed(self, fd: int) -> None:
        self._names.pop(fd, None)
        self._close(fd)

    def _writing(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, data: Any, *at: int) -> int:
            part = memoryview(data)[: max(len(data) // 2, 1)]
            self._meet(f"{name} {self._names.get(fd, '?')}", lambda: real(fd, part, *at))
            return real(fd, part if self._short else data, *at)

        return call

    def _moving(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *more: Any, **named: Any) -> None:
            target = f" -> {self._path(more[0])}" if name in ("rename", "replace") else ""
            self._meet(f"{name} {self._path(path, named.get('dir_fd'))}{target}")
            real(path, *more, **named)
            if target == f" -> {self._out}":
                self._renamed()

        return call

    def _flushing(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(fd: int, *more: Any) -> None:
            self._meet(f"{name} {self._names.get(fd, '?')}")
            real(fd, *more)

        return call

    def _exchange(self, real: Callable[[Path, Path], bool]) -> Callable[[Path, Path], bool]:
        def call(one: Path, other: Path) -> bool:
            try:
                self._meet(f"exchange {self._path(other)}")
            except OSError:
                return False
            done = real(one, other)
            self._renamed()
            return done

        return call


MARKS = ("open", "tensor", "finish", "sync", "renamed", "end")
"""In this order: the temporary folder stands, a tensor is finished, all are, everything is flushed, it is renamed.

One more, ``entered``: a tensor is in the journal (not all commands have one).
"""


def install_marks(say: Say, stop_at: str | None) -> Callable[[str], None]:
    """Say when a run reaches a mark for the first time; at ``stop_at`` the process stops until it is told to go on.

    Returns the function that says so, for marks that are met elsewhere.
    """
    from devec.io import artifact, folder, journal, shards, writer

    met: set[str] = set()

    def mark(name: str) -> None:
        if name not in met:
            met.add(name)
            say("mark", name)
            if name == stop_at:
                os.kill(os.getpid(), signal.SIGSTOP)

    def before(owner: Any, function: str, name: str, when: Callable[..., bool] = lambda *a, **k: True) -> None:
        real = getattr(owner, function)

        def call(*args: Any, **named: Any) -> Any:
            if when(*args, **named):
                mark(name)
            return real(*args, **named)

        setattr(owner, function, call)

    def after(owner: Any, function: str, name: str) -> None:
        real = getattr(owner, function)

        def call(*args: Any, **named: Any) -> Any:
            found = real(*args, **named)
            mark(name)
            return found

        setattr(owner, function, call)

    after(folder.OutputFolder, "__enter__", "open")
    after(journal.Journal, "append", "tensor")
    after(journal.Journal, "append", "entered")
    after(writer.SafetensorsWriter, "mark", "tensor")
    before(shards.ShardWriter, "close", "finish")
    before(artifact, "write_decomposition", "finish")
    before(writer.SafetensorsWriter, "close", "finish", lambda _self, sync=True: sync)
    before(folder, "sync_tree", "sync")
    return mark


def play(request: dict[str, Any], say: Say, said: int) -> int:
    """Run one command in this process; returns its exit code. ``said`` takes standard output and error."""
    os.chdir(request["folder"])
    os.dup2(said, 1)
    os.dup2(said, 2)
    if request.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    mark = install_marks(say, request.get("stop_at"))
    disk = Disk(say, lambda: mark("renamed"), request["out"], request.get("fault"), bool(request.get("short")))
    disk.install(request.get("swap", True))
    try:
        from devec.cli.main import run

        code = run(request["words"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    mark("end")
    return code
