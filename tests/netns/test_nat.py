from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from netns import namespaces, nat_legacy, sysctls
from netns.errors import KernelError, NatUnavailable
from netns.links import configure_inside, mac_of, open_links
from netns.nat import METADATA, Backend, Client, Nat, NatConfig, Publication, open_nat
from tests.netns import lab
from tests.pace import SLOWNESS

pytestmark = pytest.mark.needs_root

CONFIG = NatConfig(name="testnat", bridge="tnat0", subnet=IPv4Network("100.100.0.0/24"), flows_max=20)
GATEWAY = "100.100.0.1"


@pytest.fixture(params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "legacy" and not nat_legacy.is_installed():
        pytest.skip("needs python-iptables: pip install hostd[legacy]")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def outside() -> Iterator[lab.Outside]:
    with lab.node() as outside:
        yield outside


@pytest.fixture
def nat(outside: lab.Outside, backend: Backend) -> Iterator[Nat]:
    opened = open_nat(CONFIG, backend)
    yield opened
    opened.close()


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def rules() -> str:
    """Return all rules of both flavours in the node's namespace."""
    listed = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    for table in ("nat", "filter"):
        if shutil.which("iptables-legacy-save"):
            saved = subprocess.run(["iptables-legacy-save", "-t", table], capture_output=True, text=True, check=True)
            listed += "".join(line for line in saved.stdout.splitlines(True) if line.startswith(("-A", ":TESTNAT")))
    return listed


class Jobs:
    """Two jobs `a` (.2) and `b` (.3) on the bridge, with forwarding on."""

    def __init__(self) -> None:
        self.fds = {name: namespaces.create() for name in "ab"}

    async def connect(self) -> None:
        async with open_links() as links:
            await links.ensure_bridge("tnat0", IPv4Interface(f"{GATEWAY}/24"), 1400)
            for index, (name, fds) in enumerate(self.fds.items(), start=2):
                address = IPv4Address(f"100.100.0.{index}")
                links.add_veth(f"tnat0-{name}", "tnat0", fds.netns_fd, address, 1400)
                configure_inside(fds.netlink_fd, IPv4Interface(f"{address}/24"), IPv4Address(GATEWAY))
        sysctls.write("ipv4/ip_forward", "1")
        if sysctls.read("bridge/bridge-nf-call-iptables"):
            sysctls.write("bridge/bridge-nf-call-iptables", "0")

    def netns_fd(self, name: str) -> int:
        return self.fds[name].netns_fd


@pytest.fixture
async def jobs(nat: Nat) -> Jobs:
    made = Jobs()
    await made.connect()
    await nat.ensure_base()
    await nat.set_members([IPv4Address(lab.NODE), IPv4Address(lab.MEMBER)])
    return made


def published(job_id: str, number: int, *, is_public: bool = False, host: int = 2) -> Publication:
    return Publication(job_id=job_id, number=number, address=IPv4Address(f"100.100.0.{host}"), is_public=is_public)


async def test_ensure_and_remove_leave_no_rule(nat: Nat) -> None:
    before = rules()
    await nat.ensure_base()
    await nat.publish([published("job-a", 55000, is_public=True)])
    await nat.set_members([IPv4Address(lab.MEMBER)])
    assert rules() != before
    await nat.remove_all()
    assert rules() == before
    await nat.remove_all()


async def test_what_was_published_reads_back_and_survives_another_ensure(nat: Nat) -> None:
    wanted = (
        published("job-a", 55000),
        published("job-a", 55001, is_public=True),
        Publication(job_id="job-b", number=53, protocol="udp", address=IPv4Address("100.100.0.3")),
        Publication(job_id="router", number=80, is_public=True),
    )
    await nat.ensure_base()
    await nat.publish(wanted)
    await nat.publish(wanted[:1])
    await nat.set_members([IPv4Address(lab.MEMBER)])
    first = rules()
    await nat.ensure_base()
    assert rules() == first
    assert await nat.publications() == wanted
    assert await nat.members() == {IPv4Address(lab.MEMBER)}


async def test_unpublish_takes_only_that_jobs_ports_and_twice_is_fine(nat: Nat) -> None:
    await nat.ensure_base()
    await nat.publish([published("job-a", 55000, is_public=True), published("job-b", 55001)])
    await nat.unpublish("job-a")
    await nat.unpublish("job-a")
    await nat.unpublish("never-seen")
    assert await nat.publications() == (published("job-b", 55001),)


async def test_another_process_after_a_crash_can_unpublish(nat: Nat, backend: Backend) -> None:
    await nat.ensure_base()
    await nat.publish([published("job-a", 55000)])
    successor = open_nat(CONFIG, backend)
    await successor.ensure_base()
    await successor.unpublish("job-a")
    assert await nat.publications() == ()
    await nat.unpublish("job-a")
    successor.close()


async def test_rules_of_others_stay_and_base_comes_back_after_a_flush(nat: Nat, backend: Backend) -> None:
    await nat.ensure_base()
    if backend == "nft":
        run("nft add table ip foreign")
        run("nft flush chain ip testnat forwarding")
    else:
        run("iptables-legacy -w -A FORWARD -s 198.51.100.1 -j DROP")
        run("iptables-legacy -w -F TESTNAT-FORWARD")
    damaged = rules()
    await nat.ensure_base()
    assert len(rules()) > len(damaged)
    await nat.remove_all()
    assert ("table ip foreign" if backend == "nft" else "198.51.100.1") in rules()


async def test_both_backends_at_once_are_refused(nat: Nat, backend: Backend) -> None:
    if not nat_legacy.is_installed():
        pytest.skip("needs python-iptables: pip install hostd[legacy]")
    await nat.ensure_base()
    with pytest.raises(NatUnavailable, match="live"):
        open_nat(CONFIG, "legacy" if backend == "nft" else "nft")


async def test_a_port_is_never_published_to_two_addresses(nat: Nat, backend: Backend) -> None:
    if backend == "legacy":
        pytest.skip("legacy rules have no keys; NetworkStep's port pool guards them")
    await nat.ensure_base()
    await nat.publish([published("job-a", 55000)])
    with pytest.raises(KernelError) as refused:
        await nat.publish([published("job-b", 55001, host=3), published("job-b", 55000, host=3)])
    assert refused.value.name == "EEXIST"
    assert await nat.publications() == (published("job-a", 55000),)


async def test_the_host_and_jobs_reach_a_published_port_through_the_hosts_address(nat: Nat, jobs: Jobs) -> None:
    await nat.publish([published("job-a", 55000)])
    with lab.serve(55000, jobs.netns_fd("a")) as listener:
        lab.connect(lab.NODE, 55000).close()
        assert lab.peer_seen_by(listener) == lab.NODE
        lab.connect(lab.NODE, 55000, jobs.netns_fd("b")).close()
        assert lab.peer_seen_by(listener) == GATEWAY
        lab.connect(lab.NODE, 55000, jobs.netns_fd("a")).close()
        assert lab.peer_seen_by(listener) == GATEWAY


async def test_members_reach_a_published_port_and_strangers_only_a_public_one(
    nat: Nat, jobs: Jobs, outside: lab.Outside
) -> None:
    await nat.publish([published("job-a", 55000), published("job-a", 55001, is_public=True)])
    with lab.serve(55000, jobs.netns_fd("a")) as internal, lab.serve(55001, jobs.netns_fd("a")) as public:
        outside.connect(lab.NODE, 55000, lab.MEMBER).close()
        assert lab.peer_seen_by(internal) == lab.MEMBER
        outside.connect(lab.NODE, 55001, lab.STRANGER).close()
        assert lab.peer_seen_by(public) == lab.STRANGER
        with pytest.raises(TimeoutError):
            outside.connect(lab.NODE, 55000, lab.STRANGER, timeout_s=0.5)


async def test_ports_of_a_job_on_the_hosts_network_are_guarded_the_same_way(
    nat: Nat, jobs: Jobs, outside: lab.Outside
) -> None:
    await nat.publish(
        [Publication(job_id="router", number=80, is_public=True), Publication(job_id="router", number=1936)]
    )
    with lab.serve(80) as public, lab.serve(1936) as internal:
        outside.connect(lab.NODE, 80, lab.STRANGER).close()
        outside.connect(lab.NODE, 1936, lab.MEMBER).close()
        lab.connect(lab.NODE, 80, jobs.netns_fd("a")).close()
        lab.connect(lab.NODE, 1936).close()
        with pytest.raises(TimeoutError):
            outside.connect(lab.NODE, 1936, lab.STRANGER, timeout_s=0.5)
        assert lab.peer_seen_by(public) == lab.STRANGER
        assert lab.peer_seen_by(internal) == lab.MEMBER


async def test_a_job_cannot_reach_another_directly_nor_unpublished_ports_of_the_host(nat: Nat, jobs: Jobs) -> None:
    await nat.publish([published("job-a", 55000)])
    with lab.serve(55000, jobs.netns_fd("a")), lab.serve(8080, jobs.netns_fd("a")), lab.serve(9999):
        for port in (55000, 8080):
            with pytest.raises(OSError):
                lab.connect("100.100.0.2", port, jobs.netns_fd("b"), timeout_s=0.5)
        for address in (lab.NODE, GATEWAY):
            with pytest.raises(ConnectionRefusedError):
                lab.connect(address, 9999, jobs.netns_fd("b"))


async def test_a_stranger_cannot_route_into_the_subnet(nat: Nat, jobs: Jobs, outside: lab.Outside) -> None:
    with namespaces.inside(outside.netns_fd):
        lab.ip("route", "add", "100.100.0.0/24", "via", lab.NODE)
    with lab.serve(8080, jobs.netns_fd("a")), pytest.raises(TimeoutError):
        outside.connect("100.100.0.2", 8080, lab.MEMBER, timeout_s=0.5)


async def test_a_job_gets_out_masqueraded_and_asks_the_gateway_for_names(
    nat: Nat, jobs: Jobs, outside: lab.Outside
) -> None:
    with lab.serve(7000, outside.netns_fd) as beyond:
        lab.connect(lab.MEMBER, 7000, jobs.netns_fd("a")).close()
        assert lab.peer_seen_by(beyond) == lab.NODE
    with lab.serve(53, address=GATEWAY, is_udp=True) as names:
        with namespaces.inside(jobs.netns_fd("a")):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.sendto(b"who", (GATEWAY, 53))
            assert names.recvfrom(10)[0] == b"who"


async def test_metadata_is_for_those_alone_who_may_read_it(nat: Nat, jobs: Jobs, outside: lab.Outside) -> None:
    addresses = [str(IPv4Network(each)[-1] if each.endswith("/16") else IPv4Network(each)[0]) for each in METADATA]
    with namespaces.inside(outside.netns_fd):
        for address in addresses:
            lab.ip("addr", "add", f"{address}/32", "dev", "out0")
    reader = Client(address=IPv4Address("100.100.0.2"), reads_metadata=True)
    with lab.serve(80, outside.netns_fd):
        for clients in ([reader], []):
            await nat.set_clients(clients)
            await nat.ensure_base()  # keeps them
            for address in addresses:
                for name in "ab":
                    if clients and name == "a":
                        lab.connect(address, 80, jobs.netns_fd(name)).close()
                    else:
                        with pytest.raises(TimeoutError):
                            lab.connect(address, 80, jobs.netns_fd(name), timeout_s=0.3)


async def test_the_store_is_for_those_alone_who_are_granted_it(
    outside: lab.Outside, backend: Backend, jobs: Jobs
) -> None:
    config = replace(CONFIG, store=(IPv4Address(GATEWAY), 1111))
    nat = open_nat(config, backend)
    client = Client(address=IPv4Address("100.100.0.2"), reaches_store=True)
    try:
        await nat.ensure_base()
        with lab.serve(1111), lab.serve(1112):
            for clients in ([client], []):
                await nat.set_clients(clients)
                await nat.ensure_base()  # keeps them
                for name in "ab":
                    for address, port in ((GATEWAY, 1111), (lab.NODE, 1111), (GATEWAY, 1112)):
                        if clients and name == "a" and (address, port) == (GATEWAY, 1111):
                            lab.connect(address, port, jobs.netns_fd(name)).close()
                        else:
                            with pytest.raises(ConnectionRefusedError):
                                lab.connect(address, port, jobs.netns_fd(name))
    finally:
        nat.close()


async def test_the_gateways_address_is_for_jobs_and_the_host_alone(nat: Nat, outside: lab.Outside, jobs: Jobs) -> None:
    with namespaces.inside(outside.netns_fd):
        lab.ip("route", "add", "100.100.0.0/24", "via", lab.NODE)
    with lab.serve(53):
        lab.connect(GATEWAY, 53, jobs.netns_fd("a")).close()
        lab.connect(GATEWAY, 53).close()
        outside.connect(lab.NODE, 53, lab.MEMBER).close()
        with pytest.raises(TimeoutError):
            outside.connect(GATEWAY, 53, lab.MEMBER, timeout_s=0.5)


async def test_jobs_do_not_reach_other_members_apis(outside: lab.Outside, backend: Backend, jobs: Jobs) -> None:
    nat = open_nat(replace(CONFIG, guarded_ports=(1111, 1113)), backend)
    try:
        await nat.ensure_base()
        with lab.serve(1111, outside.netns_fd), lab.serve(1113, outside.netns_fd), lab.serve(80, outside.netns_fd):
            for members in ([IPv4Address(lab.MEMBER)], []):
                await nat.set_members(members)
                await nat.ensure_base()  # keeps them
                lab.connect(lab.MEMBER, 80, jobs.netns_fd("a")).close()
                lab.connect(lab.MEMBER, 1111).close()  # the host itself does
                for port in (1111, 1113):
                    if members:
                        with pytest.raises(ConnectionRefusedError):
                            lab.connect(lab.MEMBER, port, jobs.netns_fd("a"))
                    else:
                        lab.connect(lab.MEMBER, port, jobs.netns_fd("a")).close()
    finally:
        nat.close()


async def test_a_sender_that_is_pinned_has_one_address(nat: Nat, jobs: Jobs, outside: lab.Outside) -> None:
    own, other = IPv4Address("100.100.0.2"), "100.100.0.77"
    with namespaces.inside(jobs.netns_fd("a")):
        lab.ip("addr", "add", f"{other}/32", "dev", "eth0")

    def send(source: str, to: str, port: int) -> None:
        with namespaces.inside(jobs.netns_fd("a")), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((source, 0))
            client.sendto(source.encode(), (to, port))

    with lab.serve(7000, outside.netns_fd, is_udp=True) as beyond, lab.serve(53, address=GATEWAY, is_udp=True) as names:
        for is_pinned in (False, True):
            await nat.set_clients([Client(address=own, mac=mac_of(own))] if is_pinned else [])
            for listener, to, port in ((beyond, lab.MEMBER, 7000), (names, GATEWAY, 53)):
                for source in (other, str(own)):
                    send(source, to, port)
                heard = [listener.recv(20).decode() for _ in range(1 if is_pinned else 2)]
                assert heard == ([str(own)] if is_pinned else [other, str(own)])


async def test_one_jobs_flows_are_bounded_and_do_not_touch_anothers(nat: Nat, jobs: Jobs, outside: lab.Outside) -> None:
    held = []
    with lab.serve(7000, outside.netns_fd) as beyond:
        beyond.listen(128)
        for _ in range(CONFIG.flows_max):
            held.append(lab.connect(lab.MEMBER, 7000, jobs.netns_fd("a")))
        with pytest.raises(TimeoutError):
            lab.connect(lab.MEMBER, 7000, jobs.netns_fd("a"), timeout_s=0.5)
        lab.connect(lab.MEMBER, 7000, jobs.netns_fd("b")).close()
        for connection in held:
            connection.close()


async def test_udp_is_published_too(nat: Nat, jobs: Jobs, outside: lab.Outside) -> None:
    await nat.publish(
        [Publication(job_id="job-a", number=5353, protocol="udp", address=IPv4Address("100.100.0.2"), is_public=True)]
    )
    with namespaces.inside(outside.netns_fd):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client, lab.serve(5353, jobs.netns_fd("a"), is_udp=True) as listener:
        client.settimeout(3)
        client.sendto(b"ping", (lab.NODE, 5353))
        question, peer = listener.recvfrom(10)
        listener.sendto(question + b"-pong", peer)
        assert client.recvfrom(20) == (b"ping-pong", (lab.NODE, 5353))


async def test_legacy_keeps_every_rule_while_another_program_changes_the_tables(outside: lab.Outside) -> None:
    if not nat_legacy.is_installed():
        pytest.skip("needs python-iptables: pip install hostd[legacy]")
    nat = open_nat(CONFIG, "legacy")
    await nat.ensure_base()
    script = "for i in $(seq 40); do iptables-legacy -w -t nat -A INPUT -s 198.51.100.$i -j ACCEPT || exit 1; done"
    other = await asyncio.create_subprocess_exec("sh", "-c", script)
    wanted = tuple(published("job-a", 55000 + index) for index in range(40))
    for publication in wanted:
        await nat.publish([publication])
    assert await asyncio.wait_for(other.wait(), 30 * SLOWNESS) == 0
    assert await nat.publications() == wanted
    assert rules().count("198.51.100.") == 40
    nat.close()


def test_auto_follows_the_machines_iptables(
    outside: lab.Outside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "iptables"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for flavour, expected in (("nf_tables", "nft"), ("legacy", "legacy")):
        if expected == "legacy" and not nat_legacy.is_installed():
            continue
        program.write_text(f"#!/bin/sh\necho 'iptables v1.8.9 ({flavour})'\n")
        program.chmod(0o755)
        opened = open_nat(CONFIG)
        assert opened.backend == expected
        opened.close()


def test_values_that_could_carry_a_rule_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError):
        Publication(job_id='x" } ; flush ruleset', number=1)
    with pytest.raises(ValueError):
        NatConfig(name="a b", bridge="x", subnet=IPv4Network("10.0.0.0/24"))
