"""Answers DNS on every host: our names from the local directory, everything else through the machine's resolvers.

UDP and TCP. What our names mean is in `answers`, how others are forwarded in `resolvers`; both need no
quorum. Forwards are bounded in number, and answered SERVFAIL when no resolver answers. Refused are
other opcodes, EDNS versions that are not made yet, and zone transfers. The daemon is the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode

from discovery.answers import UDP_BYTES_MAX, Answers, is_ours
from discovery.resolvers import Resolvers
from discovery.services import Directory

log = logging.getLogger(__name__)

FORWARDS_MAX = 256
TCP_CONNECTIONS_MAX = 128
TCP_IDLE_S = 10.0
BIND_RETRY_S = 1.0
_QUERY_BYTES_MAX = 4096
_DATAGRAMS_A_TURN = 64
"""So many are answered before the loop may turn to others: a flood must not stop the store."""
_IP_FREEBIND = 15
_SO_RCVBUFFORCE = 33
_WAITING_BYTES = 4 * 1024 * 1024
"""Of questions that the kernel keeps while the store is busy: by default hardly three hundred."""


class Server:
    """Serves one address on UDP and TCP."""

    def __init__(self, directory: Directory, resolvers: Resolvers, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Make it; until `is_ready`, nothing is said about our names, not even that there are none."""
        self._answers = Answers(directory)
        self._is_ready = is_ready
        self._resolvers = resolvers
        self._forwards = asyncio.Semaphore(FORWARDS_MAX)
        self._connections = 0
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, host: str, port: int, ready: asyncio.Event | None = None) -> None:
        """Serve until cancelled; the address may come into being later, and a taken one is tried again."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._tasks:
            udp, tcp = await _bind(host, port)
            with udp:
                server = await asyncio.start_server(self._on_connection, sock=tcp)
                loop.add_reader(udp, self._on_readable, udp)
                try:
                    async with server:
                        log.info("DNS on %s port %d", host, udp.getsockname()[1])
                        if ready is not None:
                            ready.set()
                        await server.serve_forever()
                finally:
                    loop.remove_reader(udp)

    def _on_readable(self, udp: socket.socket) -> None:
        for _ in range(_DATAGRAMS_A_TURN):
            try:
                raw, peer = udp.recvfrom(_QUERY_BYTES_MAX)
            except OSError:  # there is none, or the kernel tells of an answer that did not arrive
                return
            try:
                self._on_datagram(raw, peer, udp)
            except Exception:
                log.exception("a query from %s failed", peer)

    def _on_datagram(self, raw: bytes, peer: tuple[str, int], udp: socket.socket) -> None:
        """Answer at once what we know; start a task for what must be forwarded."""
        if len(raw) < 12 or raw[2] & 0x80:
            return  # no header, or itself an answer: answering those makes loops
        answer = self._answers.quick(raw, is_udp=True)
        if answer is None:
            query = _parse(raw)
            if isinstance(query, bytes):
                answer = query
            elif is_ours(query):
                answer = self._answer(raw, query, is_udp=True)
            elif self._tasks is not None and not self._forwards.locked():
                self._tasks.create_task(self._forward_datagram(raw, query, peer, udp))
                return
            else:
                answer = _refusal(query, dns.rcode.SERVFAIL)
        _send(udp, answer, peer)

    def _answer(self, raw: bytes, query: dns.message.Message, *, is_udp: bool) -> bytes:
        if not self._is_ready():
            return _refusal(query, dns.rcode.SERVFAIL)
        return self._answers.answer(raw, query, is_udp=is_udp)

    async def _forward_datagram(
        self, raw: bytes, query: dns.message.Message, peer: tuple[str, int], udp: socket.socket
    ) -> None:
        answer = await self._forward(raw, query, is_udp=True)
        _send(udp, answer, peer)

    async def _forward(self, raw: bytes, query: dns.message.Message, *, is_udp: bool) -> bytes:
        async with self._forwards:
            return await self._resolvers.ask(raw, is_udp=is_udp) or _refusal(query, dns.rcode.SERVFAIL)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= TCP_CONNECTIONS_MAX:
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    await self._serve_stream(reader, writer)
        finally:
            self._connections -= 1
            writer.close()

    async def _serve_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(TCP_IDLE_S):
                raw = await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0])
            if len(raw) < 12 or raw[2] & 0x80:
                return
            answer = self._answers.quick(raw, is_udp=False)
            if answer is None:
                query = _parse(raw)
                if isinstance(query, bytes):
                    answer = query
                elif is_ours(query):
                    answer = self._answer(raw, query, is_udp=False)
                else:
                    answer = await self._forward(raw, query, is_udp=False)
            writer.write(struct.pack(">H", len(answer)) + answer)
            async with asyncio.timeout(TCP_IDLE_S):
                await writer.drain()


def _send(udp: socket.socket, answer: bytes, peer: tuple[str, int]) -> None:
    """Send what the kernel takes: a client that asks faster than it reads must ask again."""
    with contextlib.suppress(OSError):
        udp.sendto(answer, peer)


def _parse(raw: bytes) -> dns.message.Message | bytes:
    """Return the query, or the refusal to send back."""
    try:
        query = dns.message.from_wire(raw)
    except (dns.exception.DNSException, ValueError, struct.error):
        return raw[:2] + struct.pack(">HHHHH", 0x8000 | dns.rcode.FORMERR, 0, 0, 0, 0)
    if query.opcode() != dns.opcode.QUERY:
        return _refusal(query, dns.rcode.NOTIMP)
    if len(query.question) != 1:
        return _refusal(query, dns.rcode.FORMERR)
    if query.edns > 0:
        return _refusal(query, dns.rcode.BADVERS)
    return query


def _refusal(query: dns.message.Message, code: dns.rcode.Rcode) -> bytes:
    response = dns.message.make_response(query, recursion_available=True, our_payload=UDP_BYTES_MAX)
    response.set_rcode(code)
    return response.to_wire()


async def _bind(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Take the address, also before the bridge that will have it exists; wait while somebody else holds it."""
    has_said = False
    while True:
        sockets = []
        try:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind | socket.SOCK_NONBLOCK)
                sockets.append(one)
                one.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
                with contextlib.suppress(OSError):  # without root it stays as it is
                    one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _WAITING_BYTES)
                if kind == socket.SOCK_STREAM:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((host, port or sockets[0].getsockname()[1]))
            return sockets[0], sockets[1]
        except OSError as error:
            for one in sockets:
                one.close()
            if not has_said:
                log.error("DNS cannot take %s port %d yet: %s", host, port, error)
                has_said = True
            await asyncio.sleep(BIND_RETRY_S)
