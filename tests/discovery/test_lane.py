"""The fast lane: what is plain is answered in it, what is anything else goes on to aiohttp, and nobody can tell."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from discovery import lane
from discovery.daemon import Daemon
from discovery.wire import serve
from tests.discovery.conftest import DEADLINE_S, running

PUT = b'{"key":"YQ==","value":"MQ=="}'
GET = b'{"key":"YQ=="}'


def post(path: str, body: bytes, *headers: str, length: str | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}" if length is None else length, *headers]
    return "\r\n".join(line for line in lines if line).encode() + b"\r\n\r\n" + body


class Client:
    """Speaks bytes, and reads answers that say their length."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        async with asyncio.timeout(DEADLINE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await self._reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body) if body[:1] in b"{[" else body

    async def rest(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read()


class Served:
    def __init__(self, daemon: Daemon, port: int, handed: list[bytes]) -> None:
        self.daemon = daemon
        self.port = port
        self.handed = handed
        """What was given to aiohttp at the moment it got a connection."""
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        self.clients.append(Client(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.clients[-1]


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    handed: list[bytes] = []
    original = lane.Lane._hand_over

    def hand_over(self: lane.Lane, raw: bytes) -> None:
        handed.append(raw)
        original(self, raw)

    monkeypatch.setattr(lane.Lane, "_hand_over", hand_over)
    async with running(tmp_path / "state") as daemon:
        async with serve.listen_tcp(daemon.application(), "127.0.0.1", 0, daemon.front) as port:
            made = Served(daemon, port, handed)
            yield made
            for client in made.clients:
                client.writer.close()


async def test_plain_requests_stay_in_the_lane_and_the_connection_open(served: Served) -> None:
    client = await served.connect()
    for path, body, wanted in (("/v3/kv/put", PUT, 200), ("/v3/kv/range", GET, 200), ("/v3/kv/put", b"{", 400)):
        await client.send(post(path, body, "Connection: keep-alive", "Content-Type: application/json"))
        status, headers, _ = await client.answer()
        assert (status, headers["content-type"]) == (wanted, "application/json")
    assert not served.handed


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    client = await served.connect()
    await client.send(b"".join(post("/v3/kv/put", b'{"key":"YQ==","prev_kv":true}') for _ in range(50)))
    versions = [(await client.answer())[2].get("prev_kv", {}).get("version", "0") for _ in range(50)]
    assert versions == [str(number) for number in range(50)]
    assert not served.handed


async def test_a_request_may_come_byte_by_byte(served: Served) -> None:
    client = await served.connect()
    client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in post("/v3/kv/put", PUT) + post("/v3/kv/range", GET):
        await client.send(bytes((byte,)))
        await asyncio.sleep(0)
    assert (await client.answer())[0] == 200
    assert (await client.answer())[2]["kvs"][0]["value"] == "MQ=="
    assert not served.handed


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n",
        post("/v3/kv/range", GET, "Expect: 100-continue"),
        post("/v3/kv/range", GET, "Connection: close"),
        post("/v3/kv/range", GET, "Upgrade: websocket", "Connection: upgrade"),
        post("/v3/kv/range", b"e\r\n" + GET + b"\r\n0\r\n\r\n", length="Transfer-Encoding: chunked"),
        post("/v3/kv/range", b"", length=""),
        post("/v3/kv/range?x=1", GET),
        post("/v3/kv/range", GET).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post("/v3/nothing", GET),
        post("/services", GET),
        post("/v3/kv/range", GET, "X: " + "y" * 8200),
    ],
)
async def test_what_is_not_plain_is_answered_by_aiohttp(served: Served, raw: bytes) -> None:
    client = await served.connect()
    await client.send(post("/v3/kv/put", PUT))  # the lane first: a connection may go on to aiohttp at any time
    assert (await client.answer())[0] == 200
    await client.send(raw)
    async with asyncio.timeout(DEADLINE_S):
        assert (await client._reader.readline()).startswith(b"HTTP/1.")
    assert len(served.handed) == 1
    assert served.handed[0]
    assert raw.startswith(served.handed[0])


@pytest.mark.parametrize(
    "raw",
    [
        post("/v3/kv/put", PUT, "Content-Length: 3"),
        post("/v3/kv/put", PUT, f"content-length: {len(PUT)}, {len(PUT)}"),
        post("/v3/kv/put", PUT, "Transfer-Encoding: chunked"),
        post("/v3/kv/put", PUT, "Transfer-Encoding : chunked"),
        post("/v3/kv/put", PUT, "X: y\n folded: z"),
        post("/v3/kv/put", PUT, "no colon"),
        post("/v3/kv/put", PUT, "X: y\0"),
        post("/v3/kv/put", PUT, length="Content-Length: +5"),
        post("/v3/kv/put", PUT, length="Content-Length: 0x5"),
        post("/v3/kv/put", PUT, length="Content-Length:"),
        post("/v3/kv/put", PUT, length="Content-Length: 99999999999"),
        post("/v3/kv/put", PUT).replace(b"\r\n", b"\n"),
        post("/v3/kv/put", PUT).replace(b"Host", b" Host"),
        post("/v3/kv/put", PUT).replace(b"POST ", b"POST  "),
        b"\r\n" + post("/v3/kv/put", PUT),
        b"POST" * 5000,
        bytes(range(256)) * 100,
    ],
)
async def test_what_is_odd_is_never_judged_by_the_lane(served: Served, raw: bytes) -> None:
    client = await served.connect()
    await client.send(raw)
    client.writer.write_eof()
    await client.rest()
    if b"\n\r\n" in raw or len(raw) > lane.HEAD_BYTES_MAX:  # else it has only begun, for all that the lane knows
        assert len(served.handed) == 1
        assert raw.startswith(served.handed[0])
    else:
        assert served.daemon.member.state.revision == 1


async def test_a_body_that_is_too_large_is_refused_and_the_largest_is_not(served: Served) -> None:
    client = await served.connect()
    value = b"A" * (1400 * 1024 - 1400 * 1024 % 4)
    await client.send(post("/v3/kv/put", b'{"key":"YQ==","value":"' + value[: 1024 * 1024 // 4 * 5] + b'"}'))
    status, _, answer = await client.answer()
    assert status == 200, answer
    assert not served.handed
    await client.send(post("/v3/kv/put", b" " * (serve.BODY_BYTES_MAX + 1)))
    status, _, answer = await client.answer()
    assert (status, answer["code"]) == (400, 3)
    assert len(served.handed) == 1


async def test_a_client_that_does_not_take_its_answers_stops_being_read(served: Served) -> None:
    value = "QUFB" * 100_000
    client = await served.connect()
    await client.send(post("/v3/kv/put", b'{"key":"YQ==","value":"%s"}' % value.encode()))
    assert (await client.answer())[0] == 200
    greedy = await served.connect()
    greedy._reader._transport.pause_reading()  # type: ignore[attr-defined]
    wanted = post("/v3/kv/range", GET) * 10_000
    sent = asyncio.ensure_future(greedy.send(wanted))
    done, _ = await asyncio.wait([sent], timeout=1.0)
    held = max(sum(map(len, found._parts)) for found in _lanes(served))
    assert held < 2 * lane._AHEAD_BYTES_MAX, "requests of one who takes no answer pile up"
    del done
    sent.cancel()
    await asyncio.gather(sent, return_exceptions=True)
    greedy.writer.transport.abort()
    await client.send(post("/v3/kv/range", GET))
    assert (await client.answer())[0] == 200


def _lanes(served: Served) -> list[lane.Lane]:
    import gc

    return [found for found in gc.get_objects() if isinstance(found, lane.Lane)]


async def test_one_who_stalls_is_closed_and_one_who_is_idle_is_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "STALLED_S", 0.2)
    stalled, idle = await served.connect(), await served.connect()
    await idle.send(post("/v3/kv/put", PUT))
    assert (await idle.answer())[0] == 200
    await stalled.send(post("/v3/kv/put", PUT)[:-3])
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await stalled.answer()
    await idle.send(post("/v3/kv/range", GET))
    assert (await idle.answer())[0] == 200


async def test_a_client_that_hangs_up_leaves_nothing(served: Served) -> None:
    client = await served.connect()
    await client.send(post("/v3/kv/put", PUT) * 3)
    client.writer.transport.abort()
    await asyncio.sleep(0)
    other = await served.connect()
    await other.send(post("/v3/kv/range", GET))
    assert (await other.answer())[0] == 200


async def test_stopping_answers_what_is_under_way(tmp_path: Path) -> None:
    async with running(tmp_path / "state") as daemon:
        async with serve.listen_tcp(daemon.application(), "127.0.0.1", 0, daemon.front) as port:
            idle = Client(*await asyncio.open_connection("127.0.0.1", port))
            busy = Client(*await asyncio.open_connection("127.0.0.1", port))
            await busy.send(post("/v3/kv/put", PUT))
            while daemon.member.state.revision == 1:
                await asyncio.sleep(0.001)
        assert (await busy.answer())[0] == 200
        assert await idle.rest() == b""
        for client in (idle, busy):
            client.writer.close()
