"""The frames of an attach connection (binary WebSocket messages), both ways.

First byte is the kind; what follows depends on it:

    DATA    1 byte stream (0 stdin, 1 stdout, 2 stderr), then payload; an empty payload ends the stream
    SIGNAL  1 byte signal number                                   (client to server)
    RESIZE  2 bytes rows, 2 bytes columns, big-endian              (client to server)
    EXIT    4 bytes exit status, signed big-endian, 128+N for a signal (server to client, last)
    ERROR   JSON `ErrorBody`                                       (server to client, last)

Frames above `FRAME_BYTES_MAX` or of an unknown kind are refused with `Invalid`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from discovery.wire.errors import ErrorBody, Invalid

FRAME_BYTES_MAX = 64 * 1024 + 2

DATA, SIGNAL, RESIZE, EXIT, ERROR = range(5)
STDIN, STDOUT, STDERR = range(3)


@dataclass(frozen=True)
class Data:
    stream: int
    payload: bytes


@dataclass(frozen=True)
class Signal:
    number: int


@dataclass(frozen=True)
class Resize:
    rows: int
    columns: int


@dataclass(frozen=True)
class Exit:
    status: int


@dataclass(frozen=True)
class Error:
    body: ErrorBody


Frame = Data | Signal | Resize | Exit | Error


def encode(frame: Frame) -> bytes:
    """Write one frame as the bytes of one WebSocket message."""
    match frame:
        case Data(stream, payload):
            return bytes((DATA, stream)) + payload
        case Signal(number):
            return bytes((SIGNAL, number))
        case Resize(rows, columns):
            return struct.pack(">BHH", RESIZE, rows, columns)
        case Exit(status):
            return struct.pack(">Bi", EXIT, status)
        case Error(body):
            return bytes((ERROR,)) + msgspec.json.encode(body)


def decode(message: bytes) -> Frame:
    """Read one frame.

    Raises:
        Invalid: the message is too long, too short, or of no known kind.
    """
    if not message or len(message) > FRAME_BYTES_MAX:
        raise Invalid(f"attach frame of {len(message)} bytes", hint=f"1 to {FRAME_BYTES_MAX} bytes")
    kind, rest = message[0], message[1:]
    try:
        if kind == DATA and rest and rest[0] <= STDERR:
            return Data(rest[0], rest[1:])
        if kind == SIGNAL and len(rest) == 1 and 1 <= rest[0] <= 64:
            return Signal(rest[0])
        if kind == RESIZE:
            return Resize(*struct.unpack(">HH", rest))
        if kind == EXIT:
            return Exit(*struct.unpack(">i", rest))
        if kind == ERROR:
            return Error(msgspec.json.decode(rest, type=ErrorBody))
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"attach frame of kind {kind} does not parse: {error}") from error
    raise Invalid(f"attach frame of unknown kind or shape {kind}")
