"""Models and adapters from the Hugging Face Hub: the files of one commit, downloaded once and then cached.

Nothing else imports ``huggingface_hub``, and this module only inside functions, since that takes a quarter of a second.
Cache, endpoint, token and offline mode are its own: ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devec.core.errors import DevecError, InputError, RefusedError
from devec.io.hub_id import HubFolder, HubId

if TYPE_CHECKING:
    from devec.io.hub_files import Needed

bars = True
"""Whether downloads may show progress bars; the command line turns this off with ``--quiet``, and off a terminal."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_ROOM = 1 << 24
"""Bytes left free beside what is downloaded."""

_ANOTHER_DISK = "Free some space, or set HF_HOME to a folder on another disk."
_log = logging.getLogger("devec")
_fetched: dict[tuple[HubId, bool], HubFolder] = {}


def fetch(wanted: HubId, *, model: bool = False) -> HubFolder:
    """The files of ``wanted`` that devec reads, and the commit that they are of.

    First the revision (the main branch if none is given) is resolved to a commit, and then only files of this commit
    are asked for: those that :func:`devec.io.hub_files.needed` names and the cache lacks. Without a connection, or with
    ``HF_HUB_OFFLINE``, the cache serves if all that is needed is there; a log message says so unless offline mode was
    asked for. Within one process an id is resolved once, so that all that is read of it is of one commit.

    Raises InputError (exit 3): no such repository or revision, no access to it, no connection and not in the cache, a
    download that broke off; RefusedError (exit 5): no space for it, or a quantised model; UsageError (exit 2) where a
    ``model`` is wanted and an adapter is there.
    """
    known = _fetched.get((wanted, model))
    if known is None or not known.folder.is_dir():
        other = _fetched.get((wanted, not model))
        folder, files = _fetch(wanted if other is None else HubId(wanted.repo, other.commit), model)
        known = HubFolder(folder, folder.name, wanted)
        for use in {model, files.kind == "model"}:
            _fetched[wanted, use] = known
    return known


def fetched(wanted: HubId) -> HubFolder | None:
    """What this process fetched already under this id."""
    return _fetched.get((wanted, True)) or _fetched.get((wanted, False))


def cached_folder(wanted: HubId) -> Path | None:
    """Where the cache holds ``wanted``, complete or not, without a look at the network; ``None`` if it does not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def _fetch(wanted: HubId, model: bool) -> tuple[Path, Needed]:
    """The folder of the commit, which bears its name, and what was wanted there."""
    from devec.io.hub_files import needed

    for _ in range(3):
        try:
            info = _look_up(wanted)
        except _Unreachable as error:
            return _from_cache(wanted, model, error)
        there = {file.rfilename: file for file in info.siblings or ()}
        where = f"{wanted.repo}@{info.sha}"
        files = needed(there, where, model=model)
        # by branch or tag first, so that the cache learns what it means
        folder = _download(wanted, files.small or files.weights, there, info.sha)
        if folder.name == info.sha:
            if files.small:
                _download(HubId(wanted.repo, info.sha), _weights(files, folder, there, where), there, info.sha)
            return folder, files
    raise InputError("the revision keeps changing while it is read", file=str(wanted), remedy="Give a commit: @COMMIT.")


def _weights(files: Needed, folder: Path, there: Collection[str] | None, where: str) -> tuple[str, ...]:
    """The weight files, once the small ones are there: they may refuse the model, or name its shards.

    ``there`` is what the repository holds, if that is known.
    """
    from devec.io.hub_files import CONFIG
    from devec.io.quantised import refuse_declared
    from devec.io.shard_index import read_json, weight_map

    if CONFIG in files.small:
        refuse_declared(read_json(folder / CONFIG), where)
    if files.index is None:
        return files.weights
    shards = sorted(set(weight_map(folder / files.index).values()))
    lost = [shard for shard in shards if there is not None and shard not in there]
    if lost:
        raise InputError(
            "the index names a file that the repository does not hold", values={"index": files.index, "file": lost[0]},
            file=where, remedy="Use another revision.",
        )
    return tuple(shards)


class _Unreachable(Exception):
    """The Hub gave no answer; ``offline`` if it was not to be asked."""

    def __init__(self, reason: str, offline: bool = False) -> None:
        super().__init__(reason)
        self.offline = offline


def _look_up(wanted: HubId) -> Any:
    """Commit and files of the revision, in one request."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from devec import __version__

    api = HfApi(library_name="devec", library_version=__version__)
    with _readable_errors(wanted):
        try:
            return api.model_info(
                wanted.repo, revision=wanted.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        except OfflineModeIsEnabled:
            raise _Unreachable("HF_HUB_OFFLINE is set", offline=True) from None
        except HfHubHTTPError as error:
            if not _is_busy(error):
                raise
            raise _Unreachable(_status(error)) from None
        except (OSError, _transport_error()) as error:
            raise _Unreachable(_text(error)) from None
        except ValueError:
            raise InputError(
                f"{constants.ENDPOINT} gave an answer that the Hugging Face Hub would not give", file=str(wanted),
                remedy="Check HF_ENDPOINT and the proxy.",
            ) from None


def _transport_error() -> type[BaseException]:
    """What the HTTP library beneath raises: huggingface_hub has used three of them, and derives its own from each."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _is_busy(error: Any) -> bool:
    status = error.response.status_code
    return bool(status in (408, 429) or status >= 500)


def _status(error: Any) -> str:
    return f"HTTP status {error.response.status_code}"


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _from_cache(wanted: HubId, model: bool, error: _Unreachable) -> tuple[Path, Needed]:
    """The commit that the cache knows the revision as, if everything needed of it is there."""
    from devec.io.hub_files import needed

    remedy = "Unset HF_HUB_OFFLINE to download it." if error.offline else "Check the connection, and HF_ENDPOINT."
    folder = cached_folder(wanted)
    if folder is None:
        raise InputError(
            f"there is no path {str(wanted)!r}, the cache of the Hugging Face Hub has no such repository, "
            "and the Hub cannot be asked",
            values={"reason": error}, remedy=remedy,
        )
    where = f"{wanted.repo}@{folder.name}"
    listed = _listing(wanted, folder)
    present = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def partial(missing: str) -> InputError:
        return InputError(
            "the cache of the Hugging Face Hub holds a part of this only, and the Hub cannot be asked for the rest",
            values={"missing": missing, "reason": error}, file=where, remedy=remedy,
        )

    try:
        files = needed(present if listed is None else listed, where, model=model)
    except InputError:
        if listed is not None:
            raise
        raise partial("its weights") from None
    lost = _absent(folder, files.small) or _absent(folder, _weights(files, folder, listed, where))
    if lost:
        raise partial(lost[0])
    if not error.offline:
        _log.warning("the Hugging Face Hub cannot be reached (%s): %s is read from the cache", error, where)
    return folder, files


def _absent(folder: Path, names: Collection[str]) -> list[str]:
    return [n for n in names if not (folder / n).is_file()]


def _listing(wanted: HubId, folder: Path) -> list[str] | None:
    """The commit's files as the Hub listed them, where the cache kept that; else nobody knows what else there is."""
    import huggingface_hub
    from huggingface_hub import errors

    kept = getattr(huggingface_hub, "get_cached_repo_tree", None)  # not in every version that is supported
    if kept is not None:
        try:
            return [file.path for file in kept(wanted.repo, revision=folder.name)]
        except errors.CachedRepoTreeNotFoundError:
            return None
    return None


def _download(wanted: HubId, names: Collection[str], files: Mapping[str, Any], commit: str) -> Path:
    """Bring ``names`` into the cache; returns the folder of what is ``wanted``: of ``commit``, or of a newer one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from devec import __version__

    _refuse_full_disk(wanted, names, files)
    silenced = not bars and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        with _readable_errors(wanted):
            folder = Path(
                snapshot_download(
                    wanted.repo, revision=wanted.revision, allow_patterns=[glob.escape(n) for n in names],
                    library_name="devec", library_version=__version__,
                )
            )
    finally:
        if silenced:
            enable_progress_bars()
    lost = _absent(folder, names)
    if lost and folder.name == commit:
        raise _broken_off(wanted, f"{lost[0]} did not arrive")
    return folder


def _refuse_full_disk(wanted: HubId, names: Collection[str], files: Mapping[str, Any]) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    blobs = cache / repo_folder_name(repo_id=wanted.repo, repo_type="model") / "blobs"
    absent = [files[n] for n in names if not (blobs / _blob(files[n])).exists()]
    expected = sum(int(file.size or 0) for file in absent)
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.is_dir())).free
    if expected and free < expected + _ROOM:
        raise RefusedError(
            f"not enough space on the disk to download {wanted}",
            values={"needed": f"{expected:,} bytes", "free": f"{free:,} bytes"}, file=cache, remedy=_ANOTHER_DISK,
        )


def _blob(file: Any) -> str:
    """The name of a file's content in the cache."""
    return str(file.lfs.sha256 if file.lfs is not None else file.blob_id)


@contextmanager
def _readable_errors(wanted: HubId) -> Iterator[None]:
    """Around calls of ``huggingface_hub`` alone: what they raise is the Hub's, the network's or the disk's doing."""
    try:
        yield
    except (DevecError, _Unreachable):
        raise
    except Exception as error:
        raise _explained(error, wanted) from error


def _explained(error: Exception, wanted: HubId) -> DevecError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{wanted.repo}"
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"access to {wanted.repo} must be asked for",
            remedy=f"Ask for it at {page}, and set HF_TOKEN to your token.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"there is no path {str(wanted)!r}, and no such repository on the Hugging Face Hub that you may read",
            remedy="Check the path or id; for a private repository set HF_TOKEN to your token.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"{wanted.repo} has no revision {wanted.revision!r}", remedy=f"Its branches and tags are listed at {page}."
        )
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code in (401, 403):
            return InputError(
                f"the Hugging Face Hub refuses access to {wanted.repo}", values={"reason": _status(error)},
                remedy="Check HF_TOKEN: it may be wrong, expired, or without the right to read this repository.",
            )
        return _broken_off(wanted, _status(error))
    if isinstance(error, OSError) and error.errno in _FULL:
        return RefusedError(
            f"no space left on the disk while downloading {wanted}", file=error.filename, remedy=_ANOTHER_DISK
        )
    if isinstance(error, OSError) and error.errno in _DENIED:
        return RefusedError(
            "the cache of the Hugging Face Hub cannot be written", values={"reason": os.strerror(error.errno)},
            file=error.filename, remedy="Set HF_HOME to a folder that you may write to.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _broken_off(wanted, _text(error.__cause__))
    return _broken_off(wanted, _text(error))


def _broken_off(wanted: HubId, reason: str) -> InputError:
    return InputError(
        f"the download of {wanted} failed", values={"reason": reason},
        remedy="Run the same command again: what is complete is kept.",
    )
