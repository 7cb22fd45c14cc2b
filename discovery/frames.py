"""How records lie in our files: marked, measured, checksummed, so that damage is never taken for data.

A file starts with 16 bytes: `HOSTD` + kind (3 bytes), format version (u32), CRC-32 of both. Then records:

    marker 4 bytes | length u32 | crc u32 | durable u64 | payload        (big-endian)

`crc` covers length, durable and payload. `durable` is the file's length that was known to be on
disk when the record was written; it tells, when a bad record is found, whether what it destroyed
had ever been promised: if any later record knows of a durable length beyond the bad spot, then
it had been, and the file is damaged; otherwise the bad record is the torn end of a write that
nobody was told about, and may be cut. Used by `journal` and `snapshot`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

FORMAT_VERSION = 1
HEADER_BYTES = 16
RECORD_BYTES_MAX = 64 * 1024 * 1024

_MARKER = b"\xd5HR\x1e"
_HEAD = struct.Struct(">4sIIQ")
_COVERED = struct.Struct(">IQ")


class Damaged(Exception):
    """A file holds something else than what was written to it, where it had been promised to be safe."""


@dataclass(frozen=True)
class Record:
    """A record that passed its check, and where it ends in the file."""

    payload: bytes
    durable: int
    end: int


def header(kind: bytes) -> bytes:
    """Return the first bytes of a file of a kind (3 letters)."""
    start = b"HOSTD" + kind + struct.pack(">I", FORMAT_VERSION)
    return start + struct.pack(">I", zlib.crc32(start))


def check_header(raw: bytes, kind: bytes, name: str) -> None:
    """Check the first bytes of a file.

    Raises:
        Damaged: it is no file of this kind, or of a format that this version does not know.
    """
    if raw[:HEADER_BYTES] == header(kind):
        return
    version = struct.unpack(">I", raw[8:12])[0] if len(raw) >= HEADER_BYTES else 0
    if raw[:8] == b"HOSTD" + kind and version > FORMAT_VERSION:
        raise Damaged(f"{name} has format {version}, this version knows {FORMAT_VERSION}: run the newer hostd")
    raise Damaged(f"{name} does not start as one of our files does")


def encode(payload: bytes, durable: int = 0) -> bytes:
    """Write one record."""
    crc = zlib.crc32(payload, zlib.crc32(_COVERED.pack(len(payload), durable)))
    return _HEAD.pack(_MARKER, len(payload), crc, durable) + payload


def decode_at(raw: bytes, at: int) -> Record | None:
    """Read the record at an offset; `None` if there is no whole and correct one."""
    if len(raw) - at < _HEAD.size:
        return None
    marker, length, crc, durable = _HEAD.unpack_from(raw, at)
    end = at + _HEAD.size + length
    if marker != _MARKER or length > RECORD_BYTES_MAX or end > len(raw):
        return None
    payload = raw[at + _HEAD.size : end]
    if zlib.crc32(payload, zlib.crc32(_COVERED.pack(length, durable))) != crc:
        return None
    return Record(payload, durable, end)


def decode_all(raw: bytes, name: str, *, may_be_torn: bool) -> Iterator[Record]:
    """Yield the records after the header up to the end, or up to a torn tail if there may be one.

    Raises:
        Damaged: a record is bad and is not just a torn tail.
    """
    at = HEADER_BYTES
    while at < len(raw):
        record = decode_at(raw, at)
        if record is None:
            if may_be_torn and not raw[at:].strip(b"\0"):
                return  # filled up ahead of the writing
            if not may_be_torn or _was_promised(raw, at):
                raise Damaged(f"{name} is damaged at byte {at} of {len(raw)}")
            return
        yield record
        at = record.end


def is_unborn(raw: bytes) -> bool:
    """Tell whether a file's first record never got to the disk whole, and nothing was promised after it."""
    if len(raw) >= HEADER_BYTES and decode_at(raw, HEADER_BYTES) is not None:
        return False
    return not _was_promised(raw, 0)


def _was_promised(raw: bytes, bad: int) -> bool:
    at = raw.find(_MARKER, bad + 1)
    while at >= 0:
        record = decode_at(raw, at)
        if record is not None and record.durable > bad:
            return True
        at = raw.find(_MARKER, record.end if record is not None else at + 1)
    return False
