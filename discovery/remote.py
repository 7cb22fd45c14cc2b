"""The API over TCP, for holders of a certificate: listens if the settings say where, takes up a renewed certificate.

The same endpoints as on the unix socket, less what the role in the caller's certificate does not allow (`access`). The
address is also written into the store, so that `/v3/cluster/member/list` tells clients where else to ask: etcd's
clients find the members that way. Called by `daemon`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from discovery.operations import PutRequest, Refused
from discovery.replica import Replica
from discovery.wire.contexts import server_context
from discovery.wire.errors import ServiceError, Unavailable
from discovery.wire.mutual import listen_mutual_tls
from discovery.wire.serve import Front

log = logging.getLogger(__name__)

ADDRESSES = b"/discoverd/members/"
"""Below it each member's client addresses, separated by commas, under its name."""
RENEWAL_CHECK_S = 10.0
_RETRY_S = 0.5


@dataclass(frozen=True)
class Listening:
    """Where to listen, what to show, whom to trust; `url` is what other members tell clients (empty: from `host`)."""

    host: str
    port: int
    authority: Path
    certificate: Path
    url: str = ""


@asynccontextmanager
async def listen(
    where: Listening, make_app: Callable[[Middleware], web.Application], front: Front
) -> AsyncIterator[int]:
    """Serve and yield the port.

    Raises:
        Unavailable: the certificates cannot be read, or the address is taken.
    """
    try:
        shown = _Shown(where)
        async with (
            listen_mutual_tls(make_app, where.host, where.port, lambda: shown.context, front) as port,
            asyncio.TaskGroup() as tasks,
        ):
            log.info("ready on %s:%d for holders of a certificate", where.host, port)
            renewing = tasks.create_task(shown.renew())
            try:
                yield port
            finally:
                renewing.cancel()
    except OSError as error:
        raise Unavailable(f"the API cannot listen on {where.host}:{where.port}: {error}") from error


async def keep_listening(
    where: Listening, make_app: Callable[[Middleware], web.Application], front: Front, member: Replica
) -> None:
    """Serve, and say in the store where, for ever; try again as long as something is in the way.

    Who makes the certificates may come later than we, and a taken address is no reason for the store to be away.
    """
    has_complained = False
    while True:
        try:
            async with listen(where, make_app, front):
                await announce(member, where.url)
                await asyncio.Event().wait()
        except Unavailable as error:
            if not has_complained:
                log.warning("%s; trying on", error.message)
            has_complained = True
        await asyncio.sleep(_RETRY_S)


async def announce(member: Replica, url: str) -> None:
    """Write where this member answers, unless it says so already."""
    key = ADDRESSES + member.member_id.encode()
    await member.wait_ready()
    while addresses_of(member, member.member_id) != [url]:
        try:
            await member.propose(PutRequest(key=key, value=url.encode()))
        except (Refused, ServiceError) as error:
            log.debug("this member's address is not written yet: %s", error)
            await asyncio.sleep(_RETRY_S)


def addresses_of(member: Replica, name: str) -> list[str]:
    """Return where clients find a member, as far as it has said so."""
    value = member.state.value(ADDRESSES + name.encode())
    return [] if value is None else value.decode("utf-8", "replace").split(",")


class _Shown:
    """What we show and whom we trust, as the files say it by now; a change counts from the next handshake on."""

    def __init__(self, where: Listening) -> None:
        self._where = where
        self._seen = self._stamps()
        self.context = server_context(where.authority, where.certificate)

    async def renew(self) -> None:
        """Take up new files, for ever."""
        while True:
            await asyncio.sleep(RENEWAL_CHECK_S)
            if (found := self._stamps()) == self._seen:
                continue
            try:
                self.context = server_context(self._where.authority, self._where.certificate)
                self._seen = found
                log.info("%s is new, and is used from now on", self._where.certificate)
            except OSError as error:  # perhaps half of it is there: the old one is still good
                log.warning("%s cannot be used: %s", self._where.certificate, error)

    def _stamps(self) -> tuple[Any, Any]:
        return _stamp(self._where.authority), _stamp(self._where.certificate)


def _stamp(path: Path) -> Any:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
