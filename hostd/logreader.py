"""Read one job's log, as it was printed or as lines, from a place on; keep the place between calls.

A place is a position: how many bytes were logged before it. A line's `sequence` is the position after it, so a reader
that begins at the `sequence` of the last line it got misses none and repeats none, also if the streams were interleaved
in the middle of lines: what an unfinished line had so far is looked up (`begun`). Lines are handled a block at a time
(`loglines`); only who wants `LogLine`s pays for each. Reading never touches the writer: a reader that the rotation
overtakes is told how much it missed. Called by `logs`, `api`, `attach`, `logtext`, `logpieces`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from discovery.wire import clock
from hostd.loglines import LINE_BYTES_MAX, Block, Joiner, Piece
from hostd.segments import CARRIED, GONE, MIDLINE, OUTPUT, PASSED, READ_BYTES, Chunk, Record, Segment, segments
from hostd.types import LogLine

_FOREVER = 2**62


class Stretch(NamedTuple):
    """A long piece that was not read: `size` bytes at `offset` of `file`, which is open until the cursor moves on."""

    piece: Piece
    file: FileIO
    offset: int
    size: int


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

    def stretch(self, least: int, most: int) -> Stretch | None:
        """Return the next piece unread if it is long, else nothing: then `read`.

        Whoever finds the file shorter, as the rotation has overtaken him, sets `position` back to where it broke off.
        """
        segment, start = self._segment, self.position
        if segment is None or segment.end - start < least:
            return None
        number, (begin, end, record) = next(segment.chunks(start, min(segment.end, start + most), self._number))
        if begin != start or end - begin < least:
            return None
        self.position, self._number = end, number
        piece = Piece(record.stream, record.kind, record.at_us / 1e6, begin, end, b"")
        return Stretch(piece, segment.data_file(), begin - segment.first, end - begin)

    def read(self, until: int = _FOREVER, size: int = READ_BYTES) -> list[Piece]:
        """Return the next `size` bytes or fewer, nothing when all that is written (before `until`) was read.

        Then no file is open: a node may have thousands of followers that wait.
        """
        found: list[Piece] = []
        while not found and self.position < until:
            if self._segment is None and not self._open_next(found):
                break
            assert self._segment is not None
            stop = min(self._segment.end, self.position + size, until)
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
        self._joiner: Joiner | None = None

    def close(self) -> None:
        """Give the files back."""
        self._cursor.close()

    def blocks(self) -> list[Block]:
        """Return the next lines as blocks, none when all that is written has been read."""
        found: list[Block] = []
        if self._joiner is None:
            self._joiner = Joiner()
            for piece in begun(self.folder, self._since):
                found += self._joiner.take(piece)
        while not found and (pieces := self._cursor.read()):
            for piece in pieces:
                found += self._joiner.take(piece)
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


def begun(folder: Path, position: int) -> Iterator[Piece]:
    """Say of each stream what its line has had before a position."""
    for stream in (0, 1, 2):
        texts, has_begin = _unfinished(folder, position, stream)
        size = sum(map(len, texts))
        if not has_begin and size <= LINE_BYTES_MAX:
            yield Piece(stream, PASSED, 0.0, position - size, position, b"")
            continue
        size -= 0 if has_begin else LINE_BYTES_MAX
        if size:
            text = b"".join(texts)
            yield Piece(stream, CARRIED, 0.0, position, position, text[len(text) - ((size - 1) % LINE_BYTES_MAX + 1) :])


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
