"""What can be asked of the store, and what it answers: the vocabulary of `discovery.state`, etcd's own.

Plain data, written to the log as it stands here (see `codec`): fields are only ever added at the
end, with a default, and tags never change their meaning.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SortOrder = Literal["NONE", "ASCEND", "DESCEND"]
SortTarget = Literal["KEY", "VERSION", "CREATE", "MOD", "VALUE"]
CompareTarget = Literal["VERSION", "CREATE", "MOD", "VALUE", "LEASE"]
CompareResult = Literal["EQUAL", "GREATER", "LESS", "NOT_EQUAL"]


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One version of one key; `version` 0 is a tombstone: the key was deleted at `mod_revision`."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Event(msgspec.Struct, frozen=True, gc=False):
    """A change that watchers see: the new version (or tombstone), and the one before it, if there was one."""

    record: Record
    previous: Record | None


class RangeRequest(msgspec.Struct, frozen=True, array_like=True, tag="range", kw_only=True):
    """Read `key`, or `[key, range_end)`; a `range_end` of one zero byte means to the end of all keys."""

    key: bytes
    range_end: bytes = b""
    limit: int = 0
    revision: int = 0
    sort_order: SortOrder = "NONE"
    sort_target: SortTarget = "KEY"
    keys_only: bool = False
    count_only: bool = False
    min_mod_revision: int = 0
    max_mod_revision: int = 0
    min_create_revision: int = 0
    max_create_revision: int = 0


class PutRequest(msgspec.Struct, frozen=True, array_like=True, tag="put", kw_only=True):
    key: bytes
    value: bytes = b""
    lease: int = 0
    prev_kv: bool = False
    ignore_value: bool = False
    ignore_lease: bool = False


class DeleteRequest(msgspec.Struct, frozen=True, array_like=True, tag="delete", kw_only=True):
    key: bytes
    range_end: bytes = b""
    prev_kv: bool = False


class CompareClause(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One condition; with `range_end` every key of the range must fulfil it."""

    key: bytes
    target: CompareTarget
    result: CompareResult
    value: int | bytes = 0
    range_end: bytes = b""


class TxnRequest(msgspec.Struct, frozen=True, array_like=True, tag="txn", kw_only=True):
    compare: tuple[CompareClause, ...] = ()
    success: tuple[RangeRequest | PutRequest | DeleteRequest | TxnRequest, ...] = ()
    failure: tuple[RangeRequest | PutRequest | DeleteRequest | TxnRequest, ...] = ()


class LeaseGrant(msgspec.Struct, frozen=True, array_like=True, tag="lease_grant", kw_only=True):
    """`id` is chosen by the proposer, so that applying the command needs no dice."""

    id: int
    ttl_s: int


class LeaseRevoke(msgspec.Struct, frozen=True, array_like=True, tag="lease_revoke", kw_only=True):
    id: int


class Compact(msgspec.Struct, frozen=True, array_like=True, tag="compact", kw_only=True):
    """Forget what is older than `revision`."""

    revision: int


Step = RangeRequest | PutRequest | DeleteRequest | TxnRequest
Body = PutRequest | DeleteRequest | TxnRequest | LeaseGrant | LeaseRevoke | Compact


class Command(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One entry of the replicated log: who asked (a random id), when (wall clock of the proposer), and what.

    `after` is the log index that the proposer had applied when it made the command: an entry too far behind
    it is void (see `requests`).
    """

    id: int
    time_ms: int
    body: PutRequest | DeleteRequest | TxnRequest | LeaseGrant | LeaseRevoke | Compact
    after: int = 0


class RangeResult(msgspec.Struct, frozen=True):
    """`count` is how many keys the range has, `records` those within the limit."""

    records: list[Record]
    count: int
    more: bool = False


class PutResult(msgspec.Struct, frozen=True):
    previous: Record | None


class DeleteResult(msgspec.Struct, frozen=True):
    deleted: list[Record]
    has_previous: bool = False


class TxnResult(msgspec.Struct, frozen=True):
    succeeded: bool
    answers: list[RangeResult | PutResult | DeleteResult | TxnResult]


class LeaseResult(msgspec.Struct, frozen=True):
    id: int
    ttl_s: int


Result = RangeResult | PutResult | DeleteResult | TxnResult | LeaseResult | None


class Outcome(msgspec.Struct, frozen=True):
    """What a command did: its answer, the revision after it, and the changes in order."""

    result: Result
    revision: int
    events: list[Event]


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """A lease as the state knows it; when it ends is only in the leader's memory (`leases`)."""

    id: int
    ttl_s: int


class Image(msgspec.Struct, frozen=True):
    """The whole state as plain data: `base` are the versions from before `compacted`, `events` all changes since."""

    revision: int
    compacted: int
    leases: list[Lease]
    base: list[Record]
    events: list[Record]


class Refused(Exception):
    """The store says no, with etcd's (that is gRPC's) status code and etcd's text; nothing was changed."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = "etcdserver: " + message


INVALID_ARGUMENT, DEADLINE, NOT_FOUND, PERMISSION_DENIED, FAILED_PRECONDITION, OUT_OF_RANGE = 3, 4, 5, 7, 9, 11
UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 12, 13, 14


def prefix_end(prefix: bytes) -> bytes:
    """Return the `range_end` that makes a range of a prefix: the prefix with its last byte raised by one."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes((trimmed[-1] + 1,)) if trimmed else b"\x00"


def is_inside(key: bytes, start: bytes, end: bytes) -> bool:
    """Tell whether a key lies in the range that `key`/`range_end` of a request mean."""
    if not end:
        return key == start
    return key >= start and (end == b"\x00" or key < end)
