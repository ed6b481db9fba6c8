"""Outputs that appear whole or not at all.

Everything is written beside its final place, flushed to the disk, and renamed. Nothing stands under the final name
before that, and an old output is given up only once the new one has taken its place. What an interrupted run had
finished waits under the temporary name for ``--resume``; ``io.temporary`` says how.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from devec.core.errors import DevecError, RefusedError, RunInterrupted, SideStepError, resumable
from devec.io.disk import refusing, sync
from devec.io.journal import (
    AGAIN,
    RUN,
    SHARDS_AGAIN,
    Identity,
    Journal,
    check_same_run,
    lock,
    read_lines,
    read_plan,
    write_plan,
)
from devec.io.temporary import (
    ASIDE,
    DATA,
    bytes_in,
    discard,
    empty,
    finished_in,
    replace,
    still_there,
    sync_tree,
    temporary,
    tidy,
)


def check_output(
    out: Path, *, overwrite: bool, inputs: Sequence[Path] = (), expected_bytes: int | None = None,
    judged: bool = False,
) -> None:
    """Every reason to refuse an output place before anything is computed (exit 5, nothing written).

    Refused: an existing ``out`` without ``overwrite`` (unless it is ``judged`` later, see ``io.complete``); one that
    is, contains, or lies inside an input; one whose replacement would delete the working folder, the home folder, a
    file-system root or a version-controlled folder; a parent that is missing or not writable; a disk with less free
    space than ``expected_bytes``.
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
            tidy(temporary(real))
            if judged:
                return
            raise exists(out)
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


def exists(out: Path, unlike: str | None = None) -> RefusedError:
    """The refusal of a place that is taken; ``unlike`` says why what stands there is not what the command writes."""
    return RefusedError(
        "the output exists already", values={} if unlike is None else {"not what this command writes": unlike},
        file=out, remedy="Choose another -o, or replace it with --overwrite.",
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
    def again(self) -> str:
        """How the user begins anew."""
        return AGAIN if self.shard is None else SHARDS_AGAIN

    @property
    def part(self) -> str:
        """What this process's journal is called after."""
        return "" if self.shard is None else f"-{self.shard[0]}-of-{self.shard[1]}"


class OutputFolder:
    """A folder that is written under a temporary name and renamed when the ``with`` block ends well.

    ``path`` is where to write. ``inputs`` are files and folders that must stay as they are. One process at a time
    writes an output (or, with shards, one per shard); a second is refused. With ``run`` the finished tensors are in
    ``journal`` (and ``kept`` is a folder for what else they need), and an interrupt, a full disk or a vanished input
    leaves them for ``--resume``; everything else leaves nothing. With ``single`` the result is the one file
    ``path / out.name``.
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
        self.place = temporary(self.out)
        self.path = self.place / DATA
        self.kept = self.place / RUN
        self.journal: Journal | None = None
        self._lock = -1
        if expected_bytes is not None and run is not None and (run.resume or run.shard or run.join):
            expected_bytes = max(expected_bytes - bytes_in(self.path), 0)
        check_output(self.out, overwrite=overwrite, inputs=inputs, expected_bytes=expected_bytes)

    def __enter__(self) -> OutputFolder:
        with refusing(self.out):
            self._take()
        try:
            with refusing(self.out):
                self._prepare()
        except BaseException as error:
            try:
                done = finished_in(self.place)
                if done and resumable(error):
                    self._tell(error, done)
                elif not done and (self.run is None or self.run.shard is None):
                    self._drop()
            finally:
                if self.journal is not None:
                    self.journal.close()
                self._let_go()
            raise
        return self

    def _take(self) -> None:
        """Make the temporary folder, or take over one that nobody holds any more."""
        shared = self.run is not None and self.run.shard is not None
        while True:
            if not self.place.exists():
                with suppress(FileExistsError):
                    self.place.mkdir()
            try:
                self._lock = os.open(self.place, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its owner has just finished
            if not lock(self._lock, shared=shared):
                self._let_go()
                raise RefusedError(
                    "another run is writing this output", file=self.out, remedy="Wait for it, or choose another -o."
                )
            if self._holds():
                return
            self._let_go()

    def _holds(self) -> bool:
        """Whether the temporary folder is the one that was locked, and no later one of the same name."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self.place.stat(), os.fstat(self._lock))
        return False

    def _prepare(self) -> None:
        self._restore()
        run, done = self.run, finished_in(self.place)
        plan = read_plan(self.place) if self.path.is_dir() else None
        if run is not None and run.shard is not None:
            if plan is not None:
                check_same_run(self.place, plan, run.identity, run.again)
            if not run.resume and (own := finished_in(self.place, run.part)):
                raise self._unfinished(own)
        elif plan is not None and done and run is not None and (run.resume or run.join):
            check_same_run(self.place, plan, run.identity)
        elif plan is not None and done and not self.overwrite:
            raise self._unfinished(done)
        else:
            empty(self.place)
        self.path.mkdir(exist_ok=True)
        if run is None:
            return
        write_plan(self.place, run.identity)
        if run.join and done == 0:
            raise RefusedError("no shard has written anything", file=self.out, remedy="Run the shards first.")
        self.journal = Journal(self.kept, run.part, run.identity.inputs)
        if run.shard is None:
            for part in sorted(self.kept.glob("journal-*.jsonl")):
                self.journal.finished |= read_lines(part)[0]
            # What the end of an earlier run had written besides weights is written anew.
            empty(self.path, {record.file for record in self.journal.finished.values()})

    def _restore(self) -> None:
        """An old output that was put aside goes back if its successor has not come: it is the only one there is."""
        aside = self.place / ASIDE
        if os.path.lexists(aside) and not os.path.lexists(self.out):
            aside.rename(self.out)
            if not self.overwrite:
                raise exists(self.out)

    def _unfinished(self, done: int) -> RefusedError:
        again = AGAIN if self.run is None else self.run.again
        return RefusedError(
            "an unfinished run of this output is kept", values={"finished tensors": done}, file=self.place,
            remedy=f"Go on with --resume, or {again}.",
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
        out = self.out.absolute()
        try:
            with refusing(self.out):
                sync_tree(self.path)
                replace(self.path / out.name if self.single else self.path, out, self.place / ASIDE, self.overwrite)
        except BaseException as error:
            self._failed(error)
            raise
        try:
            for name in (DATA, ASIDE):  # while they are deleted, nobody takes them for what they were
                with suppress(OSError):
                    (self.place / name).rename(self.place / f"{name}-over")
            sync(out.parent)
        except OSError as error:
            raise RefusedError(
                "the output is in place, but the disk did not confirm it", values={"reason": error.strerror},
                file=self.out, remedy="Check the disk, and the output with devec verify.",
            ) from error
        except KeyboardInterrupt:
            raise RunInterrupted("the output was complete already") from None
        finally:
            discard(self.place)
        if self._holds():
            raise SideStepError(
                "the output is in place, but its temporary folder could not be deleted", file=self.place,
                remedy="Delete it.",
            )

    def _failed(self, error: BaseException) -> None:
        """Keep what is finished for --resume where that helps, and say so; otherwise leave nothing."""
        found = {} if self.journal is None else self.journal.finished
        done = still_there(self.place, found.values())  # what the disk would not confirm is gone
        alone = self.run is None or not (self.run.shard or self.run.join)
        if done and (resumable(error) or not alone):
            self._tell(error, done)
        elif alone:
            self._drop()

    def _tell(self, error: BaseException, done: int) -> None:
        """Add to whatever is raised what is kept and how to go on."""
        how = "give devec join" if self.run is not None and self.run.join else "give the same command with --resume"
        text = f"{done} tensors are finished and kept: {how} to go on"
        if isinstance(error, KeyboardInterrupt):
            raise RunInterrupted(text) from None
        sentence = f"{text[0].upper()}{text[1:]}."
        if not isinstance(error, DevecError):
            error.add_note(sentence)
            return
        error.remedy = f"{error.remedy or ''} {sentence}".strip()
        if error.file is not None and Path(error.file).is_relative_to(self.place):
            error.file = str(self.out)

    def _drop(self) -> None:
        """Leave nothing, but for an old output that could not go back to its place."""
        if os.path.lexists(self.out) or not os.path.lexists(self.place / ASIDE):
            discard(self.place)

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
