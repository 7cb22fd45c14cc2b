"""The members that an agent asks: one after the other until one answers, and never a write twice.

A member that cannot be reached, or says that it cannot serve now, has not done what it was asked: the next
one is asked. Where the connection broke after the question was on its way, nobody knows; a question that
changes nothing is asked again, a change is reported as unknown. Used by `mirror` and `agent`.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from discovery.operations import DEADLINE, INTERNAL, UNAVAILABLE, Refused
from discovery.wire import clock
from discovery.wire.call import Caller
from discovery.wire.errors import DeadlineExceeded, Internal, ServiceError, Unavailable

ASK_S = 2.0
"""How long one member has to be reached, or to answer what may be asked again, before the next is asked."""
PAUSE_S = 0.1


class _Error(msgspec.Struct):
    code: int = INTERNAL
    message: str = ""


class Upstream:
    """The members at these addresses, as `Caller` takes them."""

    def __init__(self, addresses: Sequence[str], tls: ssl.SSLContext | None = None) -> None:
        self._callers = [Caller(address, tls=tls, timeout_s=ASK_S) for address in addresses]
        self._at = random.SystemRandom().randrange(len(addresses))

    @property
    def address(self) -> str:
        """Return the member that is asked first."""
        return self._callers[self._at].address

    def turn(self) -> None:
        """Ask the next member first."""
        self._at = (self._at + 1) % len(self._callers)

    async def close(self) -> None:
        """Close all connections."""
        for caller in self._callers:
            await caller.close()

    async def ask(self, path: str, body: Any, *, is_change: bool, timeout_s: float = 10.0) -> bytes:
        """Return the first answer.

        Raises:
            Refused: the store says no.
            Unavailable: no member could do it, and none has.
            DeadlineExceeded: a change may or may not be done.
        """
        payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
        deadline_s = clock.monotonic_s() + timeout_s
        while True:
            for _ in self._callers:
                left_s = deadline_s - clock.monotonic_s()
                try:
                    return await self._ask_one(path, payload, min(left_s, timeout_s if is_change else ASK_S))
                except DeadlineExceeded as error:
                    if is_change or clock.monotonic_s() >= deadline_s:
                        raise
                    last: ServiceError = error
                except Unavailable as error:
                    last = error
                self.turn()
                if clock.monotonic_s() >= deadline_s:
                    raise last
            await asyncio.sleep(min(PAUSE_S, max(0.0, deadline_s - clock.monotonic_s())))

    async def ask_here(self, path: str, body: Any, timeout_s: float = ASK_S) -> bytes:
        """Ask the member that is asked first, and only that; raises as `ask` does."""
        return await self._ask_one(path, msgspec.json.encode(body), timeout_s)

    @asynccontextmanager
    async def stream(self, path: str, body: Any) -> AsyncIterator[aiohttp.StreamReader]:
        """Open a stream at the member that is asked first; raises `ServiceError`."""
        async with self._callers[self._at].stream("POST", path, body=body) as reader:
            yield reader

    async def _ask_one(self, path: str, payload: bytes, timeout_s: float) -> bytes:
        caller = self._callers[self._at]
        status, raw = await caller.exchange("POST", path, data=payload, timeout_s=max(timeout_s, 0.001))
        if status < 400:
            return raw
        try:
            error = msgspec.json.decode(raw, type=_Error)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Internal(f"{caller.address}{path} answered {status}: {raw[:200]!r}") from None
        if error.code == DEADLINE:
            raise DeadlineExceeded(error.message, hint="the change may be done: read, then decide")
        if error.code == UNAVAILABLE:
            raise Unavailable(f"{caller.address}: {error.message}")
        raise Refused(error.code, error.message.removeprefix("etcdserver: "))
