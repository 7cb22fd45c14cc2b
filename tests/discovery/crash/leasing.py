"""Holders of leases in one round: a key stays for as long as its lease is kept alive, and goes when it is not.

A holder asks any member, notes when it asked, and may rely on its lease until its time to live after the last call that
was answered with yes, whoever led meanwhile. When the round is over it stops asking, and the key has to go by itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from tests.discovery.crash.store import NotAnswered, Store

TTL_S = 2
"""The shortest that the gateway grants."""
ASK_AGAIN_S = 0.1, 0.5
GONE_S = 20.0


@dataclass
class Holder:
    """One of them; `wrong` is what no lease may do."""

    stores: dict[str, Store]
    prefix: str
    dice: random.Random
    wrong: list[str] = field(default_factory=list)
    answered: int = 0
    _lease: int = 0
    _key: str = ""
    _kept_s: float = 0.0
    _count: int = 0
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Keep nothing alive any more."""
        self._stopping.set()

    async def run(self) -> None:
        """Hold a lease, another one if that ended for good reason, until told to stop; then see the key go."""
        while not self._stopping.is_set():
            try:
                await (self._keep() if self._lease else self._begin())
            except NotAnswered as error:
                if error.is_strange:
                    self.wrong.append(str(error))
            await asyncio.sleep(self.dice.uniform(*ASK_AGAIN_S))

    async def see_it_go(self) -> None:
        """Wait until the key is gone, which it may not be too early, and must be some time."""
        deadline_s = time.monotonic() + GONE_S
        while self._lease and time.monotonic() < deadline_s:
            try:
                await self._look(self._store())
            except NotAnswered as error:
                if error.is_strange:
                    self.wrong.append(str(error))
            await asyncio.sleep(0.05)
        if self._lease:
            self.wrong.append(f"{self._key} is there {GONE_S:g} s after its lease of {TTL_S} s was left alone")

    def _store(self) -> Store:
        return self.stores[self.dice.choice(list(self.stores))]

    async def _begin(self) -> None:
        asked_s = time.monotonic()
        lease = await self._store().grant(TTL_S)
        self._count += 1
        self._key = f"{self.prefix}{self._count}"
        await self._store().put(self._key, b"held", wants_previous=False, lease=lease)
        self._lease, self._kept_s = lease, asked_s
        self.answered += 1

    async def _keep(self) -> None:
        asked_s = time.monotonic()
        if await self._store().keep_alive(self._lease):
            self._kept_s = asked_s
            self.answered += 1
        else:
            self._is_gone("the lease was said to be gone")
            return
        if self.dice.random() < 0.5:
            await self._look(self._store())

    async def _look(self, store: Store) -> None:
        answer = await store.get(self._key, is_raw=True)
        if answer.seen is not None and answer.seen.version == 0:
            self._is_gone("the key was gone")

    def _is_gone(self, what: str) -> None:
        early_s = self._kept_s + TTL_S - time.monotonic()
        if early_s > 0:
            self.wrong.append(f"{self._key}, lease {self._lease}: {what} {early_s:.3f} s too early")
        self._lease = 0
