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
    """`kind` is `up`, `update`, `down`, or `current` once the snapshot is complete (then `instance` is `None`).

    Who follows a leader gets `leader` instead of the first three; `None` is nobody.
    """

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


class StoreMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member of the store, as another one sees it; a learner has no vote yet, or never wants one."""

    id: str
    address: str = ""
    is_voter: bool = True
    is_leader: bool = False


class StoreStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a discovery daemon is. `role` is `leader`, `follower`, `learner` or `agent`.

    An agent has no log; `follows` is the member that its copy comes from, and `is_connected` whether it does now.
    """

    member_id: str
    role: str
    leader_id: str = ""
    leader_address: str = ""
    term: int = 0
    revision: int = 0
    compacted_revision: int = 0
    applied_index: int = 0
    log_entries: int = 0
    disk_bytes: int = 0
    keys: int = 0
    history_events: int = 0
    history_bytes: int = 0
    leases: int = 0
    watches: int = 0
    services: int = 0
    instances: int = 0
    members: list[StoreMember] = []
    follows: str = ""
    is_connected: bool = True
