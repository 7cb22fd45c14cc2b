"""A fast lane in front of aiohttp: plain POSTs to etcd's gateway are read and answered here, everything else goes on.

A connection begins here. As long as what it sends is, byte for byte, the simplest form of such a request (one
`Content-Length`, nothing that changes how the body is sent or the connection used), it is answered here, in order. The
first request that is anything else makes the whole connection aiohttp's, for good, beginning with that request:
nothing was consumed of it, and there is one parser at a time. So what is odd, malformed, streamed or too large is for
aiohttp to judge, and the only requests that this parser accepts are those about which no two parsers disagree.

`discovery.api` puts it before its application; it costs a fifth of what aiohttp's way from socket to handler does.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from discovery.access import CONTROLLER, Role, role_of
from discovery.gateway import Gateway
from discovery.wire import clock, roles
from discovery.wire.serve import BODY_BYTES_MAX, Handlers

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 8192
STALLED_S = 60.0
"""How long a request may take to arrive, and an answer to be taken."""
IDLE_S = 3600.0
_SWEEP_S = 5.0
_CLOSE_S = 2.0
_AHEAD_BYTES_MAX = 256 * 1024

_HEAD = re.compile(
    rb"POST (/v3[a-z0-9/-]*) HTTP/1\.1\r\n"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)+\r\n"
)
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*(?=\r\n)", re.IGNORECASE)
_SPECIAL = re.compile(
    rb"\r\n(?:transfer-encoding|content-encoding|expect|upgrade|te|trailer):"
    rb"|\r\ncontent-length:(?![ \t]*[0-9]{1,9}[ \t]*\r\n)"
    rb"|\r\nconnection:(?![ \t]*keep-alive[ \t]*\r\n)",
    re.IGNORECASE,
)
_REASONS = {
    200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 412: "Precondition Failed",
    429: "Too Many Requests", 500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable",
    504: "Gateway Timeout",
}  # fmt: skip
_LINES = {
    status: f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: ".encode()
    for status, reason in _REASONS.items()
}


class Lanes:
    """Makes the protocol of each new connection, and looks after those that stall."""

    def __init__(
        self, gateway: Gateway, behind: Handlers, group: asyncio.TaskGroup, spoken: Callable[[Any], None]
    ) -> None:
        self.gateway = gateway
        self.behind = behind
        self.group = group
        self.spoken = spoken
        self.paths = {path.encode(): path for path in gateway.handlers}
        self.open: set[Lane] = set()

    def __call__(self) -> asyncio.Protocol:
        return Lane(self)

    @property
    def connections(self) -> list[Any]:
        """Return what is connected, here or behind."""
        return [*self.open, *iter(cast(list[Any], self.behind.connections))]

    async def sweep(self) -> None:
        """Close, for ever, what has come to a halt."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = clock.monotonic_s()
            for lane in list(self.open):
                lane.close_if_stalled(now)

    async def close(self) -> None:
        """Close what is idle, and give the rest a moment."""
        for lane in self.open:
            lane.finish()
        deadline = clock.monotonic_s() + _CLOSE_S
        while self.open and clock.monotonic_s() < deadline:
            await asyncio.sleep(0.01)
        for lane in list(self.open):
            lane.abort()


@asynccontextmanager
async def fast_lane(gateway: Gateway, behind: Handlers, spoken: Callable[[Any], None]) -> AsyncIterator[Handlers]:
    """Yield what makes a protocol for each connection; `spoken` is told of a connection when it asks something."""
    async with asyncio.TaskGroup() as group:
        lanes = Lanes(gateway, behind, group, spoken)
        sweeping = group.create_task(lanes.sweep())
        try:
            yield lanes
        finally:
            sweeping.cancel()
            await lanes.close()


class Lane(asyncio.Protocol):
    """One connection, until it closes or goes on to aiohttp."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._transport = cast(asyncio.Transport, None)
        self._role: Role = CONTROLLER
        self._task: asyncio.Task[None] | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._wanted = 1
        self._waiter: asyncio.Future[None] | None = None
        self._is_blocked = False
        self._is_reading = True
        self._is_busy = False
        self._is_finishing = False
        self._since_s = clock.monotonic_s()
        self._last_head, self._last_path, self._last_length = b"", "", 0

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._role = role_of(roles.certificate_of(transport))
        self._lanes.open.add(self)
        self._task = self._lanes.group.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= self._wanted and self._waiter is not None and not self._is_busy:
            self._wake()
        elif self._is_busy and self._size > _AHEAD_BYTES_MAX and self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._is_blocked = True

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lanes.open.discard(self)
        if self._task is not None:
            self._task.cancel()

    # What `Lanes` asks for

    def close_if_stalled(self, now: float) -> None:
        """Close a connection on which nothing has moved for too long; a request that is being answered has its own."""
        limit_s = STALLED_S if self._size or self._is_blocked else IDLE_S
        if (not self._is_busy or self._is_blocked) and now > self._since_s + limit_s:
            self._transport.abort()

    def finish(self) -> None:
        """Close after the answer that is under way, if there is one."""
        self._is_finishing = True
        if not self._is_busy:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # The conversation

    async def _serve(self) -> None:
        try:
            while not self._is_finishing:
                if self._size < self._wanted:
                    await self._wait()
                    continue
                raw = self._joined()
                end = raw.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX) + 4
                if end < 4 and self._may_become_ours(raw):
                    self._wanted = self._size + 1
                    continue
                if end < 4 or not self._reads(raw[:end]):
                    self._hand_over(raw)
                    return
                total = end + self._last_length
                if self._size < total:
                    self._wanted = total
                    continue
                self._keep(raw[total:])
                await self._answer(raw[end:total])
            self._transport.close()
        except Exception:
            log.exception("a connection failed")
            self._transport.abort()

    async def _answer(self, body: bytes) -> None:
        self._is_busy = True
        status, answer = await self._lanes.gateway.answer(self._last_path, body, self._role)
        self._transport.write(b"%b%d\r\n\r\n%b" % (_LINES[status], len(answer), answer))
        self._since_s = clock.monotonic_s()
        while self._is_blocked:
            await self._wait()
        self._is_busy = False
        if not self._is_reading:
            self._is_reading = True
            self._transport.resume_reading()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._since_s = clock.monotonic_s()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _joined(self) -> bytes:
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0]

    def _keep(self, rest: bytes) -> None:
        self._parts = [rest, *self._parts[1:]] if rest else self._parts[1:]
        self._size = len(rest)
        self._wanted = 1

    def _may_become_ours(self, raw: bytes) -> bool:
        """Tell whether the beginning of a head, without its end, may still become a request of ours."""
        return len(raw) < HEAD_BYTES_MAX and (raw.startswith(b"POST /v3") or b"POST /v3".startswith(raw))

    def _reads(self, head: bytes) -> bool:
        """Read a head; tell whether it is ours. Clients say the same again and again, so that is looked at first."""
        if head == self._last_head:
            return True
        match = _HEAD.fullmatch(head)
        lengths = _LENGTH.findall(head)
        if match is None or len(lengths) != 1 or _SPECIAL.search(head):
            return False
        path, length = self._lanes.paths.get(match[1]), int(lengths[0])
        if path is None or length > BODY_BYTES_MAX:
            return False
        if not self._last_head:
            self._lanes.spoken(self._transport)
        self._last_head, self._last_path, self._last_length = head, path, length
        return True

    def _hand_over(self, raw: bytes) -> None:
        """Give the connection to aiohttp, with what it has not been answered yet."""
        self._task = None
        self._lanes.open.discard(self)
        handler = cast(asyncio.Protocol, self._lanes.behind())
        self._transport.set_protocol(handler)
        handler.connection_made(self._transport)
        handler.data_received(raw)
        if not self._is_reading:
            self._transport.resume_reading()
