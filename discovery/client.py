"""The front door of discovery: the store, the services, and name lookup, for every other room.

`Store` speaks etcd v3's JSON gateway, so it works against a real etcd as well; `Services` speaks
our own endpoints on the same socket; `resolve` needs nothing but the job's `/etc/resolv.conf`.
Reads are tried again while the member restarts, writes never (a lost answer may hide a done write).
Watches never end by themselves: they reconnect, and bring the consumer up to date without gaps.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from discovery.types import (
    Compare,
    Instance,
    InstanceEvent,
    KeyValue,
    Operation,
    Range,
    Service,
    ServiceMeta,
    TransactionResult,
    WatchEvent,
)


def compare_missing(key: str) -> Compare:
    """Hold when the key does not exist."""
    return Compare(key, "CREATE", "EQUAL", 0)


def compare_exists(key: str) -> Compare:
    """Hold when the key exists."""
    return Compare(key, "CREATE", "GREATER", 0)


def compare_revision(key: str, mod_revision: int) -> Compare:
    """Hold when the key was last changed at exactly this revision (0: does not exist)."""
    return Compare(key, "MOD", "EQUAL", mod_revision)


def compare_value(key: str, value: bytes) -> Compare:
    """Hold when the key has exactly this value."""
    return Compare(key, "VALUE", "EQUAL", value)


class Store:
    """The key-value store at `address` (`unix:///run/…/discovery.sock` or `http://…`); safe for many tasks."""

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, key: str) -> KeyValue | None:
        raise NotImplementedError

    async def range(self, prefix: str, *, limit: int = 0) -> Range:
        raise NotImplementedError

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write a key and return the store's new revision."""
        raise NotImplementedError

    async def delete(self, key: str) -> bool:
        """Remove a key; tell whether it existed."""
        raise NotImplementedError

    async def delete_prefix(self, prefix: str) -> int:
        """Remove everything under a prefix; tell how many keys."""
        raise NotImplementedError

    async def txn(
        self, compares: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TransactionResult:
        """Run `then` if all `compares` hold, else `otherwise`, atomically; a failed compare is no error here."""
        raise NotImplementedError

    async def create(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write a key that must not exist; return the revision. Raises `TransactionFailed`."""
        raise NotImplementedError

    async def replace(self, key: str, value: bytes, *, mod_revision: int, lease: int = 0) -> int:
        """Write a key that must still be at `mod_revision`; return the new one. Raises `TransactionFailed`."""
        raise NotImplementedError

    async def remove(self, key: str, *, mod_revision: int) -> int:
        """Remove a key that must still be at `mod_revision`. Raises `TransactionFailed`."""
        raise NotImplementedError

    def watch(self, prefix: str, *, from_revision: int = 0) -> AsyncIterator[WatchEvent]:
        """Yield the snapshot, one event with `is_current`, then every change; reconnects and resynchronises.

        With `from_revision` there is no snapshot: `is_current` first, then every change from that revision
        (`Compacted` if it is gone).
        """
        raise NotImplementedError

    async def lease_grant(self, ttl_s: int, *, id: int = 0) -> int:
        raise NotImplementedError

    async def lease_keep_alive(self, lease: int) -> int:
        """Renew a lease; return its time to live in seconds. Raises `LeaseNotFound`."""
        raise NotImplementedError

    async def lease_revoke(self, lease: int) -> None:
        """End a lease and remove the keys bound to it. Raises `LeaseNotFound`."""
        raise NotImplementedError


class Services:
    """The services at the same address."""

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def all(self) -> list[Service]:
        raise NotImplementedError

    async def create(self, service: str, *, leader_type: str = "oldest") -> None:
        """Make a service; nothing happens if it exists (`register` also makes it)."""
        raise NotImplementedError

    async def remove(self, service: str) -> None:
        """Remove a service with its instances and metadata. Raises `ServiceNotFound`."""
        raise NotImplementedError

    async def register(self, instance: Instance, *, lease: int = 0) -> Instance:
        """Make or update an instance, bound to a lease; return it as stored. Raises `LeaseNotFound`."""
        raise NotImplementedError

    async def deregister(self, service: str, id: str) -> None:
        """Remove an instance; nothing happens if there is none."""
        raise NotImplementedError

    async def instances(self, service: str) -> list[Instance]:
        """List the instances, oldest first; an unknown service has none."""
        raise NotImplementedError

    def watch(self, service: str = "") -> AsyncIterator[InstanceEvent]:
        """Yield instances of one service, or of all of them: snapshot (`up`), `current`, then changes; never ends."""
        raise NotImplementedError

    async def leader(self, service: str) -> Instance | None:
        raise NotImplementedError

    async def set_leader(self, service: str, id: str) -> None:
        raise NotImplementedError

    async def meta(self, service: str) -> ServiceMeta:
        raise NotImplementedError

    async def set_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        """Write metadata by compare-and-swap on its index. Raises `Conflict`."""
        raise NotImplementedError


async def resolve(service: str, *, timeout_s: float = 5.0) -> list[tuple[str, int]]:
    """Ask DNS where a service answers, as (host, port) in random order; empty when it has no instance.

    Raises:
        Unavailable: no name server answered in time.
    """
    raise NotImplementedError
