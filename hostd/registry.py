"""Keep this host's instances in discovery: one lease for all of them, renewed while hostd lives.

`register` and `deregister` state what is wanted; `run` makes it so, again and again, through lost
leases and a discovery that comes and goes. A restarted hostd takes a new lease, registers what
lives under it and only then ends the old lease, so that nothing living ever vanishes from
discovery and nothing dead stays. Called by `health`, `lifecycle` and `daemon`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from discovery.client import Services, Store
from discovery.errors import LeaseNotFound
from discovery.types import Instance
from discovery.wire import clock
from discovery.wire.errors import Invalid, ServiceError

log = logging.getLogger(__name__)

LEASE_S = 10
_RENEW_S = 3.0
_RETRY_S = 0.25
_CALL_S = 2.0
_PATIENCE_S = 3.0
"""For so long discovery may be away without a word in the log: it starts in about a second."""


class Registry(Protocol):
    """Where instances are announced."""

    def want(self, instance: Instance) -> None:
        """State that an instance is there, without waiting."""

    async def register(self, instance: Instance) -> None:
        """Announce an instance; returns once it can be found."""

    async def deregister(self, service: str, instance_id: str, *, timeout_s: float = 2.0) -> None:
        """Take an instance back; returns once it is gone, or after `timeout_s` (then it goes later)."""


class NoRegistry:
    """For a host without discovery: every instance counts as announced."""

    def want(self, instance: Instance) -> None:
        return

    async def register(self, instance: Instance) -> None:
        return

    async def deregister(self, service: str, instance_id: str, *, timeout_s: float = 2.0) -> None:
        return


class DiscoveryRegistry:
    """The instances of one host, in discovery."""

    def __init__(
        self,
        address: str,
        *,
        old_lease: int,
        save_lease: Callable[[int], Awaitable[None]],
    ) -> None:
        self._store = Store(address, timeout_s=_CALL_S)
        self._services = Services(address, timeout_s=_CALL_S)
        self._save_lease = save_lease
        self._old_lease = old_lease
        self._lease = 0
        self._wanted: dict[tuple[str, str], Instance] = {}
        self._unwanted: dict[tuple[str, str], None] = {}
        self._registered: set[tuple[str, str]] = set()
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._has_complained = False
        self._is_leaving = False

    async def close(self) -> None:
        """Close the connections; the lease lives on for a restarted hostd to take over."""
        await self._services.close()
        await self._store.close()

    def want(self, instance: Instance) -> None:
        """State that an instance is there, without waiting: for what was up before a restart of hostd."""
        key = (instance.service, instance.id)
        self._wanted[key] = instance
        self._unwanted.pop(key, None)
        self._registered.discard(key)
        self._touch()

    async def register(self, instance: Instance) -> None:
        """Announce an instance; returns once it can be found."""
        key = (instance.service, instance.id)
        if self._wanted.get(key) != instance:
            self.want(instance)
        while key in self._wanted and key not in self._registered:
            await self._settled_once()

    async def deregister(self, service: str, instance_id: str, *, timeout_s: float = 2.0) -> None:
        """Take an instance back; returns once it is gone, or after `timeout_s` (then it goes later)."""
        key = (service, instance_id)
        if self._wanted.pop(key, None) is None:
            return
        self._registered.discard(key)
        self._unwanted[key] = None
        self._touch()
        try:
            async with asyncio.timeout(timeout_s):
                while key in self._unwanted:
                    await self._settled_once()
        except TimeoutError:
            log.warning("discovery did not take back %s %s in %g s; trying on", service, instance_id, timeout_s)

    def _touch(self) -> None:
        self._changed.set()

    async def _settled_once(self) -> None:
        await self._settled.wait()

    def _settle(self) -> None:
        settled, self._settled = self._settled, asyncio.Event()
        settled.set()

    async def run(self) -> None:
        """Hold the lease and make discovery what is wanted, for ever."""
        failing_since = 0.0
        while not self._is_leaving:
            try:
                await self._renew()
                await self._converge()
                if failing_since and clock.monotonic_s() - failing_since > _PATIENCE_S:
                    log.info("discovery answers again")
                failing_since = 0.0
            except ServiceError as error:
                failing_since = self._complain(error, failing_since)
            self._settle()
            try:
                async with asyncio.timeout(_RETRY_S if failing_since else _RENEW_S):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()
            if failing_since:
                await asyncio.sleep(_RETRY_S)

    def _complain(self, error: ServiceError, since: float) -> float:
        """Say once that discovery is away, if it stays away; return since when it is."""
        now = clock.monotonic_s()
        if since and now - since > _PATIENCE_S and not self._has_complained:
            log.warning("discovery: %s; trying on", error.message)
        self._has_complained = bool(since) and now - since > _PATIENCE_S
        return since or now

    async def _renew(self) -> None:
        if self._lease:
            try:
                await self._store.lease_keep_alive(self._lease)
                return
            except LeaseNotFound:
                log.warning("the lease of this host has run out, registering again")
                self._registered.clear()
                self._lease = 0
        lease = await self._store.lease_grant(LEASE_S)
        await self._save_lease(lease)
        self._lease = lease

    async def _converge(self) -> None:
        for service, instance_id in list(self._unwanted):
            await self._services.deregister(service, instance_id)
            self._unwanted.pop((service, instance_id), None)
            self._settle()
        for key, instance in list(self._wanted.items()):
            if key in self._registered or self._wanted.get(key) is not instance:
                continue
            try:
                await self._services.register(instance, lease=self._lease)
            except LeaseNotFound:
                self._lease = 0
                self._registered.clear()
                self._touch()
                return
            except Invalid as error:  # it will never be taken: it must not be in the way of the others
                log.error("discovery refuses %s %s for good: %s", instance.service, instance.id, error.message)
                self._wanted.pop(key, None)
                self._settle()
                continue
            if self._wanted.get(key) is instance:
                self._registered.add(key)
            self._settle()
        if self._old_lease:
            await self._end_old_lease()

    async def _end_old_lease(self) -> None:
        old, self._old_lease = self._old_lease, 0
        try:
            await self._store.lease_revoke(old)
        except LeaseNotFound:
            return
        except ServiceError:
            self._old_lease = old
            raise

    async def leave(self) -> None:
        """End the lease: everything of this host vanishes from discovery."""
        self._wanted.clear()
        self._is_leaving = True
        if self._lease:
            try:
                await self._store.lease_revoke(self._lease)
            except ServiceError as error:
                log.info("the lease will run out by itself: %s", error.message)
