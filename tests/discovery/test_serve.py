"""A stream of ours: parts as they come, a word in silence, and an end on either side that the other hears of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from discovery.wire import serve
from discovery.wire.errors import Conflict
from discovery.wire.serve import Call, Endpoint

DEADLINE_S = 30.0


class Source:
    """An iterator that does as it is told, and says when it was closed."""

    def __init__(self) -> None:
        self.next: asyncio.Queue[object] = asyncio.Queue()
        self.closed = asyncio.Event()

    async def parts(self) -> AsyncIterator[object]:
        try:
            while (part := await self.next.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed.set()


async def streamed(source: Source, folder: Path, use: object) -> None:
    async def handler(call: Call) -> object:
        return await serve.send_events(call, source.parts())

    endpoint = Endpoint(method="GET", path="/events", handler=handler, summary="", kind="sse")
    path = folder / "socket"
    async with asyncio.timeout(DEADLINE_S), serve.listen_unix(serve.application("t", "1", [endpoint]), path):
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            async with session.get("http://t/events") as answer:
                await use(answer)  # type: ignore[operator]
        await source.closed.wait()


async def test_parts_come_one_by_one_and_silence_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SSE_KEEP_ALIVE_S", 0.05)
    source = Source()

    async def use(answer: aiohttp.ClientResponse) -> None:
        for _ in range(2):
            assert await answer.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        source.next.put_nowait({"a": 1})
        while (line := await answer.content.readuntil(b"\n\n")) == b": keep-alive\n\n":
            pass
        assert line == b'data: {"a":1}\n\n'
        source.next.put_nowait(None)
        assert (await answer.content.read()).replace(b": keep-alive\n\n", b"") == b""

    await streamed(source, tmp_path, use)


async def test_a_refusal_is_the_last_part(tmp_path: Path) -> None:
    source = Source()
    source.next.put_nowait([1, 2])
    source.next.put_nowait(Conflict("no more"))

    async def use(answer: aiohttp.ClientResponse) -> None:
        text = await answer.content.read()
        assert text.startswith(b"data: 1\n\ndata: 2\n\nevent: error\ndata: ")
        assert b"no more" in text

    await streamed(source, tmp_path, use)


async def test_a_client_that_goes_away_ends_the_iterator(tmp_path: Path) -> None:
    source = Source()
    source.next.put_nowait(1)

    async def use(answer: aiohttp.ClientResponse) -> None:
        assert await answer.content.readuntil(b"\n\n") == b"data: 1\n\n"
        answer.close()

    await streamed(source, tmp_path, use)


async def test_a_client_that_goes_before_it_is_answered_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    has_ended = asyncio.Event()

    async def handler(call: Call) -> object:
        assert call.raw.transport is not None
        call.raw.transport.close()  # as when a write fails: closing, and nobody has been told so far
        try:
            return await serve.send_events(call, Source().parts())
        finally:
            has_ended.set()

    endpoint = Endpoint(method="GET", path="/events", handler=handler, summary="", kind="sse")
    path = tmp_path / "socket"
    async with asyncio.timeout(DEADLINE_S), serve.listen_unix(serve.application("t", "1", [endpoint]), path):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /events HTTP/1.1\r\nHost: t\r\n\r\n")
        await has_ended.wait()
        writer.close()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
