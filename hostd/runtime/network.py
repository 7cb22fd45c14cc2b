"""Launch step two: give a job its network, taken from a small pool of ready namespaces.

Owns the node's bridge, subnet, port numbers and NAT rules. Refuses numbers that somebody holds. Nothing above
`netns` learns how it is done. Called by `hostd.runtime.launch` (apply, undo) and `hostd.daemon`
(prepare, reconcile, run, set_members, teardown).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from discovery.wire.clock import monotonic_s
from discovery.wire.errors import Unavailable
from hostd.errors import HostFull, PortTaken
from hostd.types import Port
from netns import nat_legacy, nat_nft, sysctls
from netns.addresses import AddressPool, PortPool
from netns.errors import Exhausted, KernelError, Taken
from netns.links import Links, forget_udp_flows, mac_of, open_links
from netns.nat import Client, Nat, NatConfig, Publication, open_nat

_log = logging.getLogger(__name__)

_COMPARE_INTERVAL_S = {"nft": 10.0, "legacy": 60.0}  # comparing costs 10 ms, with legacy 100
_SWEEP_INTERVAL_S = 60.0  # naming all links costs 20 ms with 500 jobs, and strangers only waste memory
_VANISH_TIMEOUT_S = 2.0
_DEFAULT_MTU = 1500
_ENDED_MAX = 64
"""So many namespaces of ended jobs may wait to be dropped; a job that ends then drops its own."""


class Listed(Protocol):
    """What the spawner holds, as far as this step asks."""

    @property
    def netns(self) -> tuple[str, ...]: ...


class NamespaceSource(Protocol):
    """Who makes network namespaces: the spawner (`hostd.runtime.process.Spawner`)."""

    async def create_netns(self, name: str, uid_base: int = 0) -> tuple[int, int]:
        """Return (namespace fd, NETLINK_ROUTE SOCK_DGRAM socket fd opened inside it); the caller closes both."""

    async def drop_netns(self, name: str) -> None:
        """Forget a namespace; an unknown name is fine. It dies with its last process."""

    async def list(self) -> Listed:
        """Say what is held."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that tells one node's network from another's. `mtu=0` takes that of the default route's device.

    `store` is where this host's store is for jobs that are granted some of it, `guarded_ports` are those of other
    hosts that no job may reach.

    `state_file` remembers the sysctls as they were before us; it should live as long as a boot does
    (`run_dir/network.json`).
    """

    bridge: str
    subnet: IPv4Network
    host_ip: IPv4Address
    nat_name: str
    state_file: Path
    nat_backend: Literal["auto", "nft", "legacy"] = "auto"
    port_low: int = 55000
    port_high: int = 65535
    pool_size: int = 4
    mtu: int = 0
    store: tuple[IPv4Address, int] | None = None
    guarded_ports: tuple[int, ...] = ()

    @property
    def gateway(self) -> IPv4Interface:
        """The bridge's own address."""
        return IPv4Interface(f"{self.subnet[1]}/{self.subnet.prefixlen}")

    @property
    def nat(self) -> NatConfig:
        return NatConfig(
            name=self.nat_name,
            bridge=self.bridge,
            subnet=self.subnet,
            store=self.store,
            guarded_ports=self.guarded_ports,
        )

    @property
    def link_prefix(self) -> str:
        """What the names of our veths and namespaces begin with; 8 more characters make a link name's 15."""
        return f"{self.bridge[:6]}-"


class NetworkState(msgspec.Struct, frozen=True, kw_only=True):
    """What a job got; goes into hostd's store. `netns_name` is None on the host's network.

    `ip` is where the job's ports are reached from this host (the host's own address on the host's network);
    `numbers` are the published ports in the spec's order, `ports` that part of the spec. `is_pinned`: the job can write
    any packet, so the firewall holds it to its address.
    """

    netns_name: str | None
    ip: str
    numbers: tuple[int, ...]
    ports: tuple[Port, ...] = ()
    reaches_metadata: bool = False
    is_pinned: bool = False
    reaches_store: bool = False

    def client(self) -> Client | None:
        """Return what is to be special for this job's address, if anything is."""
        if not self.netns_name or not (self.reaches_metadata or self.is_pinned or self.reaches_store):
            return None
        address = IPv4Address(self.ip)
        mac = mac_of(address) if self.is_pinned else ""
        return Client(address=address, reads_metadata=self.reaches_metadata, reaches_store=self.reaches_store, mac=mac)

    def publications(self, job_id: str) -> tuple[Publication, ...]:
        """Return what has to be published for this job."""
        address = IPv4Address(self.ip) if self.netns_name else None
        return tuple(
            Publication(job_id=job_id, number=number, protocol=port.protocol, address=address, is_public=port.is_public)
            for port, number in zip(self.ports, self.numbers, strict=True)
        )


@dataclass(frozen=True)
class _Ready:
    """A namespace with its veth up and its address set; both ends bear the same name."""

    name: str
    address: IPv4Address


class NetworkStep:
    """The network of this node's jobs."""

    def __init__(self, config: NetworkConfig, namespaces: NamespaceSource) -> None:
        self.config = config
        self.namespaces = namespaces
        self._addresses = AddressPool(config.subnet, start=secrets.randbelow(config.subnet.num_addresses))
        self._ports = PortPool(config.port_low, config.port_high)
        self._jobs: dict[str, NetworkState] = {}
        self._pool: deque[_Ready] = deque()
        self._ended: deque[_Ready] = deque()
        self._is_kept = False
        self._is_low = asyncio.Event()
        self._members: frozenset[IPv4Address] = frozenset((config.host_ip,))
        self._mtu = config.mtu
        self._strangers: frozenset[str] = frozenset()
        self._being_made: set[str] = set()
        self._open = AsyncExitStack()
        self._nat: Nat | None = None
        self._links: Links | None = None

    @property
    def gateway(self) -> IPv4Address:
        """The bridge's address: the jobs' router and name server."""
        return self.config.gateway.ip

    @property
    def backend(self) -> str:
        """`nft` or `legacy`."""
        return self._opened[1].backend

    @property
    def _opened(self) -> tuple[Links, Nat]:
        if self._links is None or self._nat is None:
            raise Unavailable("the host's network is not up yet")
        return self._links, self._nat

    async def prepare(self) -> None:
        """Bring up rules, bridge and sysctls, in this order, so that nothing is forwarded unguarded.

        Called once at start, before anything else; may be called again.

        Raises:
            NatUnavailable, KernelError
        """
        if self._nat is None:
            self._nat = open_nat(self.config.nat, self.config.nat_backend)
            self._open.callback(self._nat.close)
        if self._links is None:
            self._links = await self._open.enter_async_context(open_links())
        if not self._mtu:
            egress = await self._links.egress()
            self._mtu = egress.mtu if egress else _DEFAULT_MTU
        await self._ensure()

    async def _ensure(self) -> None:
        """Bring the kernel's state to ours: skeleton, members, publications, bridge, sysctls."""
        links, nat = self._opened
        await nat.ensure_base()
        if await nat.members() != self._members:
            await nat.set_members(self._members)
        await self._ensure_published(nat)
        await self._set_clients(nat)
        await links.ensure_bridge(self.config.bridge, self.config.gateway, self._mtu)
        sysctls.ensure(_wanted_sysctls(self.config), self.config.state_file)

    async def _set_clients(self, nat: Nat) -> None:
        await nat.set_clients(client for state in self._jobs.values() if (client := state.client()))

    async def _ensure_published(self, nat: Nat) -> None:
        present = frozenset(await nat.publications())
        if missing := [p for p in self._wanted() if p not in present]:
            _log.warning("publishing %d ports again that were gone from the rules", len(missing))
            await nat.publish(missing)

    def _wanted(self) -> list[Publication]:
        """Return what has to be published; a shared number in the name of the job that came last."""
        every = (p for job_id, state in list(self._jobs.items()) for p in state.publications(job_id))
        return list({(p.protocol, p.number): p for p in every}.values())

    async def reconcile(self, known: Mapping[str, NetworkState]) -> None:
        """Take over the jobs that live on after a restart; remove every rule, veth and namespace of nobody."""
        _, nat = self._opened
        for job_id, state in known.items():
            self._adopt(job_id, state)
        await self._set_clients(nat)
        await self._unpublish_strangers()
        await self._ensure_published(nat)
        held = [name for name in (await self.namespaces.list()).netns if name.startswith(self.config.link_prefix)]
        self._forget([ready for ready in self._pool if ready.name not in held])
        for name in set(held) - self._names():
            await self.namespaces.drop_netns(name)

    def forget_pool(self) -> None:
        """Hand out none of the ready namespaces any more: whoever kept them is no more."""
        self._forget(list(self._pool))

    def _forget(self, gone: Iterable[_Ready]) -> None:
        for ready in gone:
            self._pool.remove(ready)
            self._addresses.give_back(ready.address)
        self._is_low.set()

    async def _unpublish_strangers(self) -> None:
        _, nat = self._opened
        for job_id in {p.job_id for p in await nat.publications()} - set(self._jobs):
            await nat.unpublish(job_id)

    def _adopt(self, job_id: str, state: NetworkState) -> None:
        if job_id in self._jobs:
            return
        shared = {port.number for port in state.ports if port.is_shared}
        for number in state.numbers:
            self._ports.take(number, job_id, is_shared=number in shared)
        if state.netns_name:
            self._addresses.take(IPv4Address(state.ip))
        self._jobs[job_id] = state

    def _names(self) -> set[str]:
        """Return the names of all veths and namespaces that somebody needs."""
        of_jobs = {state.netns_name for state in self._jobs.values() if state.netns_name}
        return of_jobs | {ready.name for ready in self._pool} | self._being_made

    async def run(self) -> None:
        """Keep the pool filled and the kernel as wanted, for ever; a task of the daemon's group."""
        self._is_kept = True
        try:
            await self._keep()
        finally:
            self._is_kept = False

    async def _keep(self) -> None:
        interval_s = _COMPARE_INTERVAL_S[self.backend]
        compared_at = swept_at = monotonic_s()
        self._is_low.set()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._is_low.wait()
            self._is_low.clear()
            try:
                await self._drop_ended()
                await self._fill()
                if monotonic_s() - compared_at >= interval_s:
                    compared_at = monotonic_s()
                    await self._ensure()
                    await self._unpublish_strangers()
                    if compared_at - swept_at >= _SWEEP_INTERVAL_S:
                        swept_at = compared_at
                        await self._sweep()
            except Exception:  # noqa: BLE001 — one loop turn: the next one tries again
                _log.exception("keeping the network in order failed; next try in %s s", interval_s)

    async def _drop_ended(self) -> None:
        """Drop the namespaces of ended jobs; their addresses are free from then on."""
        while self._ended:
            ended = self._ended.popleft()
            try:
                await self.namespaces.drop_netns(ended.name)
            except BaseException:
                self._ended.appendleft(ended)
                raise
            self._addresses.give_back(ended.address)

    async def _fill(self) -> None:
        while len(self._pool) < self.config.pool_size:
            try:
                self._pool.append(await self._make())
            except HostFull:  # every address is in use: jobs that end refill the pool
                return

    async def _sweep(self) -> None:
        """Remove veths that belong to nobody in two turns running (a namespace's death takes a moment)."""
        links, _ = self._opened
        named = {name for _, name in socket.if_nameindex() if name.startswith(self.config.link_prefix)}
        strangers = named - self._names()
        if strangers:  # only then: asking which links are the bridge's own costs 0.5 ms of CPU a link
            strangers &= await links.ports(self.config.bridge)
        for name in strangers & self._strangers:
            _log.warning("removing link %s that belongs to no job", name)
            await links.remove(name)
        self._strangers = frozenset(strangers)

    async def _make(self, uid_base: int = 0) -> _Ready:
        """Make a namespace with an address, connected to the bridge; the user namespace of `uid_base` owns it."""
        links, _ = self._opened
        try:
            address = self._addresses.take_next()
        except Exhausted:
            await self._drop_ended()
            try:
                address = self._addresses.take_next()
            except Exhausted as error:
                raise HostFull(str(error), hint="stop jobs, or give the host a larger subnet") from error
        ready = _Ready(self.config.link_prefix + secrets.token_hex(4), address)
        self._being_made.add(ready.name)
        try:
            await self._connect(links, ready, uid_base)
        except BaseException:
            self._addresses.give_back(address)
            await self.namespaces.drop_netns(ready.name)
            raise
        finally:
            self._being_made.discard(ready.name)
        return ready

    async def _connect(self, links: Links, ready: _Ready, uid_base: int) -> None:
        netns_fd, netlink_fd = await self.namespaces.create_netns(ready.name, uid_base)
        address = IPv4Interface(f"{ready.address}/{self.config.subnet.prefixlen}")
        await links.connect(ready.name, self.config.bridge, netns_fd, netlink_fd, address, self._mtu)

    async def apply(
        self,
        job_id: str,
        ports: tuple[Port, ...],
        has_host_network: bool,
        *,
        reaches_metadata: bool = False,
        reaches_store: bool = False,
        has_power: bool = False,
        uid_base: int = 0,
    ) -> NetworkState:
        """Give the job a namespace, an address and its published ports.

        `has_power`: the job has capabilities over its network, so the namespace must belong to its user namespace
        (that of `uid_base`, 0 = the host's). It is made for this job then, which takes longer than one of the pool.

        Raises:
            PortTaken: a number asked for belongs to a job or a process of the host.
            HostFull: no address or port is left.
            KernelError
        """
        _, nat = self._opened
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} has a network already")
        try:
            numbers = self._take_numbers(job_id, ports)
            ready = None if has_host_network else await self._take_ready(uid_base if has_power else 0)
            state = NetworkState(
                netns_name=ready.name if ready else None,
                ip=str(ready.address if ready else self.config.host_ip),
                numbers=numbers,
                ports=ports,
                reaches_metadata=reaches_metadata,
                reaches_store=reaches_store,
                is_pinned=has_power,
            )
            self._jobs[job_id] = state
            if state.client() is not None:
                await self._repaired(lambda: self._set_clients(nat))
            await self._repaired(lambda: nat.publish(state.publications(job_id)))
        except BaseException:
            await self.undo(job_id)
            raise
        return state

    async def _take_ready(self, uid_base: int) -> _Ready:
        if uid_base:
            return await self._make(uid_base)
        self._is_low.set()
        return self._pool.popleft() if self._pool else await self._make()

    def _take_numbers(self, job_id: str, ports: tuple[Port, ...]) -> tuple[int, ...]:
        """Take the numbers asked for first, so that no automatic one is in their way."""
        for port in ports:
            if port.number:
                self._take_number(job_id, port)
        return tuple(port.number or self._take_lowest(job_id, port) for port in ports)

    def _take_number(self, job_id: str, port: Port) -> None:
        try:
            is_alone = self._ports.take(port.number, job_id, is_shared=port.is_shared)
        except Taken as error:
            raise PortTaken(f"port {port.number} is taken by another job", number=port.number) from error
        if is_alone and not _is_free(port.number, port.protocol):
            raise PortTaken(
                f"port {port.number} of this host is taken by a process that is no job",
                hint=f"see who: ss -lnp 'sport = :{port.number}'",
                number=port.number,
            )

    def _take_lowest(self, job_id: str, port: Port) -> int:
        """Take the lowest number that neither a job nor a process of the host has."""
        busy: frozenset[int] = frozenset()
        while True:
            try:
                number = self._ports.take_lowest(job_id, skip=busy)
            except Exhausted as error:
                raise HostFull(str(error)) from error
            if _is_free(number, port.protocol):
                return number
            self._ports.release(number)
            busy |= {number}

    async def undo(self, job_id: str) -> None:
        """Take all back from the id alone; may be called twice, or without apply."""
        _, nat = self._opened
        state = self._jobs.pop(job_id, None)
        async with AsyncExitStack() as undos:  # all run even if one fails, last first
            undos.callback(self._ports.give_back, job_id)
            if state is not None and state.netns_name:
                ended = _Ready(state.netns_name, IPv4Address(state.ip))
                if self._is_kept and len(self._ended) < _ENDED_MAX:  # a job's end waits for no word of the spawner's
                    undos.callback(self._ended.append, ended)
                    undos.callback(self._is_low.set)
                else:
                    undos.callback(self._addresses.give_back, ended.address)
                    undos.push_async_callback(self.namespaces.drop_netns, ended.name)
            for publication in state.publications(job_id) if state is not None else ():
                if publication.protocol == "udp" and publication.address is not None:
                    undos.push_async_callback(forget_udp_flows, publication.number, publication.address)
            if state is None or state.numbers:
                undos.push_async_callback(self._repaired, lambda: nat.unpublish(job_id))
            if state is not None and state.client() is not None:
                undos.push_async_callback(self._repaired, lambda: self._set_clients(nat))
            numbers = state.numbers if state is not None else ()
            if heirs := [p for p in self._wanted() if p.number in numbers]:
                undos.push_async_callback(nat.publish, heirs)

    async def set_members(self, addresses: Iterable[IPv4Address]) -> None:
        """Open ports that are not public to these hosts (our own always is)."""
        _, nat = self._opened
        self._members = frozenset(addresses) | {self.config.host_ip}
        await self._repaired(lambda: nat.set_members(self._members))

    async def _repaired(self, act: Callable[[], Awaitable[None]]) -> None:
        """Change rules; where somebody flushed ours (a firewall that was reloaded), put them back and change again.

        Raises:
            KernelError: the second time as well.
        """
        try:
            await act()
        except KernelError as error:
            _log.warning("the firewall's rules are not as we left them, putting them back: %s", error)
            await self._ensure()
            await act()

    @property
    def ready(self) -> int:
        """How many namespaces of the pool wait for a job."""
        return len(self._pool)

    def sysctls(self) -> dict[str, str]:
        """Read the sysctls that this node depends on, as they are now."""
        found = {name: sysctls.read(name) for name in _wanted_sysctls(self.config)}
        return {name.replace("/", "."): value for name, value in found.items() if value is not None}

    def obstacles(self) -> tuple[str, ...]:
        """Say what on this machine keeps the network from working as it should; for `hostd status`."""
        return self._opened[1].obstacles()

    async def close(self) -> None:
        """Let go of sockets and threads; the network stays as it is, for the next hostd."""
        self._links = self._nat = None
        await self._open.aclose()

    async def teardown(self) -> None:
        """Remove rules, namespaces, bridge and restore the sysctls. Jobs should have ended before."""
        try:
            for name in (await self.namespaces.list()).netns:
                if name.startswith(self.config.link_prefix):
                    await self.namespaces.drop_netns(name)
        finally:
            self._pool.clear()
            await self.close()
            await remove_leftovers(self.config)


async def remove_leftovers(config: NetworkConfig) -> None:
    """Remove by name all that a node of this configuration has in the kernel; needs no spawner, nothing left is fine.

    Namespaces that are dying get a moment to take their veths along; what then remains is deleted.
    """
    for backend, is_live in (("nft", nat_nft.is_live), ("legacy", nat_legacy.is_live)):
        if is_live(config.nat_name):
            nat = nat_nft.NftNat(config.nat) if backend == "nft" else nat_legacy.LegacyNat(config.nat)
            try:
                await nat.remove_all()
            finally:
                nat.close()
    async with open_links() as links:
        deadline = monotonic_s() + _VANISH_TIMEOUT_S
        while await links.ports(config.bridge) and monotonic_s() < deadline:
            await asyncio.sleep(0.02)
        for name in await links.ports(config.bridge):
            await links.remove(name)
        await links.remove(config.bridge)
    sysctls.restore(config.state_file)


def _wanted_sysctls(config: NetworkConfig) -> dict[str, sysctls.Wanted]:
    """Say what the kernel must do for us.

    bridge-nf would push frames between two ports through the rules as if bridged, where isolation drops
    translated ones. Connections that wait for a listener which closes move to the one that shares its port. Reserved
    ports are never taken as the near end of the host's own connections.
    """
    return {
        "ipv4/ip_forward": sysctls.to("1"),
        "ipv4/ip_local_reserved_ports": sysctls.including(f"{config.port_low}-{config.port_high}"),
        "ipv4/tcp_migrate_req": sysctls.to("1"),
        "netfilter/nf_conntrack_tcp_timeout_close_wait": sysctls.to("3600"),
        "bridge/bridge-nf-call-iptables": sysctls.to("0"),
    }


def _is_free(number: int, protocol: Literal["tcp", "udp"]) -> bool:
    """Whether no process of the host has this port, by taking it for a moment."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # finished connections are no hindrance
        try:
            probe.bind(("0.0.0.0", number))  # noqa: S104 — never listens
        except OSError:
            return False
    return True
