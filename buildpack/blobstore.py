"""The blob store ("shelf"): puts and gets blobs by hash over HTTP, as a job of the platform.

Whoever knows a blob's SHA-256 may read it; storing, listing and removing need the key, or a ticket (a signed URL)
for one temporary blob. A temporary blob that was read by ticket is gone. Refuses content that is not what its
name says, and anything that would fill the disk. Started as `python3 -m buildpack.blobstore`;
called by hosts (layers), by `buildpack.shelf`, and by `compile` inside build jobs.

Environment: `PORT`, `BLOBSTORE_KEY` (comma list: new keys first), `BLOBSTORE_DATA` (/data/blobs),
`BLOBSTORE_RESERVE_MIB` (64: how much of the disk stays free).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from buildpack import blobs, tickets
from buildpack.types import Blob
from discovery.wire import clock
from discovery.wire import logging as wire_logging
from discovery.wire.errors import Invalid, Unauthorized
from discovery.wire.serve import Call, Endpoint, application, listen_tcp

log = logging.getLogger("buildpack.blobstore")  # it is started as __main__

VERSION = "1"
CHUNK_BYTES = 1024 * 1024
HELD_S = 3600
SWEEP_S = 60.0
_OCTETS = "application/octet-stream"


class _ReadOnce(web.FileResponse):
    """A file that is removed once it was sent whole."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        writer = await super().prepare(request)
        self._path.unlink(missing_ok=True)
        return writer


class BlobStore:
    """The HTTP face of a folder of blobs."""

    def __init__(self, folder: blobs.Blobs, keys: Sequence[str]) -> None:
        self._blobs = folder
        self._keys = tuple(keys)

    def application(self) -> web.Application:
        """Make the application that serves it."""
        return application("hostd blob store", VERSION, self._endpoints(), self.authorize)

    def _endpoints(self) -> list[Endpoint]:
        by_hash, by_name = "/sha256/{hex}", "/temp/{name}"
        e = Endpoint
        return [
            e(method="GET", path="/sha256", handler=self._list, summary="List kept blobs", response=list[Blob]),
            *(
                e(
                    method=method,
                    path=by_hash,
                    handler=self._by_hash,
                    summary=f"{verb} a blob",
                    request=bytes if method == "PUT" else None,
                    response=Blob if method == "PUT" else bytes if method == "GET" else None,
                    kind="bytes" if method == "GET" else "json",
                    is_public=True,
                )
                for method, verb in (("GET", "Read"), ("HEAD", "Look at"), ("PUT", "Store"), ("DELETE", "Remove"))
            ),
            *(
                e(
                    method=method,
                    path=by_name,
                    handler=self._by_name,
                    summary=f"{verb} a temporary blob",
                    request=bytes if method == "PUT" else None,
                    response=Blob if method == "PUT" else bytes if method == "GET" else None,
                    kind="bytes" if method == "GET" else "json",
                    is_public=True,
                    query={"ends": "ticket", "max": "ticket", "signature": "ticket"},
                )
                for method, verb in (("GET", "Read, by ticket once,"), ("PUT", "Store"), ("DELETE", "Remove"))
            ),
            e(
                method="POST",
                path=f"{by_name}/keep",
                handler=self._keep,
                summary="Keep a temporary blob by its hash",
                response=Blob,
            ),
        ]

    async def authorize(self, request: web.Request) -> str:
        """Accept a key as bearer token or as basic password.

        Raises:
            Unauthorized: it is neither.
        """
        given = _given_key(request.headers.get(hdrs.AUTHORIZATION, ""))
        raw = given.encode("utf-8", "surrogateescape")  # a header may hold any bytes
        if not any(hmac.compare_digest(raw, key.encode()) for key in self._keys):
            raise Unauthorized("the blob store's key is needed")
        return "key"

    async def _permit(self, call: Call) -> tuple[int, bool]:
        """Return the size limit of a request (0 = none) and whether it came by ticket."""
        if "signature" not in call.query:
            await self.authorize(call.raw)
            return 0, False
        return tickets.check(self._keys, call.raw.method, call.raw.path, call.query, now_s=clock.now_s()), True

    async def _list(self, call: Call) -> list[Blob]:
        return await asyncio.to_thread(self._blobs.list)

    async def _by_hash(self, call: Call) -> web.StreamResponse | Blob | None:
        hexadecimal = blobs.parse_hex(call.path["hex"])
        match call.raw.method:
            case "GET" | "HEAD":
                headers = {hdrs.CACHE_CONTROL: "public, max-age=31536000, immutable"}
                return web.FileResponse(self._blobs.find(hexadecimal), headers={**headers, hdrs.CONTENT_TYPE: _OCTETS})
            case "PUT":
                await self.authorize(call.raw)
                async with self._received(call, 0) as incoming:
                    return await asyncio.to_thread(self._blobs.keep, incoming, hexadecimal)
            case "DELETE":
                await self.authorize(call.raw)
                self._blobs.drop(self._blobs.find(hexadecimal))
                return None
        raise Invalid(f"a blob does not take {call.raw.method}")

    async def _by_name(self, call: Call) -> web.StreamResponse | Blob | None:
        name = blobs.parse_name(call.path["name"])
        bytes_max, is_ticket = await self._permit(call)
        match call.raw.method:
            case "GET":
                path = self._blobs.find_held(name)
                headers = {hdrs.CONTENT_TYPE: _OCTETS, hdrs.CACHE_CONTROL: "no-store"}
                return _ReadOnce(path, headers=headers) if is_ticket else web.FileResponse(path, headers=headers)
            case "PUT":
                ends_at = clock.now_s() + call.number("ttl_s", HELD_S, low=1, high=24 * 3600)
                async with self._received(call, bytes_max) as incoming:
                    return await asyncio.to_thread(self._blobs.hold, incoming, name, ends_at=ends_at)
            case "DELETE" if not is_ticket:
                self._blobs.drop(self._blobs.find_held(name))
                return None
        raise Invalid(f"a temporary blob does not take {call.raw.method}")

    async def _keep(self, call: Call) -> Blob:
        return await asyncio.to_thread(self._blobs.keep_held, blobs.parse_name(call.path["name"]))

    @asynccontextmanager
    async def _received(self, call: Call, bytes_max: int) -> AsyncIterator[blobs.Incoming]:
        """Write the request's body to disk and yield it whole."""
        size_bytes = call.raw.content_length or 0
        with self._blobs.receive(size_bytes=size_bytes, bytes_max=bytes_max) as incoming:
            buffer = bytearray()
            async for chunk in call.raw.content.iter_any():
                buffer += chunk
                if len(buffer) >= CHUNK_BYTES:
                    await asyncio.to_thread(incoming.write, bytes(buffer))
                    buffer.clear()
            await asyncio.to_thread(incoming.write, bytes(buffer))
            yield incoming

    async def sweep(self) -> None:
        """Remove for ever what has ended."""
        while True:
            try:
                count = await asyncio.to_thread(self._blobs.sweep, clock.now_s(), HELD_S)
                if count:
                    log.info("removed %d temporary blobs whose time was over", count)
            except OSError:
                log.exception("temporary blobs cannot be removed")
            await asyncio.sleep(SWEEP_S)


def _given_key(header: str) -> str:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


@asynccontextmanager
async def running(environment: Mapping[str, str], host: str = "0.0.0.0") -> AsyncIterator[int]:  # noqa: S104
    """Run the store and yield its port.

    Raises:
        Invalid: the environment lacks the key.
    """
    keys = [key for key in environment.get("BLOBSTORE_KEY", "").split(",") if key]
    if not keys:
        raise Invalid("BLOBSTORE_KEY is not set")
    reserve_bytes = int(environment.get("BLOBSTORE_RESERVE_MIB", "64")) * 1024 * 1024
    folder = blobs.Blobs(Path(environment.get("BLOBSTORE_DATA", "/data/blobs")), reserve_bytes=reserve_bytes)
    store = BlobStore(folder, keys)
    async with asyncio.TaskGroup() as tasks:
        sweeper = tasks.create_task(store.sweep())
        try:
            async with listen_tcp(store.application(), host, int(environment.get("PORT", "0"))) as port:
                yield port
        finally:
            sweeper.cancel()


async def serve(environment: Mapping[str, str]) -> None:
    """Run the store until told to stop."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with running(environment) as port:
        log.info("blob store listens on %d", port)
        await stopped.wait()


def main() -> None:
    """Start the daemon."""
    wire_logging.configure()
    asyncio.run(serve(os.environ))


if __name__ == "__main__":
    main()
