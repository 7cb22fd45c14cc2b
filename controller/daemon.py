"""Runs one controller: `python3 -m controller.daemon`, a job like any other. Wiring only.

Everything comes from the environment: CONTROLLER_KEY (comma list of keys), DISCOVERD (discovery's
socket), PORT, CLUSTER_DOMAIN, GIT_ADDRESS. Any number may run; each answers the API, and the one
that is elected schedules and deploys. Losing the election or discovery never ends the API.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from controller.api import Api
from controller.auth import Doorkeeper, parse_keys
from controller.deploy import Deployer
from controller.jobs import Jobs
from controller.leader import Leadership
from controller.scheduler.hosts import Hosts
from controller.scheduler.loop import Scheduler
from controller.scheduler.wanted import Wanted
from controller.store import ControllerStore
from discovery.client import Services, Store
from discovery.wire.errors import Invalid
from discovery.wire.logging import configure
from discovery.wire.serve import listen_tcp
from hostd.types import ENDED
from router.client import Routes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a controller is told by its environment."""

    keys: tuple[str, ...]
    discoverd: str
    port: int
    domain: str = ""
    git_address: str = ""
    bind_address: str = "0.0.0.0"  # noqa: S104 — the job's own namespace; hostd's firewall decides who gets in
    holder: str = ""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the settings.

    Raises:
        Invalid: one is missing or nonsense; names it.
    """
    if missing := [name for name in ("CONTROLLER_KEY", "DISCOVERD", "PORT") if not environment.get(name)]:
        raise Invalid(f"{missing[0]} is not set", hint="the controller is started by hostd bootstrap")
    if not environment["PORT"].isdecimal():
        raise Invalid(f"PORT={environment['PORT']!r} is no port")
    return Settings(
        keys=parse_keys(environment["CONTROLLER_KEY"]),
        discoverd=environment["DISCOVERD"],
        port=int(environment["PORT"]),
        domain=environment.get("CLUSTER_DOMAIN", ""),
        git_address=environment.get("GIT_ADDRESS", ""),
        bind_address=environment.get("BIND_ADDRESS", "0.0.0.0"),  # noqa: S104 — as above
        holder=environment.get("CONTROLLER_ID") or socket.gethostname(),
    )


class Controller:
    """One controller's parts, put together."""

    def __init__(self, settings: Settings, store: Store, services: Services) -> None:
        self._settings = settings
        self.store = ControllerStore(store)
        self.routes = Routes(store)
        self.hosts = Hosts(services)
        self.wanted = Wanted(store)
        self.jobs = Jobs(self.store, self.hosts)
        self.api = Api(
            self.store,
            self.hosts,
            self.jobs,
            self.routes,
            domain=settings.domain,
            git_address=settings.git_address,
        )
        self.leadership = Leadership(store, settings.holder, has_ended=self._has_ended)

    def _has_ended(self, job_id: str) -> bool:
        job = self.hosts.job(job_id)
        return job is not None and job.status in ENDED

    async def run(self, *, started: asyncio.Event | None = None) -> None:
        """Serve and, when elected, act; until cancelled."""
        application = self.api.application(Doorkeeper(self._settings.keys))
        async with asyncio.TaskGroup() as group:
            group.create_task(self.hosts.run(), name="hosts")
            group.create_task(self.wanted.run(), name="wanted")
            async with listen_tcp(application, self._settings.bind_address, self._settings.port) as port:
                log.info("controller answers on port %d", port)
                self.port = port
                gc.collect()
                gc.freeze()  # what is here now stays; later collections need not look at it
                if started is not None:
                    started.set()
                while True:
                    await self._lead()

    async def _lead(self) -> None:
        """Act for as long as elected."""
        async with self.leadership.held() as lost, asyncio.TaskGroup() as group:
            scheduler = Scheduler(self.store, self.wanted, self.hosts, self.routes)
            deployer = Deployer(self.store, self.wanted, self.hosts, scheduler)
            acting = [
                group.create_task(scheduler.run(), name="scheduler"),
                group.create_task(deployer.run(), name="deployer"),
            ]
            await lost.wait()
            for task in acting:
                task.cancel()


async def serve(settings: Settings) -> None:
    """Run a controller until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store(settings.discoverd))
        services = await stack.enter_async_context(Services(settings.discoverd))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(Controller(settings, store, services).run(), name="controller")
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, running.cancel)


def main() -> None:
    """Start the daemon from the environment."""
    configure()
    try:
        settings = read_settings(os.environ)
    except Invalid as error:
        raise SystemExit(f"controller: {error.message} ({error.hint})") from error
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
