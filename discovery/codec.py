"""Commands and snapshots as bytes, for the log and the disk: msgpack of known types, nothing that runs code.

Called by `raft` and `snapshot` only. Bytes that do not decode to exactly these types raise
`Unreadable`; they come from our own checksummed files, so that is damage or a newer version's data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from discovery.operations import Command, Image, Lease, Record

_WRONG = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

CHUNK_RECORDS = 1000

_encoder = msgspec.msgpack.Encoder()
_command = msgspec.msgpack.Decoder(Command)


class Unreadable(Exception):
    """Stored bytes do not decode."""


class _Head(msgspec.Struct, frozen=True, array_like=True):
    revision: int
    compacted: int
    leases: list[Lease]
    base_count: int
    events_count: int


class Meta(msgspec.Struct, frozen=True, array_like=True, tag="meta"):
    """What a snapshot holds beside the state: the membership (encoded; empty: none) and the requests done lately."""

    membership: bytes
    requests: list[tuple[int, int]]


_meta = msgspec.msgpack.Decoder(Meta)
_head = msgspec.msgpack.Decoder(_Head)
_records = msgspec.msgpack.Decoder(list[Record])


def encode_command(command: Command) -> bytes:
    """Write a command as the payload of a log entry."""
    return _encoder.encode(command)


def decode_command(payload: bytes) -> Command:
    """Read a command back.

    Raises:
        Unreadable: the bytes are no command of ours.
    """
    try:
        return _command.decode(payload)
    except _WRONG as error:
        raise Unreadable(f"log entry does not decode: {error}") from error


def encode_image(image: Image) -> Iterator[bytes]:
    """Write a state as a head and chunks of records, so that no step takes long."""
    yield _encoder.encode(_Head(image.revision, image.compacted, image.leases, len(image.base), len(image.events)))
    for records in (image.base, image.events):
        for start in range(0, len(records), CHUNK_RECORDS):
            yield _encoder.encode(records[start : start + CHUNK_RECORDS])


def encode_snapshot(meta: Meta, image: Image) -> Iterator[bytes]:
    """Write all that a snapshot holds."""
    yield _encoder.encode(meta)
    yield from encode_image(image)


def decode_snapshot(chunks: list[bytes]) -> tuple[Meta, Image]:
    """Read a snapshot back; one of before there were clusters has no `Meta`.

    Raises:
        Unreadable: a chunk does not decode, or some are missing.
    """
    try:
        meta = _meta.decode(chunks[0])
    except msgspec.MsgspecError:
        return Meta(b"", []), decode_image(chunks)
    return meta, decode_image(chunks[1:])


def decode_image(chunks: Iterable[bytes]) -> Image:
    """Read a state back.

    Raises:
        Unreadable: a chunk does not decode, or some are missing.
    """
    try:
        iterator = iter(chunks)
        head = _head.decode(next(iterator))
        records = [record for chunk in iterator for record in _records.decode(chunk)]
    except (*_WRONG, StopIteration) as error:
        raise Unreadable(f"snapshot does not decode: {error}") from error
    if len(records) != head.base_count + head.events_count:
        raise Unreadable(f"snapshot has {len(records)} records, its head says {head.base_count + head.events_count}")
    image = Image(head.revision, head.compacted, head.leases, records[: head.base_count], records[head.base_count :])
    if mistake := _mistake(image):
        raise Unreadable(f"snapshot does not make sense: {mistake}")
    return image


def _mistake(image: Image) -> str:
    """Return what in an image contradicts the rest of it; nothing if it can be a state."""
    leases = {lease.id for lease in image.leases}
    newest: dict[bytes, Record] = {}
    last = image.compacted
    for record in image.base:
        if record.mod_revision >= image.compacted or record.key in newest or not record.version:
            return f"an old version of key {record.key[:80]!r}"
        newest[record.key] = record
    for record in image.events:
        if not last <= record.mod_revision <= image.revision:
            return f"revision {record.mod_revision} of key {record.key[:80]!r}"
        last = record.mod_revision
        newest[record.key] = record
    for record in newest.values():
        if record.lease and record.lease not in leases:
            return f"key {record.key[:80]!r} of lease {record.lease}, which is none"
    return ""
