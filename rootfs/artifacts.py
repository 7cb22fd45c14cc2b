"""Fetches a blob by URL into the store, checking size and digest while it streams.

`http://SERVICE.discoverd/PATH` is resolved by an injected function, since this floor knows no discovery. Refuses
other schemes, redirects, answers that are longer than promised or that stall. A failed fetch leaves nothing.
Called by `hostd.runtime.files`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import aiohttp
from yarl import URL

from rootfs.errors import BlobMismatch, BlobMissing, FetchFailed, NameInvalid
from rootfs.store import BlobWriter, Store

Resolve = Callable[[str], Awaitable[list[tuple[str, int]]]]

_SERVICE_SUFFIX = ".discoverd"
_BATCH_BYTES = 1024 * 1024
_ATTEMPTS = 3
_PAUSE_S = 0.5


class Artifacts:
    """Fetches into one store. `resolve` takes a service's name and returns addresses, best first."""

    def __init__(
        self,
        store: Store,
        *,
        resolve: Resolve | None = None,
        connect_timeout_s: float = 5.0,
        stall_timeout_s: float = 30.0,
    ) -> None:
        self._store = store
        self._resolve = resolve
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=stall_timeout_s)

    async def fetch(self, url: str, digest: str, size_bytes: int | None = None) -> Path:
        """Return the blob's path in the store, fetched first if it is not there.

        Tries each address, and all of them up to three times, when it is the network that failed.

        Raises:
            NameInvalid: the URL or the digest cannot be meant.
            BlobMissing: the server says that it has no such thing.
            BlobMismatch: the bytes are not the ones promised; not tried again.
            FetchFailed: nobody could be reached, or the answer broke off or stalled.
            DiskFull: no room.
        """
        if self._store.has_blob(digest):
            return self._store.blob(digest)
        parsed = _parse(url)
        failure: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE_S * attempt)
            try:
                for target in await self._targets(parsed):
                    try:
                        await self._fetch_from(target, digest, size_bytes)
                        return self._store.blob(digest)
                    except (aiohttp.ClientError, TimeoutError, OSError, FetchFailed) as error:
                        failure = error
            except FetchFailed as error:
                failure = error
        raise FetchFailed(f"{url} cannot be fetched: {failure or 'no address'}") from failure

    async def _targets(self, url: URL) -> list[URL]:
        host = url.host or ""
        if not host.endswith(_SERVICE_SUFFIX):
            return [url]
        if self._resolve is None:
            raise FetchFailed(f"nothing here resolves {host}")
        service = host.removesuffix(_SERVICE_SUFFIX)
        return [url.with_host(address).with_port(port) for address, port in await self._resolve(service)]

    async def _fetch_from(self, url: URL, digest: str, size_bytes: int | None) -> None:
        # Whom the machine trusts is read when somebody asks: in hostd the context that aiohttp made trusts nobody.
        trust = await asyncio.to_thread(ssl.create_default_context) if url.scheme == "https" else True
        async with (
            aiohttp.ClientSession(timeout=self._timeout, auto_decompress=False, trust_env=False) as session,
            session.get(url, allow_redirects=False, ssl=trust) as response,
        ):
            if response.status in (404, 410):
                raise BlobMissing(f"{url} answers {response.status}")
            if response.status >= 500:
                raise FetchFailed(f"{url} answers {response.status}")
            if response.status != 200:
                raise BlobMissing(f"{url} answers {response.status}, not the blob")
            if size_bytes is not None and response.content_length not in (None, size_bytes):
                raise BlobMismatch(f"{url} has {response.content_length} bytes, not {size_bytes}")
            await self._save(response.content, digest, size_bytes)

    async def _save(self, content: aiohttp.StreamReader, digest: str, size_bytes: int | None) -> None:
        # The loop has jobs to look after: hashing and all that waits for the disk happen in threads.
        async with _in_threads(self._store.new_blob(digest, size_bytes)) as writer:
            batch = bytearray()
            async for chunk in content.iter_any():
                batch += chunk
                if len(batch) >= _BATCH_BYTES:
                    await asyncio.to_thread(writer.write, memoryview(batch))
                    batch = bytearray()
            await asyncio.to_thread(writer.write, memoryview(batch))


@asynccontextmanager
async def _in_threads(manager: AbstractContextManager[BlobWriter]) -> AsyncIterator[BlobWriter]:
    writer = await asyncio.to_thread(manager.__enter__)
    try:
        yield writer
    except BaseException as error:
        await asyncio.to_thread(manager.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(manager.__exit__, None, None, None)


def _parse(url: str) -> URL:
    try:
        parsed = URL(url)
    except ValueError as error:
        raise NameInvalid(f"URL {url[:200]!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise NameInvalid(f"URL {url[:200]!r}", hint="http://HOST:PORT/PATH or http://SERVICE.discoverd/PATH")
    return parsed
