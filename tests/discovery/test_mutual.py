"""A door for holders of a certificate: strangers of every kind start nothing, hold nothing, and are in nobody's way."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from discovery.wire import door, mutual, roles, serve
from discovery.wire.blocking import BlockingCaller
from discovery.wire.contexts import client_context, server_context
from discovery.wire.door import Door
from discovery.wire.errors import ServiceError, Unauthorized, Unavailable
from discovery.wire.mutual import listen_mutual_tls
from hostd.authority import Authority
from hostd.remote import authorize

DEADLINE_S = 5.0


class Server:
    """A server in a thread; counts what got through."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.authority = authority
        self.folder = folder
        self.names: list[str] = []
        self.port = 0
        (folder / "ca.pem").write_bytes(authority.certificate.public_bytes(_PEM))
        (folder / "server.pem").write_bytes(authority.server(["127.0.0.1"]))
        self.context = server_context(folder / "ca.pem", folder / "server.pem")
        self.connections = lambda: 0

    async def _answer(self, call: serve.Call) -> None:
        self.names.append(roles.name_of(roles.certificate_of(call.raw.transport) or {}))

    async def run(self, ready: threading.Event, stop: asyncio.Event) -> None:
        def make_app(middleware: Any) -> web.Application:
            endpoints = [
                serve.Endpoint(method=method, path="/thing", handler=self._answer, summary="Count", request=None)
                for method in ("GET", "PUT")
            ]
            return serve.application("test", "1", endpoints, authorize, api_version=1, middlewares=[middleware])

        async with listen_mutual_tls(make_app, "127.0.0.1", 0, lambda: self.context) as self.port:
            ready.set()
            await stop.wait()

    def bundle(self, name: str = "alice", **more: Any) -> Path:
        path = self.folder / f"{name}.pem"
        path.write_bytes(self.authority.client(name, **more))
        return path

    def caller(self, bundle: Path, authority: Authority | None = None, host: str = "127.0.0.1") -> BlockingCaller:
        trusted = (authority or self.authority).certificate.public_bytes(_PEM).decode()
        context = client_context(str(bundle), str(bundle), trusted)
        return BlockingCaller(f"https://{host}:{self.port}", timeout_s=10, tls=context, prefix="/v1")

    def ask(self, bundle: Path, **more: Any) -> None:
        self.caller(bundle, **more).request("GET", "/thing")


def _encoding() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.PEM


_PEM = _encoding()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder, Authority.make())
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.run(ready, stop)))
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as made:
        yield made


def test_a_certificate_of_the_authority_gets_in_and_its_name_is_known(server: Server) -> None:
    server.ask(server.bundle("alice"))
    assert server.names == ["alice"]


def test_a_read_only_one_may_look_and_nothing_else(server: Server) -> None:
    caller = server.caller(server.bundle("bob", is_read_only=True))
    caller.request("GET", "/thing")
    with pytest.raises(Unauthorized, match="read-only"):
        caller.request("PUT", "/thing")
    assert len(server.names) == 1


def test_a_read_only_one_cannot_open_a_websocket(server: Server) -> None:
    bundle = server.bundle("bob", is_read_only=True)
    with server.caller(bundle).connect() as connection:
        connection.sendall(b"GET /thing HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nupgrade: websocket\r\n\r\n")
        assert b"401" in connection.recv(4096).splitlines()[0]
    assert server.names == []


NOW = datetime.now(UTC)


def stranger(server: Server, kind: str) -> Path:
    """Make the certificate that somebody shows who has no business here."""
    path = server.folder / "stranger.pem"
    if kind == "of another authority":
        path.write_bytes(Authority.make().client("alice"))
    elif kind == "expired":
        path.write_bytes(server.authority.client("alice", days=1, begin=NOW - timedelta(days=2)))
    elif kind == "not yet valid":
        path.write_bytes(server.authority.client("alice", begin=NOW + timedelta(days=1)))
    else:  # a server's certificate is not one for clients
        path.write_bytes(server.authority.server(["127.0.0.1"]))
    return path


@pytest.mark.parametrize("kind", ["of another authority", "expired", "not yet valid", "a server's"])
def test_a_wrong_certificate_is_refused(server: Server, kind: str) -> None:
    with pytest.raises((Unauthorized, Unavailable)) as refusal:
        server.ask(stranger(server, kind))
    assert "certificate" in refusal.value.hint
    assert server.names == []
    server.ask(server.bundle())


def test_no_certificate_is_refused(server: Server) -> None:
    context = ssl.create_default_context(cadata=server.authority.certificate.public_bytes(_PEM).decode())
    with pytest.raises((Unauthorized, Unavailable)):
        BlockingCaller(f"https://127.0.0.1:{server.port}", timeout_s=10, tls=context).request("GET", "/thing")
    assert server.names == []


def test_old_protocols_are_refused(server: Server) -> None:
    context = client_context(
        str(bundle := server.bundle()), str(bundle), server.authority.certificate.public_bytes(_PEM).decode()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", server.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_the_client_refuses_a_server_of_another_name_or_authority(server: Server) -> None:
    bundle = server.bundle()
    with pytest.raises(Unauthorized, match="localhost"):
        server.ask(bundle, host="localhost")
    with pytest.raises(Unauthorized):
        server.ask(bundle, authority=Authority.make())
    assert server.names == []


@pytest.mark.parametrize(
    "data", [b"GET /thing HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70000, bytes(range(256)) * 40]
)
def test_what_is_no_handshake_is_closed(server: Server, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        try:
            plain.sendall(data)
            while plain.recv(65536):
                pass
        except ConnectionError:
            pass
    assert server.names == []
    server.ask(server.bundle())


def test_hundreds_who_stand_at_the_door_are_in_nobodys_way(server: Server) -> None:
    bundle = server.bundle()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)) for _ in range(400)
        ]
        for one in crowd[::2]:
            one.sendall(b"\x16\x03\x01")  # begins a handshake and never goes on
        for _ in range(20):
            server.ask(bundle)
        closed = 0
        for one in crowd:
            one.settimeout(door.HANDSHAKE_S + 5)
            try:
                closed += one.recv(1) == b""
            except ConnectionError:
                closed += 1
        assert closed == len(crowd)  # the oldest at once, the others after HANDSHAKE_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB, both ends
    assert len(server.names) == 20


async def test_no_more_stand_at_a_door_than_may_however_many_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_S", 600.0)
    authority = Authority.make()
    (tmp_path / "ca.pem").write_bytes(authority.certificate.public_bytes(_PEM))
    (tmp_path / "server.pem").write_bytes(authority.server(["127.0.0.1"]))
    context = server_context(tmp_path / "ca.pem", tmp_path / "server.pem")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening, ExitStack() as stack:
        listening.setblocking(False)
        crowd = [stack.enter_context(socket.create_connection(listening.getsockname())) for _ in range(40)]
        for one in crowd:
            one.setblocking(False)
        async with asyncio.timeout(10 * DEADLINE_S), asyncio.TaskGroup() as group:
            serving = group.create_task(Door(listening, lambda: context, asyncio.Protocol, 8).serve())
            loop = asyncio.get_running_loop()
            for one in crowd[:32]:
                with suppress(ConnectionError):
                    assert await loop.sock_recv(one, 1) == b""  # the oldest, and at once
            for one in crowd[32:]:
                with pytest.raises(BlockingIOError):
                    one.recv(1)
            serving.cancel()
        for one in crowd[32:]:
            one.setblocking(True)
            one.settimeout(DEADLINE_S)
            with suppress(ConnectionError):
                assert one.recv(1) == b""


def test_a_connection_that_asks_nothing_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual, "FIRST_REQUEST_S", 0.3)
    bundle = server.bundle()
    with server.caller(bundle).connect() as idle, server.caller(bundle).connect() as slow:
        slow.sendall(b"GET /thing HTTP/1.1\r\nHost:")
        for one in (idle, slow):
            try:
                assert one.recv(1) == b""
            except (ConnectionError, ssl.SSLError):
                pass
    assert server.names == []


def test_one_that_has_asked_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual, "FIRST_REQUEST_S", 0.1)
    request = b"GET /v1/thing HTTP/1.1\r\nHost: x\r\n\r\n"
    with server.caller(server.bundle()).connect() as connection:
        connection.sendall(request)
        assert b"204" in connection.recv(4096)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        connection.sendall(request)
        assert b"204" in connection.recv(4096)


def test_beyond_the_most_connections_nobody_more_is_let_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual, "CONNECTIONS_MAX", 3)
    caller = server.caller(server.bundle())
    request = b"GET /v1/thing HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(caller.connect())
            connection.sendall(request)
            assert b"204" in connection.recv(4096)
        with pytest.raises((Unavailable, Unauthorized)):
            caller.request("GET", "/thing")
    assert len(server.names) == 3


def test_headers_and_bodies_are_bounded(server: Server) -> None:
    with server.caller(server.bundle()).connect() as connection:
        connection.sendall(b"GET /thing HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20000 + b"\r\n\r\n")
        assert b"400" in connection.recv(4096).splitlines()[0]
    assert server.names == []


def test_a_renewed_certificate_counts_from_the_next_handshake(server: Server) -> None:
    with server.caller(server.bundle()).connect() as before:
        assert isinstance(before, ssl.SSLSocket)
        (server.folder / "server.pem").write_bytes(server.authority.server(["127.0.0.1", "new.example"]))
        server.context.load_cert_chain(server.folder / "server.pem")
        with server.caller(server.bundle()).connect() as after:
            assert isinstance(after, ssl.SSLSocket)
            assert before.getpeercert(True) != after.getpeercert(True)


def test_every_path_is_there_with_and_without_version(server: Server) -> None:
    bundle = server.bundle()
    caller = server.caller(bundle)
    caller.prefix = ""
    caller.request("GET", "/thing")
    with pytest.raises(ServiceError, match="no endpoint GET /v2/thing"):
        caller.request("GET", "/v2/thing")
    with caller.connect() as connection:
        connection.sendall(b"GET /v1/ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"x-api-version: 1" in connection.recv(4096).lower()
