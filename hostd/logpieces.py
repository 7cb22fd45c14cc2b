"""A job's log as it lies on the disk, for who makes lines of it himself (`loglines`): the kernel sends it, not we.

A stream of frames, one for each piece; all numbers are big-endian:

    kind (1 byte, as in `segments`), stream (1), 2 bytes of 0, length (4), position after it (8), time in us (8)
    the bytes; of a word (`GONE`, `PASSED`, `MIDLINE`) the position at which it begins (8)
    how many of these bytes there are (4)

The last number is less than the length when the rotation took the file away while it was being sent: the rest is
padding. A log begins with what its streams' unfinished lines had before. A frame of kind `CLOSED` says that we are
there. Made for `api`; read by `cli.log`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from discovery.wire.errors import Internal
from discovery.wire.filepart import FilePart
from hostd.loglines import Piece
from hostd.logreader import Cursor, Stretch, begun
from hostd.segments import CLOSED, GONE, MIDLINE, NEWLINE, OUTPUT, PASSED

_HEAD = struct.Struct(">BBxxIQQ")
_TAIL = struct.Struct(">I")
_START = struct.Struct(">Q")
_WORDS = (GONE, PASSED, MIDLINE)
_SENT_LEAST_BYTES, _SENT_MOST_BYTES = 64 * 1024, 512 * 1024
"""A shorter piece is cheaper to read than to have sent; a longer one is sent in parts."""
_BLOCK_BYTES = 32 * 1024
"""So little is read at a time that malloc (`config.LEAN_MALLOC`) need not map and unmap each buffer."""


def _head(piece: Piece, length: int) -> bytes:
    return _HEAD.pack(piece.kind, piece.stream, length, piece.end, round(piece.at * 1e6))


def encode(piece: Piece) -> bytes:
    """Make a frame."""
    data = _START.pack(piece.start) if piece.kind in _WORDS else piece.data
    return _head(piece, len(data)) + data + _TAIL.pack(len(data))


KEEP_ALIVE = encode(Piece(0, CLOSED, 0.0, 0, 0, b""))


class Pieces:
    """The pieces of all streams or one, from a position on."""

    def __init__(self, folder: Path, since: int, *, stream: int | None = None) -> None:
        self._cursor = Cursor(folder, since)
        self._stream = stream
        self._begin: Iterator[Piece] = begun(folder, since)

    def read(self) -> bytes | FilePart:
        """Return the next frames, nothing when all that is written has been read."""
        if found := b"".join(map(encode, filter(self._is_wanted, self._begin))):
            return found
        while True:
            while (stretch := self._cursor.stretch(_SENT_LEAST_BYTES, _SENT_MOST_BYTES)) is not None:
                if self._is_wanted(stretch.piece):
                    return self._sent(stretch)
            if not (pieces := self._cursor.read(size=_BLOCK_BYTES)):
                return b""
            if found := b"".join(map(encode, filter(self._is_wanted, pieces))):
                return found

    def _is_wanted(self, piece: Piece) -> bool:
        return self._stream is None or piece.stream == self._stream or piece.kind in _WORDS

    def _sent(self, stretch: Stretch) -> FilePart:
        def end(sent: int) -> bytes:
            if sent < stretch.size:  # the cursor finds out what there is instead
                self._cursor.position = stretch.piece.start + sent
            return bytes(stretch.size - sent) + _TAIL.pack(sent)

        size = stretch.size
        return FilePart(_head(stretch.piece, size), stretch.file, stretch.offset, size, _TAIL.size, end)

    def close(self) -> None:
        self._cursor.close()


def decode(parts: Iterable[bytes]) -> Iterator[Piece]:
    """Yield the pieces in a stream of bytes, each when it is whole, also those that only keep the stream alive.

    Raises:
        Internal: the stream ends in the middle of a frame.
    """
    pending = bytearray()
    wanted = _HEAD.size
    for part in parts:
        pending += part
        if len(pending) < wanted:
            continue
        start = 0
        while len(pending) - start >= (wanted := _HEAD.size):
            kind, stream, length, end, at_us = _HEAD.unpack_from(pending, start)
            wanted += length + _TAIL.size
            if len(pending) - start < wanted:
                break
            begin = start + _HEAD.size
            (valid,) = _TAIL.unpack_from(pending, begin + length)
            yield _piece(kind, stream, end - length + valid, at_us, bytes(pending[begin : begin + valid]))
            start += wanted
        del pending[:start]
    if pending:
        raise Internal("the log broke off in the middle", hint="ask again")


def _piece(kind: int, stream: int, end: int, at_us: int, data: bytes) -> Piece:
    if kind in _WORDS:
        return Piece(stream, kind, at_us / 1e6, _START.unpack(data)[0], end, b"")
    start = end - len(data) if kind in (OUTPUT, NEWLINE) else end
    return Piece(stream, kind, at_us / 1e6, start, end, data)
