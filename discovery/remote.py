"""The API over TCP, for holders of a certificate: listens if the settings say where, takes up a renewed certificate.

The same endpoints as on the unix socket, less what the role in the caller's certificate does not allow (`access`). The
address is also written into the store, so that `/v3/cluster/member/list` tells clients where else to ask: etcd's
clients find the members that way. Called by `daemon`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
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
RENEWAL_CHECK_S = 600.0
_RETRY_S = 1.0


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
        context = server_context(where.authority, where.certificate)
        async with (
            asyncio.TaskGroup() as tasks,
            listen_mutual_tls(make_app, where.host, where.port, context, front) as port,
        ):
            log.info("ready on %s:%d for holders of a certificate", where.host, port)
            renewing = tasks.create_task(_renew(context, where.certificate))
            try:
                yield port
            finally:
                renewing.cancel()
    except OSError as error:
        raise Unavailable(f"the API cannot listen on {where.host}:{where.port}: {error}") from error


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


async def _renew(context: ssl.SSLContext, certificate: Path) -> None:
    """Take up a new certificate, for ever; it counts from the next handshake on."""
    seen = _stamp(certificate)
    while True:
        await asyncio.sleep(RENEWAL_CHECK_S)
        if (found := _stamp(certificate)) != seen:
            try:
                context.load_cert_chain(certificate)
                seen = found
                log.info("%s is new, and is used from now on", certificate)
            except OSError as error:  # perhaps half of it is there: the old one is still good
                log.warning("%s cannot be used: %s", certificate, error)


def _stamp(path: Path) -> Any:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
