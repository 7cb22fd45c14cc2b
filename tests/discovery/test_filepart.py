"""Parts of files in a streamed answer: sent by the kernel or, over TLS, by us; cut short; to a client that leaves."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding

from discovery.wire import serve
from discovery.wire.blocking import BlockingCaller
from discovery.wire.contexts import client_context, server_context
from discovery.wire.filepart import FilePart
from discovery.wire.mutual import listen_mutual_tls
from hostd.authority import Authority
from hostd.remote import authorize

SIZE = 3_000_000
DEADLINE_S = 60.0


class Server:
    """Streams a file between words, and again for ever if asked to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data"
        self.path.write_bytes(os.urandom(SIZE))
        self.ended = threading.Event()

    async def _parts(self, *, is_endless: bool) -> AsyncIterator[bytes | FilePart]:
        yield b"begin "
        with self.path.open("rb", buffering=0) as file:
            while True:
                # twice what there is: as if it had been cut meanwhile
                yield FilePart(b"<", file, 1, 2 * SIZE, 1, lambda sent: b"." * (2 * SIZE - sent) + b">")
                if not is_endless:
                    break
        yield b" end"

    async def answer(self, call: serve.Call) -> web.StreamResponse:
        try:
            return await serve.send_stream(call, self._parts(is_endless=call.flag("endless")), "text/plain", b"")
        finally:
            self.ended.set()

    def app(self, *middlewares: Any) -> web.Application:
        endpoint = serve.Endpoint(
            method="GET", path="/file", handler=self.answer, summary="Send", response=bytes, kind="bytes"
        )
        return serve.application(
            "test", "1", [endpoint], authorize if middlewares else None, api_version=1, middlewares=middlewares
        )


@contextmanager
def callers(server: Server, folder: Path, kind: str) -> Iterator[BlockingCaller]:
    ready, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    made: list[BlockingCaller] = []

    async def run() -> None:
        if kind == "unix":
            runner = web.AppRunner(server.app())
            await runner.setup()
            await web.UnixSite(runner, str(folder / "s")).start()
            made.append(BlockingCaller(f"unix://{folder}/s", prefix="/v1"))
            ready.set()
            await stop.wait()
            await runner.cleanup()
            return
        authority = Authority.make()
        ca = authority.certificate.public_bytes(Encoding.PEM)
        (folder / "ca.pem").write_bytes(ca)
        (folder / "server.pem").write_bytes(authority.server(["127.0.0.1"]))
        (folder / "me.pem").write_bytes(authority.client("me"))
        tls = client_context(str(folder / "me.pem"), str(folder / "me.pem"), ca.decode())
        context = server_context(folder / "ca.pem", folder / "server.pem")
        async with listen_mutual_tls(lambda each: server.app(each), "127.0.0.1", 0, lambda: context) as port:
            made.append(BlockingCaller(f"https://127.0.0.1:{port}", tls=tls, prefix="/v1"))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield made[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)
        loop.close()


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_a_file_between_words_arrives_whole_and_what_it_lacks_is_made_up(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path)
    with callers(server, tmp_path, kind) as caller:
        found = b"".join(caller.stream("/file"))
    there = server.path.read_bytes()[1:]
    assert found == b"begin <" + there + b"." * (2 * SIZE - len(there)) + b"> end"


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_a_client_that_leaves_ends_it(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path)
    with callers(server, tmp_path, kind) as caller:
        stream = caller.stream("/file", {"endless": ""})
        next(stream)
        next(stream)
        assert not server.ended.is_set()
        stream.close()  # type: ignore[attr-defined]
        assert server.ended.wait(DEADLINE_S)
