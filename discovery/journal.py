"""The log on disk: append-only segments of checksummed records, synced in groups, cut only where torn.

Stands in for pysyncobj's journal (same methods, hence their spelling) and adds what that lacks:
nothing counts as stored before `sync` has returned, and term and vote are stored before
`setCurrentTerm` returns. Entries live in memory as pysyncobj wants them, from the last snapshot on.
A segment is deleted once a snapshot covers all of it. Nothing is ever rewritten in place: what
pysyncobj removes at the end is a further record that says so. Records, by first byte:

    0 entry     index u64, term u64, command
    1 term      term u64, vote (UTF-8; empty: none)
    2 truncate  index u64: this entry and all after it are void

A reserve lies beside the segments: when the disk fills up between two looks at it, that makes room for what
is already under way, so that a full disk means refused writes and not a stopped member.

A torn tail of the last segment is cut with a log line; anything else is `Damaged` and stops the
member. `raft` is the only caller, from one task; the disk part of `sync` runs in a thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from discovery import frames
from discovery.frames import Damaged
from discovery.snapshot import sync_directory

log = logging.getLogger(__name__)

_KIND = b"LOG"
_ENTRY, _TERM, _TRUNCATE = 0, 1, 2
_PLACE = struct.Struct(">QQ")
_RESERVE_BYTES = 1024 * 1024

Entry = tuple[bytes, int, int]
"""Command, index, term: the order that pysyncobj uses."""


@dataclass
class _Segment:
    path: Path
    last_index: int = 0


@dataclass
class _Content:
    """What the segments said."""

    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    vote: str | None = None


class Journal:
    """The log from the snapshot at (`index`, `term`) on; with no snapshot both are 0.

    Raises:
        Damaged: the files are not what was written.
        OSError: the disk refuses.
    """

    def __init__(self, directory: Path, *, snapshot_index: int = 0, snapshot_term: int = 0) -> None:
        self._directory = directory
        self._reserve = directory / "reserve"
        self._segments: list[_Segment] = []
        self._pending: list[bytes] = []
        self._fd = -1
        self._size = 0
        self._durable = 0
        self.bytes_since_snapshot = 0
        content = self._read_segments(snapshot_index)
        self._entries = content.entries
        if snapshot_index:
            # pysyncobj asks for the entry before the first one that it applies; only its place matters
            self._entries.insert(0, (b"\x01", snapshot_index, snapshot_term))
        self._term = max(content.term, snapshot_term)
        self._vote = content.vote if self._term == content.term else None
        self._commit_index = max(snapshot_index, 1)
        if self._segments:
            self._open_last()
        else:
            self._begin_segment()
        self.keep_reserve()

    # As pysyncobj calls it

    def add(self, command: bytes, idx: int, term: int) -> None:
        self._entries.append((command, idx, term))
        self._append(bytes((_ENTRY,)) + _PLACE.pack(idx, term) + command)

    def clear(self) -> None:
        raise AssertionError("pysyncobj wants to forget its whole log: nothing of ours asks for that")

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        first = self._entries[entryFrom][1]
        del self._entries[entryFrom:]
        self._append(bytes((_TRUNCATE,)) + struct.pack(">Q", first))

    def deleteEntriesTo(self, entryTo: int) -> None:
        del self._entries[:entryTo]

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Note how far the log is known to be committed; only in memory, since Raft finds it out again."""
        self._commit_index = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        return self._commit_index

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Store term and vote; they are on disk when this returns."""
        self._term, self._vote = term, votedForNodeId
        self._append(self._term_record())
        self.sync_now()

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> str | None:
        return self._vote

    def onOneSecondTimer(self) -> None:
        pass

    def _destroy(self) -> None:
        self.close()

    # What pysyncobj does not know of

    @property
    def is_dirty(self) -> bool:
        """Tell whether something was added that is not yet on disk."""
        return bool(self._pending)

    async def sync(self) -> None:
        """Put everything added so far on disk; the loop goes on meanwhile.

        Raises:
            OSError: the disk refuses; what was added since the last `sync` may or may not be stored.
        """
        raw, size = self._take_pending(), self._size
        await asyncio.to_thread(self._put, self._fd, raw)
        self._durable = size

    def sync_now(self) -> None:
        """Do the same and block; for the rare things that may not be overtaken."""
        self._put(self._fd, self._take_pending())
        self._durable = self._size

    def rotate(self) -> None:
        """Begin a new segment, so that the one before can go once a snapshot covers it.

        Raises:
            OSError: the disk refuses; the old segment stays in use.
        """
        assert not self.is_dirty, "rotation would split a group that is not on disk yet"
        old, self._fd = self._fd, -1
        try:
            self._begin_segment()
        except OSError:
            self._fd = old
            raise
        os.close(old)

    def forget_to(self, index: int) -> None:
        """Drop what a durable snapshot at `index` contains; the entry at `index` itself stays as the log's head."""
        self.deleteEntriesTo(max(0, index - self._entries[0][1]))
        while len(self._segments) > 1 and self._segments[0].last_index <= index:
            self._segments.pop(0).path.unlink()
        self.bytes_since_snapshot = 0
        sync_directory(self._directory)

    def close(self) -> None:
        """Close the file; what is not synced is lost, as it would be in a crash."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def keep_reserve(self) -> None:
        """Take the reserve again if it was used; for when there is space."""
        if self._reserve.exists() or shutil.disk_usage(self._directory).free < 2 * _RESERVE_BYTES:
            return
        fd = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _RESERVE_BYTES)
        except OSError:
            self._reserve.unlink()
        finally:
            os.close(fd)

    # Writing

    def _put(self, fd: int, raw: bytes) -> None:
        """Write durably; on a full disk with the help of the reserve."""
        size = os.fstat(fd).st_size
        try:
            _write_durably(fd, raw)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._reserve.exists():
                raise
            log.warning("%s: the disk is full, the reserve is used", self._directory)
            self._reserve.unlink()
            os.ftruncate(fd, size)  # the part that was taken: nobody was promised it
            _write_durably(fd, raw)

    def _append(self, payload: bytes) -> None:
        raw = frames.encode(payload, self._durable)
        self._pending.append(raw)
        self._size += len(raw)
        self.bytes_since_snapshot += len(raw)
        if self._entries:
            self._segments[-1].last_index = self._entries[-1][1]

    def _take_pending(self) -> bytes:
        raw, self._pending = b"".join(self._pending), []
        return raw

    def _term_record(self) -> bytes:
        return bytes((_TERM,)) + struct.pack(">Q", self._term) + (self._vote or "").encode()

    def _begin_segment(self) -> None:
        number = int(self._segments[-1].path.name.removeprefix("journal-"), 16) + 1 if self._segments else 1
        path = self._directory / f"journal-{number:016x}"
        raw = frames.header(_KIND) + frames.encode(self._term_record())
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._put(fd, raw)
            sync_directory(self._directory)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        last_index = self._entries[-1][1] if self._entries else 0
        self._fd, self._size, self._durable = fd, len(raw), len(raw)
        self._segments.append(_Segment(path, last_index))

    def _open_last(self) -> None:
        """Go on writing the last segment; sync first, since what we have read may only be in the page cache."""
        path = self._segments[-1].path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.fsync(self._fd)
        sync_directory(self._directory)
        self._size = self._durable = path.stat().st_size

    # Reading

    def _read_segments(self, snapshot_index: int) -> _Content:
        content = _Content()
        paths = sorted(self._directory.glob("journal-*"))
        for path in paths:
            raw = path.read_bytes()
            is_last = path == paths[-1]
            if is_last and len(paths) > 1 and frames.is_unborn(raw):
                log.warning("%s was never finished: removed", path)
                path.unlink()
                continue
            self._read_segment(path, raw, content, snapshot_index, may_be_torn=is_last)
            self.bytes_since_snapshot += len(raw)
        return content

    def _read_segment(
        self, path: Path, raw: bytes, content: _Content, snapshot_index: int, *, may_be_torn: bool
    ) -> None:
        if may_be_torn and not self._segments and frames.is_unborn(raw):
            # the very first segment: the crash came before anything was promised
            path.unlink()
            return
        frames.check_header(raw, _KIND, str(path))
        end = frames.HEADER_BYTES
        segment = _Segment(path)
        for record in frames.decode_all(raw, str(path), may_be_torn=may_be_torn):
            segment.last_index = max(segment.last_index, _replay(record.payload, content, snapshot_index, path))
            end = record.end
        if end < len(raw):
            log.warning("%s: cut a torn tail of %d bytes that nobody was promised", path, len(raw) - end)
            os.truncate(path, end)
        self._segments.append(segment)


def _replay(payload: bytes, content: _Content, snapshot_index: int, path: Path) -> int:
    """Do to `content` what a record says; return the highest index that it speaks of (0: none)."""
    kind = payload[0] if payload else -1
    if kind == _TERM:
        content.term = struct.unpack(">Q", payload[1:9])[0]
        content.vote = payload[9:].decode() or None
        return 0
    if kind == _TRUNCATE:
        first = struct.unpack(">Q", payload[1:9])[0]
        while content.entries and content.entries[-1][1] >= first:
            content.entries.pop()
        return 0
    if kind != _ENTRY:
        raise Damaged(f"{path}: a record of unknown kind {kind}: written by a newer version?")
    index, term = _PLACE.unpack(payload[1:17])
    wanted = content.entries[-1][1] + 1 if content.entries else max(snapshot_index + 1, 1)
    if index > snapshot_index:
        if index != wanted:
            raise Damaged(f"{path}: entry {index} where {wanted} belongs: a part of the log is missing")
        content.entries.append((payload[17:], index, term))
    return int(index)


def _write_durably(fd: int, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[os.write(fd, view) :]
    os.fdatasync(fd)
