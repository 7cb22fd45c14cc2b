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
