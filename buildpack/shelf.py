"""Asks the blob store, for the builder: temporary blobs, tickets for build jobs, and keeping a slug.

`address` may be `http://NAME.discoverd`; then an instance is looked up (SRV) when needed. Tickets name the
instance's own address, because a build job is no place to look services up.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

from buildpack import tickets
from buildpack.types import Blob
from controller.client import service_of
from discovery.client import resolve
from discovery.wire import clock
from discovery.wire.call import Caller
from discovery.wire.errors import NotFound, Unavailable

UPLOAD_TIMEOUT_S = 600.0


class Shelf:
    """Speaks to the blob store at `address`; the first key of the comma list `keys` signs."""

    def __init__(self, address: str, keys: str) -> None:
        self.address = address.rstrip("/")
        self._key = keys.split(",")[0]

    async def place(self) -> str:
        """Return the base URL of an instance.

        Raises:
            Unavailable: there is none now.
        """
        service = service_of(self.address)
        if not service:
            return self.address
        places = await resolve(service)
        if not places:
            raise Unavailable(f"service {service} has no instance", hint="the blob store may be starting")
        host, port = random.choice(places)  # noqa: S311 — spreads load, keeps no secret
        return f"http://{host}:{port}"

    def layer_url(self, digest: str) -> str:
        """Return where hosts fetch a kept blob from, true as long as the store exists."""
        return f"{self.address}/sha256/{digest.removeprefix('sha256:')}"

    def ticket(self, place: str, method: str, name: str, *, for_s: float, bytes_max: int = 0) -> str:
        """Return a URL at `place` that permits `method` on one temporary blob."""
        path = f"/temp/{name}"
        ends_at = int(clock.now_s() + for_s)
        return f"{place}{path}?{tickets.sign(self._key, method, path, ends_at=ends_at, bytes_max=bytes_max)}"

    async def put(self, place: str, name: str, content: AsyncIterator[bytes]) -> None:
        """Store a temporary blob from a stream."""
        async with Caller(place, key=self._key) as caller:
            await caller.request("PUT", f"/temp/{name}", data=content, timeout_s=UPLOAD_TIMEOUT_S)

    async def read(self, place: str, name: str, into: type[Any]) -> Any:
        """Return a temporary blob's JSON. Raises `BlobNotFound`."""
        async with Caller(place, key=self._key) as caller:
            return await caller.request("GET", f"/temp/{name}", into=into)

    async def keep(self, place: str, name: str) -> Blob:
        """Keep a temporary blob by its hash. Raises `BlobNotFound`."""
        async with Caller(place, key=self._key) as caller:
            return await caller.request("POST", f"/temp/{name}/keep", into=Blob, timeout_s=UPLOAD_TIMEOUT_S)

    async def drop(self, place: str, name: str) -> None:
        """Remove a temporary blob; gone already is fine."""
        async with Caller(place, key=self._key) as caller:
            try:
                await caller.request("DELETE", f"/temp/{name}")
            except NotFound:
                pass
