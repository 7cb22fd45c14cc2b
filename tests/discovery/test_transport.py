"""Connections between members: only members get in, strangers cost little, and whoever talks nonsense is sent away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from discovery import peerwire, transport
from discovery.peerwire import VERSION, Append, Ask, Hello, Message, Propose, Unreadable
from discovery.transport import Credentials, Peers
from discovery.wire import door
from hostd.authority import Authority
from tests.discovery.members import certify, free_ports

DEADLINE_S = 10.0


class Listener:
    """Remembers what it is told."""

    def __init__(self, cluster_id: int = 7) -> None:
        self.hello = Hello(VERSION, cluster_id, 1)
        self.connected: list[str] = []
        self.gone: list[str] = []
        self.said: list[tuple[str, Message]] = []
        self._something = asyncio.Event()

    def own_hello(self) -> Hello:
        return self.hello

    def peer_connected(self, id: str, hello: Hello) -> None:
        self.connected.append(id)
        self._something.set()

    def peer_disconnected(self, id: str) -> None:
        self.gone.append(id)
        self._something.set()

    def peer_said(self, id: str, hello: Hello, message: Message) -> None:
        self.said.append((id, message))
        self._something.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self._something.clear()
                await self._something.wait()


@asynccontextmanager
async def serving(
    folder: Path, authority: Authority, id: str, addresses: dict[str, str]
) -> AsyncIterator[tuple[Peers, Listener]]:
    ca, bundle = certify(authority, folder, id)
    listener = Listener()
    peers = Peers(addresses[id], Credentials(ca, bundle, bundle), listener)
    peers.want({other: address for other, address in addresses.items() if other != id})
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(peers.run())
        try:
            yield peers, listener
        finally:
            running.cancel()


def two() -> dict[str, str]:
    return {id: f"127.0.0.1:{port}" for id, port in zip("ab", free_ports(2), strict=True)}


async def dial(address: str, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = transport.split_address(address)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await asyncio.open_connection(host, port, ssl=context)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)  # it does not listen yet


async def is_sent_away(reader: asyncio.StreamReader) -> bool:
    """Wait for the end of a connection."""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(DEADLINE_S):
            while await reader.read(65536):
                pass
    return True


async def test_messages_come_in_order_from_whom_the_certificate_names(tmp_path: Path) -> None:
    authority, addresses = Authority.make(), two()
    async with (
        serving(tmp_path, authority, "a", addresses) as (a, told_a),
        serving(tmp_path, authority, "b", addresses) as (_, told_b),
    ):
        await told_a.until(lambda: told_a.connected == ["b"])
        for number in range(2000):
            assert a.send("b", Append(1, number, 1, 1, [(1, b"x" * 500)]))
        await told_b.until(lambda: len(told_b.said) == 2000)
        assert [message.prev_index for _, message in told_b.said if isinstance(message, Append)] == list(range(2000))
        assert {id for id, _ in told_b.said} == {"a"}


async def test_a_member_that_goes_is_noticed_and_dialled_again(tmp_path: Path) -> None:
    authority, addresses = Authority.make(), two()
    async with serving(tmp_path, authority, "a", addresses) as (a, told):
        for round in range(2):
            async with serving(tmp_path, authority, "b", addresses):
                await told.until(lambda round=round: len(told.connected) == round + 1)  # type: ignore[misc]
            await told.until(lambda round=round: len(told.gone) == round + 1)  # type: ignore[misc]
            assert not a.send("b", Ask(1, Propose(b"x")))


async def test_it_listens_where_it_is_told_and_nowhere_else(tmp_path: Path) -> None:
    addresses = {"a": f"127.0.0.1:{free_ports(1)[0]}"}
    async with serving(tmp_path, Authority.make(), "a", addresses):
        await asyncio.sleep(0)
        port = int(addresses["a"].rpartition(":")[2])
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.2", port)


def context_of(bundle: Path | None, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca)
    if bundle is not None:
        context.load_cert_chain(bundle)
    return context


@pytest.mark.parametrize("who", ["nobody", "other authority", "expired", "client", "server"])
async def test_strangers_hear_nothing_and_say_nothing(tmp_path: Path, who: str) -> None:
    authority, addresses = Authority.make(), {"a": f"127.0.0.1:{free_ports(1)[0]}"}
    bundle = tmp_path / "stranger.pem"
    match who:
        case "other authority":
            bundle.write_bytes(Authority.make().member("b"))
        case "expired":
            bundle.write_bytes(authority.member("b", days=1, begin=datetime.now(UTC) - timedelta(days=2)))
        case "client":
            bundle.write_bytes(authority.client("b"))
        case "server":
            bundle.write_bytes(authority.server(["127.0.0.1"]))
    async with serving(tmp_path, authority, "a", addresses) as (_, told):
        context = context_of(None if who == "nobody" else bundle, tmp_path / "ca.pem")
        with contextlib.suppress(OSError):
            reader, writer = await dial(addresses["a"], context)
            writer.write(peerwire.encode(told.hello) + peerwire.encode(Append(9, 1, 1, 1, [])))
            assert await is_sent_away(reader)
            writer.close()
        assert told.said == []


BOMBS = {
    "length": b"\xff\xff\xff\xff" + b"x" * 100,
    "no hello": peerwire.encode(Append(9, 1, 1, 1, [])),
    "version": peerwire.encode(Hello(VERSION + 1, 7, 1)),
    "garbage": peerwire.encode(Hello(VERSION, 7, 1)) + b"\0\0\0\x05hello",
    "deep": peerwire.encode(Hello(VERSION, 7, 1)) + b"\0\x01\0\0" + b"\x91" * 65536,
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_member_that_talks_nonsense_is_sent_away(tmp_path: Path, bomb: str) -> None:
    authority, addresses = Authority.make(), two()
    ca, bundle = certify(authority, tmp_path, "b")
    async with serving(tmp_path, authority, "a", {"a": addresses["a"]}) as (_, told):
        reader, writer = await dial(addresses["a"], context_of(bundle, ca))
        writer.write(BOMBS[bomb])
        assert await is_sent_away(reader)
        writer.close()
        assert told.said == []


async def test_a_crowd_of_idle_strangers_keeps_no_member_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_S", 2.0)
    authority, addresses = Authority.make(), two()
    async with serving(tmp_path, authority, "b", addresses):
        crowd = []
        async with serving(tmp_path, authority, "a", addresses) as (_, told):
            await asyncio.sleep(0)
            host, port = transport.split_address(addresses["a"])
            for _ in range(300):
                with contextlib.suppress(OSError):
                    crowd.append(await asyncio.to_thread(socket.create_connection, (host, port), 5))
            await told.until(lambda: told.connected == ["b"])
            for each in crowd:
                each.settimeout(DEADLINE_S)
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.to_thread(each.recv, 1) == b""
        for each in crowd:
            each.close()


async def test_a_silent_member_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "IDLE_S", 0.5)
    authority, addresses = Authority.make(), two()
    ca, bundle = certify(authority, tmp_path, "b")
    async with serving(tmp_path, authority, "a", {"a": addresses["a"]}):
        reader, writer = await dial(addresses["a"], context_of(bundle, ca))
        writer.write(peerwire.encode(Hello(VERSION, 7, 1)))
        assert await is_sent_away(reader)
        writer.close()


def test_random_bytes_are_no_message() -> None:
    dice = random.Random(5)
    valid = [peerwire.encode(each)[4:] for each in (Append(1, 2, 3, 4, [(1, b"x")]), Ask(1, Propose(b"y")))]
    for _ in range(20_000):
        raw = bytearray(dice.choice(valid)) if dice.random() < 0.5 else bytearray(dice.randbytes(dice.randrange(60)))
        for _ in range(dice.randrange(3)):
            if raw:
                raw[dice.randrange(len(raw))] = dice.randrange(256)
        with contextlib.suppress(Unreadable):
            assert isinstance(peerwire.decode(bytes(raw)), msgspec.Struct)
