"""The API over TCP, for holders of a certificate: listens if the settings say where, renews its own certificate.

The same endpoints as on the unix socket. A certificate of the host's authority is as good as root; a `read-only` one
may look, but neither change, attach nor run anything. Called by `daemon`; `hostd.authority` makes the certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from discovery.wire import roles
from discovery.wire.contexts import server_context
from discovery.wire.errors import ServiceError, Unauthorized, Unavailable
from discovery.wire.mutual import listen_mutual_tls
from discovery.wire.serve import Authorize
from hostd.config import ANY_ADDRESS, Config

log = logging.getLogger(__name__)

RENEWAL_CHECK_S = 6 * 3600.0
_AUTHORITY_S = 60.0
_LOOKING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})


def address_of(listen: str) -> tuple[str, int]:
    """Return host and port of ADDRESS:PORT; of nothing port 0."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port or 0)


def names_of(config: Config) -> list[str]:
    """Return what the host's certificate has to say: its addresses and its name."""
    hosts = [address_of(listen)[0] for listen in (config.api_listen, config.discovery_api) if listen]
    own = [host for host in hosts if host not in (ANY_ADDRESS, "::")]
    jobs = [config.gateway] if config.discovery_api else []
    return list(dict.fromkeys([config.host_ip, *own, *jobs, socket.gethostname()]))


async def authorize(request: web.Request) -> str:
    """Return the name in the caller's certificate.

    Raises:
        Unauthorized: it is a read-only one, and this is more than looking; or one for discovery only.
    """
    certificate = roles.certificate_of(request.transport) or {}
    name, units = roles.name_of(certificate), roles.units_of(certificate)
    is_looking = request.method in _LOOKING and hdrs.UPGRADE not in request.headers
    if units not in ((), (roles.CONTROLLER,), (roles.READ_ONLY,)):
        raise Unauthorized(
            f"the certificate of {name or '?'} is for discovery only (role {', '.join(units)[:40]!r})",
            hint="`hostd tls client NAME` on the host makes one for hostd",
        )
    if units == (roles.READ_ONLY,) and not is_looking:
        raise Unauthorized(
            f"the certificate of {name or '?'} is read-only",
            hint="`hostd tls client NAME` on the host makes one that may do everything",
        )
    return name


async def ask_authority(*words: str) -> bytes:
    """Run `hostd.authority` and return what it prints.

    Raises:
        Unavailable: it failed; the message says why.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "hostd.authority", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_AUTHORITY_S):
            said, complaint = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"the certificate was not made within {_AUTHORITY_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Unavailable(f"the certificate: {complaint.decode(errors='replace').strip()[-500:]}")
    return said


async def ensure_certificate(config: Config) -> bool:
    """Make sure that the host has an authority and a certificate; return whether a new one was made.

    Raises:
        Unavailable: it could not be made; the message says why.
    """
    said = await ask_authority("server", str(config.tls_dir), *names_of(config))
    if said:
        log.info("made %s", said.decode().strip())
    return bool(said)


async def keep_certificate(config: Config, context: ssl.SSLContext | None = None, *, pause_s: float = 0.0) -> None:
    """Look after the certificate for ever, first after `pause_s`; the context is given a new one.

    Discovery takes up a new one by itself.
    """
    while True:
        await asyncio.sleep(pause_s)
        try:
            if await ensure_certificate(config) and context is not None:
                context.load_cert_chain(server_pem(config))
            pause_s = RENEWAL_CHECK_S
        except (ServiceError, OSError) as error:  # where there is one already, it is good for weeks yet
            log.error("%s; trying again in a minute", error)
            pause_s = 60.0


def server_pem(config: Config) -> Path:
    """Return where the host's certificate and key are; `hostd.authority` puts them there."""
    return config.tls_dir / "server.pem"


@contextlib.asynccontextmanager
async def listen(config: Config, make_app: Callable[[Authorize, Middleware], web.Application]) -> AsyncIterator[int]:
    """Serve if the settings say where, and yield the port (0: nowhere).

    Raises:
        Unavailable: the certificate cannot be made, or the address is taken.
    """
    if not config.api_listen:
        yield 0
        return
    await ensure_certificate(config)
    context = server_context(config.tls_dir / "ca.pem", server_pem(config))
    host, port = address_of(config.api_listen)
    async with contextlib.AsyncExitStack() as stack:
        try:
            chosen = await stack.enter_async_context(
                listen_mutual_tls(lambda middleware: make_app(authorize, middleware), host, port, lambda: context)
            )
        except OSError as error:
            raise Unavailable(f"api_listen {config.api_listen}: {error.strerror or error}") from error
        log.info("API for holders of a certificate on %s port %d", host, chosen)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(keep_certificate(config, context, pause_s=RENEWAL_CHECK_S))
            try:
                yield chosen
            finally:
                keeping.cancel()
