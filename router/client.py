"""The front door of the router: routes as keys of discovery's store; the router follows them from there.

A route's key is made from its domain and path (or its port), so the store itself refuses a second one.
Called by the controller; a change is live as soon as the routers have seen it, a few milliseconds later.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import msgspec

from discovery.client import Store
from discovery.errors import TransactionFailed
from discovery.types import WatchEvent
from router.errors import InvalidRoute, RouteExists, RouteNotFound
from router.types import Route

PREFIX = "/router/routes/"
TCP_PORT_LOW, TCP_PORT_HIGH = 3000, 3500
RESERVED_TCP_PORTS = frozenset({80, 443})
_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_DOMAIN = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_PATH = re.compile(r"/([A-Za-z0-9._~!$&'()*+,;=:@%-]+/)*")


def check(route: Route) -> Route:
    """Return the route in its one spelling: domain in lower case, path between slashes.

    Raises:
        InvalidRoute: no such domain, path or port can be routed; says which and why.
    """
    if not route.service:
        raise InvalidRoute("the route names no service")
    if route.kind == "tcp":
        if route.domain or not 1 <= route.port <= 65535 or route.port in RESERVED_TCP_PORTS:
            raise InvalidRoute(f"TCP route on port {route.port}", hint="1 to 65535 but 80 and 443, and no domain")
        return route
    domain = route.domain.lower().rstrip(".")
    if len(domain) > 253 or not _DOMAIN.fullmatch(domain):
        raise InvalidRoute(f"domain {route.domain[:80]!r} is not one", hint="such as www.example.com or *.example.com")
    path = "/" + route.path.strip("/") + "/" if route.path.strip("/") else "/"
    if len(path) > 500 or not _PATH.fullmatch(path):
        raise InvalidRoute(
            f"path {route.path[:80]!r} cannot be routed", hint="such as /api/, without spaces or queries"
        )
    if bool(route.certificate) != bool(route.private_key):
        raise InvalidRoute("a certificate needs its private key, and a key its certificate")
    return msgspec.structs.replace(route, domain=domain, path=path, port=0)


def key_of(route: Route) -> str:
    """Return the store's key for a route that `check` has passed."""
    return f"{PREFIX}tcp/{route.port}" if route.kind == "tcp" else f"{PREFIX}http/{route.domain}{route.path}"


def name_of(route: Route) -> str:
    """Say a route as a person would."""
    return f"port {route.port}" if route.kind == "tcp" else route.domain + route.path.rstrip("/")


class Routes:
    """All routes of the cluster."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self, owner: str = "") -> list[Route]:
        """Return the routes (of one owner), oldest first."""
        found = [decode(item.value) for item in (await self._store.range(PREFIX)).items]
        return sorted((r for r in found if owner in ("", r.owner)), key=lambda r: (r.created_at, r.id))

    async def get(self, id: str) -> Route:
        """Return a route by its id.

        Raises:
            RouteNotFound: there is none.
        """
        for route in await self.list():
            if route.id == id:
                return route
        raise RouteNotFound(f"no route {id}", hint="flynn route lists them")

    async def add(self, route: Route) -> Route:
        """Add a route; a TCP route with port 0 takes the lowest free port from 3000.

        Raises:
            InvalidRoute: see `check`.
            RouteExists: the domain and path, or the port, is taken; `detail["owner"]` says by whom.
        """
        if route.kind == "tcp" and route.port == 0:
            return await self._add_free_port(route)
        checked = check(route)
        try:
            await self._store.create(key_of(checked), msgspec.json.encode(checked))
        except TransactionFailed as error:
            held = await self._store.get(key_of(checked))
            owner = decode(held.value).owner if held else ""
            raise RouteExists(
                f"a route for {name_of(checked)} exists already",
                hint="flynn route lists the routes; remove that one first",
                owner=owner,
            ) from error
        return checked

    async def _add_free_port(self, route: Route) -> Route:
        taken = {r.port for r in await self.list() if r.kind == "tcp"}
        for port in range(TCP_PORT_LOW, TCP_PORT_HIGH + 1):
            if port not in taken:
                try:
                    return await self.add(msgspec.structs.replace(route, port=port))
                except RouteExists:
                    continue  # somebody was faster
        raise RouteExists(f"all TCP ports from {TCP_PORT_LOW} to {TCP_PORT_HIGH} are routed")

    async def remove(self, id: str) -> Route:
        """Remove a route by its id and return it.

        Raises:
            RouteNotFound: there is none.
        """
        route = await self.get(id)
        await self._store.delete(key_of(route))
        return route

    async def remove_owned(self, owner: str) -> int:
        """Remove all routes of an owner; return how many there were."""
        owned = await self.list(owner)
        for route in owned:
            await self._store.delete(key_of(route))
        return len(owned)

    def watch(self) -> AsyncIterator[WatchEvent]:
        """Follow all routes: snapshot, `is_current`, changes; decode values with `decode`."""
        return self._store.watch(PREFIX)


def decode(value: bytes) -> Route:
    """Read a stored route."""
    return msgspec.json.decode(value, type=Route)
