"""Elects the one controller that schedules and deploys: whoever holds a key that is bound to a lease.

A holder that ends well gives the key back; of one that was killed, another controller takes it as soon
as the host says that the holder's job has ended, and otherwise when the lease runs out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from controller import keys
from discovery.client import Store
from discovery.errors import LeaseNotFound, TransactionFailed
from discovery.wire import clock
from discovery.wire.errors import ServiceError

log = logging.getLogger(__name__)
TTL_S = 10
RENEW_S = 3.0
RETRY_S = 0.4


class Leadership:
    """The claim of one controller; `holder` names it (its job id, so that others can see it end)."""

    def __init__(self, store: Store, holder: str, *, has_ended: Callable[[str], bool]) -> None:
        self._store = store
        self._holder = holder
        self._has_ended = has_ended
        self._lease = 0

    @asynccontextmanager
    async def held(self) -> AsyncIterator[asyncio.Event]:
        """Wait until elected; the event yielded is set when the claim is lost. Leaving gives it back."""
        await self._win()
        lost = asyncio.Event()
        log.info("%s leads", self._holder)
        try:
            async with asyncio.TaskGroup() as group:
                renewal = group.create_task(self._renew(lost), name="leader lease")
                yield lost
                renewal.cancel()
        finally:
            await self._give_back()

    async def _win(self) -> None:
        while True:
            try:
                if await self._claim():
                    return
            except ServiceError as error:
                log.warning("no election: %s", error.message)
            await asyncio.sleep(RETRY_S)

    async def _claim(self) -> bool:
        held = await self._store.get(keys.LEADER)
        if held is not None:
            holder = held.value.decode()
            if holder != self._holder and not self._has_ended(holder):
                return False
            # ours from before a restart in place, or of a job that its host saw end: nobody acts under it
            try:
                await self._store.remove(keys.LEADER, mod_revision=held.mod_revision)
            except TransactionFailed:
                return False
        lease = await self._store.lease_grant(TTL_S)
        try:
            await self._store.create(keys.LEADER, self._holder.encode(), lease=lease)
        except TransactionFailed:
            await self._store.lease_revoke(lease)
            return False
        self._lease = lease
        return True

    async def _renew(self, lost: asyncio.Event) -> None:
        renewed_at = clock.monotonic_s()
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._store.lease_keep_alive(self._lease)
                held = await self._store.get(keys.LEADER)
                if held is None or held.lease != self._lease:
                    break  # the seat was taken from us: our job was seen to end, or somebody tidied up
                renewed_at = clock.monotonic_s()
            except LeaseNotFound:
                break
            except ServiceError as error:
                log.warning("the leader's lease was not renewed: %s", error.message)
                if clock.monotonic_s() - renewed_at >= TTL_S - RENEW_S:
                    break
        log.warning("%s leads no longer", self._holder)
        lost.set()

    async def _give_back(self) -> None:
        try:
            await self._store.lease_revoke(self._lease)
        except ServiceError as error:
            log.info("the leader's lease was not given back: %s", error.message)
