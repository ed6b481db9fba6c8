"""Ids of the Hugging Face Hub, and one commit of a repository on disk. Nothing here reads a file or the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SCHEME = "hf://"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^\s@+#=]+))?")


@dataclass(frozen=True)
class HubId:
    """``org/name``, or ``org/name@revision`` with a branch, a tag or a commit."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The id that ``text`` spells, with or without ``hf://`` before it, or ``None``."""
        match = _ID.fullmatch(text.removeprefix(SCHEME))
        if match is None or "--" in match["repo"] or ".." in match["repo"] or match["repo"].endswith(".git"):
            return None
        return cls(match["repo"], match["revision"])

    @property
    def name(self) -> str:
        """The repository's name without its owner's."""
        return self.repo.partition("/")[2]

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class HubFolder:
    """One commit of a repository in the Hub's own cache: ``folder`` holds the files of it that were needed."""

    folder: Path
    commit: str
    id: HubId

    @property
    def reference(self) -> str:
        """The id as it was asked for."""
        return str(self.id)

    @property
    def pinned(self) -> str:
        """A reference to this very commit, whatever happens to branches and tags."""
        return f"{SCHEME}{self.id.repo}@{self.commit}"
