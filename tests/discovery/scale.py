"""How a store of some size does: what is written at rest, memory, the time to come back and to be copied.

`python -m tests.discovery.scale` measures growing stores up to 100,000 keys and 1,000 services with 10,000
instances on 1,000 simulated hosts, each with a lease that it renews every three seconds as hostd does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from discovery.agent import Agent
from discovery.client import Services, Store
from discovery.types import Instance, Put, StoreStatus
from discovery.wire.blocking import BlockingCaller
from tests.discovery.conftest import Process

RENEW_S = 3.0


@dataclass(frozen=True)
class Size:
    keys: int
    services: int
    instances: int
    hosts: int

    def part(self, fraction: float) -> Size:
        shrunk = (self.keys, self.services, self.instances, self.hosts)
        return Size(*(max(1, int(number * fraction)) for number in shrunk))


FULL = Size(100_000, 1_000, 10_000, 1_000)


@dataclass(frozen=True)
class Found:
    """What was measured; times in seconds unless they say ms, of the daemon alone unless they say agent."""

    size: Size
    fill_s: float
    writes_per_s_at_rest: float
    bytes_per_s_at_rest: float
    renewals_per_s: float
    renewal_p50_ms: float
    renewal_p99_ms: float
    cpu_percent_at_rest: float
    rss_mib: float
    disk_mib: float
    restart_s: float
    restart_cpu_s: float
    agent_copy_s: float
    change_to_agent_ms: float


@contextmanager
def daemon(folder: Path) -> Iterator[Process]:
    process = Process(folder)
    process.start()
    try:
        yield process
    finally:
        if process.child is not None and process.child.poll() is None:
            process.kill()


def status(process: Process) -> StoreStatus:
    return BlockingCaller(process.address).request("GET", "/status", into=StoreStatus)


def cpu_s(process: Process) -> float:
    assert process.child is not None
    fields = Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(process: Process) -> float:
    assert process.child is not None
    lines = Path(f"/proc/{process.child.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def disk_bytes(process: Process) -> int:
    return sum(path.stat().st_size for path in (process.directory / "state").iterdir())


async def in_turns(count: int, jobs: Iterable[object]) -> None:
    """Await many things, `count` at a time."""
    left = iter(jobs)

    async def work() -> None:
        for job in left:
            await job  # type: ignore[misc]

    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(work())


async def fill(address: str, size: Size) -> list[int]:
    """Write keys and register instances; return the hosts' leases."""
    async with Store(address) as store, Services(address) as services:
        keys = range(size.keys)
        batches = [[Put(f"/app/{n}", b"v" * 100) for n in keys[at : at + 100]] for at in range(0, size.keys, 100)]
        await in_turns(4, (store.txn([], batch) for batch in batches))
        leases = [await store.lease_grant(600) for _ in range(size.hosts)]
        one = [
            (Instance(id=f"h{n % size.hosts}-{55000 + n // size.hosts}", service=f"service-{n % size.services}",
                      host=f"10.{n % size.hosts // 250}.{n % size.hosts % 250}.1", port=55000 + n // size.hosts),
             leases[n % size.hosts])
            for n in range(size.instances)
        ]  # fmt: skip
        await in_turns(16, (services.register(instance, lease=lease) for instance, lease in one))
        return leases


async def renew(store: Store, lease: int, delay_s: float, until_s: float, took: list[float]) -> None:
    await asyncio.sleep(delay_s)
    while time.monotonic() < until_s:
        begin = time.monotonic()
        await store.lease_keep_alive(lease)
        took.append(time.monotonic() - begin)
        await asyncio.sleep(RENEW_S)


async def rest(process: Process, leases: list[int], seconds: float) -> tuple[float, float, float, list[float]]:
    """Only renew leases for a while; return log entries, bytes and CPU seconds per second, and what renewals took."""
    took: list[float] = []
    async with Store(process.address) as store:
        await asyncio.sleep(1.0)  # what was begun before (a snapshot, perhaps) is done
        entries, size, used, begin = (
            status(process).applied_index,
            disk_bytes(process),
            cpu_s(process),
            time.monotonic(),
        )
        async with asyncio.TaskGroup() as tasks:
            for number, lease in enumerate(leases):
                delay_s = RENEW_S * number / len(leases)
                tasks.create_task(renew(store, lease, delay_s, begin + seconds, took))
        passed = time.monotonic() - begin
        entries, size = status(process).applied_index - entries, disk_bytes(process) - size
        return entries / passed, size / passed, (cpu_s(process) - used) / passed, took


async def copy(process: Process) -> tuple[float, float]:
    """Return how long an agent takes to have everything, and then a change to reach it (median of 20)."""
    begin = time.monotonic()
    agent = Agent.make([process.address], "agent")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(agent.run())
        while not agent.mirror.is_connected:
            await asyncio.sleep(0.005)
        copied_s, took = time.monotonic() - begin, []
        async with Store(process.address) as store:
            for number in range(20):
                begin = time.monotonic()
                revision = await store.put("/probe", b"%d" % number)
                await agent.mirror.wait_revision(revision, 10.0)
                took.append(time.monotonic() - begin)
        assert agent.mirror.state.key_count == status(process).keys
        task.cancel()
    return copied_s, sorted(took)[len(took) // 2]


async def measure(size: Size, folder: Path, rest_s: float) -> Found:
    with daemon(folder) as process:
        begin = time.monotonic()
        leases = await fill(process.address, size)
        fill_s = time.monotonic() - begin
        entries, grown, used, took = await rest(process, leases, rest_s)
        rss, disk = rss_mib(process), disk_bytes(process) / 2**20
        copied_s, change_s = await copy(process)
        before = status(process)
        process.kill()
        begin = time.monotonic()
        process.start()
        restart_s, restart_cpu_s = time.monotonic() - begin, cpu_s(process)
        after = status(process)
        assert (after.keys, after.instances, after.leases) == (before.keys, before.instances, before.leases)
        assert (after.services, after.instances) == (size.services, size.instances)
    took.sort()
    return Found(
        size, fill_s, entries, grown, len(took) / rest_s,
        took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000,
        used * 100, rss, disk, restart_s, restart_cpu_s, copied_s, change_s * 1000,
    )  # fmt: skip


def show(found: Found) -> str:
    lines = [str(found.size)]
    for name, value in vars(found).items():
        if name != "size":
            lines.append(f"  {name:<22} {value:>10.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.discovery.scale", description=__doc__)
    parser.add_argument("--rest", type=float, default=20.0, metavar="SECONDS", help="how long to look at it at rest")
    parser.add_argument("--parts", type=float, nargs="*", default=[0.01, 0.1, 1.0], help="of the full size")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    for part in given.parts:
        with tempfile.TemporaryDirectory(prefix="hostd-scale-") as name:
            print(show(asyncio.run(measure(FULL.part(part), Path(name), given.rest))), flush=True)


if __name__ == "__main__":
    main()
