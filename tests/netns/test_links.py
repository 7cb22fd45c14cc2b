from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest

from netns import namespaces, sysctls
from netns.errors import KernelError
from netns.links import configure_inside, index_of, mac_of, open_links
from tests.netns import lab

pytestmark = pytest.mark.needs_root

GATEWAY = IPv4Interface("100.100.0.1/24")
JOB = IPv4Address("100.100.0.2")


@pytest.fixture(autouse=True)
def outside() -> Iterator[lab.Outside]:
    with lab.node() as outside:
        yield outside


def shown(*arguments: str) -> Any:
    return json.loads(lab.ip("-j", "-d", *arguments))


async def test_a_bridge_is_brought_to_its_wanted_state_again_and_again() -> None:
    async with open_links() as links:
        await links.ensure_bridge("tbr0", IPv4Interface("10.9.9.1/24"), 1500)
        for _ in range(2):
            await links.ensure_bridge("tbr0", GATEWAY, 1400)
        (link,) = shown("addr", "show", "dev", "tbr0")
        assert link["mtu"] == 1400
        assert "UP" in link["flags"]
        assert [a["local"] for a in link["addr_info"] if a["family"] == "inet"] == ["100.100.0.1"]
        if (off := sysctls.read("ipv6/conf/tbr0/disable_ipv6")) is not None:
            assert off == "1"
        await links.remove("tbr0")
        await links.remove("tbr0")
        assert not index_of("tbr0")


def bridge(*arguments: str) -> None:
    subprocess.run(["bridge", *arguments], check=True)


def empty_datagram(source: IPv4Address, to: IPv4Address) -> bytes:
    """Write an IP header of protocol UDP, with its checksum."""
    words = struct.unpack("!10H", bytes.fromhex("450000140000000040110000") + source.packed + to.packed)
    total = sum(words)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return struct.pack("!10H", *words[:5], checksum, *words[6:])


async def test_a_veth_is_isolated_hairpin_and_dies_with_its_namespace() -> None:
    made = namespaces.create()
    async with open_links() as links:
        await links.ensure_bridge("tbr0", GATEWAY, 1400)
        links.add_veth("tbr0-a", "tbr0", made.netns_fd, JOB, 1400)
        configure_inside(made.netlink_fd, IPv4Interface(f"{JOB}/24"), GATEWAY.ip)
        (port,) = shown("link", "show", "dev", "tbr0-a")
        assert port["linkinfo"]["info_slave_data"]["isolated"]
        assert port["linkinfo"]["info_slave_data"]["hairpin"]
        assert port["linkinfo"]["info_slave_data"]["locked"]
        assert not any(port["linkinfo"]["info_slave_data"][f"{kind}flood"] for kind in ("", "mcast_", "bcast_"))
        assert await links.ports("tbr0") == {"tbr0-a"}
        await links.ensure_bridge("tbr0", GATEWAY, 1400)
        (neighbour,) = shown("neigh", "show", "dev", "tbr0")
        assert (neighbour["dst"], neighbour["lladdr"], neighbour["state"]) == (str(JOB), mac_of(JOB), ["PERMANENT"])
        assert shown("link", "show", "dev", "tbr0")[0]["address"] == mac_of(GATEWAY.ip)
        with namespaces.inside(made.netns_fd):
            (inner,) = shown("addr", "show", "dev", "eth0")
            assert (inner["address"], inner["mtu"]) == (mac_of(JOB), 1400)
            assert shown("route", "show", "default")[0]["gateway"] == "100.100.0.1"
            assert "UP" in shown("link", "show", "dev", "lo")[0]["flags"]
        namespaces.close(made.netns_fd)
        await lab.until(lambda: not index_of("tbr0-a"))


async def test_a_job_sees_no_frame_that_is_for_another_and_can_send_none_in_its_name() -> None:
    a, b = namespaces.create(), namespaces.create()
    there = {"a": JOB, "b": JOB + 1}
    async with open_links() as links:
        await links.ensure_bridge("tbr0", GATEWAY, 1400)
        for (name, address), made in zip(there.items(), (a, b), strict=True):
            links.add_veth(f"tbr0-{name}", "tbr0", made.netns_fd, address, 1400)
            configure_inside(made.netlink_fd, IPv4Interface(f"{address}/24"), GATEWAY.ip)
            await lab.until(lambda name=name: shown("link", "show", "dev", f"tbr0-{name}")[0]["operstate"] == "UP")  # type: ignore[misc]
        with namespaces.inside(a.netns_fd):
            ears = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
            ears.bind(("eth0", 0))
            ears.setsockopt(263, 1, struct.pack("iHH8x", socket.if_nametoindex("eth0"), 1, 0))  # promiscuous
        ears.settimeout(3)

        def first_heard() -> str:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for address in (there["b"], there["a"]):
                    sender.sendto(b"x", (str(address), 9))
            while True:
                frame = ears.recv(2048)
                if frame[23] == 17:
                    return str(IPv4Address(frame[30:34]))

        assert first_heard() == str(there["a"])
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as host:
            host.bind(("tbr0", 0))
            host.settimeout(3)
            for claimed in (there["b"], there["a"]):  # the second is true, and the first to arrive
                macs = bytes.fromhex((mac_of(GATEWAY.ip) + mac_of(claimed)).replace(":", ""))
                ears.send(macs + b"\x08\0" + empty_datagram(claimed, GATEWAY.ip))
            frames = iter(lambda: host.recv(2048), b"")
            assert next(frame for frame in frames if frame[23] == 17)[26:30] == there["a"].packed
        # and these protections are what does it:
        bridge("fdb", "del", mac_of(there["b"]), "dev", "tbr0-b", "master")
        bridge("link", "set", "dev", "tbr0-a", "flood", "on")
        assert first_heard() == str(there["b"])
        ears.close()
    for made in (a, b):
        namespaces.close(made.netns_fd)


async def test_a_refusal_names_the_link() -> None:
    made = namespaces.create()
    async with open_links() as links:
        await links.ensure_bridge("tbr0", GATEWAY, 1400)
        links.add_veth("tbr0-a", "tbr0", made.netns_fd, JOB, 1400)
        with pytest.raises(KernelError, match="tbr0-a") as refused:
            links.add_veth("tbr0-a", "tbr0", made.netns_fd, JOB, 1400)
        assert refused.value.name == "EEXIST"
        with pytest.raises(KernelError, match="no-bridge"):
            links.add_veth("tbr0-b", "no-bridge", made.netns_fd, JOB, 1400)
        with pytest.raises(KernelError, match="default via"):
            configure_inside(os.dup(made.netlink_fd), IPv4Interface(f"{JOB}/24"), IPv4Address("10.9.9.9"))
        other = namespaces.create()
        links.add_veth("tbr0-b", "tbr0", other.netns_fd, JOB + 1, 1400)  # what was refused is not in the way
        assert await links.ports("tbr0") == {"tbr0-a", "tbr0-b"}
        for fd in other:
            namespaces.close(fd)
    for fd in made:
        namespaces.close(fd)


async def test_egress_is_where_the_default_route_leads() -> None:
    async with open_links() as links:
        egress = await links.egress()
        assert egress is not None
        assert (egress.device, egress.mtu, str(egress.address)) == ("up0", 1400, lab.NODE)
        lab.ip("route", "del", "default")
        assert await links.egress() is None


def test_sysctls_remember_what_was_and_restore_it(tmp_path: Path) -> None:
    memory = tmp_path / "run" / "network.json"
    before = sysctls.read("ipv4/ip_forward"), sysctls.read("ipv4/ip_local_reserved_ports")
    sysctls.write("ipv4/ip_local_reserved_ports", "8080")
    wanted = {
        "ipv4/ip_forward": sysctls.to("1"),
        "ipv4/ip_local_reserved_ports": sysctls.including("55000-65535"),
        "ipv4/no_such_switch": sysctls.to("1"),
    }
    for _ in range(2):
        in_force = sysctls.ensure(wanted, memory)
        assert in_force == {"ipv4/ip_forward": "1", "ipv4/ip_local_reserved_ports": "8080,55000-65535"}
        assert sysctls.ensure({}, memory) == {}
    sysctls.restore(memory)
    sysctls.restore(memory)
    assert (sysctls.read("ipv4/ip_forward"), sysctls.read("ipv4/ip_local_reserved_ports")) == (before[0], "8080")
    assert not memory.exists()


def test_namespaces_are_told_apart() -> None:
    made = namespaces.create()
    own = namespaces.current()
    assert namespaces.identity(made.netns_fd) != namespaces.identity(own)
    with namespaces.inside(made.netns_fd):
        inner = namespaces.current()
    assert namespaces.identity(inner) == namespaces.identity(made.netns_fd)
    for fd in (*made, own, inner):
        namespaces.close(fd)
