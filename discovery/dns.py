"""Answers DNS on the bridge: our names from the local directory, everything else through the machine's resolvers.

    SERVICE.discoverd              A, AAAA, SRV        every instance, shuffled
    leader.SERVICE.discoverd       A, AAAA, SRV        the leader
    _SERVICE._tcp.discoverd        SRV (A, AAAA)       RFC 2782
    ID.SERVICE._i.discoverd        A, AAAA, SRV        one instance

UDP and TCP, case does not matter, time to live 0 (instances move), ANY gives all there is. A name
that does not exist is NXDOMAIN, one without the type asked for an empty answer, both with the SOA.
What does not fit a UDP answer is cut to whole records with the TC flag. Forwarding tries the
machine's resolvers in order, each for `FORWARD_TIMEOUT_S`, and answers SERVFAIL when none does; a
bounded number at a time. Answers need no quorum. The daemon is the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdatatype import RdataType

from discovery.services import Directory
from discovery.types import Instance

log = logging.getLogger(__name__)

ZONE = dns.name.from_text("discoverd.")
FORWARD_TIMEOUT_S = 2.0
FORWARDS_MAX = 256
TCP_CONNECTIONS_MAX = 128
TCP_IDLE_S = 10.0
UDP_BYTES = 512
UDP_BYTES_MAX = 1232
"""The largest UDP answer that is sure to pass unfragmented (DNS flag day 2020)."""
BIND_RETRY_S = 1.0

Ask = Callable[[bytes, str, int], Awaitable[bytes]]

_SOA = "ns.discoverd. hostmaster.discoverd. 1 3600 600 86400 0"
_KINDS = (RdataType.A, RdataType.AAAA, RdataType.SRV)
_IP_FREEBIND = 15


class Resolvers:
    """The machine's name servers, read again when the file changes; never our own address."""

    def __init__(self, file: Path, own_address: str) -> None:
        self._file = file
        self._own_address = own_address
        self._stamp = 0.0
        self._servers: list[str] = []

    def servers(self) -> list[str]:
        """Return the addresses in the order of the file."""
        try:
            stamp = self._file.stat().st_mtime
            if stamp != self._stamp:
                self._servers = self._read()
                self._stamp = stamp
        except OSError:
            pass  # gone for now: those that we know may still answer
        return self._servers

    def _read(self) -> list[str]:
        found = []
        for line in self._file.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver" and words[1] != self._own_address:
                with contextlib.suppress(ValueError):
                    ipaddress.ip_address(words[1].partition("%")[0])
                    found.append(words[1])
        return found


class Answers:
    """Makes the answers to questions about our zone; pure but for the shuffling."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def answer(self, query: dns.message.Message) -> dns.message.Message:
        """Answer a query whose one question is about our zone."""
        question = query.question[0]
        response = dns.message.make_response(query, recursion_available=True)
        response.flags |= dns.flags.AA
        if question.name.canonicalize() == ZONE:
            self._answer_zone(response, question.rdtype)
            return response
        instances = self._find(question.name)
        if instances is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            self._add_instances(response, question.name, question.rdtype, instances)
        if not response.answer:
            response.authority.append(_rrset(ZONE, RdataType.SOA, [_SOA]))
        return response

    def _answer_zone(self, response: dns.message.Message, wanted: RdataType) -> None:
        soa = _rrset(ZONE, RdataType.SOA, [_SOA])
        if wanted in (RdataType.SOA, RdataType.ANY):
            response.answer.append(soa)
        else:
            response.authority.append(soa)

    def _find(self, name: dns.name.Name) -> list[Instance] | None:
        """Return the instances that a name stands for; `None` if there is no such name."""
        labels = [label.decode("ascii", "replace").lower() for label in name.relativize(ZONE).labels]
        match labels:
            case [service]:
                return self._of_service(service)
            case ["leader", service]:
                if self._directory.service(service) is None:
                    return None
                leader = self._directory.leader(service)
                return [leader] if leader is not None else []
            case [service, "_tcp" | "_udp" as protocol] if service.startswith("_"):
                found = self._of_service(service[1:])
                return found and [instance for instance in found if instance.protocol == protocol[1:]]
            case [id, service, "_i"]:
                instance = self._directory.instance(service, id)
                return [instance] if instance is not None else None
        return None

    def _of_service(self, service: str) -> list[Instance] | None:
        instances = self._directory.instances(service)
        if not instances and self._directory.service(service) is None:
            return None
        return random.sample(instances, len(instances))

    def _add_instances(
        self, response: dns.message.Message, name: dns.name.Name, wanted: RdataType, instances: list[Instance]
    ) -> None:
        for kind in _KINDS if wanted == RdataType.ANY else (wanted,):
            if kind == RdataType.SRV:
                _append(response.answer, _rrset(name, kind, [_srv(instance) for instance in instances]))
            elif kind in (RdataType.A, RdataType.AAAA):
                _append(response.answer, _rrset(name, kind, _hosts(instances, kind)))
        if wanted == RdataType.SRV:
            for instance in instances:
                for kind in (RdataType.A, RdataType.AAAA):
                    _append(response.additional, _rrset(_instance_name(instance), kind, _hosts([instance], kind)))


def _append(section: list[dns.rrset.RRset], rrset: dns.rrset.RRset) -> None:
    if len(rrset):
        section.append(rrset)


def _rrset(name: dns.name.Name, kind: RdataType, texts: Iterable[str]) -> dns.rrset.RRset:
    return dns.rrset.from_text_list(name, 0, dns.rdataclass.IN, kind, list(texts)) if texts else _empty(name, kind)


def _empty(name: dns.name.Name, kind: RdataType) -> dns.rrset.RRset:
    return dns.rrset.RRset(name, dns.rdataclass.IN, kind)


def _hosts(instances: list[Instance], kind: RdataType) -> list[str]:
    """Return the addresses of a family, each once: several instances share a host."""
    is_v6 = kind == RdataType.AAAA
    return list(dict.fromkeys(instance.host for instance in instances if (":" in instance.host) == is_v6))


def _instance_name(instance: Instance) -> dns.name.Name:
    return dns.name.from_text(f"{instance.id}.{instance.service}._i", ZONE)


def _srv(instance: Instance) -> str:
    return f"1 1 {instance.port} {_instance_name(instance)}"


class Server:
    """Serves one address on UDP and TCP."""

    def __init__(self, directory: Directory, resolvers: Resolvers, *, forward_port: int = 53) -> None:
        self._answers = Answers(directory)
        self._forward_port = forward_port
        self._resolvers = resolvers
        self._forwards = asyncio.Semaphore(FORWARDS_MAX)
        self._connections = 0
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, host: str, port: int, ready: asyncio.Event | None = None) -> None:
        """Serve until cancelled; the address may come into being later, and a taken one is tried again."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._tasks:
            udp, tcp = await _bind(host, port)
            transport, _ = await loop.create_datagram_endpoint(lambda: _Udp(self), sock=udp)
            try:
                server = await asyncio.start_server(self._on_connection, sock=tcp)
                async with server:
                    log.info("DNS on %s port %d", host, port)
                    if ready is not None:
                        ready.set()
                    await server.serve_forever()
            finally:
                transport.close()

    def on_datagram(self, raw: bytes, peer: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        """Answer at once what we know; start a task for what must be forwarded."""
        query = _parse(raw)
        if query is None:
            return
        if not isinstance(query, dns.message.Message):
            transport.sendto(query, peer)
        elif _is_ours(query):
            transport.sendto(self._local(query, is_udp=True), peer)
        elif self._tasks is not None and not self._forwards.locked():
            self._tasks.create_task(self._forward_datagram(raw, query, peer, transport))
        else:
            transport.sendto(_refusal(query, dns.rcode.SERVFAIL), peer)

    def _local(self, query: dns.message.Message, *, is_udp: bool) -> bytes:
        response = self._answers.answer(query)
        limit = 65535
        if is_udp:
            limit = min(max(query.payload, UDP_BYTES), UDP_BYTES_MAX) if query.edns >= 0 else UDP_BYTES
        return _fit(response, limit)

    async def _forward_datagram(
        self, raw: bytes, query: dns.message.Message, peer: tuple[str, int], transport: asyncio.DatagramTransport
    ) -> None:
        answer = await self._forward(raw, query, _ask_udp)
        if not transport.is_closing():
            transport.sendto(answer, peer)

    async def _forward(self, raw: bytes, query: dns.message.Message, ask: Ask) -> bytes:
        async with self._forwards:
            for server in self._resolvers.servers():
                try:
                    async with asyncio.timeout(FORWARD_TIMEOUT_S):
                        return await ask(raw, server, self._forward_port)
                except (OSError, TimeoutError, asyncio.IncompleteReadError):
                    continue
        return _refusal(query, dns.rcode.SERVFAIL)

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
            query = _parse(raw)
            if query is None:
                return
            if not isinstance(query, dns.message.Message):
                answer = query
            elif _is_ours(query):
                answer = self._local(query, is_udp=False)
            else:
                answer = await self._forward(raw, query, _ask_tcp)
            writer.write(struct.pack(">H", len(answer)) + answer)
            async with asyncio.timeout(TCP_IDLE_S):
                await writer.drain()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own datagram transport is no DatagramTransport to isinstance
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        try:
            self._server.on_datagram(data, addr, self._transport)
        except Exception:
            log.exception("a query from %s failed", addr)


def _parse(raw: bytes) -> dns.message.Message | bytes | None:
    """Return the query; or the refusal to send back; or `None` for what deserves no answer."""
    if len(raw) < 12 or raw[2] & 0x80:
        return None  # no header, or itself an answer: answering those makes loops
    try:
        query = dns.message.from_wire(raw)
    except (dns.exception.DNSException, ValueError, struct.error):
        return raw[:2] + struct.pack(">HHHHH", 0x8000 | dns.rcode.FORMERR, 0, 0, 0, 0)
    if query.opcode() != dns.opcode.QUERY:
        return _refusal(query, dns.rcode.NOTIMP)
    if len(query.question) != 1:
        return _refusal(query, dns.rcode.FORMERR)
    return query


def _refusal(query: dns.message.Message, code: dns.rcode.Rcode) -> bytes:
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(code)
    return response.to_wire()


def _is_ours(query: dns.message.Message) -> bool:
    return query.question[0].name.is_subdomain(ZONE)


def _fit(response: dns.message.Message, limit: int) -> bytes:
    """Write an answer of at most `limit` bytes: extras go first, then records from the end, with TC set."""
    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        response.additional.clear()
    while True:
        try:
            return response.to_wire(max_size=limit)
        except dns.exception.TooBig:
            response.flags |= dns.flags.TC
            last = response.answer[-1]
            keep = list(last)[: len(last) // 2]
            response.answer[-1:] = [dns.rrset.from_rdata_list(last.name, 0, keep)] if keep else []


class _Reply(asyncio.DatagramProtocol):
    """Waits for the one datagram that answers our question, and ignores others."""

    def __init__(self, raw: bytes) -> None:
        self._id = raw[:2]
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[:2] == self._id and len(data) >= 12 and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)
            self.answer.exception()  # retrieved here: the asker may have given up already


async def _ask_udp(raw: bytes, server: str, port: int) -> bytes:
    loop = asyncio.get_running_loop()
    own_id = random.SystemRandom().randbytes(2)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    transport, reply = await loop.create_datagram_endpoint(
        lambda: _Reply(own_id), remote_addr=(server, port), family=family
    )
    try:
        # A fresh port and a fresh id for each question: the client's own id would be easier to guess.
        transport.sendto(own_id + raw[2:])
        return raw[:2] + (await reply.answer)[2:]
    finally:
        transport.close()


async def _ask_tcp(raw: bytes, server: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(server, port)
    try:
        writer.write(struct.pack(">H", len(raw)) + raw)
        return await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0])
    finally:
        writer.close()


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
