"""Several members of one store inside the test's loop: real disks, real TLS over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.serialization import Encoding

from discovery.disk import DISK, Disk
from discovery.membership import Cluster, Timing
from discovery.peerwire import Message
from discovery.raft import Member
from hostd.authority import Authority

DEADLINE_S = 30.0
TIMING = Timing(heartbeat_s=0.05, election_s=0.4)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def certify(authority: Authority, folder: Path, id: str) -> tuple[Path, Path]:
    """Write a member's certificate; return it and the authority's."""
    folder.mkdir(parents=True, exist_ok=True)
    ca, bundle = folder / "ca.pem", folder / f"{id}.pem"
    ca.write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    bundle.write_bytes(authority.member(id))
    return ca, bundle


@dataclass
class Members:
    """Members to be started, stopped and wiped at will."""

    folder: Path
    tasks: asyncio.TaskGroup
    addresses: dict[str, str]
    timing: Timing = TIMING
    authority: Authority = field(default_factory=Authority.make)
    live: dict[str, Member] = field(default_factory=dict)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    ends: dict[str, Exception] = field(default_factory=dict)
    """What members ended from by themselves."""

    def cluster(self, id: str) -> Cluster:
        ca, bundle = certify(self.authority, self.folder / "tls", id)
        return Cluster(self.addresses[id], dict(self.addresses), ca, bundle, bundle)

    def start(self, id: str, *, disk: Disk = DISK) -> Member:
        """Start a member, at the address that `addresses` says by now."""
        member = Member(self.folder / id, id, cluster=self.cluster(id), disk=disk, timing=self.timing)
        self.live[id] = member
        self.running[id] = self.tasks.create_task(self._run(id, member))
        return member

    async def _run(self, id: str, member: Member) -> None:
        try:
            await member.run()
        except Exception as error:  # noqa: BLE001 — what it ended from is what a test asks about
            self.ends[id] = error

    async def stop(self, id: str) -> None:
        """End a member without any ceremony."""
        task = self.running.pop(id)
        task.cancel()
        await asyncio.wait([task])
        self.live.pop(id).close()

    def cut(self, *ids: str) -> None:
        """Let no message of Raft between these members and the others through, in either direction."""
        for id, member in self.live.items():
            assert member._peers is not None
            real = type(member._peers).send.__get__(member._peers)

            def send(to: str, message: Message, id: str = id, real: Callable[..., bool] = real) -> bool:
                return (id in ids) != (to in ids) or real(to, message)

            member._peers.send = send  # type: ignore[method-assign,assignment]

    async def leader(self, *, not_among: tuple[str, ...] = ()) -> Member:
        """Wait for a leader."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for id, member in self.live.items():
                    if member.is_leader and id not in not_among:
                        return member
                await asyncio.sleep(0.01)

    async def all_voting(self) -> Member:
        """Wait until every member has a vote and is ready; return the leader."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                status = [member.status() for member in self.live.values()]
                if all(
                    each.leader_id and not each.is_learner and all(peer.is_voter for peer in each.members)
                    for each in status
                ):
                    break
                await asyncio.sleep(0.01)
            await asyncio.gather(*(member.wait_ready() for member in self.live.values()))
        return await self.leader()


M = TypeVar("M", bound=Members)


def members(
    folder: Path, count: int = 3, *, timing: Timing = TIMING
) -> contextlib.AbstractAsyncContextManager[Members]:
    """Start members a, b, c… and wait until all have a vote."""
    return started(Members, folder, count, timing)


@contextlib.asynccontextmanager
async def started(kind: type[M], folder: Path, count: int, timing: Timing = TIMING) -> AsyncIterator[M]:
    """Start members of this kind and wait until all have a vote; stop at the end those that live."""
    ids = "abcdefg"[:count]
    addresses = {id: f"127.0.0.1:{port}" for id, port in zip(ids, free_ports(count), strict=True)}
    async with asyncio.TaskGroup() as tasks:
        made = kind(folder, tasks, addresses, timing)
        try:
            for id in ids:
                made.start(id)
            await made.all_voting()
            yield made
        finally:
            for id in list(made.live):
                await made.stop(id)
