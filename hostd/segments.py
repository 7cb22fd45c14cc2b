"""A job's log on disk: what it printed, byte for byte, and beside it when and on which stream.

A log is a folder of segments, two files each, named by the position of their first byte in all that was ever logged:

    00000000000000000000.data     the bytes
    00000000000000000000.index    records of 24 bytes: time, position, stream, kind, boot, checksum

A record says what the bytes from its position on are, up to the next record's position or the end of the data. It
is written before its bytes: whoever is killed between the two leaves a record of nothing, never a byte of unknown
origin. Two records at one position: the later one counts. Lines are not known here; `logreader` makes them.
Used by `joblog` (which writes) and `logreader`. Refuses nothing; a record with a wrong checksum is passed over.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

OUTPUT, NEWLINE, MIDLINE, CLOSED, GONE, CARRIED, PASSED = range(7)
"""What a record is of: bytes that the job (stream 0: hostd) wrote; the end of a line that the job left unfinished,
written by hostd; the fact that a stream's line began in an earlier segment; an orderly end of writing. The others are
never on disk (`loglines`): what a reader missed, and what there was of a line that it begins in the middle of."""

RECORD_BYTES = 24
READ_BYTES = 256 * 1024
_BODY = struct.Struct("<QQBBH")
_WHOLE = struct.Struct("<QQBBHI")
_RECORDS_A_READ, _RECORDS_AT_FIRST = 1024, 64
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Record(NamedTuple):
    """One entry of an index."""

    at_us: int
    position: int
    stream: int
    kind: int
    boot: int

    def pack(self) -> bytes:
        body = _BODY.pack(*self)
        return body + crc32(body).to_bytes(4, "little")


class Chunk(NamedTuple):
    """A stretch of the data that has one origin."""

    start: int
    end: int
    record: Record


@functools.cache
def this_boot() -> int:
    """Return what tells this boot from the one before: 16 bits of the kernel's boot id."""
    return crc32(_BOOT_ID.read_bytes()) & 0xFFFF


def unpack(block: bytes) -> list[Record]:
    """Return the records of a block of an index, without those that are torn."""
    found = []
    for offset, (*fields, checksum) in enumerate(_WHOLE.iter_unpack(block)):
        start = offset * RECORD_BYTES
        if crc32(block[start : start + _BODY.size]) == checksum:
            found.append(Record(*fields))
    return found


def path_of(folder: Path, first: int, kind: str) -> Path:
    """Return a segment's `data` or `index`."""
    return folder / f"{first:020d}.{kind}"


def segments(folder: Path) -> list[int]:
    """Return the first positions of the segments, oldest first."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 — asked after each write while somebody follows
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name[:-5]) for name in names if name.endswith(".data") and name[:-5].isdigit())


def drop(folder: Path, first: int) -> None:
    """Remove a segment, and its bytes from the disk even while a reader has it open: it notices, and skips."""
    data = path_of(folder, first, "data")
    with contextlib.suppress(FileNotFoundError):
        os.truncate(data, 0)
    for path in (data, path_of(folder, first, "index")):
        path.unlink(missing_ok=True)


def _numbered(block: bytes, whole: int) -> Iterator[tuple[int, Record]]:
    found = unpack(block[: whole * RECORD_BYTES])
    if len(found) == whole:
        yield from enumerate(found)
        return
    for offset in range(whole):  # some are torn
        for each in unpack(block[offset * RECORD_BYTES : (offset + 1) * RECORD_BYTES]):
            yield offset, each


class Segment:
    """One segment, open for reading."""

    def __init__(self, first: int, data_fd: int, index_fd: int) -> None:
        self.first = first
        self._data_fd = data_fd
        self._index_fd = index_fd

    @classmethod
    def open(cls, folder: Path, first: int) -> Segment:
        """Open it.

        Raises:
            FileNotFoundError: it was dropped.
        """
        data_fd = os.open(path_of(folder, first, "data"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(first, data_fd, os.open(path_of(folder, first, "index"), os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            os.close(data_fd)
            raise

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back."""
        os.close(self._data_fd)
        os.close(self._index_fd)

    @property
    def end(self) -> int:
        """The position after its last byte. Ask before looking at the records: they are written first."""
        return self.first + os.fstat(self._data_fd).st_size

    @property
    def records(self) -> int:
        """How many records the index has."""
        return os.fstat(self._index_fd).st_size // RECORD_BYTES

    def record(self, number: int, count: int = 1) -> list[Record]:
        """Return up to `count` records from `number` on."""
        block = os.pread(self._index_fd, count * RECORD_BYTES, number * RECORD_BYTES)
        return unpack(block[: len(block) // RECORD_BYTES * RECORD_BYTES])

    def data_file(self) -> FileIO:
        """Return the data as a file, to be sent; it is closed with the segment."""
        return FileIO(self._data_fd, "rb", closefd=False)

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`; fewer if the segment was dropped meanwhile."""
        return os.pread(self._data_fd, end - start, start - self.first)

    def find(self, position: int, *, at_us: int | None = None) -> int:
        """Return the number of the last record at or before `position` (or before the time `at_us`), 0 if none is."""
        low, high = 0, self.records
        while low < high:
            middle = (low + high) // 2
            found = self.record(middle)
            if not found:  # torn: the search cannot go on, and the beginning is always right
                return 0
            is_before = found[0].position <= position if at_us is None else found[0].at_us < at_us
            low, high = (middle + 1, high) if is_before else (low, middle)
        return max(low - 1, 0)

    def midline(self) -> set[int]:
        """Return the streams whose first bytes here go on with a line of an earlier segment."""
        return {each.stream for each in self.record(0, 3) if each.kind == MIDLINE}

    def chunks(self, start: int, stop: int, number: int = 0) -> Iterator[tuple[int, Chunk]]:
        """Yield what lies between two positions, with the number of its record; `number` is not after `start`."""
        before: tuple[int, Record] | None = None
        count = _RECORDS_AT_FIRST
        while block := os.pread(self._index_fd, count * RECORD_BYTES, number * RECORD_BYTES):
            whole = len(block) // RECORD_BYTES
            for offset, each in _numbered(block, whole):
                if before is not None:
                    begin, end = max(before[1].position, start), min(each.position, stop)
                    if end > begin:
                        yield before[0], Chunk(begin, end, before[1])
                if each.position >= stop:
                    return
                before = number + offset, each
            if whole < count:
                break
            number, count = number + whole, _RECORDS_A_READ
        if before is not None and stop > (begin := max(before[1].position, start)):
            yield before[0], Chunk(begin, stop, before[1])

    def chunks_back(self, stop: int) -> Iterator[Chunk]:
        """Yield what lies before a position, newest first."""
        number = self.records
        while number > 0:
            count = min(number, _RECORDS_A_READ)
            number -= count
            for each in reversed(self.record(number, count)):
                if each.position < stop:
                    yield Chunk(each.position, stop, each)
                    stop = each.position
