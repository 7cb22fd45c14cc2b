"""What members say to each other: the messages that exist, as typed msgpack behind a length; nothing else decodes.

    length u32 (big-endian) | msgpack of one `Message`

`transport` frames and carries them, `core` speaks Raft with them, `raft` asks the rest. Fields are only
ever added at the end, with a default, and tags never change their meaning; `VERSION` is said in `Hello`.
"""

from __future__ import annotations

import struct

import msgspec

VERSION = 1
FRAME_BYTES_MAX = 4 * 1024 * 1024
"""A frame that says to be longer ends its connection before a byte of it is kept."""
APPEND_BYTES_MAX = 512 * 1024
"""How many bytes of commands one `Append` carries, unless a single one is longer."""
CHUNK_BYTES = 256 * 1024
LENGTH = struct.Struct(">I")


class Unreadable(Exception):
    """A peer sent what is no message."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    pass


class Hello(_Message, frozen=True, tag=0):
    """The first message in each direction of a connection: which cluster, which life of the member, and where it is."""

    version: int
    cluster_id: int
    incarnation: int
    address: str = ""


class Ping(_Message, frozen=True, tag=1):
    """Nothing to say, but still there."""


class Append(_Message, frozen=True, tag=2):
    """Entries after (`prev_index`, `prev_term`) as (term, command); `round` is given back with the answer."""

    term: int
    prev_index: int
    prev_term: int
    commit: int
    entries: list[tuple[int, bytes]]
    round: int = 0


class AppendReply(_Message, frozen=True, tag=3):
    """`is_ok`: the log is the leader's up to `index`, and on disk; else `index` is where to try again."""

    term: int
    is_ok: bool
    index: int
    round: int = 0


class VoteRequest(_Message, frozen=True, tag=4):
    """`is_trial` asks whether a vote would be given, and changes nothing (pre-vote)."""

    term: int
    last_index: int
    last_term: int
    is_trial: bool = False


class VoteReply(_Message, frozen=True, tag=5):
    """`term` is the one voted in if `is_granted`, else the voter's own."""

    term: int
    is_granted: bool
    is_trial: bool = False


class TimeoutNow(_Message, frozen=True, tag=6):
    """The leader asks the receiver to stand for election at once: a transfer."""

    term: int


class Chunk(_Message, frozen=True, tag=7):
    """A piece of the leader's snapshot file at (`index`, `place_term`)."""

    term: int
    index: int
    place_term: int
    offset: int
    size: int
    data: bytes


class ChunkReply(_Message, frozen=True, tag=8):
    """How much of the snapshot at `index` is here."""

    term: int
    index: int
    offset: int


class Propose(_Message, frozen=True, tag=10):
    """Put this command into the log; the answer says only whether it went in."""

    command: bytes


class ReadIndex(_Message, frozen=True, tag=11):
    """Up to where must a log be applied for a read that begins now?"""


class KeepAlive(_Message, frozen=True, tag=12):
    """Renew these leases."""

    ids: list[int]


class TimeToLive(_Message, frozen=True, tag=13):
    """How long do these leases have left?"""

    ids: list[int]


class Probe(_Message, frozen=True, tag=14):
    """What are you? Asked by a member with an empty disk."""


class Join(_Message, frozen=True, tag=15):
    """Let me in: this life of me has nothing on its disk."""

    address: str
    incarnation: int


class Change(_Message, frozen=True, tag=16):
    """Change the membership: `add` (with `address`), `remove`, `promote`, `demote`."""

    verb: str
    member_id: str
    address: str = ""


class Done(_Message, frozen=True, tag=20):
    """Yes; `index` is the log index that the question was about."""

    index: int = 0


class Numbers(_Message, frozen=True, tag=21):
    """The answers to `KeepAlive` and `TimeToLive`, in the order of the ids."""

    values: list[int]


class Nature(_Message, frozen=True, tag=22):
    """The answer to `Probe`; a cluster id of 0: none yet. `lost_cluster_id`: it was in that one, and lost the log."""

    cluster_id: int
    incarnation: int
    has_data: bool
    lost_cluster_id: int = 0


class Refusal(_Message, frozen=True, tag=23):
    """No; `is_certain` tells that nothing was done. `code` is a class of `wire.errors`, or etcd's number as text."""

    code: str
    message: str
    is_certain: bool = True


Question = Propose | ReadIndex | KeepAlive | TimeToLive | Probe | Join | Change
Answer = Done | Numbers | Nature | Refusal


class Ask(_Message, frozen=True, tag=30):
    """A question and the number that its answer will bear."""

    id: int
    question: Propose | ReadIndex | KeepAlive | TimeToLive | Probe | Join | Change


class Reply(_Message, frozen=True, tag=31):
    id: int
    answer: Done | Numbers | Nature | Refusal


Raft = Append | AppendReply | VoteRequest | VoteReply | TimeoutNow | Chunk | ChunkReply
Message = (
    Hello | Ping | Append | AppendReply | VoteRequest | VoteReply | TimeoutNow | Chunk | ChunkReply | Ask | Reply
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Write a message with its length before it."""
    raw = _encoder.encode(message)
    return LENGTH.pack(len(raw)) + raw


def decode(raw: bytes | memoryview) -> Message:
    """Read one message (without its length).

    Raises:
        Unreadable: the bytes are none.
    """
    try:
        return _decoder.decode(raw)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(str(error)) from error
