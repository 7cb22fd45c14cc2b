"""The nouns of a build: blobs in the store, and what a build job hands back."""

from __future__ import annotations

import msgspec


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """A stored blob; `digest` is `sha256:HEX` of its content."""

    digest: str
    size_bytes: int


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `compile` made: which buildpack took the app, the command of each process type, and the slug."""

    buildpack: str
    processes: dict[str, str]
    digest: str
    size_bytes: int
    media_type: str
