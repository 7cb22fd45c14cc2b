"""Snapshots of the state on disk: written beside, synced, renamed, the directory synced; older ones go afterwards.

Called by `raft`, in a thread for writing. A snapshot that fails its check is `Damaged`: the log
before it is gone, so there is nothing to fall back to, and guessing is not for a store.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from discovery import frames
from discovery.frames import Damaged

_KIND = b"SNP"
_PLACE = struct.Struct(">QQ")


@dataclass(frozen=True)
class Snapshot:
    """A state as encoded chunks, and its place in the log: the last entry that it contains."""

    index: int
    term: int
    chunks: list[bytes]


def _path(directory: Path, index: int) -> Path:
    return directory / f"snapshot-{index:016x}"


def sync_directory(directory: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save(directory: Path, index: int, term: int, chunks: Iterable[bytes]) -> None:
    """Write a snapshot so that it is there as a whole or not at all, then remove older ones.

    Raises:
        OSError: the disk refuses; the previous snapshot is untouched.
    """
    path = _path(directory, index)
    draft = path.with_suffix(".draft")
    count = 0
    try:
        with draft.open("wb") as file:
            file.write(frames.header(_KIND) + frames.encode(_PLACE.pack(index, term)))
            for chunk in chunks:
                file.write(frames.encode(chunk))
                count += 1
            file.write(frames.encode(struct.pack(">Q", count)))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(directory)
    for other in directory.glob("snapshot-*"):
        if other != path:
            other.unlink()


def load(directory: Path) -> Snapshot | None:
    """Read the newest snapshot; drafts of an interrupted `save` are removed.

    Raises:
        Damaged: it is not what was written.
    """
    for draft in directory.glob("snapshot-*.draft"):
        draft.unlink()
    paths = sorted(directory.glob("snapshot-*"))
    if not paths:
        return None
    raw = paths[-1].read_bytes()
    frames.check_header(raw, _KIND, str(paths[-1]))
    payloads = [record.payload for record in frames.decode_all(raw, str(paths[-1]), may_be_torn=False)]
    if len(payloads) < 2 or payloads[-1] != struct.pack(">Q", len(payloads) - 2):
        raise Damaged(f"{paths[-1]} is not complete")
    index, term = _PLACE.unpack(payloads[0])
    return Snapshot(index, term, payloads[1:-1])
