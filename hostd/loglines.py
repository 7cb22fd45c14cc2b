"""Make whole lines of a log's pieces, a block of many at a time; pure: pieces come from disk or from afar.

A piece is what lies on the disk in one stretch, or a word about what does not (`segments` names the kinds). Streams may
be interleaved in the middle of lines; a line up to `LINE_BYTES_MAX` comes whole, a longer one in parts of that size.
Used by `logreader` and, on the other side of the API, by `cli.log`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hostd.segments import CARRIED, GONE, MIDLINE, NEWLINE, OUTPUT, PASSED

LINE_BYTES_MAX = 1024 * 1024
"""A longer line is handed out in pieces of this size."""


class Piece(NamedTuple):
    """Bytes of one stream in one stretch; or a word.

    Kind `GONE`: there are none from `start` to `end` any more. `CARRIED`: these came before, of a line that has not
    ended. `PASSED`: so many (`end` - `start`) came before of a line whose begin is gone; `MIDLINE`: who knows how many.
    """

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


class Joiner:
    """Takes pieces in order and hands out blocks; keeps the unfinished lines of three streams."""

    def __init__(self) -> None:
        self._carried: dict[int, list[bytes]] = {}
        self._carried_bytes: dict[int, int] = {}
        self._fragments: dict[int, int] = {}  # bytes passed over of a line whose begin is gone

    def take(self, piece: Piece) -> Iterator[Block]:
        """Yield the lines that a piece ends."""
        if piece.kind in (OUTPUT, NEWLINE):
            data = self._past_fragment(piece.stream, piece.data) if self._fragments else piece.data
            if data:
                yield from self._whole(piece, data)
        elif piece.kind == CARRIED:
            self._carry(piece.stream, piece.data)
        elif piece.kind in (MIDLINE, PASSED):
            self._fragments[piece.stream] = piece.end - piece.start
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
