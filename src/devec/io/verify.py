"""Is an output still what devec wrote? Hashes of files against the manifest, of tensors against the header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from devec.core.errors import GuardError, InputError
from devec.io.disk import PIECE, sha256_of
from devec.io.hashing import tensor_hash
from devec.io.records import MANIFEST, list_files
from devec.io.safetensors_file import MAX_HEADER
from devec.io.writer import TENSOR_HASHES


@dataclass(frozen=True)
class VerifyReport:
    """What was checked (files, or tensors of a single file) and what differs."""

    path: Path
    checked: int
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.missing or self.changed or self.extra)

    def to_dict(self) -> dict[str, object]:
        return {
            "ok": self.ok, "checked": self.checked, "missing": list(self.missing), "changed": list(self.changed),
            "extra": list(self.extra),
        }


def verify_output(path: Path, *, check: bool = True) -> VerifyReport:
    """Compare an output with its own record of itself.

    A folder is compared with its manifest, file by file; a ``.safetensors`` file with the tensor hashes in its
    metadata. With ``check`` a difference raises :class:`GuardError` (exit 7); without it the report says so.
    Raises :class:`InputError` when there is nothing to compare with, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        report = _verify_folder(path)
    elif path.is_file():
        report = _verify_file(path)
    else:
        raise InputError("there is no such output", file=path, remedy="Give the folder or file that devec wrote.")
    if check and not report.ok:
        groups = {"missing": report.missing, "changed": report.changed, "extra": report.extra}
        raise GuardError(
            "the output differs from what devec wrote",
            values={what: _some(names) for what, names in groups.items() if names},
            file=path,
            remedy="Write it again, or use a sound copy.",
        )
    return report


def _some(names: tuple[str, ...], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return " ".join(names[:limit]) + more


def _verify_folder(folder: Path) -> VerifyReport:
    name = next((n for n in (MANIFEST, "manifest.json") if (folder / n).is_file()), None)
    if name is None:
        raise InputError(
            "the folder has no manifest", file=folder / MANIFEST, remedy="Only what devec wrote can be verified."
        )
    files = _manifest_files(folder / name)
    present = set(list_files(folder)) - {name}
    changed = [
        n for n, (digest, size) in files.items()
        if n in present and ((folder / n).stat().st_size != size or sha256_of(folder / n) != digest)
    ]
    return VerifyReport(
        folder, len(files), missing=tuple(sorted(set(files) - present)), changed=tuple(sorted(changed)),
        extra=tuple(sorted(present - set(files))),
    )


def _manifest_files(manifest: Path) -> dict[str, tuple[str, int]]:
    try:
        files = json.loads(manifest.read_bytes())["files"]
        found = {str(n): (str(entry["sha256"]), int(entry["bytes"])) for n, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("the manifest cannot be read", file=manifest, values={"reason": repr(error)}) from error
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError("the manifest names a file outside its folder", file=manifest, values={"name": name})
    return found


def _verify_file(path: Path) -> VerifyReport:
    header, start = _read_header(path)
    metadata = header.pop("__metadata__", {})
    try:
        hashes = json.loads(metadata[TENSOR_HASHES])
        offsets = {str(n): tuple(map(int, entry["data_offsets"])) for n, entry in header.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "the file holds no tensor hashes", file=path, remedy="Only a file that devec wrote can be verified."
        ) from error
    end = max((stop for _, stop in offsets.values()), default=0)
    changed = [n for n, (a, b) in offsets.items() if n in hashes and _hash_range(path, start + a, b - a) != hashes[n]]
    if path.stat().st_size != start + end:
        changed.append("(file size)")
    return VerifyReport(
        path, len(hashes), missing=tuple(sorted(set(hashes) - set(offsets))), changed=tuple(sorted(changed)),
        extra=tuple(sorted(set(offsets) - set(hashes))),
    )


def _read_header(path: Path) -> tuple[dict[str, dict[str, str]], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise InputError("not a safetensors file", file=path, values={"header length": length, "file size": size})
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError("the safetensors header is not JSON", file=path) from error
    if not isinstance(header, dict):
        raise InputError("the safetensors header is not a table", file=path)
    return header, 8 + length


def _hash_range(path: Path, start: int, count: int) -> str:
    digest = tensor_hash()
    with path.open("rb") as file:
        file.seek(start)
        while count > 0 and (piece := file.read(min(count, PIECE))):
            digest.update(piece)
            count -= len(piece)
    return digest.hexdigest()
