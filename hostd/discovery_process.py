"""Keep the discovery daemon of this node running: a plain process that the spawner holds, no job.

A restart of hostd finds it running and leaves it alone, a new spawner adopts it; if it dies it is started
again, with a growing pause. Its own log goes to a file, so that it never waits for hostd. Made by `daemon`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from discovery.wire import clock
from discovery.wire.errors import ServiceError
from hostd.config import ANY_ADDRESS, LEAN_MALLOC, NO_AUTHORITIES, Config
from hostd.errors import JobNotFound
from hostd.runtime import adoption
from hostd.runtime.process import Belongings, Exited, Listing, Spawner, SpawnRequest

log = logging.getLogger(__name__)

NAME = "discovery"
_PAUSE_FIRST_S, _PAUSE_MAX_S, _CALM_S = 0.2, 5.0, 60.0
_END_S = 10.0


def beginning(config: Config) -> tuple[str, ...]:
    """Return what the daemon's command line begins with, whatever the settings of the hostd that started it."""
    return (sys.executable, "-I", "-m", "discovery.daemon", f"--state-dir={config.discovery_state_dir}")


def command(config: Config) -> tuple[str, ...]:
    """Return the command line of the daemon."""
    return (
        *beginning(config),
        f"--socket={config.discovery_socket}",
        f"--dns-address={config.gateway}:53",
        f"--raft-address={config.raft_address}",
        f"--member-id={config.host_id}",
        *_agent_flags(config),
        *_api_flags(config),
    )


def _agent_flags(config: Config) -> tuple[str, ...]:
    """Return what makes the daemon an agent of the store's members, if this host has no vote."""
    if not config.discovery_members:
        return ()
    tls = (f"--tls-ca={config.discovery_ca}", f"--tls-cert={config.discovery_cert}") if config.discovery_cert else ()
    return (f"--members={config.discovery_members}", *tls)


def _api_flags(config: Config) -> tuple[str, ...]:
    """Return what makes the daemon answer over TCP; `hostd.remote` makes the certificate."""
    if not config.discovery_api:
        return ()
    host, _, port = config.discovery_api.rpartition(":")
    return (
        f"--api-listen={config.discovery_api}",
        f"--api-ca={config.tls_dir / 'ca.pem'}",
        f"--api-cert={config.tls_dir / 'server.pem'}",
        f"--api-url=https://{config.host_ip if host == ANY_ADDRESS else host}:{port}",
    )


def log_path(config: Config) -> Path:
    """Return where the daemon's log goes."""
    return config.state_dir / "discovery.log"


class DiscoveryProcess:
    """The one discovery daemon of this node."""

    def __init__(self, config: Config, spawner: Spawner) -> None:
        self._config = config
        self._spawner = spawner
        self._ended = asyncio.Event()
        self._is_wanted = True
        self.pid = 0

    def adopt(self, listing: Listing) -> None:
        """Take over the process that the spawner holds, if it lives."""
        for child in listing.children:
            if child.id == NAME and child.state == "running":
                self.pid = child.pid

    def is_as_wanted(self) -> bool:
        """Tell whether the process has our settings; one that another hostd started keeps its own until it ends."""
        return adoption.has_command(self.pid, command(self._config))

    def on_exit(self, exited: Exited) -> None:
        """Take note that it has ended."""
        if exited.id == NAME and self._is_wanted:
            status = "unknown" if exited.status is None else exited.status
            log.warning("discovery ended with status %s, see %s", status, log_path(self._config))
        if exited.id == NAME:
            self._ended.set()

    async def run(self) -> None:
        """Start it if it does not run, and again whenever it ends."""
        pause_s = _PAUSE_FIRST_S
        while self._is_wanted:
            began = clock.monotonic_s()
            try:
                if not self.pid:
                    await self._start()
                await self._ended.wait()
            except ServiceError as error:
                log.error("discovery cannot be started: %s", error.message)
            self.pid = 0
            if self._is_wanted:
                pause_s = _PAUSE_FIRST_S if clock.monotonic_s() - began > _CALM_S else min(pause_s * 2, _PAUSE_MAX_S)
                await asyncio.sleep(pause_s)

    async def _start(self) -> None:
        await self._spawner.ack(NAME)
        self._ended.clear()
        if living := adoption.find_command(beginning(self._config)):  # of a spawner that is no more
            self.pid = living.pid
            return await self._spawner.adopt(living, NAME, Belongings())
        self._config.discovery_state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        spawned = await self._spawner.spawn(
            SpawnRequest(
                id=NAME,
                args=command(self._config),
                env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **LEAN_MALLOC, **NO_AUTHORITIES},
                log_path=str(log_path(self._config)),
            )
        )
        self.pid = spawned.pid
        spawned.close()

    async def stop(self) -> None:
        """End it and wait until it is gone."""
        self._is_wanted = False
        if not self.pid:
            return
        try:
            await self._spawner.signal(NAME, 15)
            async with asyncio.timeout(_END_S):
                await self._ended.wait()
        except TimeoutError:
            log.warning("discovery does not end, killed")
            await self._spawner.kill(NAME)
        except JobNotFound:
            return
        await self._spawner.ack(NAME)
