"""Connections between members: mutual TLS on one address, one connection per direction, nothing read from strangers.

Each member dials every other and sends on the connection that it made; on those that it accepted it
only listens. Both ends show a certificate of the cluster's authority whose organizational unit is
`discovery-member` and whose common name is the member's id; that is who a message is from. A
connection begins with `Hello` both ways. A frame is measured before it is kept, whoever sends what
is no message is disconnected, and who says nothing is, too. Strangers cost a socket and a
handshake of limited time, and are limited in number; the oldest goes first.

`raft` is the caller. Messages may be lost when a connection ends, never reordered within one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from discovery import peerwire
from discovery.peerwire import LENGTH, Hello, Message, Ping, Unreadable
from discovery.wire import clock, door, roles
from discovery.wire.door import Door

log = logging.getLogger(__name__)

CONNECT_S = 1.5
HANDSHAKES_MAX = 64
IDLE_S = 15.0
PING_S = 4.0
UNSENT_BYTES_MAX = 16 * 1024 * 1024
USER_TIMEOUT_MS = 2000
"""After this long without an acknowledgement from its kernel a peer is gone, and is dialled anew."""
STRANGERS_MAX = 8
_RETRY_S = 0.05
_RETRY_MAX_S = 0.5
_BACKLOG = 64


class Listener(Protocol):
    """Who is told what arrives; `raft.Member`."""

    def peer_connected(self, id: str, hello: Hello) -> None: ...

    def peer_disconnected(self, id: str) -> None: ...

    def peer_said(self, id: str, hello: Hello, message: Message) -> None: ...

    def own_hello(self) -> Hello: ...


@dataclass(frozen=True)
class Credentials:
    """Where the certificates are; read anew whenever the files have changed."""

    ca: Path
    certificate: Path
    key: Path

    def changed_ns(self) -> int:
        """Return a number that differs once a file was replaced."""
        return sum(path.stat().st_mtime_ns for path in (self.ca, self.certificate, self.key))

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        """Return the context of one end.

        Raises:
            OSError: a file is missing or does not parse.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the member's id in the certificate is what counts
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if is_server:
            context.num_tickets = 0
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context


def _member_of(transport: asyncio.BaseTransport) -> str:
    """Return the member's id in the certificate of the other end; empty: it is none of a member."""
    certificate = roles.certificate_of(transport) or {}
    return roles.name_of(certificate) if roles.unit_of(certificate) == roles.MEMBER else ""


class _Frames:
    """Cuts a stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes.

        Raises:
            Unreadable: the stream is none of ours.
        """
        buffer = self._buffer
        buffer += data
        found: list[Message] = []
        at = 0
        while len(buffer) - at >= 4:
            (length,) = LENGTH.unpack_from(buffer, at)
            if length > peerwire.FRAME_BYTES_MAX:
                raise Unreadable(f"a frame of {length} bytes")
            if len(buffer) - at - 4 < length:
                break
            found.append(peerwire.decode(bytes(buffer[at + 4 : at + 4 + length])))
            at += 4 + length
        if at:
            del buffer[:at]
        return found


class _Connection(asyncio.Protocol):
    """One end of a connection; says hello, and hands on what comes after the other's."""

    def __init__(self, peers: Peers, expected: str | None) -> None:
        self.peers = peers
        self.expected = expected
        self.id = ""
        self.hello: Hello | None = None
        self.transport: asyncio.Transport | None = None
        self.began_s = self.heard_s = self.said_s = clock.monotonic_s()
        self.closed = asyncio.get_running_loop().create_future()
        self._frames = _Frames()
        self._unsent: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.id = _member_of(transport)
        if not self.id or (self.expected is not None and self.id != self.expected):
            self.peers.complain(f"{_name(transport)} shows a certificate of {self.id or 'no member'}: refused")
            transport.abort()
            return
        if self.expected is None:
            self.peers.accepted(self)
        self.say(self.peers.listener.own_hello())

    def say(self, message: Message) -> bool:
        """Send a message with the others of this turn of the loop; tell whether there was room for it."""
        if self.transport is None or self.transport.is_closing():
            return False
        if self.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            return False
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        self._unsent.append(peerwire.encode(message))
        return True

    def flush(self) -> None:
        """Send what was said; by itself at the end of this turn of the loop."""
        unsent, self._unsent = self._unsent, []
        if not unsent:
            return
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(unsent) if len(unsent) > 1 else unsent[0])
            self.said_s = clock.monotonic_s()

    def data_received(self, data: bytes) -> None:
        self.heard_s = clock.monotonic_s()
        try:
            for message in self._frames.take(data):
                self._take(message)
        except Unreadable as error:
            self.peers.complain(f"{self.id} sent what is no message, and is disconnected: {error}")
            self.close()

    def _take(self, message: Message) -> None:
        if isinstance(message, Hello):
            if message.version != peerwire.VERSION:
                raise Unreadable(f"version {message.version}, this one speaks {peerwire.VERSION}")
            self.hello = message
            self.peers.greeted(self)
        elif self.hello is None:
            raise Unreadable("no hello")
        elif not isinstance(message, Ping) and self.expected is None:
            self.peers.listener.peer_said(self.id, self.hello, message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        self.peers.lost(self)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def _name(transport: asyncio.BaseTransport) -> str:
    name = transport.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if name else "a peer"


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT or [HOST]:PORT.

    Raises:
        ValueError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r}: HOST:PORT is wanted")
    return host.strip("[]"), int(port)


class Peers:
    """All connections of one member."""

    def __init__(self, address: str, credentials: Credentials, listener: Listener) -> None:
        self.listener = listener
        self._address = split_address(address)
        self._credentials = credentials
        self._changed_ns = 0
        self._wanted: dict[str, str] = {}
        self._strangers: dict[str, str] = {}
        self._complained_s = 0.0
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._outgoing: dict[str, _Connection] = {}
        self._incoming: dict[str, _Connection] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._load()

    # As Member calls it

    def send(self, id: str, message: Message) -> bool:
        """Send a message if the member is connected; it may still be lost."""
        connection = self._outgoing.get(id)
        return connection is not None and connection.hello is not None and connection.say(message)

    def flush(self) -> None:
        """Send now what was given to `send`."""
        for connection in self._outgoing.values():
            connection.flush()

    def is_connected(self, id: str) -> bool:
        connection = self._outgoing.get(id)
        return connection is not None and connection.hello is not None

    def greet_again(self) -> None:
        """Tell everybody who this member is now."""
        for connection in [*self._outgoing.values(), *self._incoming.values()]:
            connection.say(self.listener.own_hello())

    def want(self, addresses: dict[str, str]) -> None:
        """Be connected to these members, at these addresses (and to members of whom this one has not heard yet)."""
        self._strangers = {id: address for id, address in self._strangers.items() if id not in addresses}
        addresses = self._strangers | addresses
        for id in [id for id, address in self._wanted.items() if addresses.get(id) != address]:
            self._wanted.pop(id)
            if task := self._dialling.pop(id, None):
                task.cancel()
        for id, address in addresses.items():
            if id not in self._wanted:
                self._start(id, address)

    def _start(self, id: str, address: str) -> None:
        self._wanted[id] = address
        if self._tasks is not None:
            self._dialling[id] = self._tasks.create_task(self._dial(id, address))

    async def run(self) -> None:
        """Listen and keep the connections until cancelled.

        Raises:
            OSError: the address is taken, or not ours.
        """
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listening:
            listening.setblocking(False)
            try:
                async with asyncio.TaskGroup() as self._tasks:
                    for id, address in self._wanted.items():
                        self._dialling[id] = self._tasks.create_task(self._dial(id, address))
                    self._tasks.create_task(self._door(listening).serve())
                    await self._sweep()
            finally:
                self._tasks = None
                for connection in [*self._outgoing.values(), *self._incoming.values()]:
                    connection.close()

    # As connections call it

    def complain(self, text: str) -> None:
        """Write to the log about a stranger, but not more than once a second."""
        if clock.monotonic_s() > self._complained_s + 1.0:
            self._complained_s = clock.monotonic_s()
            log.warning("%s", text)

    def accepted(self, connection: _Connection) -> None:
        """Take an incoming connection for the only one of its member."""
        before = self._incoming.get(connection.id)
        self._incoming[connection.id] = connection
        if before is not None:
            before.close()

    def greeted(self, connection: _Connection) -> None:
        """Take note of who is there; a member of this cluster of whom we have not heard yet is dialled, too."""
        id, hello = connection.id, connection.hello
        if hello is None:
            return
        if self._outgoing.get(id) is connection:
            self.listener.peer_connected(id, hello)
        elif connection.expected is None and id not in self._wanted and hello.address:
            is_ours = hello.cluster_id == self.listener.own_hello().cluster_id != 0
            if is_ours and len(self._strangers) < STRANGERS_MAX:
                self._strangers[id] = hello.address
                self._start(id, hello.address)

    def lost(self, connection: _Connection) -> None:
        if self._incoming.get(connection.id) is connection:
            del self._incoming[connection.id]
        if self._outgoing.get(connection.id) is connection:
            del self._outgoing[connection.id]
            if connection.hello is not None:
                self.listener.peer_disconnected(connection.id)

    # Tasks

    def _load(self) -> None:
        """Read the certificates; a running member keeps the old ones if the new do not parse."""
        changed_ns = self._credentials.changed_ns()
        if changed_ns == self._changed_ns:
            return
        self._server, self._client = (self._credentials.context(is_server=is_server) for is_server in (True, False))
        self._changed_ns = changed_ns

    def _door(self, listening: socket.socket) -> Door:
        return Door(listening, lambda: self._server, lambda: _Connection(self, None), HANDSHAKES_MAX, tune=_tune)

    async def _dial(self, id: str, address: str) -> None:
        pause_s = _RETRY_S
        while True:
            began_s = clock.monotonic_s()
            try:
                await self._connect(id, address)
            except (OSError, TimeoutError, ValueError) as error:
                log.debug("%s at %s is not to be reached: %s", id, address, error)
            if clock.monotonic_s() - began_s > 5.0:
                pause_s = _RETRY_S
            await asyncio.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 — jitter
            pause_s = min(2 * pause_s, _RETRY_MAX_S)

    async def _connect(self, id: str, address: str) -> None:
        """Connect and stay until the connection is lost."""
        loop = asyncio.get_running_loop()
        connection = _Connection(self, id)
        made = await self._reach(address)
        try:
            async with asyncio.timeout(door.HANDSHAKE_S):
                await loop.create_connection(lambda: connection, sock=made, ssl=self._client, server_hostname="")
            if not connection.closed.done():
                self._outgoing[id] = connection
                if connection.hello is not None:
                    self.greeted(connection)
            await connection.closed
        finally:
            connection.close()
            if connection.transport is None:
                made.close()

    async def _reach(self, address: str) -> socket.socket:
        """Connect from our own address, in a short time: a lost packet is sent again after one second, then three."""
        host, port = split_address(address)
        made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            _tune(made)
            made.bind((self._address[0], 0))
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().sock_connect(made, (host, port))
        except BaseException:
            made.close()
            raise
        return made

    async def _sweep(self) -> None:
        """Close what is silent, say something where nothing is said, take renewed certificates."""
        while True:
            await asyncio.sleep(1.0)
            now = clock.monotonic_s()
            for connection in list(self._incoming.values()):
                limit_s = IDLE_S if connection.hello is not None else door.HANDSHAKE_S
                if now - connection.heard_s > limit_s:
                    log.info("%s was silent for %.0f s: disconnected", connection.id, now - connection.heard_s)
                    connection.close()
            for connection in list(self._outgoing.values()):
                if connection.hello is None and now - connection.began_s > door.HANDSHAKE_S:
                    connection.close()
                elif now - connection.said_s > PING_S:
                    connection.say(Ping())
            with contextlib.suppress(OSError):
                self._load()
