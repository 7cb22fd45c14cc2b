"""Services and their instances, kept as keys of the store, and a local directory of them.

    /discoverd/services/SERVICE         a `Service`
    /discoverd/instances/SERVICE/ID     an `Instance`, bound to the lease of whoever vouches for it
    /discoverd/meta/SERVICE             metadata of the users
    /discoverd/leaders/SERVICE          the id of the leader, where that is set by hand

`Directory` follows the store and answers from memory, also when nothing can be written: DNS and
the lists read it. `Services` writes; registering what is registered already writes nothing. Names
are checked here: they are path segments and DNS labels.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import AsyncIterator, Callable

import msgspec

from discovery.errors import LeaseNotFound, ServiceNotFound
from discovery.operations import (
    NOT_FOUND,
    OUT_OF_RANGE,
    UNAVAILABLE,
    CompareClause,
    DeleteRequest,
    Event,
    Outcome,
    PutRequest,
    RangeRequest,
    Record,
    Refused,
    TxnRequest,
    TxnResult,
    prefix_end,
)
from discovery.replica import Replica
from discovery.state import State
from discovery.types import Instance, InstanceEvent, Service, ServiceMeta
from discovery.watches import Watches
from discovery.wire.errors import Conflict, Internal, Invalid, NotFound, ServiceError, Unavailable

SERVICES = b"/discoverd/services/"
INSTANCES = b"/discoverd/instances/"
META = b"/discoverd/meta/"
LEADERS = b"/discoverd/leaders/"

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PROTOCOLS = ("tcp", "udp")


def check_label(text: str, noun: str) -> str:
    """Return a name that is fit for a path and for DNS.

    Raises:
        Invalid: it is not.
    """
    if not _LABEL.fullmatch(text):
        raise Invalid(f"{noun} name {text[:80]!r}", hint="1 to 63 of a-z, 0-9 and dashes, with no dash at either end")
    return text


def check_instance(instance: Instance) -> Instance:
    """Return an instance that others can reach.

    Raises:
        Invalid: a name, the address, the port or the protocol is none.
    """
    check_label(instance.service, "service")
    check_label(instance.id, "instance")
    try:
        is_plain = not getattr(ipaddress.ip_address(instance.host), "scope_id", None)
    except ValueError:
        is_plain = False
    if not is_plain:
        raise Invalid(f"instance host {instance.host[:80]!r}", hint="an IP address, true from everywhere")
    if not 0 < instance.port < 65536 or instance.protocol not in _PROTOCOLS:
        raise Invalid(f"instance port {instance.port}/{instance.protocol}", hint="1 to 65535, tcp or udp")
    return instance


def decode_instance(record: Record) -> Instance | None:
    """Read an instance from its key, whose age it has; `None` for nonsense that somebody put there by hand."""
    try:
        instance = check_instance(msgspec.json.decode(record.value, type=Instance))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, Invalid):
        return None
    if record.key != INSTANCES + f"{instance.service}/{instance.id}".encode():
        return None
    return msgspec.structs.replace(instance, created_index=record.create_revision)


def to_service_error(refused: Refused) -> ServiceError:
    """Say what the store refused as an error of ours."""
    if refused.code == NOT_FOUND:
        return LeaseNotFound("there is no such lease", hint="it has expired: get a new one and register again")
    if refused.code == OUT_OF_RANGE:
        return Unavailable("the watch fell too far behind", hint="connect again")
    if refused.code == UNAVAILABLE:
        return Unavailable(refused.message, hint="connect again")
    return Invalid(refused.message)


class Directory:
    """What is registered, as of the last applied command."""

    def __init__(self, state: State) -> None:
        self._services: dict[str, Service] = {}
        self._instances: dict[str, dict[str, Instance]] = {}
        self._chosen: dict[str, str] = {}
        self._ordered: dict[str, tuple[Instance, ...]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._state = state
        self.on_reset(0)

    def on_reset(self, _: int) -> None:
        """Begin anew with what the store has."""
        known = {*self._services, *self._instances, *self._chosen}
        for table in (self._services, self._instances, self._chosen, self._ordered):
            table.clear()
        everything = self._state.read(RangeRequest(key=b"/discoverd/", range_end=prefix_end(b"/discoverd/")))
        self.on_applied([Event(record, None) for record in everything.records])
        for service in known:
            self._tell(service)

    def on_applied(self, events: list[Event]) -> None:
        """Follow the store."""
        for event in events:
            key = event.record.key
            if key.startswith(INSTANCES):
                self._follow_instance(event.record)
            elif key.startswith(SERVICES):
                self._follow_service(event.record)
            elif key.startswith(LEADERS):
                self._follow_leader(event.record)

    def on_changed(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the name of every service of which something changes from now on."""
        self._listeners.append(listener)

    def counts(self) -> tuple[int, int]:
        """Return how many services and instances there are."""
        return len(self._services), sum(map(len, self._instances.values()))

    def services(self) -> list[Service]:
        """Return all services by name."""
        return [self._services[name] for name in sorted(self._services)]

    def service(self, name: str) -> Service | None:
        """Return a service, if it exists."""
        return self._services.get(name)

    def instances(self, service: str) -> tuple[Instance, ...]:
        """Return the instances of a service, oldest first."""
        known = self._ordered.get(service)
        if known is None and service in self._instances:
            found = self._instances[service].values()
            known = tuple(sorted(found, key=lambda instance: (instance.created_index, instance.id)))
            self._ordered[service] = known
        return known or ()

    def instance(self, service: str, id: str) -> Instance | None:
        """Return one instance, if it is there."""
        return self._instances.get(service, {}).get(id)

    def leader(self, service: str) -> Instance | None:
        """Return who leads: the oldest, or the one set by hand if it is there."""
        known = self._services.get(service)
        if known is not None and known.leader_type == "manual":
            return self.instance(service, self._chosen.get(service, ""))
        instances = self.instances(service)
        return instances[0] if instances else None

    def _tell(self, service: str) -> None:
        for listener in self._listeners:
            listener(service)

    def _follow_instance(self, record: Record) -> None:
        service, _, id = record.key.removeprefix(INSTANCES).decode("utf-8", "replace").partition("/")
        self._ordered.pop(service, None)
        instance = decode_instance(record) if record.version else None
        if instance is not None:
            self._instances.setdefault(service, {})[id] = instance
        else:
            others = self._instances.get(service, {})
            others.pop(id, None)
            if not others:
                self._instances.pop(service, None)
        self._tell(service)

    def _follow_service(self, record: Record) -> None:
        name = record.key.removeprefix(SERVICES).decode("utf-8", "replace")
        self._services.pop(name, None)
        if record.version:
            try:
                stored = msgspec.json.decode(record.value, type=Service)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                stored = Service()
            self._services[name] = Service(name=name, leader_type=stored.leader_type)
        self._tell(name)

    def _follow_leader(self, record: Record) -> None:
        name = record.key.removeprefix(LEADERS).decode("utf-8", "replace")
        self._chosen.pop(name, None)
        if record.version:
            self._chosen[name] = record.value.decode("utf-8", "replace")
        self._tell(name)


class Services:
    """Writes services and instances, and follows them."""

    def __init__(self, member: Replica, directory: Directory, watches: Watches) -> None:
        self._member = member
        self._directory = directory
        self._watches = watches

    async def create(self, service: Service) -> Service:
        """Make a service, or find it as it was asked for.

        Raises:
            Invalid: the name or the leader type is none.
            Conflict: it exists with another leader type.
        """
        check_label(service.name, "service")
        if service.leader_type not in ("oldest", "manual"):
            raise Invalid(f"leader type {service.leader_type[:80]!r}", hint="oldest or manual")
        key = SERVICES + service.name.encode()
        put = PutRequest(key=key, value=msgspec.json.encode(service))
        await self._propose(TxnRequest(compare=(_is_missing(key),), success=(put,)))
        stored = self._known(service.name)
        if stored.leader_type != service.leader_type:
            raise Conflict(f"service {service.name} exists with leader type {stored.leader_type}")
        return stored

    async def remove(self, name: str) -> None:
        """Remove a service and all that belongs to it.

        Raises:
            ServiceNotFound: there is none.
        """
        key, prefix = SERVICES + name.encode(), INSTANCES + name.encode() + b"/"
        gone = (
            DeleteRequest(key=key),
            DeleteRequest(key=prefix, range_end=prefix_end(prefix)),
            DeleteRequest(key=META + name.encode()),
            DeleteRequest(key=LEADERS + name.encode()),
        )
        if _succeeded(await self._propose(TxnRequest(compare=(_is_missing(key),), failure=gone))):
            raise ServiceNotFound(f"there is no service {name}")

    async def register(self, instance: Instance, lease: int) -> Instance:
        """Make or update an instance and, where needed, its service.

        Raises:
            Invalid: see `check_instance`.
            LeaseNotFound: there is no such lease.
        """
        check_instance(instance)
        key = INSTANCES + f"{instance.service}/{instance.id}".encode()
        value = msgspec.json.encode(msgspec.structs.replace(instance, created_index=0))
        if self._holds(key, value, lease):
            return self._registered(instance)
        service_key = SERVICES + instance.service.encode()
        make = PutRequest(key=service_key, value=msgspec.json.encode(Service(name=instance.service)))
        put = PutRequest(key=key, value=value, lease=lease)
        await self._propose(TxnRequest(compare=(_is_missing(service_key),), success=(make, put), failure=(put,)))
        return self._registered(instance)

    async def deregister(self, service: str, id: str) -> None:
        """Remove an instance, if it is there."""
        if self._directory.instance(service, id) is not None:
            await self._propose(TxnRequest(success=(DeleteRequest(key=INSTANCES + f"{service}/{id}".encode()),)))

    async def set_leader(self, service: str, id: str) -> None:
        """Say who leads a service whose leader is set by hand.

        Raises:
            ServiceNotFound, NotFound: there is no such service or instance.
            Conflict: its leader is the oldest.
        """
        if self._known(service).leader_type != "manual":
            raise Conflict(f"the leader of {service} is its oldest instance", hint="create it with leader type manual")
        if self._directory.instance(service, id) is None:
            raise NotFound(f"service {service} has no instance {id}")
        await self._propose(TxnRequest(success=(PutRequest(key=LEADERS + service.encode(), value=id.encode()),)))

    async def meta(self, service: str) -> ServiceMeta:
        """Return the metadata; empty with index 0 where there is none.

        Raises:
            ServiceNotFound: there is no such service.
        """
        self._known(service)
        found = await self._member.read(RangeRequest(key=META + service.encode()))
        if not found.records:
            return ServiceMeta()
        data = msgspec.json.decode(found.records[0].value, type=dict[str, str])
        return ServiceMeta(data=data, index=found.records[0].mod_revision)

    async def set_meta(self, service: str, meta: ServiceMeta) -> ServiceMeta:
        """Write the metadata if its index is still the given one.

        Raises:
            ServiceNotFound: there is no such service.
            Conflict: somebody else was first.
        """
        self._known(service)
        key = META + service.encode()
        compare = CompareClause(key=key, target="MOD", result="EQUAL", value=meta.index)
        put = PutRequest(key=key, value=msgspec.json.encode(meta.data))
        outcome = await self._propose(TxnRequest(compare=(compare,), success=(put,)))
        if not _succeeded(outcome):
            raise Conflict(f"the metadata of {service} is not at index {meta.index}", hint="read it again")
        return ServiceMeta(data=meta.data, index=outcome.revision)

    async def follow(self, service: str) -> AsyncIterator[InstanceEvent]:
        """Yield the instances of one service (empty: of all), `current`, then the changes.

        Raises:
            Unavailable: the consumer was too slow.
        """
        self._member.check_ready()
        prefix = INSTANCES + (service.encode() + b"/" if service else b"")
        state = self._member.state
        snapshot = state.read(RangeRequest(key=prefix, range_end=prefix_end(prefix)))
        with self._watches.open(prefix, prefix_end(prefix), state.revision + 1) as watch:
            for instance in map(decode_instance, snapshot.records):
                if instance is not None:
                    yield InstanceEvent(kind="up", instance=instance)
            yield InstanceEvent(kind="current")
            try:
                async for events in watch.changes():
                    for change in map(_instance_event, events):
                        if change.instance is not None:
                            yield change
            except Refused as refused:
                raise to_service_error(refused) from refused

    async def follow_leader(self, service: str) -> AsyncIterator[InstanceEvent]:
        """Yield who leads a service, `current`, then everybody who does after that; `None` is nobody.

        Raises:
            Unavailable: the daemon is stopping.
        """
        self._member.check_ready()
        woken, start = asyncio.Event(), self._member.state.revision + 1
        prefix, name = INSTANCES + service.encode() + b"/", service.encode()
        watches = [self._watches.add(key, b"", start, woken) for key in (SERVICES + name, LEADERS + name)]
        watches.append(self._watches.add(prefix, prefix_end(prefix), start, woken))
        try:
            leader = self._directory.leader(service)
            if leader is not None:
                yield InstanceEvent(kind="leader", instance=leader)
            yield InstanceEvent(kind="current")
            while True:
                await woken.wait()
                woken.clear()
                if any(watch.is_closed for watch in watches):
                    raise Unavailable("server stopped", hint="connect again")
                for watch in watches:
                    with contextlib.suppress(Refused):  # compacted changes do not matter: the directory knows the end
                        watch.take()
                if (now := self._directory.leader(service)) != leader:
                    leader = now
                    yield InstanceEvent(kind="leader", instance=leader)
        finally:
            for watch in watches:
                self._watches.remove(watch)

    def _known(self, name: str) -> Service:
        service = self._directory.service(name)
        if service is None:
            raise ServiceNotFound(f"there is no service {name[:80]}")
        return service

    def _registered(self, instance: Instance) -> Instance:
        stored = self._directory.instance(instance.service, instance.id)
        return stored if stored is not None else instance  # it may be gone again already

    def _holds(self, key: bytes, value: bytes, lease: int) -> bool:
        found = self._member.state.read(RangeRequest(key=key)).records
        return bool(found) and found[0].value == value and found[0].lease == lease

    async def _propose(self, txn: TxnRequest) -> Outcome:
        try:
            return await self._member.propose(txn)
        except Refused as refused:
            raise to_service_error(refused) from refused


def _is_missing(key: bytes) -> CompareClause:
    return CompareClause(key=key, target="CREATE", result="EQUAL", value=0)


def _succeeded(outcome: Outcome) -> bool:
    if not isinstance(outcome.result, TxnResult):
        raise Internal("a transaction was answered with something else")
    return outcome.result.succeeded


def _instance_event(event: Event) -> InstanceEvent:
    if event.record.version == 0:
        assert event.previous is not None, "a deletion has something before it"
        return InstanceEvent(kind="down", instance=decode_instance(event.previous))
    kind = "up" if event.previous is None else "update"
    return InstanceEvent(kind=kind, instance=decode_instance(event.record))
