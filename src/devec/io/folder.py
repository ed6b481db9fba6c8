"""Outputs that appear whole or not at all.

Everything is written beside its final place, flushed to the disk, and renamed. Nothing stands under the final name
before that, an error or an interrupt leaves nothing behind, and an old output is given up only once the new one has
taken its place.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from devec.core.errors import RefusedError
from devec.io.disk import refusing, sync


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


class OutputFolder:
    """A folder that is written under a temporary name and renamed when the ``with`` block ends well.

    ``path`` is where to write. ``inputs`` are files and folders that must stay as they are.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
        expected_bytes: int | None = None,
    ) -> None:
        self.out = Path(out)
        self.overwrite = overwrite
        check_output(self.out, overwrite=overwrite, inputs=inputs, expected_bytes=expected_bytes)
        self.path = _beside(self.out, "partial")

    def __enter__(self) -> OutputFolder:
        with refusing(self.out):
            self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            _discard(self.path)
            return
        try:
            with refusing(self.out):
                _sync_tree(self.path)
                _rename(self.path, self.out, self.overwrite)
        except BaseException:
            _discard(self.path)
            raise


@contextmanager
def output_file(
    out: Path, *, overwrite: bool = False, inputs: Sequence[Path] = (), expected_bytes: int | None = None
) -> Iterator[Path]:
    """A single file that is written under a temporary name and renamed when the ``with`` block ends well."""
    out = Path(out)
    check_output(out, overwrite=overwrite, inputs=inputs, expected_bytes=expected_bytes)
    partial = _beside(out, "partial")
    try:
        yield partial
        with refusing(out):
            sync(partial)
            _rename(partial, out, overwrite)
    except BaseException:
        _discard(partial)
        raise


def _beside(out: Path, what: str) -> Path:
    place = out.absolute()
    return place.with_name(f"{place.name}.{what}-{secrets.token_hex(4)}")


def _rename(partial: Path, out: Path, overwrite: bool) -> None:
    """Put ``partial`` in the place of ``out``; what was there is moved aside first and deleted last."""
    final, aside = out.absolute(), _beside(out, "replaced")
    if os.path.lexists(final) and not overwrite:
        raise RefusedError("the output appeared while it was being written", file=out, remedy="Choose another -o.")
    try:
        if os.path.lexists(final):
            final.rename(aside)
        partial.rename(final)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(final):
            aside.rename(final)
        raise
    try:
        sync(final.parent)
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
