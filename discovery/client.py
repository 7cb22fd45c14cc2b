"""The front door of discovery: the store, the services, and name lookup, for every other room.

`Store` speaks etcd v3's JSON gateway, so it works against a real etcd as well; `Services` speaks
our own endpoints on the same socket; `resolve` needs nothing but the job's `/etc/resolv.conf`.
Reads and lease renewals are tried again while the member restarts, writes never (a lost answer may
hide a done write).
Watches never end by themselves: they reconnect, and bring the consumer up to date without gaps.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import msgspec

from discovery import replies
from discovery.errors import Compacted, LeaseNotFound, TransactionFailed
from discovery.replies import Answer, KeepAlive, Kv, WatchAnswer
from discovery.types import (
    Compare,
    Delete,
    Get,
    Instance,
    InstanceEvent,
    KeyValue,
    LeaderChoice,
    Operation,
    Put,
    Range,
    Service,
    ServiceMeta,
    TransactionResult,
    WatchEvent,
)
from discovery.wire import clock
from discovery.wire.call import Caller
from discovery.wire.errors import Invalid, NotFound, ServiceError, Unavailable

log = logging.getLogger(__name__)

VALUE_BYTES_MAX = 1024 * 1024
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0

T = TypeVar("T")


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


class _Asker:
    """What both front doors are: a caller with an address, to be closed."""

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._caller = Caller(address, timeout_s=timeout_s)

    async def close(self) -> None:
        """Close all connections."""
        await self._caller.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Store(_Asker):
    """The key-value store at `address` (`unix:///run/…/discovery.sock` or `http://…`); safe for many tasks.

    All methods raise `Unavailable` when the store cannot be reached or has no leader, and
    `DeadlineExceeded` (a kind of it) when no answer came: a write may then be done.
    """

    async def get(self, key: str) -> KeyValue | None:
        """Read one key."""
        answer = await self._read({"key": _b64(key)})
        return _key_value(answer.kvs[0]) if answer.kvs else None

    async def range(self, prefix: str, *, limit: int = 0) -> Range:
        """Read everything under a prefix, in key order, as of one revision."""
        answer = await self._read(_span(prefix) | ({"limit": limit} if limit else {}))
        return Range(items=[_key_value(kv) for kv in answer.kvs], revision=answer.header.revision)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write a key, bound to a lease unless that is 0; return the store's new revision.

        Raises:
            LeaseNotFound: there is no such lease.
            Invalid: the value is above `VALUE_BYTES_MAX`.
        """
        return (await self._write("/v3/kv/put", _put(Put(key, value, lease)))).header.revision

    async def delete(self, key: str) -> bool:
        """Remove a key; tell whether it existed."""
        return (await self._write("/v3/kv/deleterange", {"key": _b64(key)})).deleted > 0

    async def delete_prefix(self, prefix: str) -> int:
        """Remove everything under a prefix; tell how many keys."""
        return (await self._write("/v3/kv/deleterange", _span(prefix))).deleted

    async def txn(
        self, compares: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TransactionResult:
        """Run `then` if all `compares` hold, else `otherwise`, atomically; a failed compare is no error here."""
        answer = await self._write(
            "/v3/kv/txn",
            {
                "compare": [_compare(compare) for compare in compares],
                "success": [_step(step) for step in then],
                "failure": [_step(step) for step in otherwise],
            },
        )
        return TransactionResult(
            succeeded=answer.succeeded,
            revision=answer.header.revision,
            answers=[_key_values(response.inner()) for response in answer.responses],
        )

    async def create(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write a key that must not exist; return the revision.

        Raises:
            TransactionFailed: it exists.
        """
        return await self._must([compare_missing(key)], Put(key, value, lease), f"{key} exists")

    async def replace(self, key: str, value: bytes, *, mod_revision: int, lease: int = 0) -> int:
        """Write a key that must still be at `mod_revision`; return the new one.

        Raises:
            TransactionFailed: it has changed, or is gone.
        """
        compare = compare_revision(key, mod_revision)
        return await self._must([compare], Put(key, value, lease), f"{key} is not at revision {mod_revision}")

    async def remove(self, key: str, *, mod_revision: int) -> int:
        """Remove a key that must still be at `mod_revision`; return the store's new revision.

        Raises:
            TransactionFailed: it has changed, or is gone.
        """
        compare = compare_revision(key, mod_revision)
        return await self._must([compare], Delete(key), f"{key} is not at revision {mod_revision}")

    async def watch(self, prefix: str, *, from_revision: int = 0) -> AsyncGenerator[WatchEvent, None]:
        """Yield the snapshot, one event with `is_current`, then every change; reconnects and resynchronises.

        Never ends and does not raise while the store is away. After a break it goes on from the next
        revision; if that is compacted by then, the difference to the present is made into changes.
        With `from_revision` there is no snapshot: `is_current` first, then every change from that
        revision (then, and only then, `Compacted` is raised if it is gone).
        """
        if from_revision:
            yield WatchEvent(is_current=True, revision=from_revision - 1)
            async for event in self._changes(prefix, from_revision):
                yield event
            return
        seen: dict[str, int] = {}
        is_current = False
        while True:
            snapshot = await _until_done(lambda: self.range(prefix), f"watch of {prefix}")
            for event in _difference(seen, snapshot):
                yield event
            if not is_current:
                is_current = True
                yield WatchEvent(is_current=True, revision=snapshot.revision)
            with contextlib.suppress(Compacted):
                async for event in self._changes(prefix, snapshot.revision + 1):
                    _note(seen, event)
                    yield event

    async def lease_grant(self, ttl_s: int, *, id: int = 0) -> int:
        """Make a lease that ends `ttl_s` after its last renewal; return its id."""
        return (await self._write("/v3/lease/grant", {"TTL": ttl_s, "ID": id})).ID

    async def lease_keep_alive(self, lease: int) -> int:
        """Renew a lease; return its time to live in seconds. Tried again like a read.

        Raises:
            LeaseNotFound: it is gone.
        """

        async def ask() -> bytes:
            return await self._caller.request("POST", "/v3/lease/keepalive", body={"ID": lease})

        ttl_s = replies.decode(await _until_done(ask, "", self._timeout_s), KeepAlive).result.TTL
        if ttl_s <= 0:
            raise LeaseNotFound(f"lease {lease} is gone", hint="get a new one and write its keys again")
        return ttl_s

    async def lease_revoke(self, lease: int) -> None:
        """End a lease and remove the keys bound to it.

        Raises:
            LeaseNotFound: it is gone already.
        """
        await self._write("/v3/lease/revoke", {"ID": lease})

    async def _read(self, body: dict[str, Any]) -> Answer:
        """Ask, and ask again for as long as the deadline allows while the store is away."""

        async def ask() -> bytes:
            return await self._caller.request("POST", "/v3/kv/range", body=body)

        return replies.decode(await _until_done(ask, "", self._timeout_s), Answer)

    async def _write(self, path: str, body: dict[str, Any]) -> Answer:
        payload = io.BytesIO(msgspec.json.encode(body))  # aiohttp warns of large plain bytes
        try:
            return replies.decode(await self._caller.request("POST", path, data=payload), Answer)
        except NotFound as error:
            # the one thing that a write can fail to find
            raise LeaseNotFound("the lease is gone", hint="get a new one and write its keys again") from error

    async def _must(self, compares: Sequence[Compare], then: Operation, otherwise: str) -> int:
        result = await self.txn(compares, [then])
        if not result.succeeded:
            raise TransactionFailed(otherwise, hint="read it again, then decide")
        return result.revision

    async def _changes(self, prefix: str, revision: int) -> AsyncGenerator[WatchEvent, None]:
        """Yield every change from a revision on, over as many connections as it takes.

        Raises:
            Compacted: a revision that is still to be seen is gone.
        """
        pause_s = RETRY_FIRST_S
        while True:
            try:
                async for result in self._watch_once(prefix, revision):
                    pause_s = RETRY_FIRST_S
                    for event in result.events:
                        yield _watch_event(event)
                    if result.events:
                        revision = result.events[-1].kv.mod_revision + 1
            except Compacted:
                raise
            except ServiceError as error:
                log.debug("watch of %s from revision %d broke: %s", prefix, revision, error)
            await asyncio.sleep(_jittered(pause_s))
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def _watch_once(self, prefix: str, revision: int) -> AsyncGenerator[WatchAnswer, None]:
        body = {"create_request": _span(prefix) | {"start_revision": revision, "progress_notify": True}}
        async with self._caller.stream("POST", "/v3/watch", body=body) as reader:
            async for answer in replies.watch_answers(reader.iter_any()):
                if answer.canceled:
                    raise Compacted(f"revision {revision} is compacted", compact_revision=answer.compact_revision)
                yield answer


class Services(_Asker):
    """The services at the same address; methods raise `Unavailable` as `Store` does."""

    async def all(self) -> list[Service]:
        """List the services by name."""
        return await self._get("/services", list[Service])

    async def create(self, service: str, *, leader_type: str = "oldest") -> None:
        """Make a service; nothing happens if it exists so already (`register` also makes one).

        Raises:
            Conflict: it exists with another leader type.
        """
        body = Service(name=service, leader_type=leader_type)
        await self._caller.request("PUT", _path(service), body=body)

    async def remove(self, service: str) -> None:
        """Remove a service with its instances and metadata.

        Raises:
            ServiceNotFound: there is none.
        """
        await self._caller.request("DELETE", _path(service))

    async def register(self, instance: Instance, *, lease: int = 0) -> Instance:
        """Make or update an instance, bound to a lease; return it as stored. Saying the same twice costs nothing.

        Raises:
            LeaseNotFound: there is no such lease.
            Invalid: a name, the address or the port is not fit.
        """
        path = _path(instance.service, "instances", instance.id)
        query = {"lease": str(lease)} if lease else None
        return await self._caller.request("PUT", path, into=Instance, body=instance, query=query)

    async def deregister(self, service: str, id: str) -> None:
        """Remove an instance; nothing happens if there is none."""
        await self._caller.request("DELETE", _path(service, "instances", id))

    async def instances(self, service: str) -> list[Instance]:
        """List the instances, oldest first; an unknown service has none."""
        return await self._get(_path(service, "instances"), list[Instance])

    async def watch(self, service: str = "") -> AsyncGenerator[InstanceEvent, None]:
        """Yield instances of one service, or of all: snapshot (`up`), `current` once, then changes; never ends.

        Does not raise while the store is away; after a break what has changed meanwhile comes as changes.
        """
        path = _path(service, "instances") if service else "/instances"
        seen: dict[tuple[str, str], Instance] = {}
        is_current = False
        pause_s = RETRY_FIRST_S
        while True:
            fresh: dict[tuple[str, str], Instance] | None = {}
            try:
                async for event in self._caller.events(path, InstanceEvent, {"follow": "true"}):
                    pause_s = RETRY_FIRST_S
                    if event.kind == "current" and fresh is not None:
                        for change in _instance_difference(seen, fresh):
                            yield change
                        seen, fresh = fresh, None
                        if not is_current:
                            is_current = True
                            yield event
                    elif event.instance is not None:
                        _follow(seen if fresh is None else fresh, event)
                        if fresh is None:
                            yield event
            except Invalid:
                raise  # no such name can ever exist: waiting will not help
            except ServiceError as error:
                log.debug("watch of %s broke: %s", service or "all services", error)
            await asyncio.sleep(_jittered(pause_s))
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def watch_leader(self, service: str) -> AsyncGenerator[Instance | None, None]:
        """Yield who leads a service, `None` for nobody, at once and whenever it is another; never ends, as `watch`."""
        told: tuple[Instance | None] | None = None
        pause_s = RETRY_FIRST_S
        while True:
            leader: Instance | None = None
            is_current = False
            try:
                async for event in self._caller.events(_path(service, "leader"), InstanceEvent, {"follow": "true"}):
                    pause_s = RETRY_FIRST_S
                    is_current = is_current or event.kind == "current"
                    leader = event.instance if event.kind == "leader" else leader
                    if is_current and told != (leader,):
                        told = (leader,)
                        yield leader
            except Invalid:
                raise
            except ServiceError as error:
                log.debug("watch of the leader of %s broke: %s", service, error)
            await asyncio.sleep(_jittered(pause_s))
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def leader(self, service: str) -> Instance | None:
        """Return the instance that leads a service, if there is one."""
        try:
            return await self._get(_path(service, "leader"), Instance)
        except NotFound:
            return None

    async def set_leader(self, service: str, id: str) -> None:
        """Say who leads a service that was created with leader type `manual`.

        Raises:
            NotFound: no such service or instance.
            Conflict: its leader is the oldest.
        """
        await self._caller.request("PUT", _path(service, "leader"), body=LeaderChoice(id=id))

    async def meta(self, service: str) -> ServiceMeta:
        """Return the metadata; empty at index 0 where none was set.

        Raises:
            ServiceNotFound: there is no such service.
        """
        return await self._get(_path(service, "meta"), ServiceMeta)

    async def set_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        """Write metadata by compare-and-swap on its index; return it with the new index.

        Raises:
            Conflict: somebody else was first.
            ServiceNotFound: there is no such service.
        """
        return await self._caller.request("PUT", _path(service, "meta"), into=ServiceMeta, body=meta)

    async def _get(self, path: str, into: type[T]) -> T:
        async def ask() -> T:
            return await self._caller.request("GET", path, into=into)

        return await _until_done(ask, "", self._timeout_s)


async def resolve(
    service: str, *, timeout_s: float = 5.0, nameserver: str = "", port: int = 53
) -> list[tuple[str, int]]:
    """Ask DNS where a service answers, as (host, port) in random order; empty when it has no instance.

    `nameserver` stands in for those of `/etc/resolv.conf`.

    Raises:
        Unavailable: no name server answered in time.
    """
    import dns.asyncresolver  # 60 ms that only a caller of this pays
    import dns.exception
    import dns.resolver

    resolver = dns.asyncresolver.Resolver(configure=not nameserver)
    if nameserver:
        resolver.nameservers, resolver.port = [nameserver], port
    hosts: dict[Any, str] = {}
    answer: Any = ()
    for is_tcp in (False, True):  # by UDP there may be room for the names and not for all of their addresses
        try:
            answer = await resolver.resolve(
                f"{service}.discoverd.", "SRV", lifetime=timeout_s, search=False, tcp=is_tcp
            )
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except dns.exception.DNSException as error:
            raise Unavailable(f"{service}.discoverd could not be resolved: {error}") from error
        hosts = {
            rrset.name: rdata.address
            for rrset in answer.response.additional
            for rdata in rrset
            if hasattr(rdata, "address")
        }
        if all(srv.target in hosts for srv in answer):
            break
    found = [(hosts[srv.target], srv.port) for srv in answer if srv.target in hosts]
    random.shuffle(found)
    return found


async def _until_done(ask: Callable[[], Awaitable[T]], what: str, limit_s: float = 0.0) -> T:
    """Call until it works; only `Unavailable` is worth another try, and only within `limit_s` (0: for ever)."""
    deadline_s = clock.monotonic_s() + limit_s
    pause_s = RETRY_FIRST_S
    while True:
        try:
            return await ask()
        except Unavailable as error:
            if limit_s and clock.monotonic_s() + pause_s >= deadline_s:
                raise
            if what:
                log.debug("%s waits: %s", what, error)
        await asyncio.sleep(_jittered(pause_s))
        pause_s = min(pause_s * 2, RETRY_MAX_S)


def _jittered(pause_s: float) -> float:
    """Spread the return of many clients after a restart."""
    return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 — no secret


def _key_value(kv: Kv) -> KeyValue:
    return KeyValue(
        key=kv.key.decode(),
        value=kv.value,
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        version=kv.version,
        lease=kv.lease,
    )


def _key_values(answer: Answer) -> list[KeyValue]:
    return [_key_value(kv) for kv in (answer.kvs or answer.prev_kvs)]


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _span(prefix: str) -> dict[str, Any]:
    """Return the range of everything under a prefix; an empty prefix means all keys."""
    start = prefix.encode()
    if not start:
        return {"key": b"\x00", "range_end": b"\x00"}
    # UTF-8 never ends in 0xff, so raising the last byte is all that it takes
    return {"key": start, "range_end": start[:-1] + bytes((start[-1] + 1,))}


def _put(put: Put) -> dict[str, Any]:
    if len(put.value) > VALUE_BYTES_MAX:
        raise Invalid(f"the value of {put.key} has {len(put.value)} bytes", hint=f"at most {VALUE_BYTES_MAX}")
    return {"key": _b64(put.key), "value": put.value} | ({"lease": str(put.lease)} if put.lease else {})


def _step(step: Operation) -> dict[str, Any]:
    match step:
        case Put():
            return {"request_put": _put(step)}
        case Delete():
            where = _span(step.key) if step.is_prefix else {"key": _b64(step.key)}
            return {"request_delete_range": where | {"prev_kv": True}}
        case Get():
            return {"request_range": _span(step.key) if step.is_prefix else {"key": _b64(step.key)}}


def _compare(compare: Compare) -> dict[str, Any]:
    names = {"CREATE": "create_revision", "MOD": "mod_revision", "VERSION": "version", "VALUE": "value"}
    return {
        "key": _b64(compare.key),
        "target": compare.target,
        "result": compare.result,
        names[compare.target]: compare.value,
    }


def _watch_event(event: replies.WatchEvent) -> WatchEvent:
    is_gone = event.type == "DELETE"
    return WatchEvent(
        key=event.kv.key.decode(), value=None if is_gone else event.kv.value, revision=event.kv.mod_revision
    )


def _note(seen: dict[str, int], event: WatchEvent) -> None:
    if event.value is None:
        seen.pop(event.key, None)
    else:
        seen[event.key] = event.revision


def _difference(seen: dict[str, int], snapshot: Range) -> list[WatchEvent]:
    """Say as changes what a snapshot has that was not seen, and bring `seen` up to it."""
    present = {item.key: item for item in snapshot.items}
    gone = [WatchEvent(key=key, value=None, revision=snapshot.revision) for key in seen if key not in present]
    changed = [
        WatchEvent(key=item.key, value=item.value, revision=item.mod_revision)
        for item in snapshot.items
        if seen.get(item.key) != item.mod_revision
    ]
    seen.clear()
    seen.update({key: item.mod_revision for key, item in present.items()})
    return gone + changed


def _path(*parts: str) -> str:
    return "/services/" + "/".join(quote(part, safe="") for part in parts)


def _follow(instances: dict[tuple[str, str], Instance], event: InstanceEvent) -> None:
    assert event.instance is not None
    place = (event.instance.service, event.instance.id)
    if event.kind == "down":
        instances.pop(place, None)
    else:
        instances[place] = event.instance


def _instance_difference(
    seen: dict[tuple[str, str], Instance], fresh: dict[tuple[str, str], Instance]
) -> list[InstanceEvent]:
    gone = [InstanceEvent(kind="down", instance=old) for place, old in seen.items() if place not in fresh]
    new = [
        InstanceEvent(kind="update" if place in seen else "up", instance=instance)
        for place, instance in fresh.items()
        if seen.get(place) != instance
    ]
    return gone + new
