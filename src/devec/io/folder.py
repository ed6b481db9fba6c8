"""Outputs that appear whole or not at all.

Everything is written beside its final place, flushed to the disk, and renamed. Nothing stands under the final name
before that, and an old output is given up only once the new one has taken its place. What an interrupted run had
finished waits under the temporary name for ``--resume``.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from devec.core.errors import DevecError, RefusedError, RunInterrupted, resumable
from devec.io.disk import refusing, sync
from devec.io.exchange import exchange
from devec.io.journal import RUN, Identity, Journal, check_same_run, lock, read_lines, read_plan, write_plan


def check_output(
    out: Path, *, overwrite: bool, inputs: Sequence[Path] = (), expected_bytes: int | None = None
) -> None:
    """Every reason to refuse an output place before anything is computed (exit 5, nothing written).

    Refused: an existing ``out`` without ``overwrite``; one that is, contains, or lies inside an input; one whose
    replacement would delete the working folder, the home folder, a file-system root or a version-controlled folder;
    a parent that is missing or not writable; a disk with less free space than ``expected_bytes``.
    """
    parent = out.absolute().parent
    if not parent.is_dir():
        raise RefusedError(
            "the output's parent folder does not exist", file=parent, remedy="Create it, or choose another -o."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedError(
            "the output's parent folder is not writable", file=parent, remedy="Give -o a place that you may write to."
        )
    real = parent.resolve() / out.name
    for source in inputs:
        _refuse_input(out, real.resolve(), Path(source).resolve())
    if os.path.lexists(real):
        if not overwrite:
            raise RefusedError(
                "the output exists already", file=out, remedy="Choose another -o, or replace it with --overwrite."
            )
        _refuse_precious(out, real)
    if expected_bytes is not None:
        with refusing(parent):
            free = shutil.disk_usage(parent).free
        if free < expected_bytes:
            raise RefusedError(
                "not enough space on the disk",
                values={"needed": f"{expected_bytes:,} bytes", "free": f"{free:,} bytes"}, file=parent,
                remedy="Free some space, or give -o a place on another disk.",
            )


def _refuse_input(out: Path, real: Path, source: Path) -> None:
    inside_folder = source.is_dir() and source in real.parents
    if real == source or real in source.parents or inside_folder:
        raise RefusedError(
            "the output would change an input", values={"input": source.name}, file=out, remedy="Choose another -o."
        )


def _refuse_precious(out: Path, real: Path) -> None:
    if real.is_symlink() or not real.is_dir():
        return
    here, home = Path.cwd().resolve(), Path.home().resolve()
    if real.is_mount() or (real / ".git").exists() or any(p == real or real in p.parents for p in (here, home)):
        raise RefusedError(
            "this folder is not one that --overwrite may delete", file=out, remedy="Choose another -o."
        )


@dataclass(frozen=True)
class Run:
    """A run that may be gone on with: what it is, and how this process takes part in it.

    ``shard`` (i, n) makes this process one of n that fill the same output; ``join`` finishes what they filled.
    """

    identity: Identity
    resume: bool = False
    shard: tuple[int, int] | None = None
    join: bool = False

    @property
    def part(self) -> str:
        """What this process's journal is called after."""
        return "" if self.shard is None else f"-{self.shard[0]}-of-{self.shard[1]}"


class OutputFolder:
    """A folder that is written under a temporary name and renamed when the ``with`` block ends well.

    ``path`` is where to write. ``inputs`` are files and folders that must stay as they are. One process at a time
    writes an output (or, with shards, one per shard); a second is refused. With ``run`` the finished tensors are in
    ``journal``, and an interrupt, a full disk or a vanished input leaves them for ``--resume``; everything else leaves
    nothing. With ``single`` the result is the one file ``path / out.name``.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
        expected_bytes: int | None = None,
        run: Run | None = None,
        single: bool = False,
    ) -> None:
        self.out = Path(out)
        self.overwrite, self.run, self.single = overwrite, run, single
        place = self.out.absolute()
        self.path = place.with_name(f"{place.name}.partial-run")
        self.journal: Journal | None = None
        self._lock = -1
        if expected_bytes is not None and run is not None and (run.resume or run.shard or run.join):
            expected_bytes = max(expected_bytes - _bytes_in(self.path), 0)
        check_output(self.out, overwrite=overwrite, inputs=inputs, expected_bytes=expected_bytes)

    def __enter__(self) -> OutputFolder:
        with refusing(self.out):
            self._take()
        try:
            self._prepare()
        except BaseException:
            if not _finished_in(self.path) and (self.run is None or self.run.shard is None):
                _discard(self.path)
            self._let_go()
            raise
        return self

    def _take(self) -> None:
        """Make the temporary folder, or take over one that nobody holds any more."""
        shared = self.run is not None and self.run.shard is not None
        while True:
            with suppress(FileExistsError):
                self.path.mkdir()
            try:
                self._lock = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its owner has just finished
            if not lock(self._lock, shared=shared):
                self._let_go()
                raise RefusedError(
                    "another run is writing this output", file=self.out, remedy="Wait for it, or choose another -o."
                )
            now = self.path.stat() if self.path.exists() else None
            if now is not None and os.path.samestat(now, os.fstat(self._lock)):
                return
            self._let_go()

    def _prepare(self) -> None:
        run, plan = self.run, read_plan(self.path)
        done = _finished_in(self.path) if plan is not None else 0
        if run is not None and run.shard is None and (run.resume or run.join) and plan is not None:
            check_same_run(self.path, plan, run.identity)
        elif run is not None and run.shard is not None and plan is not None:
            check_same_run(self.path, plan, run.identity)
            if not run.resume and _finished_in(self.path, run.part):
                raise self._unfinished(_finished_in(self.path, run.part))
        elif done and not self.overwrite:
            raise self._unfinished(done)
        elif run is None or run.shard is None:
            _empty(self.path)
        if run is None:
            return
        write_plan(self.path, run.identity)
        if run.join and done == 0:
            raise RefusedError("no shard has written anything", file=self.path, remedy="Run the shards first.")
        self.journal = Journal(self.path / RUN, run.part)
        if run.shard is None:
            for part in sorted((self.path / RUN).glob("journal-*.jsonl")):
                self.journal.finished |= read_lines(part)[0]
            # What the end of an earlier run had written besides weights is written anew.
            _empty(self.path, {RUN, *(record.file for record in self.journal.finished.values())})

    def _unfinished(self, done: int) -> RefusedError:
        return RefusedError(
            "an unfinished run of this output is kept", values={"finished tensors": done}, file=self.path,
            remedy="Go on with --resume, or begin again with --overwrite.",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._failed(error)
            elif self.run is None or self.run.shard is None:
                self._finish()
        finally:
            if self.journal is not None:
                self.journal.close()
            self._let_go()

    def _finish(self) -> None:
        try:
            with refusing(self.out):
                _sync_tree(self.path)
                if self.journal is not None:
                    _discard(self.path / RUN)
                if self.single:
                    _replace(self.path / self.out.name, self.out.absolute(), self.overwrite)
                    _discard(self.path)
                else:
                    _replace(self.path, self.out.absolute(), self.overwrite)
        except BaseException as error:
            self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        """Keep what is finished for --resume where that helps, and say so; otherwise leave nothing."""
        if self.run is not None and (self.run.shard is not None or self.run.join):
            kept = self.run.shard is not None and self.journal is not None and len(self.journal.finished) > 0
        else:
            kept = self.journal is not None and bool(self.journal.finished) and resumable(error)
            if not kept and os.path.lexists(self.path):
                _discard(self.path)
        if not kept or self.journal is None or not os.path.lexists(self.path):
            return
        done = len(self.journal.finished)
        text = f"{done} tensors are finished and kept: give the same command with --resume to go on"
        if isinstance(error, KeyboardInterrupt):
            raise RunInterrupted(text) from None
        if isinstance(error, DevecError):
            error.remedy = f"{error.remedy or ''} {text[0].upper()}{text[1:]}.".strip()

    def _let_go(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@contextmanager
def output_file(
    out: Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    expected_bytes: int | None = None,
) -> Iterator[Path]:
    """A single file that is written under a temporary name and renamed when the ``with`` block ends well."""
    place = OutputFolder(out, overwrite=overwrite, inputs=inputs, expected_bytes=expected_bytes, single=True)
    with place as folder:
        yield folder.path / Path(out).name


def _bytes_in(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk (holes take none)."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0


def _finished_in(folder: Path, part: str = "*") -> int:
    """How many tensors the journals of a temporary folder call finished."""
    return sum(len(read_lines(p)[0]) for p in (folder / RUN).glob(f"journal{part}.jsonl"))


def _empty(folder: Path, but: AbstractSet[str] = frozenset()) -> None:
    for path in folder.iterdir():
        if path.name not in but:
            _discard(path)


def _replace(partial: Path, out: Path, overwrite: bool) -> None:
    """Put ``partial`` in the place of ``out``, in one step where the system can; what was there is deleted last."""
    if not os.path.lexists(out):
        partial.rename(out)
        sync(out.parent)
        return
    if not overwrite:
        raise RefusedError("the output appeared while it was being written", file=out, remedy="Choose another -o.")
    if exchange(partial, out):
        sync(out.parent)
        _discard(partial)
        return
    aside = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}")
    out.rename(aside)
    try:
        partial.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    try:
        sync(out.parent)
    finally:
        _discard(aside)


def _sync_tree(folder: Path) -> None:
    for place, _folders, files in os.walk(folder):
        for name in files:
            sync(Path(place) / name)
        sync(Path(place))


def _discard(path: Path) -> None:
    """Remove a file or folder; what cannot be removed stays, since an error is being reported already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
