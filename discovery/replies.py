"""What etcd's JSON gateway answers, as whoever asked it reads it: ours as well as a real etcd's.

Shapes only, all answers in one, because each has some of the fields; what they mean is for the caller: `client`, of
every other room, and `asking`, of agents. The side that answers has its own in `etcdjson`. Fields that nobody here
knows are not looked at.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

import msgspec

from discovery.wire.errors import Internal, Unavailable

_LINE_BYTES_MAX = 64 * 1024 * 1024

T = TypeVar("T")


class Header(msgspec.Struct, frozen=True):
    """The head of every answer: whose it is, and as of when."""

    cluster_id: int = 0
    member_id: int = 0
    revision: int = 0
    raft_term: int = 0


class Kv(msgspec.Struct, frozen=True):
    key: bytes = b""
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


class Answer(msgspec.Struct, frozen=True):
    """An answer of the key-value and lease endpoints."""

    header: Header = Header()
    kvs: list[Kv] = []
    more: bool = False
    count: int = 0
    prev_kv: Kv | None = None
    prev_kvs: list[Kv] = []
    deleted: int = 0
    succeeded: bool = False
    responses: list[Response] = []
    ID: int = 0
    TTL: int = 0


class Response(msgspec.Struct, frozen=True):
    """What one step of a transaction answered."""

    response_range: Answer | None = None
    response_put: Answer | None = None
    response_delete_range: Answer | None = None
    response_txn: Answer | None = None

    def inner(self) -> Answer:
        """Return the one that is there."""
        each = (self.response_range, self.response_put, self.response_delete_range, self.response_txn)
        return next((one for one in each if one is not None), Answer())


class KeepAlive(msgspec.Struct, frozen=True):
    result: Answer


class WatchEvent(msgspec.Struct, frozen=True):
    kv: Kv
    type: str = "PUT"


class WatchAnswer(msgspec.Struct, frozen=True):
    header: Header = Header()
    events: list[WatchEvent] = []
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0


class WatchLine(msgspec.Struct, frozen=True):
    """A line of a watch; without a result it is a refusal."""

    result: WatchAnswer | None = None


async def watch_answers(chunks: AsyncIterator[bytes]) -> AsyncGenerator[WatchAnswer, None]:
    """Cut the stream that answers a watch into its lines.

    Raises:
        Unavailable: it is a refusal.
        Internal: it is no such stream.
    """
    pending = bytearray()
    async for chunk in chunks:
        pending += chunk
        if b"\n" not in chunk:
            if len(pending) > _LINE_BYTES_MAX:
                raise Internal(f"a watch sent {len(pending)} bytes without a line's end")
            continue
        *lines, pending = pending.split(b"\n")
        for line in filter(None, lines):
            result = decode(bytes(line), WatchLine).result
            if result is None:
                raise Unavailable("the watch was refused")
            yield result


def decode(raw: bytes, into: type[T]) -> T:
    """Read an answer; the gateway's integers are strings.

    Raises:
        Internal: it is none.
    """
    try:
        return msgspec.json.decode(raw, type=into, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Internal(f"a member's answer is not understood: {error}", hint="is it of another version?") from error
