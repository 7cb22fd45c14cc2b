"""Routes plus instances make a table of what HAProxy should do; pure, no clock, no I/O.

`router.daemon` calls `build` whenever a route or an instance changes and compares the result with
what runs: `shape` needs a reload when it differs, servers alone go through the runtime API.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from discovery.types import Instance
from router.types import Route

WILDCARD_LABELS_MAX = 5


@dataclass(frozen=True, order=True)
class Server:
    """One instance behind a backend; `name` is what HAProxy's runtime API knows it by."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Backend:
    """Where a service's requests go. A sticky backend sets a cookie naming the server."""

    name: str
    service: str
    mode: str
    is_sticky: bool
    servers: tuple[Server, ...]


@dataclass(frozen=True, order=True)
class HttpRule:
    """`key` is what a request's host and path are compared with: `www.example.com/api/`."""

    key: str
    backend: str


@dataclass(frozen=True, order=True)
class TcpRule:
    port: int
    backend: str


@dataclass(frozen=True, order=True)
class Certificate:
    domain: str
    pem: str


@dataclass(frozen=True)
class Table:
    """Everything that the configuration is rendered from."""

    http: tuple[HttpRule, ...] = ()
    tcp: tuple[TcpRule, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    backends: tuple[Backend, ...] = ()

    @property
    def shape(self) -> object:
        """What cannot change at run time: all but the rules of the map, and servers of backends without stickiness."""
        backends = tuple(b if b.is_sticky else Backend(b.name, b.service, b.mode, False, ()) for b in self.backends)
        return has_wildcards(self), self.tcp, self.certificates, backends


def backend_name(service: str, mode: str, is_sticky: bool) -> str:
    """Name a backend so that HAProxy accepts it and two services never share one."""
    clean = re.sub(r"[^a-z0-9-]", "_", service.lower())[:60]
    mark = hashlib.sha256(service.encode()).hexdigest()[:8]
    return f"{mode}-{clean}-{mark}" + ("-sticky" if is_sticky else "")


def server_of(instance: Instance) -> Server:
    """Name a server by where it is, so that the same instance keeps its name."""
    return Server(f"s-{instance.host.replace(':', '_')}-{instance.port}", instance.host, instance.port)


def build(routes: Iterable[Route], instances: Mapping[str, Iterable[Instance]]) -> Table:
    """Make the table. Routes that clash (same domain and path, same port): the older one wins."""
    http: dict[str, HttpRule] = {}
    tcp: dict[int, TcpRule] = {}
    certificates: dict[str, Certificate] = {}
    backends: dict[str, Backend] = {}
    for route in sorted(routes, key=lambda r: (r.created_at, r.id)):
        is_sticky = route.kind == "http" and route.is_sticky
        name = backend_name(route.service, route.kind, is_sticky)
        if route.kind == "tcp":
            tcp.setdefault(route.port, TcpRule(route.port, name))
        else:
            key = route.domain.lower() + route.path
            http.setdefault(key, HttpRule(key, name))
            if route.certificate and route.private_key:
                pem = route.certificate.strip() + "\n" + route.private_key.strip() + "\n"
                certificates.setdefault(route.domain.lower(), Certificate(route.domain.lower(), pem))
        servers = tuple(sorted({server_of(i) for i in instances.get(route.service, ()) if i.protocol == "tcp"}))
        backends[name] = Backend(name, route.service, route.kind, is_sticky, servers)
    return Table(
        tuple(sorted(http.values())),
        tuple(sorted(tcp.values())),
        tuple(sorted(certificates.values())),
        tuple(backends[name] for name in sorted(backends)),
    )


def has_wildcards(table: Table) -> bool:
    """Return whether any rule needs the label-by-label lookup."""
    return any(rule.key.startswith("*.") for rule in table.http)


@dataclass(frozen=True)
class RuleChange:
    """One step in HAProxy's map: `add` a rule, `set` its backend, or `del` it."""

    verb: str
    rule: HttpRule


def rule_changes(seen: Table, wanted: Table) -> tuple[RuleChange, ...]:
    """Say how to get from one table's rules to another's, whose backends are there already."""
    before = {rule.key: rule for rule in seen.http}
    after = {rule.key: rule for rule in wanted.http}
    gone = [RuleChange("del", before[key]) for key in sorted(before.keys() - after.keys())]
    new = [RuleChange("add", after[key]) for key in sorted(after.keys() - before.keys())]
    other = [RuleChange("set", after[k]) for k in sorted(before.keys() & after.keys()) if before[k] != after[k]]
    return (*new, *other, *gone)


@dataclass(frozen=True)
class ServerChange:
    """One step at the runtime API: `add` brings a server in, `remove` takes it out without cutting its requests."""

    verb: str
    backend: str
    server: Server


def server_changes(seen: Table, wanted: Table) -> tuple[ServerChange, ...]:
    """Say how to get from one table to another of the same shape: additions first, so that there is no gap."""
    before = {b.name: set(b.servers) for b in seen.backends}
    adds: list[ServerChange] = []
    removes: list[ServerChange] = []
    for backend in wanted.backends:
        old = before.get(backend.name, set())
        new = set(backend.servers)
        adds += [ServerChange("add", backend.name, server) for server in sorted(new - old)]
        removes += [ServerChange("remove", backend.name, server) for server in sorted(old - new)]
    return (*adds, *removes)
