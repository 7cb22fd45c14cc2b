"""NAT and firewall of one node as values: what is published to whom, behind one interface with two backends.

`nat_nft` keeps an own table through libnftables, `nat_legacy` own chains through python-iptables; `open_nat`
probes which one this machine wants and refuses to leave both live. Rules carry the job id; the machine's
other rules are never touched. Called by `hostd.runtime.network`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, Protocol

from netns.errors import KernelError, NatUnavailable

Backend = Literal["nft", "legacy"]
Transport = Literal["tcp", "udp"]

METADATA = ("169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32")
"""Where clouds tell a machine its secrets (link-local: most of them; Azure; Alibaba): no job may ask there unasked."""
_JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,14}")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One port of one job: `number` on every address of the host leads to `address:number`.

    Without `address` the job is on the host's network: nothing is translated, the firewall opens the port.
    `is_public` opens it to everyone; otherwise only members and local jobs reach it.
    """

    job_id: str
    number: int
    protocol: Transport = "tcp"
    address: IPv4Address | None = None
    is_public: bool = False

    def __post_init__(self) -> None:
        if not _JOB_ID.fullmatch(self.job_id) or not 1 <= self.number <= 65535:
            raise ValueError(f"publication of job {self.job_id!r} port {self.number}")


@dataclass(frozen=True, kw_only=True)
class Client:
    """An address of a job that has other rules than all.

    `reads_metadata` opens `METADATA` to it, `reaches_store` this host's store. `mac` holds the frames of this sender to
    this address, for a job that can write any packet; that they bear this sender's address is the bridge's business
    (`netns.links`).
    """

    address: IPv4Address
    reads_metadata: bool = False
    reaches_store: bool = False
    mac: str = ""


@dataclass(frozen=True, kw_only=True)
class NatConfig:
    """What the skeleton of rules depends on. `name` marks all that is ours (`hostd` → table `hostd`, chains `HOSTD-*`).

    Jobs may reach `gateway_ports` (udp and tcp) on the gateway, and those that are granted it the `store` (an address
    of this host, and a port); any other port of the host only if published. Nobody but they and the host reaches the
    gateway's address. `guarded_ports` (tcp) of other members are closed to all jobs. A job has at most `flows_max`
    tracked flows that it began itself: the machine's table of them is shared by all.
    """

    name: str
    bridge: str
    subnet: IPv4Network
    gateway_ports: tuple[int, ...] = (53,)
    store: tuple[IPv4Address, int] | None = None
    guarded_ports: tuple[int, ...] = ()
    flows_max: int = 16384

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or not re.fullmatch(r"[a-zA-Z0-9_.-]{1,15}", self.bridge):
            raise ValueError(f"nat name {self.name!r}, bridge {self.bridge!r}")


class Nat(Protocol):
    """The rules of one node. Every change is one transaction; a failed one leaves all as it was.

    Raises (all methods): KernelError.
    """

    @property
    def backend(self) -> Backend: ...

    async def ensure_base(self) -> None:
        """Bring the skeleton into place, keeping publications and members that are there already."""

    async def publish(self, publications: Iterable[Publication]) -> None:
        """Add publications, all or none; one that is there already is fine."""

    async def unpublish(self, job_id: str) -> None:
        """Remove all of a job's publications; an unknown job is fine."""

    async def publications(self) -> tuple[Publication, ...]:
        """Read back from the kernel what is published."""

    async def set_members(self, addresses: Iterable[IPv4Address]) -> None:
        """Replace the set of hosts that may reach ports that are not public."""

    async def members(self) -> frozenset[IPv4Address]:
        """Read the members back from the kernel."""

    async def set_clients(self, clients: Iterable[Client]) -> None:
        """Replace the addresses with rules of their own."""

    async def remove_all(self) -> None:
        """Remove everything that is ours; nothing there is fine."""

    def obstacles(self) -> tuple[str, ...]:
        """Say what in the machine's other rules keeps ours from working; for `hostd status`."""

    def close(self) -> None:
        """Let go of the backend's resources; the rules stay."""


def by_job(publications: Iterable[Publication]) -> dict[str, tuple[Publication, ...]]:
    """Group publications by their job."""
    grouped: dict[str, tuple[Publication, ...]] = {}
    for publication in publications:
        grouped[publication.job_id] = (*grouped.get(publication.job_id, ()), publication)
    return grouped


def open_nat(config: NatConfig, backend: Literal["auto", "nft", "legacy"] = "auto") -> Nat:
    """Choose the backend and open it, without changing a rule.

    `auto` takes legacy where the machine's `iptables` is the legacy one and python-iptables is installed, else nft.
    Both at once would translate every packet twice, so a backend is refused while the other has rules of our name.

    Raises:
        NatUnavailable: none works, or the other backend's rules of the same name are live.
    """
    # Imported here: each backend imports this module, and iptc loads C libraries that few machines need.
    from netns import nat_legacy, nat_nft

    chosen = backend if backend != "auto" else _probe()
    try:
        if chosen == "legacy":
            if nat_nft.is_live(config.name):
                raise NatUnavailable(f"nftables table ip {config.name} is live: remove it, or choose backend nft")
            return nat_legacy.LegacyNat(config)
        if nat_legacy.is_live(config.name):
            raise NatUnavailable(
                f"legacy iptables chains {config.name.upper()}-* are live: remove them, or choose backend legacy"
            )
        return nat_nft.NftNat(config)
    except KernelError as error:
        raise NatUnavailable(f"NAT backend {chosen} does not work here: {error}") from error


def _probe() -> Backend:
    from netns import nat_legacy

    return "legacy" if _iptables_flavour() == "legacy" and nat_legacy.is_installed() else "nft"


def _iptables_flavour() -> str:
    """Return `legacy` or `nf_tables` as the machine's own iptables says, "" when it has none."""
    try:
        said = subprocess.run(["iptables", "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.partition("(")[2].partition(")")[0]
