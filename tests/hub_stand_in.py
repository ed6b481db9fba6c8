"""A Hugging Face Hub of a few repositories on 127.0.0.1, which remembers what it was asked for.

It speaks as much of the Hub's protocol as ``huggingface_hub`` needs to download: the information on a repository, its
tree, and its files, where weights are redirected to another address as large files are on the real one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".onnx", ".gguf")


class StandIn:
    """``repos[id][revision]`` is a commit, ``files[commit]`` its content; ``asked`` has "id: file" of each download."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, str]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.after_lookup: Callable[[], None] = lambda: None
        self.cut: Callable[[str], int | None] = lambda name: None
        self.busy = False
        self.nonsense = False
        self.endpoint = ""

    def commit(self, repo: str, files: Mapping[str, bytes] | Path, branch: str = "main") -> str:
        """A new commit on a branch; returns its hash."""
        content = dict(files) if isinstance(files, Mapping) else _content(files)
        tree = hashlib.sha256(repo.encode())
        for name in sorted(content):
            tree.update(name.encode() + hashlib.sha256(content[name]).digest())
        sha = hashlib.sha1(tree.digest()).hexdigest()
        self.files[sha] = content
        self.repos.setdefault(repo, {})[branch] = sha
        return sha

    def of(self, repo: str) -> list[str]:
        """The files of a repository that were downloaded, sorted, each as often as it was."""
        return sorted(line.partition(": ")[2] for line in self.asked if line.startswith(f"{repo}: "))


def _content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _file(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"size": len(data), "oid": oid}
    if name.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if not path.startswith("/cdn/"):
            hub.tokens.add(self.headers.get("Authorization"))
        if hub.busy:
            return self._send(503, b"busy")
        if hub.nonsense:
            return self._send(200, b"<html>Please log in to this network</html>")
        cdn = re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path)
        if cdn is not None:
            return self._content(cdn[1], cdn[3], hub.files[cdn[2]][cdn[3]])
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = (api or file or [None, ""])[1]
        gated = hub.refusals.get(repo)
        if gated is not None and (file is not None or gated[1] != "GatedRepo"):  # who may not read it may still look
            return self._send(gated[0], b"{}", {"X-Error-Code": gated[1]} if gated[1] else {})
        if repo not in hub.repos:
            # the Hub does not say whether a repository is missing or private
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = (api[3] if api else file[2] if file else None) or "main"
        sha = hub.repos[repo].get(revision, revision if revision in hub.files else None)
        if sha is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api is not None:
            self._send(200, json.dumps(self._info(repo, sha, api[2])).encode())
            if api[2] != "tree":
                hub.after_lookup()
            return None
        assert file is not None
        if file[3] not in hub.files[sha]:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return self._resolve(repo, sha, file[3])

    def _info(self, repo: str, sha: str, what: str | None) -> Any:
        listed = [(name, _file(name, data)) for name, data in sorted(self.hub.files[sha].items())]
        if what == "tree":
            return [{"type": "file", "path": name, **found} for name, found in listed]
        siblings = []
        for name, found in listed:
            lfs = found.get("lfs")
            large = {} if lfs is None else {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}}
            siblings.append({"rfilename": name, "size": found["size"], "blobId": found["oid"], **large})
        return {"_id": "0", "id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "private": False}

    def _resolve(self, repo: str, sha: str, name: str) -> None:
        data = self.hub.files[sha][name]
        found = _file(name, data)
        if "lfs" not in found:
            return self._content(repo, name, data, {"ETag": f'"{found["oid"]}"', "X-Repo-Commit": sha})
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")  # another host, as far as the client knows
        where = f"{elsewhere}/cdn/{repo}/{sha}/{name}"
        linked = {"X-Linked-Etag": f'"{found["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        return self._send(302, b"", {"Location": where, "X-Repo-Commit": sha, **linked})

    def _content(self, repo: str, name: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        if self.command == "GET":
            self.hub.asked.append(f"{repo}: {name}")
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        rest = data[int(start[1]) :] if start else data
        upto = self.hub.cut(name) if self.command == "GET" else None
        self._send(206 if start else 200, rest, headers or {}, upto)

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, upto: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:upto])
        if upto is not None:
            self.close_connection = True


@contextmanager
def serving() -> Iterator[StandIn]:
    """The stand-in, answering at ``endpoint`` until the block ends."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in as this process's Hub, with an empty cache in ``tmp_path / "cache"``."""
    with serving() as found:
        point_at(found.endpoint, tmp_path / "cache", monkeypatch)
        yield found


def point_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment would say, if huggingface_hub did not read it only once, when it is imported."""
    from huggingface_hub import constants

    from devec.io import hub as devec_hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(devec_hub, "_fetched", {})
