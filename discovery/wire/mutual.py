"""Serve an application on TCP to holders of a certificate only: mutual TLS, with a door that strangers cannot block.

Before the handshake is done nothing of the application runs: no request is read, no path is known. A stranger costs
one socket and a TLS state for `HANDSHAKE_S` at most; when `HANDSHAKES_MAX` are at the door, the one that has
stood there longest goes, so that somebody with a certificate, who needs milliseconds, always gets through. Inside, a
connection that asks nothing for `FIRST_REQUEST_S` is closed, and beyond `CONNECTIONS_MAX` nobody more is let in.

Called by hostd's daemon. Who made the certificates is not its business (`hostd.authority`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast
from weakref import WeakSet

from aiohttp import web
from aiohttp.typedefs import Middleware

from discovery.wire.serve import Front, Handlers, handlers

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
HANDSHAKES_MAX = 128
CONNECTIONS_MAX = 512
FIRST_REQUEST_S = 15.0
KEEP_ALIVE_S = 75.0
_BACKLOG = 256
_RETRY_S = 0.1
SSLProtocol.max_size = 32 * 1024
"""asyncio's read buffer of a TLS connection, which it zeroes before the handshake: 256 KiB make strangers expensive."""
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def subject_of(request: web.Request) -> dict[str, str] | None:
    """Return the subject of the caller's certificate (`commonName`, `organizationalUnitName`…); `None` without TLS."""
    certificate = None if request.transport is None else request.transport.get_extra_info("peercert")
    if certificate is None:
        return None
    return {name: value for rdn in certificate["subject"] for name, value in rdn}


class Door:
    """Accepts connections and sees each through its handshake."""

    def __init__(self, listening: socket.socket, context: ssl.SSLContext, group: asyncio.TaskGroup) -> None:
        self._listening = listening
        self._context = context
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._at_the_door: dict[asyncio.Task[None], None] = {}
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

    async def serve(self, server: Handlers) -> None:
        """Accept until cancelled."""
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError as error:
                if error.errno in _FULL:  # no file or memory is left: the others go on, and some end
                    log.warning("no connection can be accepted: %s", error)
                    await asyncio.sleep(_RETRY_S)
                continue
            if len(self._at_the_door) >= HANDSHAKES_MAX:
                next(iter(self._at_the_door)).cancel()
            task = self._group.create_task(self._let_in(connection, server))
            self._at_the_door[task] = None
            task.add_done_callback(self._left)

    def close(self) -> None:
        """Send away who stands at the door."""
        for task in list(self._at_the_door):
            task.cancel()

    def _left(self, task: asyncio.Task[None]) -> None:
        self._at_the_door.pop(task, None)

    async def _let_in(self, connection: socket.socket, server: Handlers) -> None:
        try:
            connection.setblocking(False)
            async with asyncio.timeout(HANDSHAKE_S):
                transport, _ = await self._loop.connect_accepted_socket(
                    cast(Callable[[], asyncio.Protocol], server), connection, ssl=self._context
                )
        except (OSError, TimeoutError) as error:  # an SSLError is an OSError
            log.debug("nobody was let in: %s", error)
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        if len(server.connections) > CONNECTIONS_MAX:
            log.warning("more than %d connections: one is refused", CONNECTIONS_MAX)
            transport.abort()
            return
        self._loop.call_later(FIRST_REQUEST_S, self._close_unless_used, transport)

    def _close_unless_used(self, transport: asyncio.Transport) -> None:
        if transport not in self._spoken:
            transport.abort()


@asynccontextmanager
async def listen_mutual_tls(
    make_app: Callable[[Middleware], web.Application],
    host: str,
    port: int,
    context: ssl.SSLContext,
    front: Front | None = None,
) -> AsyncIterator[int]:
    """Serve on TCP and yield the port (useful with port 0). `make_app` gets a middleware that the app has to run first.

    Raises:
        OSError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listening:
        listening.setblocking(False)
        async with asyncio.TaskGroup() as group:
            door = Door(listening, context, group)
            app = make_app(door.middleware())
            async with handlers(app, front, door.note, keepalive_timeout=KEEP_ALIVE_S, tcp_keepalive=True) as made:
                accepting = group.create_task(door.serve(made))
                try:
                    yield listening.getsockname()[1]
                finally:
                    accepting.cancel()
                    door.close()
