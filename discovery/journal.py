"""The log on disk: append-only segments of checksummed records, synced in groups, cut only where torn.

Stands in for pysyncobj's journal (same methods, hence their spelling) and adds what that lacks:
nothing counts as stored before `sync` has returned, and term and vote are stored before
`setCurrentTerm` returns. Entries live in memory as pysyncobj wants them, from the last snapshot on
(and some before it, for followers that are a little behind).
A segment is deleted once a snapshot covers all of it; one that another has followed is named `….closed`, so that the
loss of the newest is seen. Nothing is ever rewritten in place: what
pysyncobj removes at the end is a further record that says so. Records, by first byte:

    0 entry     index u64, term u64, command
    1 term      term u64, vote (UTF-8; empty: none)
    2 truncate  index u64: this entry and all after it are void
    3 restart   index u64, term u64: all entries before this record are void, the log goes on after that place
                (a snapshot came from the leader)
    4 synced    nothing: its own head says (`frames`) that all before it is on disk. Follows every group without a sync
                of its own, so that damage in the newest group is known for damage and not taken for a torn tail
    5 follows   index u64: begins a segment, all entries to that one are in older segments or in the snapshot; so the
                loss of a snapshot is seen also where no entry has come after it

The last segment is filled up with zeros ahead of what is written, so that a sync need not also store a new file size
(measured: 0.17 ms instead of 0.27); zeros to the end of the file are no torn tail.

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
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from discovery import frames
from discovery.disk import DISK, Disk
from discovery.frames import Damaged
from discovery.measures import Times
from discovery.wire import clock

log = logging.getLogger(__name__)

_KIND = b"LOG"
_ENTRY, _TERM, _TRUNCATE, _RESTART, _SYNCED, _FOLLOWS = 0, 1, 2, 3, 4, 5
_PLACE = struct.Struct(">QQ")
RESERVE = "reserve"
_RESERVE_BYTES = 1024 * 1024
_AHEAD_BYTES = 1024 * 1024
_FAST_S = 0.001
_CLOSED = ".closed"
_HEAD_COMMAND = b"\x01"
"""Stands at the place of the entry that a snapshot ends with: pysyncobj asks for it, but only for its place."""

_SYNCED_PAYLOAD = bytes((_SYNCED,))
_SYNCED_BYTES = len(frames.encode(_SYNCED_PAYLOAD))

Entry = tuple[bytes, int, int]
"""Command, index, term: the order that pysyncobj uses."""


@dataclass
class _Segment:
    path: Path
    last_index: int = 0


@dataclass
class _Content:
    """What the segments said; `entries` are those after the snapshot."""

    snapshot_index: int
    snapshot_term: int
    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    vote: str | None = None
    is_of_other_history: bool = False

    def check_has(self, index: int, path: Path) -> None:
        """Make sure that all is there that a segment says to follow.

        Raises:
            Damaged: something is not.
        """
        there = self.entries[-1][1] if self.entries else self.snapshot_index
        if index > there and not self.is_of_other_history:
            raise Damaged(
                f"{path} follows entry {index}, and there is none after {there}: a snapshot or a part is missing"
            )

    def forget(self) -> None:
        self.entries.clear()
        self.is_of_other_history = False


def is_there(directory: Path, disk: Disk = DISK) -> bool:
    """Tell whether a folder holds a log: segments that never came to be, or are empty, are none.

    Raises:
        OSError: the disk refuses.
    """
    names = disk.names(directory, "journal-")
    return any(not frames.is_unborn(disk.read_file(directory / name)) for name in names)


def clear(directory: Path, disk: Disk = DISK) -> None:
    """Remove what is no log (see `is_there`), so that one can begin.

    Raises:
        OSError: the disk refuses.
    """
    for name in disk.names(directory, "journal-"):
        disk.unlink(directory / name)


def was_there(directory: Path, disk: Disk = DISK) -> bool:
    """Tell whether a folder has held a log: the reserve is made when the first segment is on disk."""
    return disk.exists(directory / RESERVE)


class Journal:
    """The log from the snapshot at (`index`, `term`) on; with no snapshot both are 0.

    Raises:
        Damaged: the files are not what was written.
        OSError: the disk refuses.
    """

    def __init__(self, directory: Path, *, snapshot_index: int = 0, snapshot_term: int = 0, disk: Disk = DISK) -> None:
        self._directory = directory
        self._disk = disk
        self._writer = ThreadPoolExecutor(1, "journal")
        self._reserve = directory / RESERVE
        self._segments: list[_Segment] = []
        self._pending: list[bytes] = []
        self._fd = -1
        self._size = 0
        self._durable = 0
        self._filled = 0
        self.bytes_since_snapshot = 0
        self.sync_times = Times()
        self._usual_s = 0.0
        self._is_syncing = False
        try:
            self._open(_Content(snapshot_index, snapshot_term))
        except BaseException:
            self.close()
            raise

    def _open(self, content: _Content) -> None:
        snapshot_index, snapshot_term = content.snapshot_index, content.snapshot_term
        self._read_segments(content)
        self._entries = content.entries
        if snapshot_index:
            self._entries.insert(0, (_HEAD_COMMAND, snapshot_index, snapshot_term))
        self._term = max(content.term, snapshot_term)
        self._vote = content.vote if self._term == content.term else None
        self._commit_index = max(snapshot_index, 1)
        if self._segments and self._segments[-1].path.suffix == _CLOSED:
            raise Damaged(f"{self._segments[-1].path} was followed by another segment of the log, which is gone")
        if self._segments:
            self._open_last()
            self._close_older()
        else:
            self._begin_segment()
        if content.is_of_other_history:
            log.warning("%s: entries of another history than the snapshot's are void", self._directory)
            self.restart(snapshot_index, snapshot_term)
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
        """Put everything added so far on disk; unless the disk is fast, the loop goes on meanwhile.

        Where a sync takes less than a millisecond, the way to a thread and back takes longer (measured with one change
        at a time over three members, on a busy machine: median 1.7 ms instead of 2.5).

        Raises:
            OSError: the disk refuses; what was added since the last `sync` may or may not be stored.
        """
        assert not self._is_syncing, "one sync at a time"
        raw, at = self._take_pending()
        if self._usual_s < _FAST_S:
            self._put(raw, at)
        else:
            self._is_syncing = True
            try:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._put, raw, at)
            finally:
                self._is_syncing = False
        self._durable = max(self._durable, at + len(raw))

    def sync_now(self) -> None:
        """Do the same and block; for the rare things that may not be overtaken."""
        assert not self._is_syncing, "a sync is under way in the other thread"
        raw, at = self._take_pending()
        self._put(raw, at)
        self._durable = max(self._durable, at + len(raw))

    def rotate(self) -> None:
        """Begin a new segment, so that the one before can go once a snapshot covers it.

        Raises:
            OSError: the disk refuses; the old segment stays in use.
        """
        assert not self._is_syncing, "a sync is under way in the other thread"
        assert not self.is_dirty, "rotation would split a group that is not on disk yet"
        old, size, filled = self._fd, self._size, self._filled
        # zeros may end the last segment only
        self._disk.truncate(old, size)
        self._disk.fsync(old)
        self._filled, self._fd = size, -1
        try:
            self._begin_segment()
        except OSError:
            self._fd, self._size, self._durable, self._filled = old, size, size, min(size, filled)
            raise
        self._disk.close(old)
        self._close_older()

    def _close_older(self) -> None:
        """Have the names of all segments but the newest, which is on disk, say that another follows."""
        open_ones = [segment for segment in self._segments[:-1] if segment.path.suffix != _CLOSED]
        for segment in open_ones:
            path = segment.path.with_name(segment.path.name + _CLOSED)
            self._disk.rename(segment.path, path)
            segment.path = path
        if open_ones:
            self._disk.sync_directory(self._directory)

    def forget_to(self, index: int, *, keep: int = 0) -> None:
        """Drop from disk what a durable snapshot at `index` contains.

        The entry at `index` stays in memory as the log's head, and `keep` entries before it.
        """
        self.deleteEntriesTo(max(0, index - keep - self._entries[0][1]))
        while len(self._segments) > 1 and self._segments[0].last_index <= index:
            self._disk.unlink(self._segments.pop(0).path)
        self.bytes_since_snapshot = 0
        self._disk.sync_directory(self._directory)

    def restart(self, index: int, term: int) -> None:
        """Go on after a snapshot at (`index`, `term`) that is on disk already; everything else is void.

        Raises:
            OSError: the disk refuses.
        """
        self._entries = [(_HEAD_COMMAND, index, term)]
        self._commit_index = index
        self._append(bytes((_RESTART,)) + _PLACE.pack(index, term))
        self.sync_now()
        self.rotate()
        self.forget_to(index)

    def close(self) -> None:
        """Close the file; what is not synced is lost, as it would be in a crash."""
        self._writer.shutdown()
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    def keep_reserve(self) -> None:
        """Take the reserve again if it was used; for when there is space."""
        if self._disk.exists(self._reserve) or self._disk.free_bytes(self._directory) < 2 * _RESERVE_BYTES:
            return
        fd = self._disk.open(self._reserve, os.O_WRONLY | os.O_CREAT)
        try:
            self._disk.allocate(fd, _RESERVE_BYTES)
        except OSError:
            self._disk.unlink(self._reserve)
        finally:
            self._disk.close(fd)

    # Writing

    def _put(self, raw: bytes, at: int) -> None:
        """Write durably; on a full disk with the help of the reserve."""
        try:
            self._write_durably(raw, at)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._disk.exists(self._reserve):
                raise
            log.warning("%s: the disk is full, the reserve is used", self._directory)
            self._disk.unlink(self._reserve)
            self._disk.truncate(self._fd, at)  # the part that was taken: nobody was promised it
            self._filled = at
            self._write_durably(raw, at, is_tight=True)

    def _write_durably(self, raw: bytes, at: int, *, is_tight: bool = False) -> None:
        end = at + len(raw)
        written = self._disk.write_all(self._fd, raw + bytes(_SYNCED_BYTES), at)  # with the room for what follows
        if written > self._filled:
            self._filled = written
            if not is_tight:
                self._fill_ahead(written)
        began_s = clock.monotonic_s()
        self._disk.fdatasync(self._fd)
        took_s = clock.monotonic_s() - began_s
        self.sync_times.add(took_s)
        self._usual_s += (took_s - self._usual_s) / 4
        self._disk.write_all(self._fd, frames.encode(_SYNCED_PAYLOAD, end), end)

    def _fill_ahead(self, end: int) -> None:
        try:
            self._filled = self._disk.write_all(self._fd, bytes(_AHEAD_BYTES), end)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._disk.truncate(self._fd, end)  # there was room for the group, and that is all that is needed

    def _append(self, payload: bytes) -> None:
        raw = frames.encode(payload, self._durable)
        self._pending.append(raw)
        self._size += len(raw)
        self.bytes_since_snapshot += len(raw)
        if self._entries:
            self._segments[-1].last_index = self._entries[-1][1]

    def _take_pending(self) -> tuple[bytes, int]:
        raw, self._pending = b"".join(self._pending), []
        at = self._size - len(raw)
        self._size += _SYNCED_BYTES
        return raw, at

    def _term_record(self) -> bytes:
        return bytes((_TERM,)) + struct.pack(">Q", self._term) + (self._vote or "").encode()

    def _begin_segment(self) -> None:
        number = int(self._segments[-1].path.name.removeprefix("journal-"), 16) + 1 if self._segments else 1
        path = self._directory / f"journal-{number:016x}"
        last_index = self._entries[-1][1] if self._entries else 0
        raw = frames.header(_KIND) + frames.encode(self._term_record())
        raw += frames.encode(bytes((_FOLLOWS,)) + struct.pack(">Q", last_index))
        self._fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._filled = 0
        try:
            self._put(raw, 0)
            self._disk.sync_directory(self._directory)
        except OSError:
            self._disk.close(self._fd)
            self._fd = -1
            self._disk.unlink(path)
            raise
        self._size, self._durable = len(raw) + _SYNCED_BYTES, len(raw)
        self._segments.append(_Segment(path, last_index))

    def _open_last(self) -> None:
        """Go on writing the last segment; sync first, since what we have read may only be in the page cache."""
        path = self._segments[-1].path
        self._fd = self._disk.open(path, os.O_RDWR)
        self._disk.fsync(self._fd)
        self._disk.sync_directory(self._directory)
        self._filled = self._disk.size(path)

    # Reading

    def _read_segments(self, content: _Content) -> None:
        paths = [self._directory / name for name in self._disk.names(self._directory, "journal-")]
        for path in paths:
            raw = self._disk.read_file(path)
            is_last = path == paths[-1]
            if is_last and len(paths) > 1 and frames.is_unborn(raw):
                log.warning("%s was never finished: removed", path)
                self._disk.unlink(path)
                continue
            self._read_segment(path, raw, content, may_be_torn=is_last)
            self.bytes_since_snapshot += self._size

    def _read_segment(self, path: Path, raw: bytes, content: _Content, *, may_be_torn: bool) -> None:
        if may_be_torn and not self._segments and frames.is_unborn(raw):
            # the very first segment: the crash came before anything was promised
            self._disk.unlink(path)
            return
        frames.check_header(raw, _KIND, str(path))
        end = frames.HEADER_BYTES
        segment = _Segment(path)
        for record in frames.decode_all(raw, str(path), may_be_torn=may_be_torn):
            segment.last_index = max(segment.last_index, _replay(record.payload, content, path))
            end = record.end
        if end < len(raw) and raw[end:].strip(b"\0"):
            log.warning("%s: cut a torn tail of up to %d bytes that nobody was promised", path, len(raw) - end)
            self._cut(path, end)
        self._segments.append(segment)
        self._size = self._durable = end

    def _cut(self, path: Path, end: int) -> None:
        fd = self._disk.open(path, os.O_RDWR)
        try:
            self._disk.truncate(fd, end)
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)


def _replay(payload: bytes, content: _Content, path: Path) -> int:
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
        if first <= content.snapshot_index:
            content.forget()
        return 0
    if kind == _SYNCED:
        return 0
    if kind == _FOLLOWS:
        content.check_has(struct.unpack(">Q", payload[1:9])[0], path)
        return 0
    if kind == _RESTART:
        content.forget()
        return int(_PLACE.unpack(payload[1:17])[0])
    if kind != _ENTRY:
        raise Damaged(f"{path}: a record of unknown kind {kind}: written by a newer version?")
    return _replay_entry(payload, content, path)


def _replay_entry(payload: bytes, content: _Content, path: Path) -> int:
    index, term = _PLACE.unpack(payload[1:17])
    if index == content.snapshot_index and term != content.snapshot_term:
        # a snapshot came from the leader, and the power went before the log could say so
        content.is_of_other_history = True
    if index > content.snapshot_index and not content.is_of_other_history:
        wanted = content.entries[-1][1] + 1 if content.entries else max(content.snapshot_index + 1, 1)
        if index != wanted:
            raise Damaged(f"{path}: entry {index} where {wanted} belongs: a part of the log is missing")
        content.entries.append((payload[17:], index, term))
    return int(index)
