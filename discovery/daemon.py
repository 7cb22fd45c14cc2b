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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovery import api
from discovery.codec import Unreadable
from discovery.frames import Damaged
from discovery.gateway import Gateway
from discovery.history import trim_history
from discovery.leases import Leases
from discovery.membership import Cluster
from discovery.raft import Member
from discovery.services import Directory, Services
from discovery.watches import Watches
from discovery.wire import config, serve
from discovery.wire import logging as wire_logging
from discovery.wire.config import Setting
from discovery.wire.errors import Internal, Invalid, ServiceError

log = logging.getLogger(__name__)

SETTINGS = (
    Setting("state_dir", "/var/lib/hostd/discovery", str, "where the log and the snapshots are"),
    Setting("socket", "/run/hostd/discovery/discovery.sock", str, "the unix socket to answer on"),
    Setting("dns_address", "", str, "HOST:PORT to answer DNS on; empty: none"),
    Setting("raft_address", "127.0.0.1:4001", str, "this member's address towards other members (unused while alone)"),
    Setting("initial_members", "", str, "ID=HOST:PORT,… of the first members, this one among them (default: it alone)"),
    Setting("tls_ca", "", str, "the authority that members trust; empty: this member is alone, and opens no port"),
    Setting("tls_cert", "", str, "this member's certificate: common name member_id, unit discovery-member"),
    Setting("tls_key", "", str, "its key (default: in tls_cert)"),
    Setting("member_id", "", str, "this member's name, the same for ever (default: raft_address)"),
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

    @classmethod
    def make(cls, state_dir: Path, member_id: str, cluster: Cluster | None = None) -> Daemon:
        """Open the state and put the parts together."""
        member = Member(state_dir, member_id, cluster=cluster)
        watches, directory = Watches(member.state), Directory(member.state)
        member.on_applied(directory.on_applied)
        member.on_applied(watches.on_applied)
        member.on_reset(directory.on_reset)
        member.on_reset(watches.on_reset)
        return cls(member, Leases(member), watches, directory, Services(member, directory, watches))

    def application(self) -> Any:
        """Return the HTTP application."""
        etcd = api.EtcdApi(Gateway(self.member, self.leases), self.member, self.watches)
        return api.make_application(etcd, api.ServicesApi(self.services, self.directory))


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


async def run(settings: dict[str, Any]) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
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
                running.append(tasks.create_task(_serve_dns(daemon, settings)))
            async with serve.listen_unix(daemon.application(), socket):
                gc.freeze()
                log.info("ready on %s", socket)
                await stop.wait()
                await daemon.member.hand_over()
            for task in running:
                task.cancel()
    finally:
        daemon.member.close()


async def _serve_dns(daemon: Daemon, settings: dict[str, Any]) -> None:
    from discovery.dns import Server  # 40 ms of imports that a daemon without DNS does not need
    from discovery.resolvers import Resolvers

    host, port = _parse_address(settings["dns_address"])
    await Server(daemon.directory, Resolvers(Path(settings["resolv_conf"]), host)).run(host, port)


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
