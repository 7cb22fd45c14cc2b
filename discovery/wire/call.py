"""How our daemons ask over HTTP: a typed client on aiohttp that raises the server's own errors.

Commands, which must start fast, use `wire.blocking` instead; both speak the same protocol.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar, overload

import aiohttp
import msgspec

from discovery.wire import attach
from discovery.wire.errors import DeadlineExceeded, Internal, Unavailable, error_of

T = TypeVar("T")
LINE_BYTES_MAX = 8 * 1024 * 1024


class Caller:
    """Speaks to one server: a base URL, or a unix socket with any host name in the URL.

    `address` may be `http://host:port`, `https://…` or `unix:///path/to.sock`. `prefix` comes before every path.
    """

    def __init__(
        self,
        address: str,
        *,
        key: str = "",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 30.0,
        prefix: str = "",
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        connector: aiohttp.BaseConnector
        if address.startswith("unix://"):
            connector = aiohttp.UnixConnector(path=address.removeprefix("unix://"), limit=0)
            self.base = "http://unix"
        else:
            connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=0)
            self.base = address.rstrip("/")
        self.base += prefix
        headers = {"Authorization": aiohttp.encode_basic_auth("", key)} if key else {}
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_s),
            read_bufsize=2**18,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    async def request(self, method: str, path: str, *, into: type[T], body: Any = ..., query: dict[str, str] | None = ..., timeout_s: float | None = ..., data: Any = ...) -> T: ...  # fmt: skip  # noqa: E501
    @overload
    async def request(self, method: str, path: str, *, into: None = ..., body: Any = ..., query: dict[str, str] | None = ..., timeout_s: float | None = ..., data: Any = ...) -> bytes: ...  # fmt: skip  # noqa: E501

    async def request(
        self,
        method: str,
        path: str,
        *,
        into: Any = None,
        body: Any = None,
        query: dict[str, str] | None = None,
        timeout_s: float | None = None,
        data: Any = None,
    ) -> Any:
        """Send one request and decode the answer as `into` (raw bytes if `None`).

        Raises:
            ServiceError: whatever the server raised; `Unavailable` when it cannot be reached,
                `DeadlineExceeded` after `timeout_s`.
        """
        payload = data if data is not None else (msgspec.json.encode(body) if body is not None else None)
        headers = {} if body is None else {"Content-Type": "application/json"}
        status, raw = await self.exchange(
            method, path, data=payload, query=query, headers=headers, timeout_s=timeout_s or self.timeout_s
        )
        if status >= 400:
            raise error_of(status, raw, self.address)
        return raw if into is None else self._decode(raw, into, path)

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        data: Any,
        timeout_s: float,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Send one request; return the status and the body of the answer, whatever they are.

        Raises:
            Unavailable: the server was not reached, it has not seen the request.
            DeadlineExceeded: no answer came, in time or before the connection broke; it may have been carried out.
        """
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(
                    method, self.base + path, params=query, data=data, headers=headers
                ) as response:
                    return response.status, await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise Unavailable(f"{self.address} cannot be reached: {error}") from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"{method} {self.address}{path}: no answer in {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise Unavailable(f"{self.address} cannot be reached: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise DeadlineExceeded(f"{self.address} cannot be reached any more: {error}") from error

    def _decode(self, raw: bytes, into: type[T], path: str) -> T:
        try:
            return msgspec.json.decode(raw, type=into)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Internal(
                f"{self.address}{path}: the answer is not understood: {error}", hint="is it of another version?"
            ) from error

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: dict[str, str] | None = None,
        data: Any = None,
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """Open a streaming answer and yield its reader; it has no deadline but the connection's."""
        payload = data if data is not None else (msgspec.json.encode(body) if body is not None else None)
        try:
            async with self._session.request(method, self.base + path, params=query, data=payload) as response:
                if response.status >= 400:
                    raise error_of(response.status, await response.read(), self.address)
                yield response.content
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{self.address}: the stream broke: {error}") from error

    async def events(self, path: str, into: type[T], query: dict[str, str] | None = None) -> AsyncIterator[T]:
        """Follow a Server-Sent Events endpoint; ends when the server ends it.

        Raises:
            ServiceError: the server's own, at once or in the middle; `Unavailable` when the connection breaks.
        """
        async with self.stream("GET", path, query=query) as reader:
            is_error = False
            pending = b""
            async for chunk in reader.iter_any():
                *lines, pending = (pending + chunk).split(b"\n")
                if len(pending) > LINE_BYTES_MAX:
                    raise Internal(f"{self.address}{path}: an event of over {LINE_BYTES_MAX} bytes")
                for line in lines:
                    if line.startswith(b"event: error"):
                        is_error = True
                    elif line.startswith(b"data: "):
                        if is_error:
                            raise error_of(500, line[6:], self.address)
                        yield self._decode(line[6:], into, path)

    @asynccontextmanager
    async def websocket(
        self, path: str, query: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """Open an attach connection; see `wire.attach` for its frames."""
        try:
            async with self._session.ws_connect(
                self.base + path, params=query, heartbeat=30.0, max_msg_size=attach.FRAME_BYTES_MAX
            ) as websocket:
                yield websocket
        except aiohttp.WSServerHandshakeError as error:
            raise Unavailable(f"{self.address}{path} refused to attach: {error.status}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{self.address} cannot be reached: {error}") from error
