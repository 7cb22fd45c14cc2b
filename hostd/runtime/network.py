"""Launch step two: give a job its network, taken from a small pool of ready namespaces.

Owns the node's bridge, subnet, port numbers and NAT rules. Refuses numbers that somebody holds. Nothing above
`netns` learns how it is done. Called by `hostd.runtime.launch` (apply, undo) and `hostd.daemon`
(prepare, reconcile, ensure, set_members, teardown).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from hostd.types import Port


class NamespaceSource(Protocol):
    """Who makes network namespaces: the spawner (`hostd.runtime.process.Spawner`)."""

    async def create_netns(self, name: str) -> tuple[int, int]:
        """Return (namespace fd, NETLINK_ROUTE SOCK_DGRAM socket fd opened inside it); the caller closes both."""

    async def drop_netns(self, name: str) -> None:
        """Forget a namespace; an unknown name is fine. It dies with its last process."""

    async def netns_names(self) -> list[str]:
        """Return the names of all namespaces that are kept."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that tells one node's network from another's. `mtu=0` takes that of the default route's device."""

    bridge: str
    subnet: IPv4Network
    host_ip: IPv4Address
    nat_name: str
    state_file: Path  # remembers sysctls as they were; lives as long as a boot: run_dir/network.json
    nat_backend: Literal["auto", "nft", "legacy"] = "auto"
    port_low: int = 55000
    port_high: int = 65535
    pool_size: int = 4
    mtu: int = 0


class NetworkState(msgspec.Struct, frozen=True, kw_only=True):
    """What a job got; goes into hostd's store. `netns_name` is None on the host's network.

    `ip` is where the job's ports are reached from this host (the host's own address on the host's network);
    `numbers` are the published ports in the spec's order.
    """

    netns_name: str | None
    ip: str
    numbers: tuple[int, ...]
    ports: tuple[Port, ...] = ()


class NetworkStep:
    """The network of this node's jobs."""

    def __init__(self, config: NetworkConfig, namespaces: NamespaceSource) -> None: ...

    @property
    def gateway(self) -> IPv4Address:
        """The bridge's address: the jobs' router and name server."""
        raise NotImplementedError

    @property
    def backend(self) -> str:
        """`nft` or `legacy`."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Ensure sysctls, bridge and base rules. Called once at start, before anything else; may be called again.

        Raises:
            NatUnavailable, KernelError
        """
        raise NotImplementedError

    async def reconcile(self, known: Mapping[str, NetworkState]) -> None:
        """Take over the jobs that live on after a restart; remove every rule, veth and namespace of nobody."""
        raise NotImplementedError

    async def run(self) -> None:
        """Keep the pool filled and the kernel as wanted, for ever; a task of the daemon's group."""
        raise NotImplementedError

    async def apply(self, job_id: str, ports: tuple[Port, ...], has_host_network: bool) -> NetworkState:
        """Give the job a namespace, an address and its published ports.

        Raises:
            PortTaken: a number asked for belongs to a job or a process of the host.
            HostFull: no address or port is left.
            KernelError
        """
        raise NotImplementedError

    async def undo(self, job_id: str) -> None:
        """Take all back from the id alone; may be called twice, or without apply."""
        raise NotImplementedError

    async def set_members(self, addresses: Iterable[IPv4Address]) -> None:
        """Open ports that are not public to these hosts (our own always is)."""
        raise NotImplementedError

    def sysctls(self) -> dict[str, str]:
        """Read the sysctls that this node depends on, as they are now."""
        raise NotImplementedError

    async def teardown(self) -> None:
        """Remove rules, bridge, veths and pool, and restore the sysctls; works after a crash, too."""
        raise NotImplementedError
