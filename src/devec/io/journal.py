"""What an unfinished output remembers: which command it belongs to, and every tensor that is finished.

Both lie in ``.run`` inside the temporary folder and go away with it. A journal line is written once the bytes that it
speaks of are, and names their hash, so that whoever goes on can see whether they are still there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from devec.core.errors import IncompatibleError, InputError, RefusedError
from devec.io.disk import refusing, write_file

RUN = ".run"
PLAN = "plan.json"

AGAIN = "begin again with --overwrite"
SHARDS_AGAIN = "delete OUT.partial-run and run every part again"
"""How a run is begun anew: one part of several may not delete what the others have done, whatever it is given."""

RESTORE = "Restore it and go on with --resume, or {again}."


@dataclass(frozen=True)
class Finished:
    """One journal line: a tensor as it was written, and the hashes of inputs found on the way.

    ``digest`` BLAKE3 hash of the tensor's bytes; of a file of factors the file's SHA-256
    ``inputs`` number of the input -> tensor name -> BLAKE3 hash of its bytes there.
    """

    name: str
    file: str
    digest: str
    bytes: int
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on where another stopped.

    ``command``  the resolved recipe of the command, and the versions that decide its numbers
    ``outputs``  digest of the names, shapes, dtypes and files of all tensors to be written
    ``inputs``   every input file -> its size and time of change
    ``words``    the command line, from which ``devec join`` finishes the run, and the folder that it was given in
    """

    command: Mapping[str, Any]
    outputs: str
    inputs: Mapping[str, list[int]]
    words: tuple[str, ...] = ()
    place: str = ""

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def stamp(paths: Iterable[Path], again: str = AGAIN) -> dict[str, list[int]]:
    """Size and time of change (ns) of each file; of a folder, of every file directly in it."""
    found: dict[str, list[int]] = {}
    for path in paths:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                status = file.stat()
            except OSError as error:
                text = f"an input vanished: {error.strerror}"
                remedy = RESTORE.format(again=again)
                raise InputError(text, file=file, remedy=remedy, passing=True) from None
            found[str(file.absolute())] = [status.st_size, status.st_mtime_ns]
    return found


def check_unchanged(before: Mapping[str, list[int]], again: str = AGAIN) -> None:
    """Raises IncompatibleError (exit 4) for a file that is not what it was when the run began."""
    for name, then in before.items():
        now = stamp([Path(name)], again)[str(Path(name).absolute())]
        if now != then:
            raise IncompatibleError(
                "an input was changed while it was read",
                values={"size then": then[0], "size now": now[0], "changed": _later(then[1], now[1])},
                file=name, remedy=RESTORE.format(again=again), passing=True,
            )


def _later(then: int, now: int) -> str:
    return "no" if now == then else f"{(now - then) / 1e9:+.3f} s"


class Journal:
    """The finished tensors of one run, or of one shard of a run that several processes share.

    ``inputs`` are the files that tensors are made of, as :func:`stamp` found them: what was made after one of them
    changed is not entered. Raises RefusedError when another process holds the same journal.
    """

    def __init__(self, folder: Path, part: str = "", inputs: Mapping[str, list[int]] | None = None) -> None:
        self.path = folder / f"journal{part}.jsonl"
        self.inputs = inputs or {}
        self.again = SHARDS_AGAIN if part else AGAIN
        with refusing(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            if not lock(self._fd, shared=False):
                os.close(self._fd)
                raise RefusedError(
                    "another process writes this part of the output", file=self.path,
                    remedy="Wait for it, or give each process its own --shard-of.",
                )
            try:
                self.finished, whole = read_lines(self.path)
                os.ftruncate(self._fd, whole)  # a line that was cut short by the end of its process
            except BaseException:
                os.close(self._fd)
                raise

    def append(self, record: Finished) -> None:
        """Remember one more tensor. The line is written at once, in a single call."""
        # Else the file might be put back, and its strange numbers taken for finished.
        check_unchanged(self.inputs, self.again)
        line = json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":")) + "\n"
        with refusing(self.path):
            data = memoryview(line.encode())
            while data:
                data = data[os.write(self._fd, data) :]
        self.finished[record.name] = record

    def forget(self, names: Iterable[str]) -> None:
        """Strike tensors whose bytes are not what was written."""
        for name in names:
            self.finished.pop(name, None)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_lines(path: Path) -> tuple[dict[str, Finished], int]:
    """The records of a journal, the last of each name, and the length of its whole lines in bytes."""
    found: dict[str, Finished] = {}
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                record = Finished(**json.loads(line))
            except (ValueError, TypeError):
                break
            found[record.name] = record
            whole += len(line)
    return found, whole


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The identity of the run that began in a temporary folder; ``None`` if none did, or it cannot be read."""
    try:
        plan = json.loads((folder / RUN / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def write_plan(folder: Path, identity: Identity) -> None:
    """Record what is being written. Appears whole, and the same whoever of several processes is first."""
    place = folder / RUN
    with refusing(place):
        place.mkdir(exist_ok=True)
        partial = place / f"{PLAN}.{os.getpid()}"
        partial.unlink(missing_ok=True)
        write_file(partial, json.dumps(identity.as_dict(), ensure_ascii=False).encode())
        partial.replace(place / PLAN)


def check_same_run(folder: Path, plan: Mapping[str, Any], identity: Identity, again: str = AGAIN) -> None:
    """Raises for an unfinished run of another command (exit 2 of the user's words: here exit 4) or of other inputs."""
    wanted = identity.as_dict()
    for name in sorted(set(plan.get("inputs", {})) | set(wanted["inputs"])):
        then, now = plan.get("inputs", {}).get(name), wanted["inputs"].get(name)
        if then != now:
            raise IncompatibleError(
                "an input is not what it was when the unfinished run began",
                values={"then": _stamped(then), "now": _stamped(now)}, file=name, remedy=RESTORE.format(again=again),
            )
    for key in ("command", "outputs"):
        if plan.get(key) != wanted[key]:
            raise IncompatibleError(
                "the unfinished run belongs to another command or version",
                values=_differences(plan.get(key), wanted[key]), file=folder,
                remedy=f"Give the command that began it, with --resume, or {again}.",
            )


def _stamped(value: list[int] | None) -> str:
    return "not an input" if value is None else f"{value[0]:,} bytes, changed at {value[1] / 1e9:.3f}"


def _differences(then: Any, now: Any) -> dict[str, object]:
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return {"then": then, "now": now}
    unlike = [k for k in sorted(set(then) | set(now)) if then.get(k) != now.get(k)]
    return {f"{k} then": then.get(k) for k in unlike[:1]} | {f"{k} now": now.get(k) for k in unlike[:1]}


def lock(fd: int, *, shared: bool) -> bool:
    """Take an advisory lock that ends with the process. False if another process holds it.

    A file system without locks gives none: then two runs into one place are found out only when the second renames.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
