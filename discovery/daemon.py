"""The discovery daemon: wiring only. `python -m discovery.daemon --state-dir … --socket …`.

Part of the node and not a job: hostd starts it through the spawner as a plain process, so that a
restart of hostd leaves it alone. It is ready when its socket answers. Exit status: 0 after a signal,
69 and more as the errors' own, 70 when its disk failed or its files are damaged.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovery import api, offline, remote
from discovery.agent import Agent
from discovery.codec import Unreadable
from discovery.frames import Damaged
from discovery.gateway import Gateway
from discovery.history import trim_history
from discovery.lane import fast_lane
from discovery.leases import Leases
from discovery.measures import Times
from discovery.membership import TIMING, Cluster, Timing
from discovery.operating import Operating, Sample
from discovery.operations import Image
from discovery.peerwire import Change
from discovery.raft import Member
from discovery.services import Directory, Services
from discovery.types import StoreMember, StoreStatus
from discovery.watches import Watches
from discovery.wire import config, serve
from discovery.wire import logging as wire_logging
from discovery.wire.config import Setting
from discovery.wire.contexts import client_context
from discovery.wire.errors import Internal, Invalid, ServiceError, Unavailable

log = logging.getLogger(__name__)

SETTINGS = (
    Setting("state_dir", "/var/lib/hostd/discovery", str, "where the log and the snapshots are"),
    Setting("socket", "/run/hostd/discovery/discovery.sock", str, "the unix socket to answer on"),
    Setting("dns_address", "", str, "HOST:PORT to answer DNS on; empty: none"),
    Setting("raft_address", "127.0.0.1:4001", str, "this member's address towards other members (unused while alone)"),
    Setting("initial_members", "", str, "ID=HOST:PORT,… of the first members, this one among them (default: it alone)"),
    Setting("tls_ca", "", str, "the authority that members trust; empty: this member is alone, and opens no port"),
    Setting("tls_cert", "", str, "our certificate: common name member_id, unit discovery-member (an agent: host)"),
    Setting("tls_key", "", str, "its key (default: in tls_cert)"),
    Setting("member_id", "", str, "this member's name, the same for ever (default: raft_address)"),
    Setting("members", "", str, "addresses of members (https://HOST:PORT, …): follow them as an agent, without a vote"),
    Setting("api_listen", "", str, "HOST:PORT of the API for holders of a certificate; empty: only the unix socket"),
    Setting("api_ca", "", str, "the authority whose certificates the API accepts"),
    Setting("api_cert", "", str, "the API's own certificate, with its key"),
    Setting("api_url", "", str, "what clients of other members are told (default: https:// and api_listen)"),
    Setting("resolv_conf", "/etc/resolv.conf", str, "where the machine's own name servers are listed"),
)  # fmt: skip


@dataclass(frozen=True)
class Daemon:
    """The parts of one running daemon."""

    member: Member
    leases: Leases
    watches: Watches
    directory: Directory
    services: Services
    gateway: Gateway

    @classmethod
    def make(cls, state_dir: Path, member_id: str, cluster: Cluster | None = None, timing: Timing = TIMING) -> Daemon:
        """Open the state and put the parts together."""
        member = Member(state_dir, member_id, cluster=cluster, timing=timing)
        watches, directory = Watches(member.state), Directory(member.state)
        member.on_applied(directory.on_applied)
        member.on_applied(watches.on_applied)
        member.on_reset(directory.on_reset)
        member.on_reset(watches.on_reset)
        leases, services = Leases(member), Services(member, directory, watches)
        return cls(member, leases, watches, directory, services, Gateway(member, leases))

    def application(self, *middlewares: Any) -> Any:
        """Return the HTTP application."""
        etcd = api.EtcdApi(self.gateway, self.member, self.watches)
        operating = Operating(self.status, self._image, self._samples, self._times(), self._change)
        return api.make_application(etcd, api.ServicesApi(self.services, self.directory), operating, middlewares)

    def front(self, behind: Any, spoken: Any) -> Any:
        """Return what answers the most frequent requests before they come to the application."""
        return fast_lane(self.gateway, behind, spoken)

    def status(self) -> StoreStatus:
        """Say how it is."""
        member, seen, (services, instances) = self.member, self.member.status(), self.directory.counts()
        members = [
            StoreMember(id=peer.id, address=peer.address, is_voter=peer.is_voter, is_leader=peer.id == seen.leader_id)
            for peer in seen.members
        ]
        return StoreStatus(
            member_id=member.member_id,
            role="leader" if member.is_leader else "learner" if seen.is_learner else "follower",
            leader_id=seen.leader_id,
            leader_address=seen.leader_address,
            term=seen.term,
            revision=member.state.revision,
            compacted_revision=member.state.compacted,
            applied_index=seen.applied,
            log_entries=member.log_entries,
            disk_bytes=member.disk_bytes(),
            keys=member.state.key_count,
            history_events=member.state.history_events,
            history_bytes=member.state.history_bytes,
            leases=member.state.lease_count,
            watches=self.watches.count,
            services=services,
            instances=instances,
            members=members or [StoreMember(id=member.member_id, is_leader=member.is_leader)],
        )

    def is_ready(self) -> bool:
        """Tell whether this member knows the store."""
        try:
            self.member.check_ready()
        except Unavailable:
            return False
        return True

    def _samples(self) -> list[Sample]:
        return [
            ("proposals_total", "counter", "Changes that this process asked for.", self.member.proposals),
            ("proposals_waiting", "gauge", "Those that are under way.", self.member.proposals_waiting),
            ("leader_changes_total", "counter", "Changes of leader that were seen.", self.member.leader_changes),
        ]

    def _times(self) -> dict[str, tuple[str, Times]]:
        return {"log_sync_seconds": ("How long the log's syncs to disk took.", self.member.sync_times)}

    async def _change(self, verb: str, member_id: str, address: str) -> None:
        await self.member.change(Change(verb, member_id, address))

    async def _image(self) -> tuple[Image, int, int]:
        await self.member.catch_up()  # a snapshot is what certainly is, or none
        return self.member.state.image(), self.member.index, self.member.term


def _parse_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise Invalid(f"address {text!r}", hint="HOST:PORT")
    return host.strip("[]"), int(port)


def _cluster(settings: dict[str, Any]) -> Cluster | None:
    """Return what a member of a cluster is told, if this is one.

    Raises:
        Invalid: something is missing or nonsense.
    """
    ca, certificate, key = (settings[name] for name in ("tls_ca", "tls_cert", "tls_key"))
    if not ca and not certificate and not settings["initial_members"]:
        return None
    if not ca or not certificate:
        raise Invalid("a member of a cluster needs tls_ca and tls_cert")
    address = settings["raft_address"]
    member_id = settings["member_id"] or address
    initial = {}
    for each in filter(None, settings["initial_members"].split(",")):
        id, _, where = each.strip().partition("=")
        _parse_address(where)
        initial[id] = where
    _parse_address(address)
    if initial.setdefault(member_id, address) != address:
        raise Invalid(f"initial_members says that {member_id} is at {initial[member_id]}, raft_address {address}")
    return Cluster(address, initial, Path(ca), Path(certificate), Path(key or certificate))


def _listening(settings: dict[str, Any]) -> remote.Listening | None:
    """Return where the API listens beside the unix socket, if anywhere.

    Raises:
        Invalid: something is missing or nonsense.
    """
    if not settings["api_listen"]:
        return None
    if not settings["api_ca"] or not settings["api_cert"]:
        raise Invalid("api_listen needs api_ca and api_cert")
    host, port = _parse_address(settings["api_listen"])
    url = settings["api_url"] or "https://" + settings["api_listen"]
    return remote.Listening(host, port, Path(settings["api_ca"]), Path(settings["api_cert"]), url)


async def run(settings: dict[str, Any]) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if settings["members"]:
        return await _run_agent(settings, stop)
    if said := offline.carry_out(Path(settings["state_dir"])):
        log.warning("%s", said)
    cluster = _cluster(settings)
    daemon = Daemon.make(Path(settings["state_dir"]), settings["member_id"] or settings["raft_address"], cluster)
    socket = Path(settings["socket"])
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(daemon.member.run()), tasks.create_task(daemon.leases.run())]
            if cluster is None:
                await daemon.member.wait_ready()
            running.append(tasks.create_task(trim_history(daemon.member)))
            if settings["dns_address"]:
                running.append(tasks.create_task(_serve_dns(daemon.directory, settings, daemon.is_ready)))
            async with AsyncExitStack() as listening:
                await listening.enter_async_context(serve.listen_unix(daemon.application(), socket, front=daemon.front))
                if where := _listening(settings):
                    keeping = remote.keep_listening(where, daemon.application, daemon.front, daemon.member)
                    running.append(tasks.create_task(keeping))
                gc.freeze()
                log.info("ready on %s", socket)
                await stop.wait()
                await daemon.member.hand_over()
            for task in running:
                task.cancel()
    finally:
        daemon.member.close()


async def _run_agent(settings: dict[str, Any], stop: asyncio.Event) -> None:
    """Run as an agent: the socket answers at once, our names in DNS once there is a copy."""
    addresses = [address.strip().rstrip("/") for address in settings["members"].split(",")]
    for address in addresses:
        if not address.startswith(("https://", "http://", "unix://")):
            raise Invalid(f"members: {address!r}", hint="https://HOST:PORT,…")
    agent = Agent.make(addresses, settings["member_id"] or "agent", _client_tls(settings))
    socket = Path(settings["socket"])
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(agent.run())]
        if settings["dns_address"]:
            running.append(tasks.create_task(_serve_dns(agent.directory, settings, agent.mirror.is_ready)))
        async with serve.listen_unix(agent.application(), socket):
            log.info("an agent of %s on %s", ", ".join(addresses), socket)
            await stop.wait()
        for task in running:
            task.cancel()


def _client_tls(settings: dict[str, Any]) -> ssl.SSLContext | None:
    if not settings["tls_cert"]:
        return None
    try:
        key, authority = settings["tls_key"] or settings["tls_cert"], Path(settings["tls_ca"]).read_text()
        return client_context(settings["tls_cert"], key, authority)
    except (OSError, ValueError) as error:
        raise Invalid(f"tls_ca, tls_cert, tls_key: {error}", hint="PEM files") from error


async def _serve_dns(directory: Directory, settings: dict[str, Any], is_ready: Callable[[], bool]) -> None:
    from discovery.dns import Server  # 40 ms of imports that a daemon without DNS does not need
    from discovery.resolvers import Resolvers

    host, port = _parse_address(settings["dns_address"])
    await Server(directory, Resolvers(Path(settings["resolv_conf"]), host), is_ready).run(host, port)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m discovery.daemon", description="The store, the services and the DNS of a node."
    )
    config.add_flags(parser, SETTINGS)
    wire_logging.configure()
    os.umask(0o077)
    try:
        settings = config.load(SETTINGS, prefix="DISCOVERY", flags=vars(parser.parse_args(arguments)))
        asyncio.run(run(settings))
    except Exception as raised:  # noqa: BLE001 — main: everything becomes a line and a status
        return _report(_first(raised))
    return 0


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(error: BaseException) -> int:
    """Say why the daemon ends; return its exit status."""
    if isinstance(error, (Damaged, Unreadable)):
        log.critical("the store's files cannot be used: %s", error)
        log.critical("a member of a cluster comes back from its peers after `python -m discovery.rebuild`")
    elif isinstance(error, ServiceError):
        log.critical("%s%s", error.message, f" ({error.hint})" if error.hint else "")
        return error.exit_code
    elif isinstance(error, OSError):
        log.critical("stopped: the system refuses: %s", error)
    else:
        log.critical("stopped", exc_info=error)
    return Internal.exit_code


if __name__ == "__main__":
    sys.exit(main())
