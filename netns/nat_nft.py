"""The nftables backend: an own table, whose rules never change; what is published are elements of its sets.

A publication costs one map lookup however many there are, and 0.3 ms to add. An own table can drop, but cannot
accept what another table drops: where the machine's FORWARD policy is drop (Docker sets it), `obstacles` says so.
Called through `nat.open_nat`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from errno import EEXIST, EINVAL, ENOENT
from ipaddress import IPv4Address
from typing import Any

from netns.errors import KernelError
from netns.nat import METADATA, Backend, Client, NatConfig, Publication, Transport, by_job
from netns.syscalls import Nftables

_SKELETON = """
add table ip {name}
add map ip {name} published {{ type inet_proto . inet_service : ipv4_addr; }}
add set ip {name} host_ports {{ type inet_proto . inet_service; }}
add set ip {name} public {{ type inet_proto . inet_service; }}
add set ip {name} members {{ type ipv4_addr; }}
add set ip {name} metadata_readers {{ type ipv4_addr; }}
add set ip {name} store_clients {{ type ipv4_addr; }}
add set ip {name} pinned_senders {{ type ether_addr; }}
add set ip {name} pinned {{ type ether_addr . ipv4_addr; }}
add set ip {name} flows {{ type ipv4_addr; size 65535; flags dynamic; }}
add chain ip {name} from_jobs
add chain ip {name} to_jobs
add chain ip {name} jobs_to_host
add chain ip {name} to_host_ports
add chain ip {name} prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}
add chain ip {name} output {{ type nat hook output priority -100; policy accept; }}
add chain ip {name} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
add chain ip {name} forwarding {{ type filter hook forward priority filter; policy accept; }}
add chain ip {name} input {{ type filter hook input priority filter; policy accept; }}
flush table ip {name}
add rule ip {name} prerouting fib daddr type local dnat ip to meta l4proto . th dport map @published
add rule ip {name} output ip daddr != 127.0.0.0/8 fib daddr type local \
    dnat ip to meta l4proto . th dport map @published
add rule ip {name} postrouting ip saddr {subnet} oifname != "{bridge}" masquerade
add rule ip {name} postrouting ip saddr {subnet} ip daddr {subnet} oifname "{bridge}" ct status dnat masquerade
add rule ip {name} forwarding iifname "{bridge}" jump from_jobs
add rule ip {name} forwarding oifname "{bridge}" jump to_jobs
add rule ip {name} from_jobs ct state invalid drop
add rule ip {name} from_jobs ether saddr @pinned_senders ether saddr . ip saddr != @pinned drop
add rule ip {name} from_jobs ct state established,related accept
add rule ip {name} from_jobs ip saddr != {subnet} drop
add rule ip {name} from_jobs add @flows {{ ip saddr ct count over {flows_max} }} drop
add rule ip {name} from_jobs oifname "{bridge}" ct status dnat accept
add rule ip {name} from_jobs oifname "{bridge}" drop
add rule ip {name} from_jobs ip daddr {{ {metadata} }} ip saddr != @metadata_readers drop
{guard}
add rule ip {name} from_jobs accept
add rule ip {name} to_jobs ct state established,related accept
add rule ip {name} to_jobs ct status dnat meta l4proto . th dport @public accept
add rule ip {name} to_jobs ct status dnat ip saddr @members accept
add rule ip {name} to_jobs drop
add rule ip {name} input iifname "{bridge}" jump jobs_to_host
add rule ip {name} input iifname != "lo" ip daddr {gateway} drop
add rule ip {name} input iifname != "lo" meta l4proto . th dport @host_ports jump to_host_ports
add rule ip {name} jobs_to_host ether saddr @pinned_senders ether saddr . ip saddr != @pinned drop
add rule ip {name} jobs_to_host ct state established,related accept
add rule ip {name} jobs_to_host ip saddr != {subnet} drop
add rule ip {name} jobs_to_host add @flows {{ ip saddr ct count over {flows_max} }} drop
add rule ip {name} jobs_to_host ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport {{ {gateway_ports} }} accept
{store}
add rule ip {name} jobs_to_host meta l4proto . th dport @host_ports accept
add rule ip {name} jobs_to_host icmp type echo-request accept
add rule ip {name} jobs_to_host meta l4proto tcp reject with tcp reset
add rule ip {name} jobs_to_host reject
add rule ip {name} to_host_ports ct state established,related accept
add rule ip {name} to_host_ports meta l4proto . th dport @public accept
add rule ip {name} to_host_ports ip saddr @members accept
add rule ip {name} to_host_ports fib saddr type local accept
add rule ip {name} to_host_ports drop
"""


_STORE = "add rule ip {name} jobs_to_host ip saddr @store_clients ip daddr {address} tcp dport {port} accept"
_GUARD = "add rule ip {name} from_jobs ip daddr @members tcp dport {{ {ports} }} reject with tcp reset"


class NftNat:
    """The rules of one node as table `ip <name>`, in the namespace of the thread that makes this."""

    backend: Backend = "nft"

    def __init__(self, config: NatConfig) -> None:
        self._config = config
        self._nft = Nftables()
        self._known: dict[str, tuple[Publication, ...]] = {}

    async def ensure_base(self) -> None:
        """Put the rules back as they should be; elements of the sets stay."""
        name, store, guarded = self._config.name, self._config.store, self._config.guarded_ports
        skeleton = _SKELETON.format(
            name=name,
            store=_STORE.format(name=name, address=store[0], port=store[1]) if store else "",
            guard=_GUARD.format(name=name, ports=", ".join(map(str, guarded))) if guarded else "",
            bridge=self._config.bridge,
            subnet=self._config.subnet,
            gateway=self._config.subnet[1],
            metadata=", ".join(METADATA),
            gateway_ports=", ".join(map(str, self._config.gateway_ports)),
            flows_max=self._config.flows_max,
        )
        try:
            self._nft.run(skeleton)
        except KernelError as error:
            if error.errno not in (EEXIST, EINVAL):
                raise
            # A table of that name with other types: an older release's. Its publications come back by reconcile.
            self._nft.run(self._removal() + skeleton)
        self._remember(await self.publications())

    async def publish(self, publications: Iterable[Publication]) -> None:
        """Add the elements of one or more publications.

        On the host's network a number passes from job to job (its listeners share the port); one that leads
        to an address is refused to everybody else.
        """
        new = [p for p in publications if p not in self._known.get(p.job_id, ())]
        if not new:
            return
        shared = {(p.protocol, p.number) for p in new if p.address is None}
        known = [p for held in self._known.values() for p in held]
        old = [p for p in known if p.address is None and (p.protocol, p.number) in shared]
        commands = [command for p in old for command in self._elements("delete", p)]
        self._nft.run("\n".join([*commands, *(command for p in new for command in self._elements("add", p))]))
        for publication in old:
            held = self._known[publication.job_id]
            self._known[publication.job_id] = tuple(p for p in held if p != publication)
        for publication in new:
            self._known[publication.job_id] = (*self._known.get(publication.job_id, ()), publication)

    async def unpublish(self, job_id: str) -> None:
        """Delete a job's elements; if others changed the table meanwhile, look again and delete what is there."""
        try:
            self._delete(self._known.get(job_id, ()))
        except KernelError as error:
            if error.errno != ENOENT:
                raise
            self._remember(await self.publications())
            self._delete(self._known.get(job_id, ()))
        self._known.pop(job_id, None)

    def _delete(self, publications: Iterable[Publication]) -> None:
        if commands := [command for p in publications for command in self._elements("delete", p)]:
            self._nft.run("\n".join(commands))

    async def publications(self) -> tuple[Publication, ...]:
        """Read the elements and put publications together again."""
        public = {_key_of(element) for element in self._read("set", "public")}
        found = []
        for element, address in self._read("map", "published"):
            protocol, number = _key_of(element)
            found.append(
                Publication(
                    job_id=element["elem"]["comment"],
                    protocol=protocol,
                    number=number,
                    address=IPv4Address(address),
                    is_public=(protocol, number) in public,
                )
            )
        for element in self._read("set", "host_ports"):
            protocol, number = _key_of(element)
            found.append(
                Publication(
                    job_id=element["elem"]["comment"],
                    protocol=protocol,
                    number=number,
                    is_public=(protocol, number) in public,
                )
            )
        return tuple(sorted(found, key=lambda p: (p.job_id, p.protocol, p.number)))

    async def set_members(self, addresses: Iterable[IPv4Address]) -> None:
        """Swap the members' set in one transaction."""
        commands = [f"flush set ip {self._config.name} members"]
        if wanted := sorted(set(addresses)):
            commands.append(f"add element ip {self._config.name} members {{ {', '.join(map(str, wanted))} }}")
        self._nft.run("\n".join(commands))

    async def members(self) -> frozenset[IPv4Address]:
        """Read the members' set."""
        return frozenset(IPv4Address(element) for element in self._read("set", "members"))

    async def set_clients(self, clients: Iterable[Client]) -> None:
        """Swap the sets of addresses with rules of their own in one transaction."""
        given = sorted(set(clients), key=lambda client: client.address)
        pinned = [client for client in given if client.mac]
        wanted = {
            "metadata_readers": [str(client.address) for client in given if client.reads_metadata],
            "store_clients": [str(client.address) for client in given if client.reaches_store],
            "pinned_senders": [client.mac for client in pinned],
            "pinned": [f"{client.mac} . {client.address}" for client in pinned],
        }
        commands = [f"flush set ip {self._config.name} {name}" for name in wanted]
        for name, elements in wanted.items():
            if elements:
                commands.append(f"add element ip {self._config.name} {name} {{ {', '.join(elements)} }}")
        self._nft.run("\n".join(commands))

    async def remove_all(self) -> None:
        """Delete the table."""
        self._nft.run(self._removal())
        self._known.clear()

    def obstacles(self) -> tuple[str, ...]:
        """Say what in the machine's other rules keeps ours from working."""
        chains = _objects(self._nft.run("list chains ip"), "chain")
        return tuple(
            f"chain {chain['name']} of table ip {chain['table']} drops forwarded packets by policy: accept those "
            f"from and to {self._config.bridge} there"
            for chain in chains
            if chain.get("hook") == "forward" and chain.get("policy") == "drop"
        )

    def close(self) -> None:
        """Free the library's context; the rules stay."""
        self._nft.close()

    def _removal(self) -> str:
        # Adding first makes deleting fine when there is none (`destroy` came with a later nft).
        return f"add table ip {self._config.name}\ndelete table ip {self._config.name}\n"

    def _elements(self, verb: str, publication: Publication) -> list[str]:
        table = f"{verb} element ip {self._config.name}"
        key = f"{publication.protocol} . {publication.number}"
        marked = f'{key} comment "{publication.job_id}"' if verb == "add" else key
        if publication.address is None:
            commands = [f"{table} host_ports {{ {marked} }}"]
        else:
            value = f" : {publication.address}" if verb == "add" else ""
            commands = [f"{table} published {{ {marked}{value} }}"]
        if publication.is_public:
            commands.append(f"{table} public {{ {marked} }}")
        return commands

    def _read(self, kind: str, name: str) -> list[Any]:
        try:
            listed = self._nft.run(f"list {kind} ip {self._config.name} {name}")
        except KernelError as error:
            if error.errno == ENOENT:
                return []
            raise
        return [element for found in _objects(listed, kind) for element in found.get("elem", [])]

    def _remember(self, publications: Iterable[Publication]) -> None:
        self._known = by_job(publications)


def is_live(name: str) -> bool:
    """Whether a table of that name is there; False where there are no nftables at all."""
    try:
        nft = Nftables()
    except KernelError:
        return False
    try:
        return any(table["name"] == name for table in _objects(nft.run("list tables ip"), "table"))
    except KernelError:
        return False
    finally:
        nft.close()


def _objects(listed: str, kind: str) -> list[dict[str, Any]]:
    """Return the objects of one kind from libnftables' JSON."""
    return [entry[kind] for entry in json.loads(listed or '{"nftables": []}')["nftables"] if kind in entry]


def _key_of(element: Any) -> tuple[Transport, int]:
    protocol, number = element["elem"]["val"]["concat"]
    return protocol, number
