"""Serve an application on TCP to holders of a certificate only: mutual TLS, behind a door that strangers cannot block.

Before the handshake is done (`wire.door`) nothing of the application runs: no request is read, no path is known.
Inside, a connection that asks nothing for `FIRST_REQUEST_S` is closed, and beyond `CONNECTIONS_MAX` nobody more is let
in.

Called by hostd's daemon. Who made the certificates is not its business (`hostd.authority`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakSet

from aiohttp import web
from aiohttp.typedefs import Middleware

from discovery.wire.door import Door
from discovery.wire.serve import Front, handlers

log = logging.getLogger(__name__)

HANDSHAKES_MAX = 128
CONNECTIONS_MAX = 512
FIRST_REQUEST_S = 15.0
KEEP_ALIVE_S = 75.0
_BACKLOG = 256


class _Guests:
    """Who got through the door: too many are sent away, and so is who then asks nothing."""

    def __init__(self) -> None:
        self.count: Callable[[], int] = int
        self._spoken: WeakSet[Any] = WeakSet()

    def note(self, transport: Any) -> None:
        """Take note of a connection that is in use."""
        self._spoken.add(transport)

    def middleware(self) -> Middleware:
        """Return what takes note of a connection that is in use."""

        @web.middleware
        async def note(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            if request.transport is not None:
                self.note(request.transport)
            return await handler(request)

        return note

    def entered(self, transport: asyncio.Transport) -> None:
        """Take note of one who got through the door."""
        if self.count() > CONNECTIONS_MAX:
            log.warning("more than %d connections: one is refused", CONNECTIONS_MAX)
            transport.abort()
            return
        asyncio.get_running_loop().call_later(FIRST_REQUEST_S, self._close_unless_used, transport)

    def _close_unless_used(self, transport: asyncio.Transport) -> None:
        if transport not in self._spoken:
            transport.abort()


@asynccontextmanager
async def listen_mutual_tls(
    make_app: Callable[[Middleware], web.Application],
    host: str,
    port: int,
    context: Callable[[], ssl.SSLContext],
    front: Front | None = None,
) -> AsyncIterator[int]:
    """Serve on TCP and yield the port (useful with port 0). `make_app` gets a middleware that the app has to run first.

    `context` is asked for every connection, so that certificates and whom they are from may change.

    Raises:
        OSError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listening:
        listening.setblocking(False)
        guests = _Guests()
        app = make_app(guests.middleware())
        async with (
            asyncio.TaskGroup() as group,
            handlers(app, front, guests.note, keepalive_timeout=KEEP_ALIVE_S, tcp_keepalive=True) as made,
        ):
            guests.count = lambda: len(made.connections)
            door = Door(listening, context, made, HANDSHAKES_MAX, entered=guests.entered)
            accepting = group.create_task(door.serve())
            try:
                yield listening.getsockname()[1]
            finally:
                accepting.cancel()
