"""The door of every TLS port: accepts, sees each through its handshake, and strangers cannot block it.

A stranger costs one socket and a TLS state for `HANDSHAKE_S` at most; when as many as may stand at the door do, the one
that has stood there longest goes, so that somebody with a certificate, who needs milliseconds, always gets through.
Whether there are files and memory for one more is the kernel's word: until then the others go on, and some end.

Called by `wire.mutual` (APIs) and `discovery.transport` (members).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import cast

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
_RETRY_S = 0.1
SSLProtocol.max_size = 32 * 1024
"""asyncio's read buffer of a TLS connection, which it zeroes before the handshake: with its own 256 KiB, 2,000 idle
strangers took 170 MiB."""
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Door:
    """Those who are on their way in to one listening socket; `make` makes the protocol of who gets through.

    `context` is asked for each, so that it may change. `tune` sets what a connection needs before its handshake,
    `entered` takes note of who got through.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: Callable[[], ssl.SSLContext],
        make: Callable[[], asyncio.BaseProtocol],
        handshakes_max: int,
        *,
        tune: Callable[[socket.socket], None] = lambda _: None,
        entered: Callable[[asyncio.Transport], None] = lambda _: None,
    ) -> None:
        self._listening = listening
        self._context = context
        self._make = cast(Callable[[], asyncio.Protocol], make)
        self._handshakes_max = handshakes_max
        self._tune = tune
        self._entered = entered
        self._waiting: dict[asyncio.Task[None], None] = {}

    async def serve(self) -> None:
        """Accept until cancelled, which sends away who stands at the door."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    if error.errno in _FULL:
                        log.warning("no connection can be accepted: %s", error)
                        await asyncio.sleep(_RETRY_S)
                    continue
                if len(self._waiting) >= self._handshakes_max:
                    oldest = next(iter(self._waiting))
                    del self._waiting[oldest]  # it ends a turn later; the next of a crowd takes the next oldest
                    oldest.cancel()
                task = group.create_task(self._let_in(connection))
                self._waiting[task] = None
                task.add_done_callback(lambda task: self._waiting.pop(task, None))
                await asyncio.sleep(0)  # with many in the queue `sock_accept` would never let the others run

    async def _let_in(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            self._tune(connection)
            async with asyncio.timeout(HANDSHAKE_S):
                transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                    self._make, connection, ssl=self._context(), ssl_handshake_timeout=HANDSHAKE_S
                )
        except (OSError, TimeoutError) as error:  # an SSLError is an OSError
            log.debug("nobody was let in: %s", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise
        else:
            self._entered(transport)
