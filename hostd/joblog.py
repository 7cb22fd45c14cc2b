"""Write one job's log: move what a pipe holds to the disk, and note when it came and on which stream.

The bytes of a pipe are spliced into the log's file: they leave the pipe when they are in the file, in one system call,
so a hostd that is killed at any moment has lost none and the next one repeats none. Nothing waits in our memory and
Python never sees them. A terminal cannot be spliced from: what was read from it and not yet written dies with us.

A log keeps its newest two segments of bounded size. It says so when a job writes so much that this is soon over. On a
full disk output is dropped, the job is not held up, and the log says how much as soon as it can.
Called by `pump` and, through `logs`, by `lifecycle`. The files are described in `segments`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
from pathlib import Path

from discovery.wire import clock
from hostd.segments import (
    CLOSED,
    MIDLINE,
    NEWLINE,
    OUTPUT,
    READ_BYTES,
    RECORD_BYTES,
    Record,
    Segment,
    drop,
    path_of,
    segments,
    this_boot,
)

log = logging.getLogger(__name__)

SEGMENTS_KEPT = 2
SEGMENT_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
"""At most so much is moved in one go: about half a millisecond, then the loop has its turn."""
_STREAMS = (0, 1, 2)
_SAME_CHUNK_US = 1000
"""What a stream brings within this time of a record needs none of its own."""
_FLOOD_S = 10.0
"""A segment that is full so soon is a flood; that is said once in `_FLOOD_SAID_S`."""
_FLOOD_SAID_S = 60.0
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_NO_RECORD = Record(0, -1, -1, CLOSED, 0)


class JobLog:
    """The log of one job, open for writing. An idle job's has no file until something is written."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.is_ended = False
        self._changed: asyncio.Event | None = None
        self._data_fd = self._index_fd = -1
        self._first = self._position = 0
        self._records = 0
        self._last = _NO_RECORD
        self._ends: dict[int, int] = {}  # of the streams' last chunks in this segment
        self._midline: set[int] = set()  # streams that came into this segment in the middle of a line
        self._began_at = 0.0
        self._flood_said_at = -_FLOOD_SAID_S
        self._lost_bytes = 0
        self._lost_why = ""
        self._has_splice = True
        if segments(folder):
            try:
                self._open()
            except OSError as error:  # a full disk: the job runs all the same, and each write tries again
                self._lose(0, error)

    # writing

    def take(self, stream: int, fd: int, *, is_wanted: bool = False) -> tuple[int, bytes]:
        """Move what a pipe holds into the log, up to `CHUNK_BYTES`.

        Returns how many bytes have left the pipe, 0 if it has ended, and the bytes if they are wanted (also if the
        disk was full and they were dropped).

        Raises:
            BlockingIOError: the pipe is empty.
        """
        if self.is_ended or not self._has_splice:
            return self._copy(stream, fd)
        if self._data_fd < 0 and not self._lost_bytes and _is_over(fd):  # a job that said nothing: no file for that
            return 0, b""
        try:
            room = self._begin(stream, OUTPUT, clock.now_s())
            offset = self._position - self._first
            flags = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
            count = os.splice(fd, self._data_fd, min(room, CHUNK_BYTES), offset_dst=offset, flags=flags)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno == errno.EINVAL:  # no pipe, or a file system without
                self._has_splice = False
                return self._copy(stream, fd)
            dropped = os.read(fd, READ_BYTES)
            self._lose(len(dropped), error)
            return len(dropped), dropped
        if count:
            self._advance(stream, count)
        return count, os.pread(self._data_fd, count, offset) if is_wanted else b""

    def _copy(self, stream: int, fd: int) -> tuple[int, bytes]:
        data = os.read(fd, READ_BYTES)
        self.append(stream, data)
        return len(data), data

    def append(self, stream: int, data: bytes, at: float | None = None, *, kind: int = OUTPUT) -> None:
        """Write bytes that we hold; they may begin and end in the middle of a line."""
        before = self._position
        try:
            if not self.is_ended:
                self._put(stream, kind, data, clock.now_s() if at is None else at)
        except OSError as error:
            self._lose(len(data) - max(self._position - before, 0), error)

    def _put(self, stream: int, kind: int, data: bytes, now_s: float) -> None:
        rest = memoryview(data)
        while rest:
            wanted = rest[: self._begin(stream, kind, now_s)]
            count = os.pwrite(self._data_fd, wanted, self._position - self._first)
            if count < len(wanted):
                os.ftruncate(self._data_fd, self._position - self._first)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._advance(stream, count)
            rest = rest[count:]

    def say(self, text: str) -> None:
        """Add a line of hostd's own (stream 0)."""
        self.append(0, b"hostd: " + text.replace("\n", " ").encode() + b"\n")

    def end_stream(self, stream: int) -> None:
        """End the line that the stream left unfinished, if any."""
        with contextlib.suppress(OSError):
            if self._is_midline(stream):
                self.append(stream, b"\n", kind=NEWLINE)

    def end(self) -> None:
        """Note that nothing more will come: followers finish, the files are closed."""
        if not self.is_ended:
            for stream in _STREAMS:
                self.end_stream(stream)
            self.close()

    def close(self) -> None:
        """Close the files without ending the log: a later hostd goes on."""
        if not self.is_ended:
            if self._data_fd >= 0:
                with contextlib.suppress(OSError):
                    self._note(0, CLOSED, clock.now_s())
            self._close_files()
            self.is_ended = True
            self._tell()

    # being read

    @property
    def changed(self) -> asyncio.Event:
        """The event of the next write or of the end; take it before reading, wait for it after."""
        if self._changed is None:
            self._changed = asyncio.Event()
            if self.is_ended:
                self._changed.set()
        return self._changed

    @property
    def position(self) -> int:
        """Return the position of the next byte."""
        return self._position

    @property
    def bytes_dropped(self) -> int:
        """Return how much the rotation has taken away."""
        found = segments(self.folder)
        return found[0] if found else 0

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None if not self.is_ended else self._changed

    # one write

    def _begin(self, stream: int, kind: int, now_s: float) -> int:
        """Have a file, a record of what is about to be written, and return the room for it."""
        if self._data_fd < 0:
            self._open()
        if self._lost_bytes:
            self._say_lost()
        if self._used_bytes + RECORD_BYTES >= self.segment_bytes and self._position > self._first:
            self._rotate(now_s)
        last, at_us = self._last, int(now_s * 1_000_000)
        is_same = last.stream == stream and last.kind == kind == OUTPUT and 0 <= at_us - last.at_us < _SAME_CHUNK_US
        if not is_same:
            self._note(stream, kind, now_s)
        return max(self.segment_bytes - self._used_bytes, 1)

    @property
    def _used_bytes(self) -> int:
        return self._position - self._first + self._records * RECORD_BYTES

    def _note(self, stream: int, kind: int, now_s: float) -> None:
        record = Record(int(now_s * 1_000_000), self._position, stream, kind, this_boot())
        is_unused = self._last.position == self._position and self._last.kind == OUTPUT
        number = self._records - 1 if is_unused else self._records
        if os.pwrite(self._index_fd, record.pack(), number * RECORD_BYTES) != RECORD_BYTES:
            self._last = _NO_RECORD  # it may be torn
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._records, self._last = number + 1, record

    def _advance(self, stream: int, count: int) -> None:
        self._position += count
        self._ends[stream] = self._position
        self._tell()

    def _is_midline(self, stream: int) -> bool:
        end = self._ends.get(stream)
        if end is None:
            return stream in self._midline
        return os.pread(self._data_fd, 1, end - 1 - self._first) != b"\n"

    # a full disk

    def _lose(self, size: int, error: OSError) -> None:
        if not self._lost_bytes:
            log.warning("%s: output is being lost: %s", self.folder.name, error)
        self._lost_bytes += size
        self._lost_why = error.strerror or str(error)

    def _say_lost(self) -> None:
        """Say what was lost where it is missing; if that does not work yet, nothing is written."""
        lost, self._lost_bytes = self._lost_bytes, 0
        now_s = clock.now_s()
        try:
            for stream in _STREAMS:
                if self._is_midline(stream):
                    self._put(stream, NEWLINE, b"\n", now_s)
            word = f"hostd: {lost} bytes of output were lost here: {self._lost_why}\n"
            self._put(0, OUTPUT, word.encode(), now_s)
        except OSError:
            self._lost_bytes = lost
            raise

    # segments

    def _rotate(self, now_s: float) -> None:
        midline = {stream for stream in _STREAMS if self._is_midline(stream)}
        first, took_s = self._position, now_s - self._began_at
        self._close_files()
        self._create(first, now_s)
        self._midline = midline
        for stream in sorted(midline):
            self._note(stream, MIDLINE, now_s)
        dropped = segments(self.folder)[:-SEGMENTS_KEPT]
        for old in dropped:
            drop(self.folder, old)
        is_due = now_s - self._flood_said_at >= _FLOOD_SAID_S and 0 not in midline  # not into a word of our own
        if dropped and took_s < _FLOOD_S and is_due:
            self._flood_said_at = now_s
            rate = self.segment_bytes / max(took_s, 0.001) / 1e6
            log.warning("%s floods its log: %.1f MB/s", self.folder.name, rate)
            self.say(f"the job floods its log ({rate:.1f} MB/s): {self.bytes_dropped} bytes dropped by rotation so far")

    def _create(self, first: int, now_s: float) -> None:
        self._index_fd = os.open(path_of(self.folder, first, "index"), _OPEN, 0o600)
        self._data_fd = os.open(path_of(self.folder, first, "data"), _OPEN, 0o600)
        self._first = self._position = first
        self._records, self._last, self._ends, self._midline = 0, _NO_RECORD, {}, set()
        self._began_at = now_s

    def _close_files(self) -> None:
        for fd in (self._data_fd, self._index_fd):
            if fd >= 0:
                os.close(fd)
        self._data_fd = self._index_fd = -1

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = segments(self.folder)
        if len(found) > 1 and not path_of(self.folder, found[-1], "data").stat().st_size:
            drop(self.folder, found.pop())  # killed in the middle of a rotation: the one before will rotate again
        try:
            self._create(found[-1] if found else 0, clock.now_s())
            self._recover()
        except OSError:
            self._close_files()
            raise

    def _recover(self) -> None:
        """Cut what a power cut left: torn records, records of bytes that are not there, and bytes that are of none."""
        segment = Segment(self._first, self._data_fd, self._index_fd)
        end, number = segment.end, segment.records
        last: Record | None = None
        while number and last is None:
            number -= 1
            last = next((each for each in segment.record(number) if self._first <= each.position <= end), None)
        self._records = 0 if last is None else number + 1
        os.ftruncate(self._index_fd, self._records * RECORD_BYTES)
        kept = self._first if last is None else end
        has_fallen = last is not None and last.kind != CLOSED and last.boot != this_boot()
        if last is not None and has_fallen:
            kept = self._without_zeros(segment, last.position, end)
        if kept < end:
            os.ftruncate(self._data_fd, kept - self._first)
        self._position = kept
        self._midline = segment.midline()
        for chunk in segment.chunks_back(kept):
            self._ends.setdefault(chunk.record.stream, chunk.end)
            if all(stream in self._ends for stream in _STREAMS):
                break
        self.end_stream(0)
        if has_fallen:
            self.say("the machine was restarted before this log was closed: what was printed last may be missing")

    @staticmethod
    def _without_zeros(segment: Segment, start: int, end: int) -> int:
        """Return the end without the zeros that a file system shows for blocks that were never written."""
        while end > start:
            begin = max(start, end - READ_BYTES)
            block = segment.read(begin, end).rstrip(b"\0")
            if block:
                return begin + len(block)
            end = begin
        return end


def _is_over(fd: int) -> bool:
    """Tell whether a pipe is empty and nobody can write to it any more."""
    asked = select.poll()
    asked.register(fd, select.POLLIN)
    return asked.poll(0) == [(fd, select.POLLHUP)]
