"""How our daemons answer HTTP: a table of endpoints becomes an aiohttp application and an OpenAPI document.

A handler takes one `Call` (path, query, decoded body) and returns a Struct, a list of them, `None`
(204), or a response that it has streamed itself. It raises `ServiceError`s; this module encodes
them. Unknown fields, malformed JSON and oversized bodies are refused here, so that no handler
re-checks shapes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Sized
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
from aiohttp import WSMsgType, hdrs, web
from aiohttp.http_writer import StreamWriter
from aiohttp.typedefs import Middleware

from discovery.wire import attach
from discovery.wire.errors import DeadlineExceeded, ErrorBody, Internal, Invalid, NotFound, ServiceError
from discovery.wire.filepart import FilePart

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 4 * 1024 * 1024
BODY_S = 60.0
SSE_KEEP_ALIVE_S = 15.0
_JSON = "application/json"
_BACKLOG = 1024
_SO_SNDBUFFORCE = 32  # not in `socket`


@dataclass(frozen=True)
class Call:
    """One request, decoded."""

    path: dict[str, str]
    query: dict[str, str]
    body: Any
    raw: web.Request
    identity: str = ""

    def flag(self, name: str) -> bool:
        """Return whether a query switch is on (`?follow`, `?follow=true`, `?follow=1`)."""
        return self.query.get(name, "false").lower() in ("", "1", "true", "yes")

    def number(self, name: str, default: int, *, low: int = 0, high: int = 2**53) -> int:
        """Return an integer query parameter.

        Raises:
            Invalid: it is no integer, or outside `low..high`.
        """
        text = self.query.get(name)
        if text is None or text == "":
            return default
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise Invalid(f"query parameter {name}={text!r}", hint=f"an integer from {low} to {high}")
        return value


Handler = Callable[[Call], Awaitable[Any]]
Authorize = Callable[[web.Request], Awaitable[str]]
"""Returns who is calling, or raises `Unauthorized`."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One line of an API: where, what goes in, what comes out, who answers.

    `request=bytes` hands the handler no body: it reads `call.raw.content` itself.
    `response` is documentation (and what handlers return); `kind` is `json`, `sse`, `websocket` or `bytes`.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    request: Any = None
    response: Any = None
    kind: str = "json"
    is_public: bool = False
    query: dict[str, str] = field(default_factory=dict)


def error_response(error: ServiceError) -> web.Response:
    """Encode an error as its status and JSON body."""
    return web.Response(status=error.http_status, body=msgspec.json.encode(error.to_body()), content_type=_JSON)


def json_response(value: Any, status: int = 200) -> web.Response:
    """Encode a value as a JSON response."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type=_JSON)


async def _body(request: web.Request, wanted: Any) -> Any:
    if wanted is None or wanted is bytes:
        return None
    try:
        async with asyncio.timeout(BODY_S):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise Invalid(f"request body above {BODY_BYTES_MAX} bytes") from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"the request body did not come within {BODY_S:g} s") from error
    try:
        return msgspec.json.decode(raw or b"{}", type=wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"request body: {error}", hint="see /openapi.json for the fields") from error


def _wrap(endpoint: Endpoint, authorize: Authorize | None) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            identity = "" if authorize is None or endpoint.is_public else await authorize(request)
            body = await _body(request, endpoint.request)
            call = Call(dict(request.match_info), dict(request.query), body, request, identity)
            result = await endpoint.handler(call)
        except ServiceError as error:
            if error.http_status >= 500 and not error.retry:
                log.warning("%s %s: %s", request.method, request.path, error.message)
            return error_response(error)
        except (ConnectionResetError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return error_response(Internal("internal error", hint="the daemon's log has the cause"))
        if isinstance(result, web.StreamResponse):
            return result
        if result is None:
            return web.Response(status=204)
        return json_response(result)

    return answer


@web.middleware
async def _unknown_paths(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return cast(web.StreamResponse, await handler(request))
    except web.HTTPNotFound:
        return error_response(NotFound(f"no endpoint {request.method} {request.path}", hint="see /openapi.json"))
    except web.HTTPMethodNotAllowed:
        return error_response(Invalid(f"{request.path} does not take {request.method}", hint="see /openapi.json"))
    except ConnectionResetError:
        if request.transport is not None and not request.transport.is_closing():
            raise
        return web.Response(status=499)  # the client went before it was answered: nobody hears this, nor need the log


def application(
    title: str,
    version: str,
    endpoints: Sequence[Endpoint],
    authorize: Authorize | None = None,
    *,
    api_version: int = 0,
    middlewares: Sequence[Middleware] = (),
) -> web.Application:
    """Make the application that answers `endpoints`, plus `/ping` and `/openapi.json`.

    With an `api_version` every path is also there under `/vN`, every answer carries `X-API-Version: N`, and the
    document describes the paths below `/vN`.
    """

    async def ping(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def document(_: web.Request) -> web.Response:
        return json_response(openapi(title, version, endpoints, api_version))

    async def say_version(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-API-Version"] = str(api_version)

    app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[*middlewares, _unknown_paths])
    if api_version:
        app.on_response_prepare.append(say_version)
    for prefix in ("", f"/v{api_version}") if api_version else ("",):
        app.router.add_get(prefix + "/ping", ping)
        app.router.add_get(prefix + "/openapi.json", document)
        for endpoint in endpoints:
            app.router.add_route(endpoint.method, prefix + endpoint.path, _wrap(endpoint, authorize))
    return app


def openapi(title: str, version: str, endpoints: Sequence[Endpoint], api_version: int = 0) -> dict[str, Any]:
    """Describe the API as an OpenAPI 3.1 document, from the same table that serves it.

    A versioned API (`api_version`) is one on a unix socket or mutual TLS; any other asks for a key.
    """
    types = [t for e in endpoints for t in (e.request, e.response) if t not in (None, bytes)]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(repr, [*types, ErrorBody]), schemas, strict=True))
    media = {"json": _JSON, "sse": "text/event-stream", "bytes": "application/octet-stream"}
    security = "certificate" if api_version else "basic"
    schemes = {"basic": {"type": "http", "scheme": "basic"}, "certificate": {"type": "mutualTLS"}}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        parameters = [
            {"name": part[1:-1].split(":")[0], "in": "path", "required": True, "schema": {"type": "string"}}
            for part in endpoint.path.split("/")
            if part.startswith("{")
        ] + [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in endpoint.query.items()
        ]
        operation: dict[str, Any] = {"summary": endpoint.summary, "parameters": parameters}
        if endpoint.request is bytes:
            operation["requestBody"] = {"content": {"application/octet-stream": {}}}
        elif endpoint.request is not None:
            operation["requestBody"] = {"content": {_JSON: {"schema": schema_of[repr(endpoint.request)]}}}
        answer: dict[str, Any] = {"description": endpoint.summary}
        if endpoint.kind in media and endpoint.response is not None:
            schema = {} if endpoint.response is bytes else {"schema": schema_of[repr(endpoint.response)]}
            answer["content"] = {media[endpoint.kind]: schema}
        status = {"websocket": "101"}.get(endpoint.kind, "200" if endpoint.response is not None else "204")
        error = {"description": "error", "content": {_JSON: {"schema": schema_of[repr(ErrorBody)]}}}
        operation["responses"] = {status: answer, "default": error}
        if not endpoint.is_public:
            operation["security"] = [{security: []}]
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "servers": [{"url": f"/v{api_version}" if api_version else "/"}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {security: schemes[security]}},
    }


async def send_events(call: Call, events: AsyncIterator[Any]) -> web.StreamResponse:
    """Stream Structs, one by one or in lists, as Server-Sent Events until the iterator or the client ends.

    Each message is `data: JSON`; a `ServiceError` from the iterator becomes `event: error` with its
    body and ends the stream; silence is broken by a comment every `SSE_KEEP_ALIVE_S`.
    """
    return await send_stream(call, _as_sse(events), "text/event-stream", b": keep-alive\n\n")


async def _as_sse(events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    encoder = msgspec.json.Encoder()
    try:
        async for event in events:
            if isinstance(event, list):  # JSON has no newline in it: many are encoded as quickly as one
                if event:
                    lines = encoder.encode_lines(event)
                    yield b"data: " + lines[:-1].replace(b"\n", b"\n\ndata: ") + b"\n\n"
            else:
                yield b"data: " + encoder.encode(event) + b"\n\n"
    except ServiceError as error:
        yield b"event: error\ndata: " + encoder.encode(error.to_body()) + b"\n\n"
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def send_stream(
    call: Call,
    parts: AsyncIterator[bytes] | AsyncIterator[bytes | FilePart],
    content_type: str,
    keep_alive: bytes,
    *,
    buffer_bytes: int = 0,
) -> web.StreamResponse:
    """Stream bytes until the iterator or the client ends; `keep_alive` breaks silence every `SSE_KEEP_ALIVE_S`.

    `buffer_bytes` is how much the kernel may hold for the client: with much, a busy machine switches less between us.
    """
    response = web.StreamResponse(
        headers={hdrs.CONTENT_TYPE: content_type, hdrs.CACHE_CONTROL: "no-cache", "X-Accel-Buffering": "no"}
    )
    writer = await response.prepare(call.raw)
    if buffer_bytes and call.raw.transport is not None:
        with suppress(OSError):  # beyond the system's limit, which root may
            link = call.raw.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, buffer_bytes)
    iterator: AsyncIterator[bytes | FilePart] = parts.__aiter__()
    waiting: asyncio.Future[bytes | FilePart] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(iterator.__anext__())
            done, _ = await asyncio.wait({waiting}, timeout=SSE_KEEP_ALIVE_S)
            if not done:
                await response.write(keep_alive)
                continue
            finished, waiting = waiting, None
            try:
                part = finished.result()
            except StopAsyncIteration:
                break
            if isinstance(part, bytes):
                await response.write(part)
            elif isinstance(writer, StreamWriter):
                await _send_file(call, writer, part)
    except ConnectionError:
        pass
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
    return response


async def _send_file(call: Call, writer: StreamWriter, part: FilePart) -> None:
    """Have the kernel send a part of a file, as one chunk; over TLS it is read and written.

    Raises:
        ConnectionError: the client is gone.
    """
    writer.send_headers()  # else they wait for the first bytes that go through the writer
    transport = call.raw.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError(call.raw.path)
    chunk = b"%x\r\n" % (len(part.head) + part.size + part.end_bytes) if writer.chunked else b""
    transport.write(chunk + part.head)
    sent = await asyncio.get_running_loop().sendfile(transport, part.file, part.offset, part.size)
    transport.write(part.end(sent) + (b"\r\n" if writer.chunked else b""))


@asynccontextmanager
async def open_websocket(call: Call) -> AsyncIterator[web.WebSocketResponse]:
    """Answer the upgrade; an error inside the block goes to the client as the last frame."""
    websocket = web.WebSocketResponse(heartbeat=30.0, max_msg_size=attach.FRAME_BYTES_MAX)
    await websocket.prepare(call.raw)
    try:
        yield websocket
    except ServiceError as error:
        if not websocket.closed:
            await websocket.send_bytes(attach.encode(attach.Error(error.to_body())))
    finally:
        if not websocket.closed:
            await websocket.close()


async def frames(websocket: Any) -> AsyncIterator[attach.Frame]:
    """Decode the frames that the other side of a WebSocket (aiohttp, either end) sends, until it closes."""
    async for message in websocket:
        if message.type is WSMsgType.BINARY:
            yield attach.decode(message.data)
        elif message.type is WSMsgType.TEXT:
            raise Invalid("attach frames are binary messages")


class Handlers(Protocol):
    """What makes the protocol of each new connection: aiohttp's server, or what stands before it."""

    def __call__(self) -> asyncio.BaseProtocol: ...

    @property
    def connections(self) -> Sized: ...


Front = Callable[[Handlers, Callable[[Any], None]], AbstractAsyncContextManager[Handlers]]
"""Puts something before aiohttp's server; what it answers itself, it tells the second argument of (the transport)."""


@asynccontextmanager
async def handlers(
    app: web.Application, front: Front | None, spoken: Callable[[Any], None] = lambda _: None, **options: Any
) -> AsyncIterator[Handlers]:
    """Run an application, without listening anywhere; `options` are aiohttp's."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0, handler_cancellation=True, **options)
    await runner.setup()
    assert runner.server is not None
    try:
        if front is None:
            yield runner.server
        else:
            async with front(runner.server, spoken) as found:
                yield found
    finally:
        await runner.cleanup()


@asynccontextmanager
async def listen_unix(
    app: web.Application, path: Path, mode: int = 0o600, front: Front | None = None
) -> AsyncIterator[None]:
    """Serve on a unix socket; a stale file is replaced, the file is removed at the end."""
    loop = asyncio.get_running_loop()
    async with handlers(app, front) as made:
        path.unlink(missing_ok=True)
        server = await loop.create_unix_server(cast(Callable[[], asyncio.Protocol], made), path, backlog=_BACKLOG)
        try:
            path.chmod(mode)
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)


@asynccontextmanager
async def listen_tcp(app: web.Application, host: str, port: int, front: Front | None = None) -> AsyncIterator[int]:
    """Serve on TCP and yield the port (useful with port 0).

    Raises:
        OSError: the address is taken or not ours.
    """
    loop = asyncio.get_running_loop()
    async with handlers(app, front) as made:
        factory = cast(Callable[[], asyncio.Protocol], made)
        server = await loop.create_server(factory, host, port, backlog=_BACKLOG)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
