"""One append-only log per job: written a chunk at a time, read a line at a time.

On disk a log is a folder of segments named by their first sequence number. A segment is text, one
record a line, so that it can be read with plain tools:

    1700000000.123456 1F the text of a whole line
    1700000000.123500 1P a line that has not ended yet, con
    1700000000.200000 1F tinued here

The digit is the stream (0 is hostd itself), `F` ends a line, `P` is continued by the stream's next
record, `E` ends a line that the job left without a newline. So every chunk that a job writes is on
its way to the disk in one `write`, nothing waits in our memory, and a hostd that is killed loses no
byte. A record's sequence number is its place; a line's is that of its last record. Python never
loops over lines on the way in.

The newest two segments are kept; a reader that asks for what is gone is told how much is missing.
Called by `pump` (append) and by `api` (read). Refuses nothing: a job may print what it likes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from discovery.wire import clock
from hostd.types import LogLine

log = logging.getLogger(__name__)

SEGMENTS_KEPT = 2
LINE_BYTES_MAX = 1024 * 1024
"""A longer line is handed out in pieces of about this size."""
_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_READ_BYTES = 256 * 1024
_HEAD = 21  # bytes before a record's text: 17 of time, space, stream, kind, space
_STREAM, _KIND = 18, 19
_WHOLE, _PARTIAL = ord("F"), ord("P")


def _prefix(at: float, stream: int, kind: bytes) -> bytes:
    return b"%017.6f %d%b " % (at, stream, kind)


def _segments(folder: Path) -> list[tuple[int, Path]]:
    try:
        return sorted((int(path.stem), path) for path in folder.glob("*.log") if path.stem.isdigit())
    except FileNotFoundError:
        return []


class JobLog:
    """The log of one job, open for appending."""

    def __init__(self, folder: Path, *, segment_bytes: int = 16 * 1024 * 1024) -> None:
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.is_ended = False
        self._changed = asyncio.Event()
        self._partial: set[int] = set()
        self._lost_bytes = 0
        self._fd = -1
        self._first = self._next = 1
        self._size = 0
        try:
            self._open()
        except OSError as error:  # a full disk: the job runs all the same, and each write tries again
            self._lose(0, error)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = _segments(self.folder)
        self._first, path = found[-1] if found else (1, self._path(1))
        self._fd = os.open(path, _APPEND, 0o600)
        self._recover()

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:020d}.log"

    def _recover(self) -> None:
        """Count what is there, cut a record torn by a power cut, and see which streams are in the middle of a line."""
        size, tail = os.fstat(self._fd).st_size, b""
        self._size, self._next = 0, self._first
        for offset in range(0, size, _READ_BYTES):
            block = os.pread(self._fd, _READ_BYTES, offset)
            self._next += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                self._size = offset + last + 1
            tail = tail[-_READ_BYTES:] + block
        if self._size != size:
            os.ftruncate(self._fd, self._size)
        kinds = {line[_STREAM]: line[_KIND] for line in tail.split(b"\n")[:-1] if len(line) >= _HEAD}
        self._partial |= {stream - 48 for stream, kind in kinds.items() if kind == _PARTIAL}

    def append(self, stream: int, chunk: bytes, at: float | None = None) -> None:
        """Write what a stream brought; it may begin and end in the middle of a line."""
        if not chunk:
            return
        now = clock.now_s() if at is None else at
        whole, newline, rest = chunk.rpartition(b"\n")
        record = b""
        if newline:
            head = _prefix(now, stream, b"F")
            record = head + whole.replace(b"\n", b"\n" + head) + b"\n"
        if rest:
            record += _prefix(now, stream, b"P") + rest + b"\n"
            self._partial.add(stream)
        else:
            self._partial.discard(stream)
        self._write(record)

    def say(self, text: str) -> None:
        """Add a line of hostd's own (stream 0)."""
        self.append(0, b"hostd: " + text.replace("\n", " ").encode() + b"\n")

    def end_stream(self, stream: int) -> None:
        """End the line that the stream left unfinished, if any."""
        if stream in self._partial:
            self._partial.discard(stream)
            self._write(_prefix(clock.now_s(), stream, b"E") + b"\n")

    def end(self) -> None:
        """Note that nothing more will come: followers finish, the file is closed."""
        if self.is_ended:
            return
        for stream in sorted(self._partial):
            self.end_stream(stream)
        self.close()

    def close(self) -> None:
        """Close the file without ending the log: a later hostd goes on."""
        if not self.is_ended:
            self.is_ended = True
            if self._fd >= 0:
                os.close(self._fd)
            self._changed.set()

    @property
    def changed(self) -> asyncio.Event:
        """The event of the next append or of the end; take it before reading, wait for it after."""
        return self._changed

    @property
    def position(self) -> int:
        """Return the sequence number that the next record will have."""
        return self._next

    def _write(self, record: bytes) -> None:
        if self.is_ended:
            return
        try:
            if self._fd < 0:
                self._open()
            if self._size >= self.segment_bytes:
                self._rotate()
            written = os.write(self._fd, record)
            if written < len(record):  # a full disk takes a part: keep whole records only
                os.ftruncate(self._fd, self._size)
                raise OSError("short write")
        except OSError as error:
            self._lose(len(record), error)
            return
        self._size += len(record)
        self._next += record.count(b"\n")
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self._lost_bytes:
            lost, self._lost_bytes = self._lost_bytes, 0
            self.say(f"about {lost} bytes of output were lost before this: the disk was full")

    def _lose(self, size: int, error: OSError) -> None:
        if not self._lost_bytes:
            log.warning("%s: output is being lost: %s", self.folder.name, error)
        self._lost_bytes += size

    def _rotate(self) -> None:
        fd = os.open(self._path(self._next), _APPEND, 0o600)
        os.close(self._fd)
        self._fd, self._first, self._size = fd, self._next, 0
        for _, path in _segments(self.folder)[:-SEGMENTS_KEPT]:
            path.unlink(missing_ok=True)


class Reader:
    """Reads one job's log from a place on, as lines; keeps its place between calls, across rotations."""

    def __init__(self, folder: Path, job_id: str, labels: Mapping[str, str], *, since: int = 0) -> None:
        self.folder = folder
        self.job_id = job_id
        self.labels = dict(labels)
        self._since = since
        self._sequence = 0  # of the next record to read
        self._opened = 0  # first sequence of the open segment
        self._fd = -1
        self._torn = b""
        self._pieces: dict[int, list[bytes]] = {}

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self) -> list[LogLine]:
        """Return the next lines, none when all that is written has been read."""
        lines: list[LogLine] = []
        while not lines:
            if self._fd < 0 and not self._open_next(lines):
                return lines
            chunk = os.read(self._fd, _READ_BYTES)
            if not chunk:
                if not self._has_next():
                    return lines
                self.close()
                continue
            *records, self._torn = (self._torn + chunk).split(b"\n")
            for record in records:
                line = self._line(record)
                self._sequence += 1
                if line is not None:
                    lines.append(line)
        return lines

    def iterate(self) -> Iterator[LogLine]:
        """Yield all lines up to the present end."""
        while lines := self.read():
            yield from lines

    def _has_next(self) -> bool:
        return any(first >= self._sequence and first > self._opened for first, _ in _segments(self.folder))

    def _open_next(self, lines: list[LogLine]) -> bool:
        wanted = max(self._sequence, self._since + 1, 1)
        found = _segments(self.folder)
        older = [item for item in found if item[0] <= wanted]
        is_at_start = self._sequence == 0
        chosen = older[-1] if older else (found[0] if found else None)
        if chosen is None or (not is_at_start and chosen[0] < self._sequence):
            return False
        self._opened, path = chosen
        if self._opened > wanted:
            lines.append(self._missing(wanted, self._opened))
            self._pieces.clear()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # rotated away between listing and opening
            return self._open_next(lines)
        self._sequence, self._torn = self._opened, b""
        self._skip()
        return True

    def _skip(self) -> None:
        """Pass over blocks that hold nothing after `since`, without looking at their lines."""
        offset = 0
        while block := os.pread(self._fd, _READ_BYTES, offset):
            records = block.count(b"\n")
            if not records or self._sequence + records > self._since:
                break
            self._sequence += records
            offset += block.rfind(b"\n") + 1
        os.lseek(self._fd, offset, os.SEEK_SET)

    def _missing(self, wanted: int, first: int) -> LogLine:
        text = f"hostd: {first - wanted} earlier lines are gone (a job's log keeps its newest part)"
        return LogLine(
            job_id=self.job_id, sequence=first - 1, at=clock.now_s(), stream=0, text=text, labels=self.labels
        )

    def _line(self, record: bytes) -> LogLine | None:
        if len(record) < _HEAD:
            return None
        try:
            at, stream = float(record[:17]), record[_STREAM] - 48
        except ValueError:  # what a power cut left of a block
            return None
        text = record[_HEAD:]
        if record[_KIND] == _PARTIAL:
            pieces = self._pieces.setdefault(stream, [])
            pieces.append(text)
            if sum(map(len, pieces)) < LINE_BYTES_MAX:
                return None
            text = b""
        if stream in self._pieces:
            text = b"".join([*self._pieces.pop(stream), text])
        if self._sequence <= self._since:
            return None
        return LogLine(
            job_id=self.job_id,
            sequence=self._sequence,
            at=at,
            stream=stream,
            text=text.decode("utf-8", "replace").rstrip("\r"),
            labels=self.labels,
        )


def _backwards(folder: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, stream, kind) of every record, newest first."""
    for first, path in reversed(_segments(folder)):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # rotated away
            return
        sequence = first + content.count(b"\n")
        end = content.rfind(b"\n")
        while end >= 0:
            start = content.rfind(b"\n", 0, end) + 1
            sequence -= 1
            if end - start >= _HEAD:
                yield sequence, content[start + _STREAM] - 48, content[start + _KIND]
            end = start - 1


def start_of_tail(folder: Path, lines: int, stream: int | None = None) -> int:
    """Return the sequence number after which the last `lines` lines (of one stream, if given) begin."""
    missing = lines
    for sequence, of, kind in _backwards(folder):
        if kind == _PARTIAL:
            continue
        if missing == 0:
            return sequence
        missing -= stream is None or of == stream
    return 0


def raw_chunks(folder: Path, until: int) -> Iterator[tuple[int, bytes]]:
    """Yield what the job printed, as it printed it, as (stream, bytes), up to record `until` (exclusive)."""
    for first, path in _segments(folder):
        sequence, torn = first, b""
        try:
            file = path.open("rb")
        except FileNotFoundError:  # rotated away
            continue
        with file:
            while sequence < until and (block := file.read(_READ_BYTES)):
                *records, torn = (torn + block).split(b"\n")
                yield from _joined(records[: until - sequence])
                sequence += len(records)


def _joined(records: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Put neighbours of the same stream together: a client is sent a few large messages, not one a line."""
    current, texts = -1, list[bytes]()
    for record in records:
        if len(record) < _HEAD or not record[_STREAM : _STREAM + 1].isdigit():
            continue
        stream = record[_STREAM] - 48
        if stream != current and texts:
            yield current, b"".join(texts)
            texts.clear()
        current = stream
        texts.append(record[_HEAD:])
        if record[_KIND] == _WHOLE:
            texts.append(b"\n")
    if texts:
        yield current, b"".join(texts)


class Logs:
    """All logs of this host."""

    def __init__(self, root: Path, *, segment_bytes: int) -> None:
        self.root = root
        self.segment_bytes = segment_bytes
        self._open: dict[str, JobLog] = {}
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder(self, job_id: str) -> Path:
        """Return where the job's log is."""
        return self.root / job_id

    def open(self, job_id: str) -> JobLog:
        """Return the job's log for appending; the same object for everyone."""
        found = self._open.get(job_id)
        if found is None or found.is_ended:
            found = self._open[job_id] = JobLog(self.folder(job_id), segment_bytes=self.segment_bytes)
        return found

    def position(self, job_id: str) -> int:
        """Return the sequence number of the next record of a log that is open; beyond all others if it is not."""
        found = self._open.get(job_id)
        return 2**62 if found is None else found.position

    def end(self, job_id: str) -> None:
        """End a job's log; followers finish."""
        if found := self._open.pop(job_id, None):
            found.end()

    def say(self, job_id: str, text: str) -> None:
        """Add a line of hostd's own to a log, open or not."""
        if found := self._open.get(job_id):
            found.say(text)
            return
        self.open(job_id).say(text)
        self.end(job_id)

    def remove(self, job_id: str) -> None:
        """Delete a job's log."""
        self.end(job_id)
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def names(self) -> list[str]:
        """Return the ids that have a log."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def close(self) -> None:
        """Close all files; nothing is ended, a later hostd goes on."""
        for found in self._open.values():
            found.close()
        self._open.clear()

    def reader(self, job_id: str, labels: Mapping[str, str], *, since: int = 0, lines: int | None = None,
               stream: int | None = None) -> Reader:  # fmt: skip
        """Return a reader of the last `lines` lines (all if `None`) after `since`."""
        folder = self.folder(job_id)
        if lines is not None:
            since = max(since, start_of_tail(folder, lines, stream))
        return Reader(folder, job_id, labels, since=since)

    async def follow(self, reader: Reader) -> AsyncIterator[LogLine]:
        """Yield lines as they come, until the job's log ends."""
        try:
            while True:
                current = self._open.get(reader.job_id)
                changed = None if current is None else current.changed
                for line in reader.iterate():
                    yield line
                if current is None or changed is None or current.is_ended:
                    return
                await changed.wait()
        finally:
            reader.close()
