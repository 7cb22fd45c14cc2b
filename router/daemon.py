"""The router's job: follows routes and instances in discovery and keeps HAProxy serving them.

Run as `python3 -m router.daemon` on the host's network; everything comes from the environment:
`DISCOVERD` (the store's address), `HTTP_PORT`, `HTTPS_PORT`, `BIND_ADDRESS`, `ROUTER_DIR`, `ROUTER_USER`.
When discovery is away the last table goes on; when HAProxy dies it is started again at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from discovery.client import Services, Store
from discovery.types import Instance
from discovery.wire import logging as wire_logging
from discovery.wire.errors import ServiceError
from router.client import PREFIX, Routes, decode
from router.config import Settings
from router.haproxy import Haproxy
from router.table import Table, build
from router.types import Route

log = logging.getLogger(__name__)

RETRY_S = 1.0
SWEEP_S = 10.0
DRAIN_S = 25.0
"""How long requests under way may take once the job is told to stop; its release allows a little more."""


class Router:
    """What is wanted (routes, instances) and the loop that makes HAProxy follow it."""

    def __init__(self, settings: Settings, store: Store, services: Services) -> None:
        self._haproxy = Haproxy(settings)
        self._store = store
        self._services = services
        self._routes: dict[str, Route] = {}
        self._instances: dict[tuple[str, str], Instance] = {}
        self._has_routes = asyncio.Event()
        self._has_instances = asyncio.Event()
        self._changed = asyncio.Event()

    def wanted(self) -> Table:
        """Return the table for what is known now."""
        by_service: dict[str, list[Instance]] = {}
        for instance in self._instances.values():
            by_service.setdefault(instance.service, []).append(instance)
        return build(self._routes.values(), by_service)

    async def run(self) -> None:
        """Follow and serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_routes())
                group.create_task(self._follow_instances())
                await self._has_routes.wait()
                await self._has_instances.wait()
                group.create_task(self._serve())
                group.create_task(self._sweep())
        finally:
            try:
                await self._haproxy.drain(DRAIN_S)
            finally:
                await self._haproxy.stop()

    async def _follow_routes(self) -> None:
        async for event in Routes(self._store).watch():
            if event.is_current:
                self._has_routes.set()
            elif event.value is None:
                self._routes.pop(event.key.removeprefix(PREFIX), None)
            else:
                self._routes[event.key.removeprefix(PREFIX)] = decode(event.value)
            self._changed.set()

    async def _follow_instances(self) -> None:
        async for event in self._services.watch():
            if event.instance is None:
                self._has_instances.set()
            elif event.kind == "down":
                self._instances.pop((event.instance.service, event.instance.id), None)
            else:
                self._instances[event.instance.service, event.instance.id] = event.instance
            self._changed.set()

    async def _serve(self) -> None:
        ended: asyncio.Future[int] | None = None
        while True:
            self._changed.clear()
            try:
                before = self._haproxy.pid
                await self._haproxy.apply(self.wanted())
                if self._haproxy.pid != before:
                    log.info("HAProxy %d serves %d routes", self._haproxy.pid, len(self._routes))
                    if ended is not None:
                        ended.cancel()
                    ended = asyncio.ensure_future(self._haproxy.wait_ended())
            except ServiceError as error:  # one turn: the last table goes on, the next change or second tries again
                log.error("%s %s", error.message, error.hint)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_S):
                        await self._changed.wait()
                continue
            assert ended is not None
            changed = asyncio.ensure_future(self._changed.wait())
            waiting: set[asyncio.Future[Any]] = {changed, ended}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            if ended.done():
                log.warning("HAProxy ended with %s; starting it again", ended.result())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            with contextlib.suppress(ServiceError):
                await self._haproxy.forget_removed()


@contextlib.asynccontextmanager
async def _directory(path: str) -> AsyncIterator[Path]:
    folder = Path(path or tempfile.mkdtemp(prefix="router-"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not path:
            shutil.rmtree(folder, ignore_errors=True)


async def main() -> None:
    """Wire the room together and run until SIGTERM."""
    wire_logging.configure()
    environment = os.environ
    address = environment["DISCOVERD"]
    async with (
        _directory(environment.get("ROUTER_DIR", "")) as folder,
        Store(address) as store,
        Services(address) as services,
    ):
        settings = Settings(
            directory=folder,
            http_port=int(environment.get("HTTP_PORT", "80")),
            https_port=int(environment.get("HTTPS_PORT", "443")),
            bind_address=environment.get("BIND_ADDRESS", ""),
            user=environment.get("ROUTER_USER", ""),
        )
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await Router(settings, store, services).run()


if __name__ == "__main__":
    asyncio.run(main())
