"""Read one job's log, as it was printed or as lines, from a place on; keep the place between calls.

A place is a position: how many bytes were logged before it. A line's `sequence` is the position after it, so a reader
that begins at the `sequence` of the last line it got misses none and repeats none, also if the streams were interleaved
in the middle of lines: what an unfinished line had so far is looked up. Lines are handled a block at a time; only who
wants `LogLine`s pays for each. Reading never touches the writer: a reader that the rotation overtakes is told how much
it missed. Called by `logs`, `api`, `attach`, `output`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from discovery.wire import clock
from hostd.segments import GONE, MIDLINE, NEWLINE, OUTPUT, READ_BYTES, Chunk, Record, Segment, segments
from hostd.types import LogLine

LINE_BYTES_MAX = 1024 * 1024
"""A longer line is handed out in pieces of this size."""
_FOREVER = 2**62


class Piece(NamedTuple):
    """Bytes of one stream in one stretch, or (kind `GONE`) that there are none from `start` to `end` any more."""

    stream: int
    kind: int
    at: float
    start: int
    end: int
    data: bytes


class Block(NamedTuple):
    """Whole lines of one stream and time, each with its newline; or a part, without one, of a line that is too long."""

    stream: int
    at: float
    end: int
    data: bytes


class Cursor:
    """Walks through a log's bytes."""

    def __init__(self, folder: Path, position: int = 0) -> None:
        self._folder = folder
        self.position = position
        self._segment: Segment | None = None
        self._number = 0  # a record that is not after our position
        self._done = -1  # the first position of the segment that was read last
        self._resting = -1  # that of the segment to go on with

    def close(self) -> None:
        """Give the files back."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def read(self, until: int = _FOREVER) -> list[Piece]:
        """Return the next quarter of a MiB or less, nothing when all that is written (before `until`) was read.

        Then no file is open: a node may have thousands of followers that wait.
        """
        found: list[Piece] = []
        while not found and self.position < until:
            if self._segment is None and not self._open_next(found):
                break
            assert self._segment is not None
            stop = min(self._segment.end, self.position + READ_BYTES, until)
            if stop > self.position:
                found += self._pieces(self._segment, stop)
            elif self._has_next(self._segment):
                self.close()
            else:
                self._resting = self._segment.first
                self.close()
                break
        return found

    def _pieces(self, segment: Segment, stop: int) -> Iterator[Piece]:
        start = self.position
        chunks = list(segment.chunks(start, stop, self._number))
        data = segment.read(start, stop)
        if len(data) < stop - start:  # dropped while we looked
            return
        self.position = stop
        for number, (begin, end, record) in chunks:
            text = data if end - begin == len(data) else data[begin - start : end - start]
            yield Piece(record.stream, record.kind, record.at_us / 1e6, begin, end, text)
            self._number = number

    def _has_next(self, segment: Segment) -> bool:
        has_more = any(first > segment.first for first in segments(self._folder))
        return has_more and not segment.first <= self.position < segment.end

    def _open_next(self, found: list[Piece]) -> bool:
        if self._resting >= 0:
            resting, self._resting = self._resting, -1
            with contextlib.suppress(FileNotFoundError):  # dropped while we rested
                self._segment = Segment.open(self._folder, resting)
                return True
        while True:
            later = [first for first in segments(self._folder) if first > self._done]
            if not later:
                return False
            chosen = max((first for first in later if first <= self.position), default=later[0])
            try:
                self._segment = Segment.open(self._folder, chosen)
            except FileNotFoundError:  # dropped between listing and opening
                continue
            break
        self._done = chosen
        if chosen > self.position:
            now = clock.now_s()
            found.append(Piece(0, GONE, now, self.position, chosen, b""))
            found += [Piece(stream, MIDLINE, now, chosen, chosen, b"") for stream in sorted(self._segment.midline())]
            self.position = chosen
        self._number = self._segment.find(self.position)
        return True


class Reader:
    """Reads one job's log from a place on, as lines."""

    def __init__(self, folder: Path, job_id: str, labels: Mapping[str, str], *, since: int = 0) -> None:
        self.folder = folder
        self.job_id = job_id
        self.labels = dict(labels)
        self._cursor = Cursor(folder, since)
        self._since = since
        self._is_started = False
        self._carried: dict[int, list[bytes]] = {}
        self._carried_bytes: dict[int, int] = {}
        self._fragments: dict[int, int] = {}  # bytes passed over of a line whose begin is gone

    def close(self) -> None:
        """Give the files back."""
        self._cursor.close()

    def blocks(self) -> list[Block]:
        """Return the next lines as blocks, none when all that is written has been read."""
        if not self._is_started:
            self._is_started = True
            for stream in (0, 1, 2):
                self._look_back(stream)
        found: list[Block] = []
        while not found and (pieces := self._cursor.read()):
            for piece in pieces:
                found += self._take(piece)
        return found

    def read(self) -> list[LogLine]:
        """Return the next lines, none when all that is written has been read."""
        return [line for block in self.blocks() for line in self._lines(block)]

    def iterate(self) -> Iterator[LogLine]:
        """Yield all lines up to the present end."""
        while lines := self.read():
            yield from lines

    def _lines(self, block: Block) -> Iterator[LogLine]:
        stream, at, end, data = block
        job_id, labels, position = self.job_id, self.labels, end - len(data)
        texts = data.split(b"\n")
        if not texts[-1]:
            texts.pop()
        for text in texts:
            position = min(position + len(text) + 1, end)
            yield LogLine(
                job_id=job_id,
                sequence=position,
                at=at,
                stream=stream,
                text=text.decode("utf-8", "replace").rstrip("\r"),
                labels=labels,
            )

    def _take(self, piece: Piece) -> Iterator[Block]:
        if piece.kind in (OUTPUT, NEWLINE):
            data = self._past_fragment(piece.stream, piece.data) if self._fragments else piece.data
            if data:
                yield from self._whole(piece, data)
        elif piece.kind == MIDLINE:
            self._fragments[piece.stream] = 0
        elif piece.kind == GONE:
            self._carried.clear()
            self._fragments.clear()
            text = b"hostd: %d bytes dropped by rotation (a job's log keeps its newest part)\n"
            yield Block(0, piece.at, piece.end, text % (piece.end - piece.start))

    def _past_fragment(self, stream: int, data: bytes) -> bytes:
        passed = self._fragments.get(stream)
        if passed is None:
            return data
        newline = data.find(b"\n")
        if 0 <= newline <= LINE_BYTES_MAX - passed:
            del self._fragments[stream]
            return data[newline + 1 :]
        if passed + len(data) > LINE_BYTES_MAX:
            del self._fragments[stream]
            return data[LINE_BYTES_MAX - passed :]
        self._fragments[stream] = passed + len(data)
        return b""

    def _whole(self, piece: Piece, data: bytes) -> Iterator[Block]:
        """Yield the lines that a piece ends, and keep the rest for the next."""
        stream, at, end = piece.stream, piece.at, piece.end
        if stream in self._carried:
            if b"\n" not in data and self._carried_bytes[stream] + len(data) <= LINE_BYTES_MAX:
                self._carry(stream, data)
                return
            data = b"".join([*self._carried.pop(stream), data])
        while (data.find(b"\n", 0, LINE_BYTES_MAX + 1)) < 0 and len(data) > LINE_BYTES_MAX:
            # it takes the byte after it to know that no newline follows: that byte is ours, and so is the position
            yield Block(stream, at, end - len(data) + LINE_BYTES_MAX + 1, data[:LINE_BYTES_MAX])
            data = data[LINE_BYTES_MAX:]
        whole = data.rfind(b"\n") + 1
        if whole:
            yield Block(stream, at, end - len(data) + whole, data[:whole])
        if whole < len(data):
            self._carry(stream, data[whole:])

    def _carry(self, stream: int, data: bytes) -> None:
        if stream not in self._carried:
            self._carried[stream], self._carried_bytes[stream] = [], 0
        self._carried[stream].append(data)
        self._carried_bytes[stream] += len(data)

    def _look_back(self, stream: int) -> None:
        """Take up the line that the stream is in the middle of where we begin."""
        texts, has_begin = _unfinished(self.folder, self._since, stream)
        size = sum(map(len, texts))
        if not has_begin and size <= LINE_BYTES_MAX:
            self._fragments[stream] = size
            return
        size -= 0 if has_begin else LINE_BYTES_MAX
        if size:
            text = b"".join(texts)
            self._carry(stream, text[len(text) - ((size - 1) % LINE_BYTES_MAX + 1) :])


def _older(folder: Path, position: int) -> Iterator[Segment]:
    """Yield the segments that have something before a position, newest first, open while they are looked at."""
    for first in reversed(segments(folder)):
        if first < position:
            try:
                segment = Segment.open(folder, first)
            except FileNotFoundError:  # dropped: so are those before
                return
            with segment:
                yield segment


def _unfinished(folder: Path, position: int, stream: int) -> tuple[list[bytes], bool]:
    """Return what a stream's line has had before a position, and whether that is from its begin."""
    texts: list[bytes] = []
    has_begin = True
    for segment in _older(folder, position):
        for chunk in segment.chunks_back(min(position, segment.end)):
            if chunk.record.stream != stream:
                continue
            for block in _blocks_back(segment, chunk):
                newline = block.rfind(b"\n")
                texts.append(block[newline + 1 :])
                if newline >= 0:
                    return texts[::-1], True
        has_begin = stream not in segment.midline()
        if has_begin:
            break
    return texts[::-1], has_begin


def _blocks_back(segment: Segment, chunk: Chunk) -> Iterator[bytes]:
    end = chunk.end
    while end > chunk.start:
        begin = max(chunk.start, end - READ_BYTES)
        yield segment.read(begin, end)
        end = begin


def start_of_tail(folder: Path, lines: int, stream: int | None = None) -> int:
    """Return the position after which the last `lines` lines (of one stream, if given) begin; 0 if that is all."""
    missing = lines + 1
    for segment in _older(folder, _FOREVER):
        end = segment.end
        everything = Chunk(segment.first, end, Record(0, segment.first, 0, OUTPUT, 0))
        for chunk in [everything] if stream is None else segment.chunks_back(end):
            if stream is not None and chunk.record.stream != stream:
                continue
            position = chunk.end
            for block in _blocks_back(segment, chunk):
                count = block.count(b"\n")
                if count >= missing:
                    return position - len(block) + _newline_from_end(block, missing) + 1
                missing -= count
                position -= len(block)
    return 0


def _newline_from_end(block: bytes, count: int) -> int:
    found = len(block)
    for _ in range(count):
        found = block.rfind(b"\n", 0, found)
    return found


def start_at_time(folder: Path, at: float) -> int:
    """Return the position of the first byte that came at a time (seconds since the epoch) or later; else the end."""
    at_us, end = int(at * 1_000_000), 0
    for first in segments(folder):
        try:
            segment = Segment.open(folder, first)
        except FileNotFoundError:
            continue
        with segment:
            for record in segment.record(segment.find(0, at_us=at_us), 2):
                if record.at_us >= at_us:
                    return record.position
            end = segment.end
    return end


def raw_chunks(folder: Path, until: int) -> Iterator[tuple[int, bytes]]:
    """Yield what the job printed, as it printed it, as (stream, bytes), up to position `until` (exclusive)."""
    cursor = Cursor(folder)
    try:
        while pieces := cursor.read(until):
            for piece in pieces:
                if piece.kind == OUTPUT:
                    yield piece.stream, piece.data
    finally:
        cursor.close()
