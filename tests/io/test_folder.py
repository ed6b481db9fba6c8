"""Outputs appear whole or not at all, and never in the place of an input."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from devec.core.errors import RefusedError, SideStepError
from devec.io.disk import write_file
from devec.io.folder import OutputFolder, output_file


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _fill(folder: OutputFolder, text: bytes = b"new") -> None:
    (folder.path / "sub").mkdir()
    write_file(folder.path / "sub" / "a.txt", text)


def test_nothing_under_the_final_name_until_the_end(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out) as folder:
        _fill(folder)
        assert not out.exists()
        assert folder.path.is_relative_to(tmp_path / "out.partial-run")
    assert _tree(tmp_path) == {"out/sub/a.txt": b"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupt_or_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), OutputFolder(tmp_path / "out") as folder:
        _fill(folder)
        raise error
    with pytest.raises(error), output_file(tmp_path / "out.bin") as path:
        write_file(path, b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_with_overwrite_keeps_the_old_output(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out) as folder:
        _fill(folder, b"old")
    with pytest.raises(KeyboardInterrupt), OutputFolder(out, overwrite=True) as folder:
        _fill(folder)
        raise KeyboardInterrupt
    assert _tree(tmp_path) == {"out/sub/a.txt": b"old"}


@pytest.mark.parametrize("kind", ["file", "folder", "full folder", "dangling link"])
def test_an_existing_output_is_refused_and_untouched(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "full folder":
            (out / "mine").write_bytes(b"mine")
    before = _tree(tmp_path)
    with pytest.raises(RefusedError, match=r"exists already.*--overwrite") as error:
        OutputFolder(out)
    with pytest.raises(RefusedError, match="exists already"), output_file(out):
        pass
    assert error.value.exit_code == 5
    assert _tree(tmp_path) == before and os.path.lexists(out)


def test_overwrite_replaces_folders_and_files_whole(tmp_path):
    out, single = tmp_path / "out", tmp_path / "x.bin"
    out.mkdir()
    (out / "stale").write_bytes(b"old")
    single.write_bytes(b"old")
    with OutputFolder(out, overwrite=True) as folder:
        _fill(folder)
        assert (out / "stale").exists()
    with output_file(single, overwrite=True) as path:
        write_file(path, b"new")
        assert single.read_bytes() == b"old"
    assert _tree(tmp_path) == {"out/sub/a.txt": b"new", "x.bin": b"new"}


def test_a_failed_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with OutputFolder(out) as folder:
        _fill(folder, b"old")
    real = Path.rename

    def fail(self, target):
        if self.name == "output":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr("devec.io.temporary.exchange", lambda *_: False)  # a system that cannot swap two paths at once
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RefusedError, match="Input/output error"), OutputFolder(out, overwrite=True) as folder:
        _fill(folder)
    assert _tree(tmp_path) == {"out/sub/a.txt": b"old"}


def test_an_old_output_that_was_put_aside_goes_back(tmp_path):
    """A run without the exchange of two paths was killed between its two renames."""
    out, aside = tmp_path / "out", tmp_path / "out.partial-run" / "aside"
    aside.mkdir(parents=True)
    write_file(aside / "a.txt", b"old")
    with pytest.raises(RefusedError, match="exists already"), OutputFolder(out):
        pass
    assert _tree(tmp_path) == {"out/a.txt": b"old"} and not aside.parent.exists()


def test_what_a_finished_run_could_not_delete_goes_later(tmp_path):
    out, place = tmp_path / "out", tmp_path / "out.partial-run"
    out.mkdir()
    (place / ".run").mkdir(parents=True)
    (place / "output-over").mkdir()
    with pytest.raises(RefusedError, match="exists already"):
        OutputFolder(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_temporary_folder_that_cannot_be_deleted_is_said(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "rmtree", lambda *_args, **_more: None)
    with pytest.raises(SideStepError, match=r"in place, but .*out\.partial-run"), OutputFolder(out) as folder:
        _fill(folder)
    assert (out / "sub" / "a.txt").read_bytes() == b"new"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RefusedError, match="appeared"), OutputFolder(out) as folder:
        _fill(folder)
        out.mkdir()
        (out / "theirs").write_bytes(b"theirs")
    assert _tree(tmp_path) == {"out/theirs": b"theirs"}


def test_parent_missing_a_file_or_read_only(tmp_path, monkeypatch):
    with pytest.raises(RefusedError, match="does not exist"):
        OutputFolder(tmp_path / "no" / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RefusedError, match="does not exist"):
        OutputFolder(tmp_path / "file" / "out")
    # The tests may run as a user whom no permission stops
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *a, **k: False)
        with pytest.raises(RefusedError, match="not writable"):
            OutputFolder(tmp_path / "out")

    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(RefusedError, match="Read-only file system"), OutputFolder(tmp_path / "out"):
        pass


@pytest.mark.parametrize("place", ["model", "model/out", "model/w.safetensors", ".", "link"])
def test_no_output_over_inside_or_around_an_input(tmp_path, place):
    model = tmp_path / "work" / "model"
    model.mkdir(parents=True)
    (model / "w.safetensors").write_bytes(b"w")
    (tmp_path / "work" / "link").symlink_to(model)
    out = tmp_path / "work" / place
    with pytest.raises(RefusedError, match="would change an input"):
        OutputFolder(out.resolve() if place == "." else out, overwrite=True, inputs=[model])
    assert (model / "w.safetensors").read_bytes() == b"w"


def test_an_input_file_may_have_the_output_beside_it(tmp_path):
    (tmp_path / "in.safetensors").write_bytes(b"w")
    with output_file(tmp_path / "out.safetensors", inputs=[tmp_path / "in.safetensors"]) as path:
        write_file(path, b"v")
    assert _tree(tmp_path) == {"in.safetensors": b"w", "out.safetensors": b"v"}


def test_overwrite_never_deletes_home_working_or_versioned_folders(tmp_path, monkeypatch):
    here = tmp_path / "here" / "deep"
    here.mkdir(parents=True)
    repo = tmp_path / "repo"
    (repo / ".git").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "repo2" / "home"))
    (tmp_path / "repo2" / "home").mkdir(parents=True)
    for out in (here, here.parent, repo, tmp_path / "repo2"):
        with pytest.raises(RefusedError, match="may delete"):
            OutputFolder(out, overwrite=True)


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RefusedError, match=r"not enough space.*needed = 1,000,000,000,000,000,000 bytes"):
        OutputFolder(tmp_path / "out", expected_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RefusedError, match="no space left"), OutputFolder(tmp_path / "out") as folder:
        _fill(folder)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RefusedError, match="no space left"), OutputFolder(tmp_path / "out") as folder:
        _fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_readable_like_any_other(tmp_path):
    (tmp_path / "plain").mkdir()
    with OutputFolder(tmp_path / "out") as folder:
        _fill(folder)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
