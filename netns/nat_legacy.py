"""The legacy iptables backend: own chains `<NAME>-*` through python-iptables, for hosts that still have that iptables.

python-iptables hides failed commits, takes no lock and is not thread safe, so here every change is: one owner
thread, the lock that the iptables program takes, fresh table, change, explicit commit (again on EAGAIN), read back.
A table changes at once; a publication spans two, and a port is open to the public before packets can reach it.
Rules that the kernel evaluates one by one make it slower than nft above some hundred ports.
Called through `nat.open_nat`; the only importer of iptc, and only when it is used.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import importlib.util
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EAGAIN, EBADMSG, EIO
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from netns.errors import KernelError
from netns.nat import METADATA, Backend, Client, NatConfig, Publication, Transport

_LOCK = Path("/run/xtables.lock")
_LOCK_TIMEOUT_S = 10.0
_COMMITS = 8
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule as a value; `!` before a source, destination or interface negates it. Empty fields match all."""

    target: str
    target_options: Mapping[str, str] = field(default_factory=dict)
    protocol: str = ""
    number: int = 0
    source: str = ""
    destination: str = ""
    in_interface: str = ""
    out_interface: str = ""
    matches: tuple[tuple[str, str, str], ...] = ()
    comment: str = ""


_ESTABLISHED = (("conntrack", "ctstate", "RELATED,ESTABLISHED"),)
_TRANSLATED = (("conntrack", "ctstate", "DNAT"),)  # a virtual state; `--ctstatus` does not get through python-iptables
_TO_LOCAL = (("addrtype", "dst-type", "LOCAL"),)


class LegacyNat:
    """The rules of one node in the legacy tables nat and filter, in the namespace of the thread that makes this."""

    backend: Backend = "legacy"

    def __init__(self, config: NatConfig) -> None:
        self._config = config
        self._prefix = config.name.upper()
        self._owner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="iptables")
        self._iptc = self._owner.submit(_import_iptc).result()

    async def ensure_base(self) -> None:
        """Rebuild the chains whose rules never change and put their hooks first; publications and members stay."""
        await self._change("filter", self._ensure(_filter_base(self._config)))
        await self._change("nat", self._ensure(_nat_base(self._config)))

    async def publish(self, publications: Iterable[Publication]) -> None:
        """Append the rules of one or more publications, firewall first."""
        new = tuple(publications)
        if not new:
            return
        for table_name, rules in (("filter", _filter_rules(new)), ("nat", _nat_rules(new))):
            if rules:
                await self._change(table_name, functools.partial(self._append, rules=rules))

    async def unpublish(self, job_id: str) -> None:
        """Delete all rules that carry the job's id, translation first."""
        await self._change("nat", lambda table: self._purge(table, ("PUBLISHED",), job_id))
        await self._change("filter", lambda table: self._purge(table, ("PUBLIC", "HOST-PORTS"), job_id))

    async def publications(self) -> tuple[Publication, ...]:
        """Read the rules and put publications together again."""
        return await self._on_owner(self._list)

    async def set_members(self, addresses: Iterable[IPv4Address]) -> None:
        """Rebuild the members' chains in one commit."""
        wanted = sorted(set(addresses))
        rules = [("MEMBERS", Rule(source=f"{address}/32", target="ACCEPT")) for address in wanted]
        for number in self._config.guarded_ports:
            closed = {"target": "REJECT", "target_options": {"reject-with": "tcp-reset"}}
            rules += [
                ("PEERS", Rule(destination=f"{address}/32", protocol="tcp", number=number, **closed))  # type: ignore[arg-type]
                for address in wanted
            ]

        def change(table: Any) -> None:
            for name in ("MEMBERS", "PEERS"):
                table.flush_entries(self._chain(name))
            self._append(table, rules)

        await self._change("filter", change)

    async def members(self) -> frozenset[IPv4Address]:
        """Read the members' chain."""

        def read() -> frozenset[IPv4Address]:
            rules = self._rules(self._table("filter"), "MEMBERS")
            return frozenset(IPv4Address(rule.src.partition("/")[0]) for rule in rules)

        return await self._on_owner(read)

    async def set_clients(self, clients: Iterable[Client]) -> None:
        """Rebuild the chains of addresses with rules of their own in one commit."""
        given = sorted(set(clients), key=lambda client: client.address)
        rules = [
            ("METADATA", Rule(source=f"{client.address}/32", target="ACCEPT"))
            for client in given
            if client.reads_metadata
        ]
        rules += [
            ("STORE", Rule(source=f"{client.address}/32", target="ACCEPT")) for client in given if client.reaches_store
        ]
        for client in given:
            if client.mac:
                sender = (("mac", "mac-source", client.mac),)
                rules.append(("PINNED", Rule(source=f"!{client.address}/32", matches=sender, target="DROP")))

        def change(table: Any) -> None:
            for name in ("METADATA", "STORE", "PINNED"):
                table.flush_entries(self._chain(name))
            self._append(table, rules)

        await self._change("filter", change)

    async def remove_all(self) -> None:
        """Remove hooks and chains of both tables."""
        await self._change("nat", lambda table: self._remove(table, _nat_base(self._config)))
        await self._change("filter", lambda table: self._remove(table, _filter_base(self._config)))

    def obstacles(self) -> tuple[str, ...]:
        """None: a hook of ours is the first of its chain, where it can accept before others drop."""
        return ()

    def close(self) -> None:
        """End the owner thread; the rules stay."""
        self._owner.shutdown()

    # What follows runs on the owner thread.

    def _chain(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _table(self, name: str) -> Any:
        """Return the table as it is in the kernel now."""
        table = self._iptc.Table(name, autocommit=False)
        table.refresh()
        return table

    def _rules(self, table: Any, chain: str) -> list[Any]:
        name = self._chain(chain)
        return list(self._iptc.Chain(table, name).rules) if table.is_chain(name) else []

    def _append(self, table: Any, rules: Iterable[tuple[str, Rule]]) -> None:
        """Append rules, skipping those whose like (port and comment) is there."""
        for name, rule in rules:
            if rule.comment and any(_is_same(present, rule) for present in self._rules(table, name)):
                continue
            self._iptc.Chain(table, self._chain(name)).append_rule(self._encode(rule, table))

    def _purge(self, table: Any, chains: Iterable[str], comment: str) -> bool:
        has_changed = False
        for name in chains:
            for rule in self._rules(table, name):
                if _comment_of(rule) == comment:
                    self._iptc.Chain(table, self._chain(name)).delete_rule(rule)
                    has_changed = True
        return has_changed

    def _ensure(self, base: _Base) -> Callable[[Any], None]:
        def change(table: Any) -> None:
            for name in (*base.chains, *base.kept):
                if not table.is_chain(self._chain(name)):
                    table.create_chain(self._chain(name))
            for name, rules in base.chains.items():
                table.flush_entries(self._chain(name))
                self._append(table, ((name, rule) for rule in rules))
            for hook, rule in base.hooks:
                chain = self._iptc.Chain(table, hook)
                if not any(_target_of(present) == self._chain(rule.target) for present in chain.rules):
                    chain.insert_rule(self._encode(rule, table))

        return change

    def _remove(self, table: Any, base: _Base) -> None:
        ours = [self._chain(name) for name in (*base.chains, *base.kept)]
        for hook in {hook for hook, _ in base.hooks}:
            chain = self._iptc.Chain(table, hook)
            for rule in list(chain.rules):
                if _target_of(rule) in ours:
                    chain.delete_rule(rule)
        present = [name for name in ours if table.is_chain(name)]
        for name in present:
            table.flush_entries(name)
        for name in present:
            table.delete_chain(name)

    def _encode(self, rule: Rule, table: Any) -> Any:
        made = self._iptc.Rule()
        if rule.protocol:
            made.protocol = rule.protocol
        for attribute, value in (
            ("src", rule.source),
            ("dst", rule.destination),
            ("in_interface", rule.in_interface),
            ("out_interface", rule.out_interface),
        ):
            if value:
                setattr(made, attribute, value)
        if rule.number:
            made.create_match(rule.protocol).set_parameter("dport", str(rule.number))
        for name, option, value in rule.matches:
            made.create_match(name).set_parameter(option, value)
        if rule.comment:
            made.create_match("comment").set_parameter("comment", rule.comment)
        is_ours = table.is_chain(self._chain(rule.target))
        target = made.create_target(self._chain(rule.target) if is_ours else rule.target)
        for option, value in rule.target_options.items():
            target.set_parameter(option, value)
        return made

    def _list(self) -> tuple[Publication, ...]:
        filters = self._table("filter")
        public = {(_comment_of(rule), *_port_of(rule)) for rule in self._rules(filters, "PUBLIC")}
        found = [(rule, None) for rule in self._rules(filters, "HOST-PORTS")]
        translated = self._rules(self._table("nat"), "PUBLISHED")
        pairs = [*found, *((rule, IPv4Address(rule.target.to_destination)) for rule in translated)]
        publications = [
            Publication(
                job_id=_comment_of(rule),
                protocol=_port_of(rule)[0],
                number=_port_of(rule)[1],
                address=address,
                is_public=(_comment_of(rule), *_port_of(rule)) in public,
            )
            for rule, address in pairs
        ]
        return tuple(sorted(publications, key=lambda p: (p.job_id, p.protocol, p.number)))

    # The way onto the owner thread.

    async def _on_owner(self, act: Callable[[], _T]) -> _T:
        def guarded() -> _T:
            try:
                return act()
            except self._failures() as error:
                raise KernelError(EIO, "iptables", str(error)) from error

        return await asyncio.get_running_loop().run_in_executor(self._owner, guarded)

    def _failures(self) -> tuple[type[Exception], ...]:
        return (self._iptc.IPTCError, self._iptc.xtables.XTablesError, ValueError)

    async def _change(self, table_name: str, change: Callable[[Any], bool | None]) -> None:
        """Run a change on the owner thread; one that returns False had nothing to do."""
        await self._on_owner(lambda: self._commit(table_name, change))

    def _commit(self, table_name: str, change: Callable[[Any], bool | None]) -> None:
        """Carry out one change: lock, fresh table, change, commit, read back; again when somebody was quicker."""
        failure = ""
        with _xtables_lock():
            for _ in range(_COMMITS):
                table = self._table(table_name)
                if change(table) is False:
                    return
                wanted = self._picture(table)
                try:
                    table.commit()
                except self._iptc.IPTCError as error:
                    failure = str(error)
                    continue
                if self._picture(self._table(table_name)) != wanted:
                    raise KernelError(EBADMSG, "iptables", f"table {table_name} does not read back as committed")
                return
        raise KernelError(EAGAIN, "iptables", failure)

    def _picture(self, table: Any) -> dict[str, int]:
        """Count the rules of each of our chains: a lost commit shows as another count."""
        names = [chain.name for chain in table.chains if chain.name.startswith(self._prefix + "-")]
        return {name: len(self._iptc.Chain(table, name).rules) for name in names}


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The skeleton of one table: `chains` with their rules, `kept` ones for what is published, hooks to them."""

    chains: Mapping[str, tuple[Rule, ...]]
    kept: tuple[str, ...]
    hooks: tuple[tuple[str, Rule], ...]


def _nat_base(config: NatConfig) -> _Base:
    subnet, bridge = str(config.subnet), config.bridge
    return _Base(
        chains={
            "EGRESS": (
                Rule(source=subnet, out_interface=f"!{bridge}", target="MASQUERADE"),
                Rule(source=subnet, destination=subnet, out_interface=bridge, matches=_TRANSLATED, target="MASQUERADE"),
            )
        },
        kept=("PUBLISHED",),
        hooks=(
            ("PREROUTING", Rule(matches=_TO_LOCAL, target="PUBLISHED")),
            ("OUTPUT", Rule(destination="!127.0.0.0/8", matches=_TO_LOCAL, target="PUBLISHED")),
            ("POSTROUTING", Rule(target="EGRESS")),
        ),
    )


def _filter_base(config: NatConfig) -> _Base:
    return _Base(
        chains={
            "FORWARD": (
                Rule(in_interface=config.bridge, target="FROM-JOBS"),
                Rule(out_interface=config.bridge, target="TO-JOBS"),
            ),
            "INPUT": (
                Rule(in_interface=config.bridge, target="TO-HOST"),
                Rule(in_interface="!lo", destination=f"{config.subnet[1]}/32", target="DROP"),
                Rule(in_interface="!lo", target="HOST-PORTS"),
            ),
            "FROM-JOBS": _from_jobs(str(config.subnet), config.bridge, _too_many(config)),
            "TO-JOBS": (
                Rule(matches=_ESTABLISHED, target="ACCEPT"),
                Rule(matches=_TRANSLATED, target="PUBLIC"),
                Rule(matches=_TRANSLATED, target="MEMBERS"),
                Rule(target="DROP"),
            ),
            "TO-HOST": _to_host(config, _too_many(config)),
            "GUARD": (
                Rule(matches=_ESTABLISHED, target="ACCEPT"),
                Rule(in_interface=config.bridge, target="ACCEPT"),
                Rule(target="PUBLIC"),
                Rule(target="MEMBERS"),
                Rule(matches=(("addrtype", "src-type", "LOCAL"),), target="ACCEPT"),
                Rule(target="DROP"),
            ),
        },
        kept=("PUBLIC", "MEMBERS", "HOST-PORTS", "METADATA", "PINNED", "STORE", "PEERS"),
        hooks=(("FORWARD", Rule(target="FORWARD")), ("INPUT", Rule(target="INPUT"))),
    )


def _too_many(config: NatConfig) -> Rule:
    """Refuse a flow to a sender that began too many; for what is not part of one that is there."""
    return Rule(matches=(("connlimit", "connlimit-above", str(config.flows_max)),), target="DROP")


def _from_jobs(subnet: str, bridge: str, too_many: Rule) -> tuple[Rule, ...]:
    return (
        Rule(matches=(("conntrack", "ctstate", "INVALID"),), target="DROP"),
        Rule(target="PINNED"),
        Rule(matches=_ESTABLISHED, target="ACCEPT"),
        Rule(source=f"!{subnet}", target="DROP"),
        too_many,
        Rule(out_interface=bridge, matches=_TRANSLATED, target="ACCEPT"),
        Rule(out_interface=bridge, target="DROP"),
        *(Rule(destination=address, target=target) for address in METADATA for target in ("METADATA", "DROP")),
        Rule(target="PEERS"),
        Rule(target="ACCEPT"),
    )


def _to_host(config: NatConfig, too_many: Rule) -> tuple[Rule, ...]:
    gateway = f"{config.subnet[1]}/32"
    store: tuple[Rule, ...] = ()
    if config.store is not None:
        address, number = config.store
        store = (Rule(protocol="tcp", number=number, destination=f"{address}/32", target="STORE"),)
    return (
        Rule(target="PINNED"),
        Rule(matches=_ESTABLISHED, target="ACCEPT"),
        Rule(source=f"!{config.subnet}", target="DROP"),
        too_many,
        *(
            Rule(protocol=protocol, number=number, destination=gateway, target="ACCEPT")
            for number in config.gateway_ports
            for protocol in ("tcp", "udp")
        ),
        *store,
        Rule(target="HOST-PORTS"),
        Rule(protocol="icmp", matches=(("icmp", "icmp-type", "echo-request"),), target="ACCEPT"),
        Rule(protocol="tcp", target="REJECT", target_options={"reject-with": "tcp-reset"}),
        Rule(target="REJECT"),
    )


def _nat_rules(publications: Iterable[Publication]) -> list[tuple[str, Rule]]:
    return [
        (
            "PUBLISHED",
            Rule(
                protocol=p.protocol,
                number=p.number,
                comment=p.job_id,
                target="DNAT",
                target_options={"to-destination": str(p.address)},
            ),
        )
        for p in publications
        if p.address is not None
    ]


def _filter_rules(publications: Iterable[Publication]) -> list[tuple[str, Rule]]:
    rules = []
    for p in publications:
        if p.is_public:
            rules.append(("PUBLIC", Rule(protocol=p.protocol, number=p.number, comment=p.job_id, target="ACCEPT")))
        if p.address is None:
            rules.append(("HOST-PORTS", Rule(protocol=p.protocol, number=p.number, comment=p.job_id, target="GUARD")))
    return rules


def is_installed() -> bool:
    """Whether python-iptables is there; looked up without loading its libraries."""
    return importlib.util.find_spec("iptc") is not None


def is_live(name: str) -> bool:
    """Whether legacy chains of that name are there; does not bring legacy tables to life by looking."""
    try:
        tables = Path("/proc/thread-self/net/ip_tables_names").read_text().split()
    except OSError:
        return False
    if "nat" not in tables:
        return False
    try:
        saved = subprocess.run(
            ["iptables-legacy-save", "-t", "nat"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(line.startswith(f":{name.upper()}-") for line in saved.splitlines())


def _import_iptc() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its sources have invalid escapes, a warning whenever they are compiled
        try:
            import iptc
            import iptc.xtables
        except ImportError as error:
            raise KernelError(EIO, "import", "iptc: install hostd[legacy]") from error
    return iptc


@contextmanager
def _xtables_lock() -> Iterator[None]:
    """Hold the lock that iptables takes with `-w`, on the owner thread."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with _LOCK.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise KernelError(EAGAIN, "flock", str(_LOCK)) from error
                time.sleep(0.01)
        yield


def _comment_of(rule: Any) -> str:
    return next((str(match.comment) for match in rule.matches if match.name == "comment"), "")


def _port_of(rule: Any) -> tuple[Transport, int]:
    number = next(match.dport for match in rule.matches if match.name in ("tcp", "udp"))
    return rule.protocol, int(number)


def _target_of(rule: Any) -> str:
    return str(rule.target.name) if rule.target else ""


def _is_same(present: Any, wanted: Rule) -> bool:
    return _comment_of(present) == wanted.comment and _port_of(present) == (wanted.protocol, wanted.number)
