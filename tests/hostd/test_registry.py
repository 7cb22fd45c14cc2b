"""What is wanted is in a real discovery, whatever happens to leases, to hostd, or to discovery itself."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from discovery.client import Services, Store
from discovery.types import Instance
from discovery.wire.errors import Unavailable
from hostd.registry import DiscoveryRegistry
from tests.pace import SLOWNESS

DEADLINE_S = 20.0 * SLOWNESS


def instance(number: int, service: str = "web") -> Instance:
    return Instance(id=f"h-{number}", service=service, host="192.0.2.1", port=number)


class Discovery:
    """A real daemon, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix://{folder}/d.sock"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "discovery.daemon", f"--state-dir={self.folder}/state",
            f"--socket={self.folder}/d.sock", "--member-id=h", stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with Services(self.address) as services:
            await eventually(lambda: _answers(services))

    async def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def found(self, service: str = "web") -> set[str]:
        async with Services(self.address) as services:
            return {each.id for each in await services.instances(service)}


async def _answers(services: Services) -> bool:
    await services.all()
    return True


async def eventually(probe: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if await probe():
                    return
            except Unavailable:
                pass
            await asyncio.sleep(0.05)


@pytest.fixture
async def discovery() -> AsyncIterator[Discovery]:
    with tempfile.TemporaryDirectory(prefix="hostd-reg-") as folder:
        made = Discovery(Path(folder))
        await made.start()
        yield made
        await made.kill()


@asynccontextmanager
async def running(discovery: Discovery, *, old_lease: int = 0) -> AsyncIterator[tuple[DiscoveryRegistry, list[int]]]:
    leases: list[int] = []

    async def save(lease: int) -> None:
        leases.append(lease)

    registry = DiscoveryRegistry(discovery.address, old_lease=old_lease, save_lease=save)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(registry.run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                yield registry, leases
        finally:
            task.cancel()
    await registry.close()


async def test_registered_means_found_and_deregistered_means_gone(discovery: Discovery) -> None:
    async with running(discovery) as (registry, _):
        await registry.register(instance(1))
        assert await discovery.found() == {"h-1"}
        await registry.deregister("web", "h-1")
        assert await discovery.found() == set()
        await registry.deregister("web", "h-1")


async def test_a_lost_lease_is_replaced_and_everything_is_back(discovery: Discovery) -> None:
    async with running(discovery) as (registry, leases):
        await registry.register(instance(1))
        async with Store(discovery.address) as store:
            await store.lease_revoke(leases[0])
        assert await discovery.found() == set()
        await registry.register(instance(2))  # whatever comes next finds out

        async def both() -> bool:
            return await discovery.found() == {"h-1", "h-2"}

        await eventually(both)
        assert len(leases) == 2


async def test_a_killed_discovery_costs_nothing_that_is_wanted(discovery: Discovery) -> None:
    async with running(discovery) as (registry, _):
        await registry.register(instance(1))
        await registry.register(instance(2))
        await discovery.kill()
        await registry.deregister("web", "h-1", timeout_s=0.2)  # returns, though nobody heard it
        await discovery.start()

        async def settled() -> bool:
            return await discovery.found() == {"h-2"}

        await eventually(settled)


async def test_a_restarted_hostd_keeps_what_lives_and_ends_what_died(discovery: Discovery) -> None:
    async with running(discovery) as (registry, leases):
        await registry.register(instance(1))
        await registry.register(instance(2))
    later = DiscoveryRegistry(discovery.address, old_lease=leases[0], save_lease=_forget)
    later.want(instance(1))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(later.run())

        async def settled() -> bool:
            found = await discovery.found()
            assert "h-1" in found  # not for a moment was it away
            return found == {"h-1"}

        await eventually(settled)
        await later.leave()
        assert await discovery.found() == set()
        task.cancel()
    await later.close()


async def _forget(_: int) -> None:
    return


async def test_without_discovery_stopping_does_not_wait_for_ever() -> None:
    registry = DiscoveryRegistry("unix:///nonexistent/d.sock", old_lease=0, save_lease=_forget)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        task = group.create_task(registry.run())
        registry.want(instance(1))
        await registry.deregister("web", "h-1", timeout_s=0.2)
        task.cancel()
    await registry.close()
