"""The router's loop with the real discovery daemon and the real HAProxy."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from discovery.client import Services, Store
from discovery.types import Instance
from discovery.wire.errors import ServiceError
from router.client import Routes
from router.config import Settings
from router.daemon import Router
from router.errors import RouteExists, RouteNotFound
from router.types import Route
from tests.router.test_haproxy import backend, free_port, get

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy (Debian package)")
DEADLINE_S = 20.0


@asynccontextmanager
async def running_discovery(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "discovery.daemon", "--state-dir", str(folder / "state")),
        *("--socket", str(folder / "d.sock"), "--raft-address", f"127.0.0.1:{free_port()}", "--member-id", "m"),
    )
    try:
        async with Store(f"unix://{folder}/d.sock") as store, asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(ServiceError):
                    await store.get("/ready")
                    break
                await asyncio.sleep(0.05)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="router-") as name:  # short: a unix socket's path has 107 bytes
        yield Path(name)


@asynccontextmanager
async def running_router(folder: Path, settings: Settings) -> AsyncIterator[Router]:
    address = f"unix://{folder}/d.sock"
    async with Store(address) as store, Services(address) as services:
        router = Router(settings, store, services)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(router.run())
            try:
                yield router
            finally:
                task.cancel()


async def until_status(settings: Settings, host: str, wanted: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with suppress(aiohttp.ClientError):
                if (await get(settings, host))[0] == wanted:
                    return
            await asyncio.sleep(0.02)


async def test_routes_and_instances_are_followed_through_deaths_of_both_neighbours(folder: Path) -> None:
    settings = Settings(directory=folder, http_port=free_port(), https_port=free_port(), bind_address="127.0.0.1")
    address = f"unix://{folder}/d.sock"
    async with backend("web") as instance, Store(address) as store, Services(address) as services:
        async with running_discovery(folder) as discovery, running_router(folder, settings) as router:
            await until_status(settings, "a.test", 404)
            route = await Routes(store).add(Route(id="1", kind="http", service="web", owner="app", domain="a.test"))
            await until_status(settings, "a.test", 503)
            await services.register(instance)
            await until_status(settings, "a.test", 200)

            os.kill(router._haproxy.pid, signal.SIGKILL)
            await until_status(settings, "a.test", 200)

            discovery.kill()
            await discovery.wait()
            assert (await get(settings, "a.test"))[0] == 200
            async with running_discovery(folder):
                assert (await get(settings, "a.test"))[0] == 200
                await services.deregister("web", instance.id)
                await until_status(settings, "a.test", 503)
                await Routes(store).remove(route.id)
                await until_status(settings, "a.test", 404)


async def test_a_route_is_unique_and_free_ports_are_found(folder: Path) -> None:
    async with running_discovery(folder), Store(f"unix://{folder}/d.sock") as store:
        routes = Routes(store)
        first = Route(id="1", kind="http", service="web", owner="one", domain="a.test")
        await routes.add(first)
        with pytest.raises(RouteExists) as caught:
            await routes.add(Route(id="2", kind="http", service="web", owner="two", domain="A.test"))
        assert caught.value.detail["owner"] == "one"
        ports = [(await routes.add(Route(id=f"t{n}", kind="tcp", service="db", owner="two"))).port for n in range(2)]
        assert ports == [3000, 3001]
        assert await routes.remove_owned("two") == 2
        assert [route.id for route in await routes.list()] == ["1"]
        with pytest.raises(RouteNotFound):
            await routes.remove("2")


def test_an_instance_of_an_unrouted_service_changes_nothing() -> None:
    from router.table import Table, build

    assert build([], {"x": [Instance(id="1", service="x", host="10.0.0.1", port=1)]}) == Table()
