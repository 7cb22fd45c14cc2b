"""Three daemons as processes, killed at will: the cluster forms by itself, goes on, and comes back by itself."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovery.client import Store
from discovery.wire.errors import ServiceError
from hostd.authority import Authority
from tests.discovery.conftest import Process
from tests.discovery.members import certify, free_ports

DEADLINE_S = 60.0


class Cluster:
    """Daemons a, b and c."""

    def __init__(self, folder: Path, ids: str = "abc") -> None:
        authority = Authority.make()
        initial = {id: f"127.0.0.1:{port}" for id, port in zip(ids, free_ports(len(ids)), strict=True)}
        self.processes: dict[str, Process] = {}
        for id in ids:
            ca, bundle = certify(authority, folder / "tls", id)
            (folder / id).mkdir()
            flags = {"member-id": id, "raft-address": initial[id], "tls-ca": str(ca), "tls-cert": str(bundle),
                     "initial-members": ",".join(f"{each}={where}" for each, where in initial.items())}  # fmt: skip
            self.processes[id] = Process(folder / id, [f"--{name}={text}" for name, text in flags.items()])

    def start(self) -> None:
        for process in self.processes.values():
            process.start(is_expected_up=False)
        for process in self.processes.values():
            process.wait_ready()

    async def put(self, key: str, value: bytes) -> str:
        """Write through whoever takes it; return through whom."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for id, process in self.processes.items():
                if process.child is None or process.child.poll() is not None:
                    continue
                try:
                    async with Store(process.address) as store:
                        await store.put(key, value)
                    return id
                except ServiceError:
                    if time.monotonic() > deadline:
                        raise
            await asyncio.sleep(0.02)

    async def get(self, id: str, key: str) -> bytes | None:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                async with Store(self.processes[id].address) as store:
                    found = await store.get(key)
                return None if found is None else found.value
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def all_voting(self) -> None:
        """Wait until the founder has made voters of all others."""
        async with asyncio.timeout(DEADLINE_S):
            while sum(process.log.count("has caught up") for process in self.processes.values()) < 2:
                await asyncio.sleep(0.02)

    def leader(self) -> str:
        """Return who said last in its log that it leads."""
        said = {id: process.log.rfind("this member leads now") for id, process in self.processes.items()}
        times = {id: self.processes[id].log[:at].rpartition("\n")[2] for id, at in said.items() if at >= 0}
        return max(times, key=times.__getitem__)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        for process in made.processes.values():
            if process.child is not None and process.child.poll() is None:
                process.kill()


async def test_it_forms_survives_its_leader_and_everybody_s_death(cluster: Cluster) -> None:
    cluster.start()
    await cluster.put("first", b"1")
    for id in cluster.processes:
        assert await cluster.get(id, "first") == b"1"
    await cluster.all_voting()
    leader = cluster.leader()
    cluster.processes[leader].kill()
    assert await cluster.put("second", b"2") != leader
    cluster.processes[leader].start()
    assert await cluster.get(leader, "second") == b"2"
    for process in cluster.processes.values():
        assert process.child is not None
        process.child.send_signal(signal.SIGKILL)
    for process in cluster.processes.values():
        process.kill()
    cluster.start()
    for id in cluster.processes:
        assert await cluster.get(id, "first") == b"1"
        assert await cluster.get(id, "second") == b"2"


async def test_an_orderly_stop_of_the_leader_costs_no_election_timeout(cluster: Cluster) -> None:
    cluster.start()
    await cluster.put("first", b"1")
    await cluster.all_voting()
    leader = cluster.leader()
    assert cluster.processes[leader].stop() == 0
    await cluster.put("second", b"2")
    assert any(f"{leader} handed over" in process.log for process in cluster.processes.values())
