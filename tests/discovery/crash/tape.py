"""The tape between a member's disk and the driver: what was done to files, step by step, and how to read it back."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

OPEN, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, SYNC_NAMES, CLOSE = range(8)
_HEAD = struct.Struct(">BIQII")
"""Kind, handle, number (offset, size or count of steps), length of what follows, CRC of that."""


class Tape:
    """Open for adding to; a killed writer may leave its last word unfinished."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.steps = 0

    def note(self, kind: int, handle: int, number: int, raw: bytes = b"") -> None:
        os.write(self._fd, _HEAD.pack(kind, handle, number, len(raw), zlib.crc32(raw)) + raw)
        self.steps += 1


def steps_of(tape: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield what a tape says; the writer may have been killed in the middle of its last word."""
    raw = tape.read_bytes() if tape.exists() else b""
    at = 0
    while at + _HEAD.size <= len(raw):
        kind, handle, number, length, crc = _HEAD.unpack_from(raw, at)
        body = raw[at + _HEAD.size : at + _HEAD.size + length]
        at += _HEAD.size + length
        if len(body) < length:
            return
        assert zlib.crc32(body) == crc, f"{tape} is wrong at {at}"
        yield kind, handle, number, body
