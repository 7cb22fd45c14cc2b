"""Bridge, veth, addresses, routes, tracked flows: the only importer of pyroute2, always through its asyncio class.

What every job costs (`add_veth`, `configure_inside`) is not said through pyroute2 but packed by `netns.rtnetlink`.

A veth is made with its far end straight inside the job's namespace, so it is never seen on the host, and the
bridge port is isolated (jobs talk only through the host, where the firewall sees them), in hairpin mode, and locked to
its own hardware address.
A veth is never deleted in a job's way (it waits 28 ms for RCU): the death of its namespace takes it along. That makes
who asks for one meanwhile wait for the kernel's lock, hence `connect` asks in a thread of this file.
Called by `hostd.runtime.network`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from errno import ENODEV, ENXIO
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import AsyncNFCTSocket, NFCTAttrTuple

from netns import rtnetlink
from netns.errors import KernelError

INNER_NAME = "eth0"


@dataclass(frozen=True, kw_only=True)
class Egress:
    """Where packets to everywhere leave: device, its MTU, and the address they leave from."""

    device: str
    mtu: int
    address: IPv4Address | None


@contextmanager
def _refusals(request: str, target: str) -> Iterator[None]:
    """Turn netlink's refusal into a `KernelError` that names what it was about."""
    try:
        yield
    except NetlinkError as error:
        raise KernelError(int(error.code), request, target) from error


def index_of(name: str) -> int:
    """Return a link's index, 0 when there is none of that name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def mac_of(address: IPv4Address) -> str:
    """Return the hardware address that belongs to an address for ever, so that no neighbour entry can be stale."""
    return _packed_mac(address).hex(":")


def _packed_mac(address: IPv4Address) -> bytes:
    return b"\x02\x64" + address.packed


class Links:
    """The links of the network namespace in which `open_links` was entered."""

    def __init__(self, route: Any, per_job: socket.socket, thread: ThreadPoolExecutor) -> None:
        self._route = route
        self._per_job = per_job
        self._thread = thread

    async def ensure_bridge(self, name: str, gateway: IPv4Interface, mtu: int) -> None:
        """Make the bridge with its address, or bring an existing one to that state.

        IPv6 is off on it: no rule of ours guards link-local addresses, so the host must not listen there.
        """
        with _refusals("RTM_NEWLINK", name):
            if not index_of(name):
                await self._route.link("add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
            index = index_of(name)
            _disable_ipv6(name)
            # An address of its own: by itself a bridge takes its ports' lowest, and jobs' neighbour entries go stale.
            if await self._mac(index) != mac_of(gateway.ip):  # setting even the same one forgets all neighbours
                await self._route.link("set", index=index, address=mac_of(gateway.ip))
            await self._route.link("set", index=index, mtu=mtu, state="up")
        with _refusals("RTM_NEWADDR", f"{gateway} on {name}"):
            await self._route.addr("replace", index=index, address=str(gateway.ip), prefixlen=gateway.network.prefixlen)
            for stale in await self._addresses(index):
                if stale != gateway:
                    await self._route.addr("del", index=index, address=str(stale.ip), prefixlen=stale.network.prefixlen)

    async def _mac(self, index: int) -> str:
        links = await self._route.link("get", index=index)
        return str(links[0].get("address"))

    async def _addresses(self, index: int) -> list[IPv4Interface]:
        found = [entry async for entry in await self._route.addr("dump", family=socket.AF_INET, index=index)]
        return [IPv4Interface(f"{entry.get('address')}/{entry['prefixlen']}") for entry in found]

    async def connect(
        self, name: str, bridge: str, netns_fd: int, netlink_fd: int, address: IPv4Interface, mtu: int
    ) -> None:
        """Make a veth into a namespace and set it up inside; the first host of the address's network is its router.

        Takes both fds over: they are closed afterwards, also on failure, and also if nobody waits any more.
        """

        def make() -> None:
            try:
                self.add_veth(name, bridge, netns_fd, address.ip, mtu)
            except BaseException:
                os.close(netlink_fd)
                raise
            finally:
                os.close(netns_fd)
            configure_inside(netlink_fd, address, address.network[1])

        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, make))

    def add_veth(self, name: str, bridge: str, netns_fd: int, address: IPv4Address, mtu: int) -> None:
        """Make a veth: `name` is a port of the bridge, its far end `eth0` in the namespace, to be configured there.

        The bridge and the host know both addresses for ever, so nothing that is sent can claim them for another.
        """
        if not (index := index_of(bridge)):
            raise KernelError(ENODEV, "RTM_NEWLINK", f"{name} on {bridge}")
        mac = _packed_mac(address)
        veth = rtnetlink.new_veth(name, index, mtu, INNER_NAME, mac, netns_fd)
        rtnetlink.exchange(self._per_job, [veth, rtnetlink.isolate_port(name)])
        pins = [rtnetlink.pin_sender(index_of(name), mac), rtnetlink.pin_neighbour(index, address, mac)]
        rtnetlink.exchange(self._per_job, pins)

    async def ports(self, bridge: str) -> frozenset[str]:
        """Return the names of all links that are ports of the bridge; none without a bridge."""
        if not (master := index_of(bridge)):
            return frozenset()
        found = [link async for link in await self._route.link("dump")]
        return frozenset(str(link.get("ifname")) for link in found if link.get("master") == master)

    async def remove(self, name: str) -> None:
        """Delete a link (slow: waits for RCU); one that is not there is fine."""
        if not (index := index_of(name)):
            return
        try:
            await self._route.link("del", index=index)
        except NetlinkError as error:
            if error.code not in (ENODEV, ENXIO):
                raise KernelError(int(error.code), "RTM_DELLINK", name) from error

    async def egress(self) -> Egress | None:
        """Return where the default route leads, `None` without one."""
        routes = [
            route
            async for route in await self._route.route("dump", family=socket.AF_INET, table=254)
            if route["dst_len"] == 0 and route.get("oif")
        ]
        if not routes:
            return None
        best = min(routes, key=lambda route: int(route.get("priority") or 0))
        index = int(best.get("oif"))
        links = await self._route.link("get", index=index)
        source = best.get("prefsrc")
        own = await self._addresses(index)
        address = IPv4Address(source) if source else (own[0].ip if own else None)
        return Egress(device=str(links[0].get("ifname")), mtu=int(links[0].get("mtu")), address=address)


@asynccontextmanager
async def open_links() -> AsyncIterator[Links]:
    """Speak to the network namespace of the calling thread."""
    async with AsyncIPRoute() as route:
        with rtnetlink.open_socket() as per_job, ThreadPoolExecutor(1, thread_name_prefix="netns-links") as thread:
            yield Links(route, per_job, thread)


def configure_inside(netlink_fd: int, address: IPv4Interface, gateway: IPv4Address) -> None:
    """Through a netlink socket that was opened inside a namespace: lo and eth0 up, address, default route.

    Takes the fd over: it is closed afterwards, also on failure.
    """
    with rtnetlink.open_socket(netlink_fd) as inner:
        up = [rtnetlink.raise_link("lo"), rtnetlink.raise_link(INNER_NAME), rtnetlink.get_link(INNER_NAME)]
        index = rtnetlink.index_in(rtnetlink.exchange(inner, up)[0])
        default = rtnetlink.new_default_route(index, gateway)
        rtnetlink.exchange(inner, [rtnetlink.new_address(index, address), default])


async def forget_udp_flows(number: int, address: IPv4Address) -> int:
    """Make the kernel forget the UDP flows that it translates to `address:number`; return how many there were.

    A client that keeps sending would otherwise be led to the dead job for ever. (TCP needs none of this: a job's
    end ends its connections.)
    """
    forgotten = 0
    async with AsyncNFCTSocket() as tracking:
        with _refusals("IPCTNL_MSG_CT_GET", f"udp port {number}"):
            wanted = NFCTAttrTuple(proto=socket.IPPROTO_UDP, dport=number)
            flows = [flow async for flow in await tracking.dump(tuple_orig=wanted)]
        for flow in flows:
            there = NFCTAttrTuple.from_netlink(socket.AF_INET, flow.get_attr("CTA_TUPLE_ORIG"))
            back = NFCTAttrTuple.from_netlink(socket.AF_INET, flow.get_attr("CTA_TUPLE_REPLY"))
            if there.dport == number and back.saddr == str(address):
                with suppress(NetlinkError):  # it ended by itself
                    await tracking.entry("del", tuple_orig=there)
                    forgotten += 1
    return forgotten


def _disable_ipv6(device: str) -> None:
    """Write the switch where the kernel has IPv6 at all."""
    switch = Path("/proc/sys/net/ipv6/conf") / device / "disable_ipv6"
    if switch.exists():
        switch.write_text("1")
