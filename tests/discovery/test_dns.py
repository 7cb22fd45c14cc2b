"""DNS: our names from the directory, the rest forwarded; real queries over UDP and TCP."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from discovery import answers, client, resolvers
from discovery import dns as our_dns
from discovery.daemon import Daemon
from discovery.dns import Server
from discovery.resolvers import Resolvers
from discovery.services import Directory
from discovery.state import State
from discovery.types import Instance, Service
from discovery.wire.errors import Unavailable
from tests.discovery.conftest import DEADLINE_S

HOST = "127.0.0.1"


def free_port() -> int:
    """Return a port that nobody has, neither for UDP nor for TCP."""
    while True:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other,
        ):
            one.bind((HOST, 0))
            try:
                other.bind(one.getsockname())
            except OSError:
                continue
            return int(one.getsockname()[1])


@asynccontextmanager
async def serving(directory: Directory, resolv_conf: Path, forward_port: int = 53) -> AsyncIterator[int]:
    port, ready = free_port(), asyncio.Event()
    server = Server(directory, Resolvers(resolv_conf, HOST, port=forward_port))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(server.run(HOST, port, ready))
        async with asyncio.timeout(DEADLINE_S):
            await ready.wait()
        yield port
        running.cancel()


@pytest.fixture
async def port(daemon: Daemon, tmp_path: Path) -> AsyncIterator[int]:
    (tmp_path / "resolv.conf").write_text("search example.test\n")
    services = daemon.services
    for id, host, number in (("h1-1", "10.0.0.1", 1), ("h1-2", "10.0.0.1", 2), ("h2-1", "10.0.0.2", 1)):
        await services.register(Instance(id=id, service="web", host=host, port=number), 0)
    await services.register(Instance(id="six", service="v6", host="fd00::1", port=6), 0)
    await services.create(Service(name="empty"))
    async with serving(daemon.directory, tmp_path / "resolv.conf") as port:
        yield port


async def ask(port: int, name: str, kind: str = "A", *, is_tcp: bool = False, **options: int) -> dns.message.Message:
    query = dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]
    send = dns.asyncquery.tcp if is_tcp else dns.asyncquery.udp
    return await send(query, HOST, timeout=DEADLINE_S, port=port)


def texts(message: dns.message.Message) -> list[str]:
    return sorted(record.to_text() for rrset in message.answer for record in rrset)


async def test_a_service_has_each_host_once(port: int) -> None:
    for is_tcp in (False, True):
        answer = await ask(port, "web.discoverd", is_tcp=is_tcp)
        assert texts(answer) == ["10.0.0.1", "10.0.0.2"]
        assert answer.flags & dns.flags.AA
        assert answer.answer[0].ttl == 0


async def test_srv_names_instances_that_resolve(port: int) -> None:
    for name in ("web.discoverd", "_web._tcp.discoverd"):
        answer = await ask(port, name, "SRV")
        wanted = [f"1 1 {p} {id}.web._i.discoverd." for id, p in (("h1-1", 1), ("h1-2", 2), ("h2-1", 1))]
        assert texts(answer) == sorted(wanted)
        assert len(answer.additional) == 3
    assert texts(await ask(port, "h2-1.web._i.discoverd")) == ["10.0.0.2"]
    assert texts(await ask(port, "_web._udp.discoverd", "SRV")) == []


async def test_the_leader_is_the_oldest(port: int, daemon: Daemon) -> None:
    assert texts(await ask(port, "leader.web.discoverd", "SRV")) == ["1 1 1 h1-1.web._i.discoverd."]
    await daemon.services.deregister("web", "h1-1")
    assert texts(await ask(port, "leader.web.discoverd", "SRV")) == ["1 1 2 h1-2.web._i.discoverd."]


async def test_families_any_and_case(port: int) -> None:
    assert texts(await ask(port, "v6.discoverd", "AAAA")) == ["fd00::1"]
    nothing = await ask(port, "v6.discoverd", "A")
    assert (nothing.rcode(), nothing.answer) == (dns.rcode.NOERROR, [])
    assert nothing.authority[0].rdtype == dns.rdatatype.SOA
    assert len(texts(await ask(port, "web.discoverd", "ANY"))) == 5
    answer = await ask(port, "WeB.DiscoverD")
    assert texts(answer) == ["10.0.0.1", "10.0.0.2"]
    assert answer.question[0].name.to_text() == "WeB.DiscoverD."


@pytest.mark.parametrize(
    "name", ["nosuch", "leader.nosuch", "_nosuch._tcp", "x.web._i", "a.b.c", "web.web", "_web._sctp", "_web"]
)
async def test_unknown_names_do_not_exist(port: int, name: str) -> None:
    answer = await ask(port, f"{name}.discoverd")
    assert answer.rcode() == dns.rcode.NXDOMAIN
    assert answer.authority[0].rdtype == dns.rdatatype.SOA


async def test_an_empty_service_and_the_zone_exist(port: int) -> None:
    for name in ("empty.discoverd", "leader.empty.discoverd", "discoverd"):
        answer = await ask(port, name)
        assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
        assert answer.authority[0].rdtype == dns.rdatatype.SOA
    assert len(texts(await ask(port, "discoverd", "SOA"))) == 1


async def test_what_does_not_fit_is_cut_and_whole_over_tcp(port: int, daemon: Daemon) -> None:
    for number in range(200):
        one = Instance(id=f"i{number}", service="big", host=f"10.1.0.{number}", port=1)
        await daemon.services.register(one, 0)
    small = await ask(port, "big.discoverd")
    assert small.flags & dns.flags.TC
    assert 1 <= len(texts(small)) <= 30
    assert len(small.to_wire()) <= 512
    larger = await ask(port, "big.discoverd", use_edns=0, payload=4096)
    assert len(larger.to_wire()) <= answers.UDP_BYTES_MAX
    assert len(texts(larger)) > len(texts(small))
    for kind in ("A", "SRV"):
        assert len(texts(await ask(port, "big.discoverd", kind, is_tcp=True))) == 200


async def test_names_with_nothing_but_names_below_are_no_errors(port: int) -> None:
    """A resolver that asks label by label (RFC 9156) would stop at NXDOMAIN."""
    for name in ("_i", "_tcp", "_udp", "leader", "web._i"):
        answer = await ask(port, f"{name}.discoverd")
        assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, []), name
        assert answer.authority[0].rdtype == dns.rdatatype.SOA


async def test_what_is_not_served_is_said(port: int) -> None:
    assert (await ask(port, "web.discoverd", "AXFR")).rcode() == dns.rcode.REFUSED
    assert (await ask(port, "web.discoverd", "A", rdclass=3)).rcode() == dns.rcode.REFUSED
    assert (await ask(port, "web.discoverd", "A", use_edns=1)).rcode() == dns.rcode.BADVERS
    answer = await ask(port, "web.discoverd", "A", use_edns=0)
    assert (answer.edns, answer.payload) == (0, answers.UDP_BYTES_MAX)
    assert (await ask(port, "web.discoverd", "A")).edns == -1


def by_kind(message: dns.message.Message) -> list[dns.rrset.RRset]:
    return sorted(message.answer, key=lambda rrset: rrset.rdtype)


async def test_kept_answers_are_those_that_would_be_written(daemon: Daemon, port: int) -> None:
    """Whatever is asked the second time is as the first time but for the order, the id and the case."""
    names = "web v6 empty nosuch other leader.web _web._tcp h1-1.web._i x.web._i _i a.b.c".split()
    fresh = answers.Answers(daemon.directory)
    kept = answers.Answers(daemon.directory)
    for name in names:
        for kind in ("A", "AAAA", "SRV", "ANY", "TXT", "SOA", "HTTPS"):
            for options in ({}, {"use_edns": 0, "payload": 1400}, {"use_edns": 0, "want_dnssec": True}):
                for shown in (name, name.upper(), name.capitalize()):
                    query = dns.message.make_query(f"{shown}.Discoverd", kind, **options)  # type: ignore[arg-type]
                    raw = query.to_wire()
                    wanted = dns.message.from_wire(fresh.answer(raw, query, is_udp=True))
                    got = dns.message.from_wire(kept.quick(raw, is_udp=True) or kept.answer(raw, query, is_udp=True))
                    assert query.is_response(got)
                    assert (got.rcode(), got.flags, got.edns) == (wanted.rcode(), wanted.flags, wanted.edns)
                    assert got.question[0].name.labels == query.question[0].name.labels
                    assert got.authority == wanted.authority
                    assert by_kind(got) == by_kind(wanted)
                    assert sorted(map(str, got.additional)) == sorted(map(str, wanted.additional))


async def test_kept_answers_follow_every_change(port: int, daemon: Daemon) -> None:
    async def many(name: str, kind: str = "A") -> set[str]:
        return {text for _ in range(8) for text in texts(await ask(port, name, kind))}

    assert await many("web.discoverd") == {"10.0.0.1", "10.0.0.2"}
    assert await many("leader.web.discoverd") == {"10.0.0.1"}
    for id in ("h1-1", "h1-2"):
        await daemon.services.deregister("web", id)
    assert await many("web.discoverd") == await many("leader.web.discoverd") == {"10.0.0.2"}
    assert await many("late.discoverd") == set()
    await daemon.services.register(Instance(id="a", service="late", host="10.0.0.9", port=1), 0)
    assert await many("late.discoverd") == {"10.0.0.9"}
    await daemon.services.remove("late")
    assert (await ask(port, "late.discoverd")).rcode() == dns.rcode.NXDOMAIN


async def test_everybody_of_a_cut_answer_gets_its_turn(daemon: Daemon, port: int) -> None:
    for number in range(60):
        await daemon.services.register(Instance(id=f"i{number}", service="big", host=f"10.1.0.{number}", port=1), 0)
    seen: set[str] = set()
    async with asyncio.timeout(DEADLINE_S):
        while len(seen) < 60:
            seen.update(texts(await ask(port, "big.discoverd")))


async def test_what_is_kept_is_bounded(port: int, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEPT_MAX", 10)
    kept = answers.Answers(daemon.directory)
    for number in range(100):
        query = dns.message.make_query("web.discoverd", dns.rdatatype.RdataType(number + 1), use_edns=0)
        kept.answer(query.to_wire(), query, is_udp=True)
        query = dns.message.make_query("x" * (number % 60 + 1) + ".y.discoverd", "A", use_edns=0, payload=600 + number)
        kept.answer(query.to_wire(), query, is_udp=True)
    assert max(len(kept._kept), len(kept._absent), sum(map(len, kept._keys_of.values()))) <= 10


async def test_garbage_never_stops_the_server(port: int) -> None:
    dice = random.Random(5)
    valid = dns.message.make_query("web.discoverd", "A").to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _ in range(500):
            one.sendto(dice.randbytes(dice.randrange(600)), (HOST, port))
            raw = bytearray(valid)
            raw[dice.randrange(len(raw))] = dice.randrange(256)
            one.sendto(raw, (HOST, port))
            await asyncio.sleep(0)  # the server shares our loop: let it read, or the kernel drops
    for length in (b"\x00\x00", b"\x00\x05hello", b"\xff\xff"):
        _, writer = await asyncio.open_connection(HOST, port)
        writer.write(length)
        writer.close()
    assert len(texts(await ask(port, "web.discoverd"))) == 2


@dataclass
class Upstream(asyncio.DatagramProtocol):
    """A resolver of the machine, that answers everything with one address."""

    address: str
    code: int = 0
    asked: list[str] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def answer(self, raw: bytes) -> bytes:
        query = dns.message.from_wire(raw)
        self.asked.append(query.question[0].name.to_text())
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.Rcode(self.code))
        response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", self.address))
        return response.to_wire()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(self.answer(data), addr)  # type: ignore[attr-defined]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = self.answer(await reader.readexactly(int.from_bytes(await reader.readexactly(2))))
        writer.write(len(raw).to_bytes(2) + raw)
        writer.close()


async def test_other_names_go_to_the_machines_resolvers_in_order(tmp_path: Path) -> None:
    forward_port = free_port()
    upstream = Upstream("192.0.2.7")
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: upstream, local_addr=("127.0.0.3", forward_port))
    tcp = await asyncio.start_server(upstream.serve, "127.0.0.3", forward_port)
    conf = tmp_path / "resolv.conf"
    # ourselves (would loop), one where nobody listens, the one that answers
    conf.write_text(f"nameserver {HOST}\nnameserver 127.0.0.2\nnameserver nonsense\nnameserver 127.0.0.3\n")
    async with serving(Directory(State()), conf, forward_port) as port:
        for is_tcp in (False, True):
            assert texts(await ask(port, "example.test", is_tcp=is_tcp)) == ["192.0.2.7"]
        assert (await ask(port, "nosuch.discoverd")).rcode() == dns.rcode.NXDOMAIN
        assert upstream.asked == ["example.test."] * 2
        conf.write_text("nameserver 127.0.0.2\n")
        os.utime(conf, (1, 1))
        assert (await ask(port, "example.test")).rcode() == dns.rcode.SERVFAIL
        conf.unlink()
        assert (await ask(port, "example.test")).rcode() == dns.rcode.SERVFAIL
    transport.close()
    tcp.close()


async def test_a_resolver_that_fails_or_is_silent_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolvers, "FORWARD_TIMEOUT_S", 0.3)
    forward_port = free_port()
    failing, good = Upstream("192.0.2.1", code=dns.rcode.SERVFAIL), Upstream("192.0.2.7")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.2", forward_port))
        first, _ = await loop.create_datagram_endpoint(lambda: failing, local_addr=("127.0.0.3", forward_port))
        second, _ = await loop.create_datagram_endpoint(lambda: good, local_addr=("127.0.0.4", forward_port))
        conf = tmp_path / "resolv.conf"
        conf.write_text("".join(f"nameserver 127.0.0.{n}\n" for n in (2, 3, 4)))
        async with serving(Directory(State()), conf, forward_port) as port:
            assert texts(await ask(port, "example.test")) == ["192.0.2.7"]
            silent.setblocking(False)
            assert silent.recv(600)
            assert texts(await ask(port, "example.test")) == ["192.0.2.7"]
            with pytest.raises(BlockingIOError):
                silent.recv(600)
            second.close()
            assert (await ask(port, "example.test")).rcode() == dns.rcode.SERVFAIL
        first.close()


async def test_the_address_may_come_into_being_later(tmp_path: Path) -> None:
    """The bridge that has it is made by hostd, which may start after us."""
    udp, tcp = await our_dns._bind("203.0.113.77", free_port())
    udp.close()
    tcp.close()


async def test_a_taken_address_is_taken_when_it_becomes_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(our_dns, "BIND_RETRY_S", 0.02)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((HOST, 0))
        port = holder.getsockname()[1]
        binding = asyncio.ensure_future(our_dns._bind(HOST, port))
        async with asyncio.timeout(DEADLINE_S):
            while "cannot take" not in caplog.text:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(DEADLINE_S):
        for one in await binding:
            one.close()


async def test_resolve_finds_what_is_registered(port: int, daemon: Daemon) -> None:
    found = await client.resolve("web", nameserver=HOST, port=port)
    assert sorted(found) == [("10.0.0.1", 1), ("10.0.0.1", 2), ("10.0.0.2", 1)]
    assert await client.resolve("v6", nameserver=HOST, port=port) == [("fd00::1", 6)]
    for number in range(8):  # their names fit into a datagram, their addresses do not
        one = Instance(id=f"h1-5500{number}", service="eight", host="10.1.0.1", port=number + 1)
        await daemon.services.register(one, 0)
    assert len(await client.resolve("eight", nameserver=HOST, port=port)) == 8
    assert await client.resolve("empty", nameserver=HOST, port=port) == []
    assert await client.resolve("nosuch", nameserver=HOST, port=port) == []
    for number in range(100):
        one = Instance(id=f"i{number}", service="big", host=f"10.1.0.{number}", port=1)
        await daemon.services.register(one, 0)
    assert len(await client.resolve("big", nameserver=HOST, port=port)) == 100
    with pytest.raises(Unavailable):
        await client.resolve("web", nameserver=HOST, port=free_port(), timeout_s=0.3)
