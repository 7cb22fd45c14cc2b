"""Snapshots of the state on disk: written beside, synced, renamed, the directory synced; older ones go afterwards.

Called by `raft`, in a thread for writing. A snapshot that fails its check is `Damaged`: the log
before it is gone, so there is nothing to fall back to, and guessing is not for a store.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from discovery import frames
from discovery.disk import DISK, Disk
from discovery.frames import Damaged

_KIND = b"SNP"
_PLACE = struct.Struct(">QQ")


@dataclass(frozen=True)
class Snapshot:
    """A state as encoded chunks, and its place in the log: the last entry that it contains."""

    index: int
    term: int
    chunks: list[bytes]


def path_of(directory: Path, index: int) -> Path:
    """Return where the snapshot at an index is."""
    return directory / f"snapshot-{index:016x}"


def written(index: int, term: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a snapshot file, part by part."""
    yield frames.header(_KIND) + frames.encode(_PLACE.pack(index, term))
    count = 0
    for chunk in chunks:
        yield frames.encode(chunk)
        count += 1
    yield frames.encode(struct.pack(">Q", count))


def save(directory: Path, index: int, term: int, chunks: Iterable[bytes], disk: Disk = DISK) -> None:
    """Write a snapshot so that it is there as a whole or not at all, then remove older ones.

    Raises:
        OSError: the disk refuses; the previous snapshot is untouched.
    """
    draft = path_of(directory, index).with_suffix(".draft")
    try:
        fd = disk.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            end = 0
            for part in written(index, term, chunks):
                end = disk.write_all(fd, part, end)
            disk.fsync(fd)
        finally:
            disk.close(fd)
    except BaseException:
        disk.unlink(draft)
        raise
    publish(draft, directory, index, disk)


def publish(draft: Path, directory: Path, index: int, disk: Disk = DISK) -> None:
    """Make a whole and synced draft the snapshot at `index`; remove the others.

    Raises:
        OSError: the disk refuses; the previous snapshot is untouched.
    """
    path = path_of(directory, index)
    disk.rename(draft, path)
    disk.sync_directory(directory)
    for name in disk.names(directory, "snapshot-"):
        if name < path.name and not name.endswith(".draft"):
            disk.unlink(directory / name)


def load(directory: Path, disk: Disk = DISK) -> Snapshot | None:
    """Read the newest snapshot; drafts of an interrupted `save` are removed.

    Raises:
        Damaged: it is not what was written.
    """
    names = disk.names(directory, "snapshot-")
    for draft in [name for name in names if name.endswith(".draft")]:
        names.remove(draft)
        disk.unlink(directory / draft)
    return load_file(directory / names[-1], disk) if names else None


def load_file(path: Path, disk: Disk = DISK) -> Snapshot:
    """Read one snapshot.

    Raises:
        Damaged: it is not what was written.
    """
    raw = disk.read_file(path)
    frames.check_header(raw, _KIND, str(path))
    payloads = [record.payload for record in frames.decode_all(raw, str(path), may_be_torn=False)]
    if len(payloads) < 2 or payloads[-1] != struct.pack(">Q", len(payloads) - 2):
        raise Damaged(f"{path} is not complete")
    index, term = _PLACE.unpack(payloads[0])
    return Snapshot(index, term, payloads[1:-1])
