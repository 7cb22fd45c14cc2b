"""A job's log as a stream of frames: blocks of many lines, made without looking at any one of them.

For who wants text rather than `LogLine`s: a frame is a head of 16 bytes and its text.

    stream (1 byte: 0 hostd, 1 stdout, 2 stderr), 3 bytes of 0, length of the text (4), position after it (8)

All numbers are big-endian. The position can be given back as `since`. A frame without text says that we are there.
As lines, the text is whole lines, each with its newline and, if asked for, its time in front
(`2026-11-23T11:19:01.123456Z `). Raw, it is what the job wrote, byte for byte, and nothing of hostd's own.
Made for `api`, for who cannot make lines himself (`logpieces`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from discovery.wire.errors import Internal
from hostd.loglines import Block
from hostd.logreader import Cursor, Reader
from hostd.segments import OUTPUT

_HEAD = struct.Struct(">BxxxIQ")
KEEP_ALIVE = _HEAD.pack(0, 0, 0)


def frame(stream: int, position: int, text: bytes) -> bytes:
    """Make one frame."""
    return _HEAD.pack(stream, len(text), position) + text


def text_of(block: Block, *, has_times: bool) -> list[bytes | memoryview]:
    """Return a block's lines, each with its newline and, if wanted, its time in front; in parts, to copy none twice."""
    data = block.data
    if b"\r\n" in data:  # a terminal's
        data = data.replace(b"\r\n", b"\n")
    found: list[bytes | memoryview] = [data]
    if has_times:
        time = datetime.fromtimestamp(block.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()
        text = memoryview(data.replace(b"\n", b"\n" + time))
        found = [time, text[: -len(time)] if data.endswith(b"\n") else text]
    if not data.endswith(b"\n"):
        found.append(b"\n")
    return found


class Lines:
    """Lines, with or without their times, of all streams or one."""

    def __init__(self, reader: Reader, *, has_times: bool, stream: int | None = None) -> None:
        self._reader = reader
        self._has_times = has_times
        self._stream = stream

    def read(self) -> bytes:
        """Return the next frames, nothing when all that is written has been read."""
        while blocks := self._reader.blocks():
            if found := b"".join(self._frames(blocks)):
                return found
        return b""

    def _frames(self, blocks: list[Block]) -> Iterator[bytes]:
        for block in blocks:
            if self._stream is None or block.stream == self._stream:
                yield frame(block.stream, block.end, b"".join(text_of(block, has_times=self._has_times)))

    def close(self) -> None:
        self._reader.close()


class Raw:
    """What the job wrote, of both streams or one, from a position on."""

    def __init__(self, folder: Path, since: int, *, stream: int | None = None) -> None:
        self._cursor = Cursor(folder, since)
        self._stream = stream

    def read(self) -> bytes:
        """Return the next frames, nothing when all that is written has been read."""
        while pieces := self._cursor.read():
            if found := b"".join(
                frame(piece.stream, piece.end, piece.data)
                for piece in pieces
                if piece.kind == OUTPUT
                and (piece.stream == self._stream if self._stream is not None else piece.stream != 0)
            ):
                return found
        return b""

    def close(self) -> None:
        self._cursor.close()


def decode(parts: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (stream, position, text) of the frames in a stream of bytes, each when it is whole.

    Raises:
        Internal: the stream ends in the middle of a frame.
    """
    pending = b""
    for part in parts:
        pending += part
        start = 0
        while len(pending) - start >= _HEAD.size:
            stream, size, position = _HEAD.unpack_from(pending, start)
            begin = start + _HEAD.size
            if len(pending) - begin < size:
                break
            start = begin + size
            yield stream, position, pending[begin:start]
        pending = pending[start:]
    if pending:
        raise Internal("the log broke off in the middle", hint="ask again")
