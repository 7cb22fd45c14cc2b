"""Watches inside the daemon: who waits for which keys, woken when something of theirs changed.

A watch keeps no queue: it remembers the first revision that it has not seen and reads the
retained changes from there, so a slow consumer costs nothing and is told `Refused` (compacted)
once it is too late. `api`, `services` and `leases` make watches; `Member.on_applied` feeds them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from discovery.operations import UNAVAILABLE, Event, Refused, is_inside
from discovery.state import State

GROUP_BYTES = 1024 * 1024
"""How much a watch hands out at a time, so that one that lags does not make one huge answer."""


class Watch:
    """The changes of one key or range, from a revision on."""

    def __init__(
        self, state: State, key: bytes, range_end: bytes, from_revision: int, woken: asyncio.Event | None = None
    ) -> None:
        self.key = key
        self.range_end = range_end
        self._state = state
        self._unseen: int | None = from_revision if from_revision <= state.revision else None
        self._start = from_revision
        self.is_closed = False
        self._woken = woken or asyncio.Event()
        if self._unseen is not None:
            self._woken.set()

    def tell(self, revision: int) -> None:
        """Note that something of this watch changed at a revision."""
        if self._unseen is None:
            self._unseen = revision
            self._woken.set()

    def take(self) -> list[Event]:
        """Return the changes not seen yet, or the first of them if they are many; no revision is split.

        Raises:
            Refused: they are compacted.
        """
        if self._unseen is None:
            return []
        first, self._unseen = max(self._unseen, self._start), None
        taken: list[Event] = []
        size = 0
        for event in self._state.events_from(first):
            if size > GROUP_BYTES and event.record.mod_revision != taken[-1].record.mod_revision:
                self.tell(event.record.mod_revision)
                break
            if is_inside(event.record.key, self.key, self.range_end):
                taken.append(event)
                size += len(event.record.key) + len(event.record.value) + 100
        return taken

    async def wait(self) -> None:
        """Wait until there may be something to take.

        Raises:
            Refused: the daemon is stopping.
        """
        await self._woken.wait()
        if self.is_closed:
            raise Refused(UNAVAILABLE, "server stopped")
        self._woken.clear()

    def close(self) -> None:
        """Make whoever waits give up."""
        self.is_closed = True
        self._woken.set()

    async def changes(self) -> AsyncIterator[list[Event]]:
        """Yield groups of changes for ever; a revision is never split between two groups.

        Raises:
            Refused: the consumer was too slow, what it wants next is compacted; or the daemon is stopping.
        """
        while True:
            await self.wait()
            if events := self.take():
                yield events


class Watches:
    """All watches of the daemon; exact keys are found by name, ranges one after the other."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._by_key: dict[bytes, set[Watch]] = {}
        self._ranges: set[Watch] = set()

    @property
    def count(self) -> int:
        """Return how many watches there are."""
        return len(self._ranges) + sum(map(len, self._by_key.values()))

    @contextmanager
    def open(self, key: bytes, range_end: bytes, from_revision: int) -> Iterator[Watch]:
        """Watch for as long as the block lasts; the first changes are those at `from_revision`."""
        watch = self.add(key, range_end, from_revision)
        try:
            yield watch
        finally:
            self.remove(watch)

    def add(self, key: bytes, range_end: bytes, from_revision: int, woken: asyncio.Event | None = None) -> Watch:
        """Begin to watch; several watches may share the event that is set when there may be something to take."""
        watch = Watch(self._state, key, range_end, from_revision, woken)
        (self._ranges if range_end else self._by_key.setdefault(key, set())).add(watch)
        return watch

    def remove(self, watch: Watch) -> None:
        """End a watch that `add` has made."""
        if watch.range_end:
            self._ranges.discard(watch)
            return
        members = self._by_key.get(watch.key, set())
        members.discard(watch)
        if not members:
            self._by_key.pop(watch.key, None)

    def on_applied(self, events: list[Event]) -> None:
        """Wake whoever is concerned."""
        for event in events:
            key, revision = event.record.key, event.record.mod_revision
            for watch in self._by_key.get(key, ()):
                watch.tell(revision)
            for watch in self._ranges:
                if is_inside(key, watch.key, watch.range_end):
                    watch.tell(revision)

    def on_reset(self, revision: int) -> None:
        """Have all watches read on from a revision: the state was replaced, they were not told of changes."""
        for watch in [*self._ranges, *(watch for watches in self._by_key.values() for watch in watches)]:
            watch.tell(revision + 1)

    def close(self) -> None:
        """End all watches, so that nobody holds up the daemon's stop."""
        for watch in [*self._ranges, *(watch for watches in self._by_key.values() for watch in watches)]:
            watch.close()
