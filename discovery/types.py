"""The nouns of discovery: keys with revisions, watch events, services and their instances."""

from __future__ import annotations

import msgspec


class KeyValue(msgspec.Struct, frozen=True, kw_only=True):
    """One key of the store; revisions are the store's global counter."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class WatchEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A change of one key; `value` is `None` for a deletion. `is_current` marks the end of the snapshot."""

    key: str = ""
    value: bytes | None = None
    revision: int = 0
    is_current: bool = False


class Instance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place where a service answers: `host:port`, true from everywhere in the cluster."""

    id: str
    service: str
    host: str
    port: int
    protocol: str = "tcp"
    meta: dict[str, str] = {}
    created_index: int = 0


class InstanceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is `up`, `update`, `down`, or `current` once the snapshot is complete (then `instance` is `None`)."""

    kind: str
    instance: Instance | None = None


class ServiceMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What users keep beside a service; `index` is 0 to create it, else the index that must still hold."""

    data: dict[str, str] = {}
    index: int = 0


class Service(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name under which instances answer; `leader_type` is `oldest` (by creation) or `manual`."""

    name: str = ""
    leader_type: str = "oldest"


class LeaderChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The instance that shall lead a service whose leader is set by hand."""

    id: str


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefix held at `revision`, in key order."""

    items: list[KeyValue]
    revision: int


class Put(msgspec.Struct, frozen=True):
    """A write inside a transaction; bound to `lease` unless that is 0."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """A removal inside a transaction: of one key, or of everything under a prefix."""

    key: str
    is_prefix: bool = False


class Get(msgspec.Struct, frozen=True):
    """A read inside a transaction."""

    key: str
    is_prefix: bool = False


Operation = Put | Delete | Get


class Compare(msgspec.Struct, frozen=True):
    """A condition of a transaction; make one with the `compare_*` functions of `discovery.client`."""

    key: str
    target: str
    result: str
    value: int | bytes


class TransactionResult(msgspec.Struct, frozen=True, kw_only=True):
    """`succeeded` tells which branch ran; `answers` has, for each of its operations, the keys read or removed."""

    succeeded: bool
    revision: int
    answers: list[list[KeyValue]]
