"""Watchers of one round: they see every change once and in order, whichever member they ask and whatever happens to it.

Each follows all keys from the revision at which the round began, goes to another member when the dice say so or its
connection ends, and reads on after the last revision that it got. `differences` then holds what each has seen against
what the healed cluster says of the same revisions.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.discovery.crash.history import Operation
from tests.discovery.crash.revisions import has_changed
from tests.discovery.crash.store import NotAnswered, Store

STAY_S = 0.3, 1.5
END_S = 20.0


class Change(msgspec.Struct, frozen=True):
    """One event of a watch."""

    revision: int
    key: str
    version: int
    value: str


@dataclass
class Watcher:
    """One of them; `wrong` is what no watch may do."""

    stores: dict[str, Store]
    first: int
    dice: random.Random
    seen: list[Change] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.seen[-1].revision if self.seen else self.first - 1

    async def run(self) -> None:
        """Follow, at one member after the other; until cancelled."""
        while True:
            name = self.dice.choice(list(self.stores))
            try:
                async with asyncio.timeout(self.dice.uniform(*STAY_S)):
                    await self._follow(name)
            except TimeoutError:
                pass
            except NotAnswered as error:
                if error.is_strange:
                    self.wrong.append(str(error))
            await asyncio.sleep(self.dice.uniform(0.0, 0.05))

    async def reach(self, revision: int) -> None:
        """Wait until this one has seen a revision; say if that takes too long."""
        deadline_s = time.monotonic() + END_S
        while self.last < revision:
            if time.monotonic() > deadline_s:
                self.wrong.append(f"got no further than revision {self.last} of {revision} in {END_S:g} s")
                return
            await asyncio.sleep(0.02)

    async def _follow(self, name: str) -> None:
        async with aclosing(changes(self.stores[name], self.last + 1)) as groups:
            async for group in groups:
                revisions = [self.last, *(change.revision for change in group)]
                if revisions != sorted(revisions) or revisions[0] == revisions[1]:
                    self.wrong.append(f"a watch at {name} told {revisions[1:]} after {revisions[0]}")
                self.seen += group


async def changes(store: Store, first: int) -> AsyncGenerator[list[Change], None]:
    """Yield the changes from a revision on, as a member tells of them.

    Raises:
        NotAnswered: the watch has ended; `is_strange` if as no watch may.
    """
    wanted = {"key": _EVERYTHING, "range_end": _EVERYTHING, "start_revision": str(first)}
    async with aclosing(store.lines("watch", {"create_request": wanted})) as lines:
        async for line in lines:
            result = line.get("result", {})
            if result.get("canceled") or not result:
                raise NotAnswered("unknown", f"a watch from {first} got {line}", is_strange=True)
            if group := [_change(event) for event in result.get("events", [])]:
                yield group


async def all_of(store: Store, first: int, last: int) -> list[Change]:
    """Return the changes of these revisions."""
    found: list[Change] = []
    if last < first:
        return found
    async with asyncio.timeout(END_S), aclosing(changes(store, first)) as groups:
        async for group in groups:
            found += [change for change in group if change.revision <= last]
            if group[-1].revision >= last:
                break
    return found


def differences(watchers: Iterable[Watcher], truth: list[Change], history: Iterable[Operation]) -> list[str]:
    """Return what watchers missed, or saw and is not so, and which answered changes are in no watch."""
    found: list[str] = []
    last = truth[-1].revision if truth else 0
    for number, watcher in enumerate(watchers):
        found += [f"watcher {number}: {text}" for text in watcher.wrong]
        seen = [change for change in watcher.seen if change.revision <= last]
        if seen != truth:
            missed, invented = [c for c in truth if c not in set(seen)], [c for c in seen if c not in set(truth)]
            found.append(
                f"watcher {number} saw {len(seen)} changes of {len(truth)}: missed {missed[:3]},"
                f" saw what is not so {invented[:3]}"
            )
    told = {(change.revision, change.key) for change in truth}
    for operation in history:
        is_done = operation.outcome == "ok" and operation.revision and has_changed(operation)
        if is_done and operation.revision <= last and (operation.revision, operation.key) not in told:
            found.append(f"no watch tells of {operation}")
    return found


_EVERYTHING = base64.b64encode(b"\0").decode()


def _change(event: dict[str, Any]) -> Change:
    kv = event["kv"]
    key, value = base64.b64decode(kv["key"]).decode(), base64.b64decode(kv.get("value", ""))
    return Change(int(kv["mod_revision"]), key, int(kv.get("version", 0)), value[:60].decode(errors="replace"))
