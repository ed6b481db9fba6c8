"""The temporary folder beside an output::

    OUT.partial-run/    locked by the run that writes OUT
        .run/           plan and journals, see ``io.journal``
        output/         becomes OUT, or holds the file that does; when that is gone, the run is over
        aside           the old output while two paths cannot be exchanged in one step: it goes back if that fails

It is named after the output, so that whoever comes later finds it, and lies in the same folder, so that a rename is all
that is left to do at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from devec.core.errors import RefusedError
from devec.io.disk import refusal, sync
from devec.io.exchange import exchange
from devec.io.journal import RUN, Finished, lock, read_lines

DATA, ASIDE = "output", "aside"


def temporary(out: Path) -> Path:
    """Where an output is while it is being written."""
    place = Path(out).absolute()
    return place.with_name(f"{place.name}.partial-run")


def tidy(place: Path) -> None:
    """Delete what a run had not yet deleted when it was killed after its last step; nobody could go on with it."""
    if not place.is_dir() or finished_in(place):
        return
    with suppress(OSError):
        fd = os.open(place, os.O_RDONLY)
        try:
            if lock(fd, shared=False):
                discard(place)
        finally:
            os.close(fd)


def bytes_in(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk (holes take none)."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0


def finished_in(place: Path, part: str = "*") -> int:
    """How many tensors of a temporary folder can be gone on with."""
    journals = (place / RUN).glob(f"journal{part}.jsonl")
    return still_there(place, [record for path in journals for record in read_lines(path)[0].values()])


def still_there(place: Path, records: Iterable[Finished]) -> int:
    """How many finished tensors still have their file. None once the output is taken away: the run is over then."""
    if not (place / DATA).is_dir():
        return 0
    files = {path.name for folder in (DATA, RUN) for path in (place / folder).rglob("*") if path.is_file()}
    return sum(record.file in files for record in records)


def empty(folder: Path, but: AbstractSet[str] = frozenset()) -> None:
    """Remove everything else, or fail: what stays would become part of the output."""
    for path in folder.iterdir():
        if path.name not in but:
            _remove(path)


def replace(new: Path, out: Path, aside: Path, overwrite: bool) -> None:
    """Put ``new`` in the place of ``out``, in one step where the system can.

    What was there is at ``new`` then, or at ``aside``.
    """
    if not os.path.lexists(out):
        new.rename(out)
        return
    if not overwrite:
        raise RefusedError(
            "the output appeared while it was being written", file=out, passing=True,
            remedy="Move it away, or replace it with --overwrite.",
        )
    if exchange(new, out):
        return
    out.rename(aside)
    try:
        new.rename(out)
    except BaseException:
        aside.rename(out)
        raise


def sync_tree(folder: Path) -> None:
    """Flush every file. One that the disk would not confirm is removed: the system may hold in memory what is not on
    the disk, and say nothing when it is flushed again."""
    for place, _folders, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            try:
                sync(path)
            except OSError as error:
                with suppress(OSError):
                    path.unlink()
                raise refusal(error, path) from error
        sync(Path(place))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(place: Path) -> None:
    """Remove a temporary folder that nothing depends on any more; what cannot be removed stays."""
    shutil.rmtree(place, ignore_errors=True)
