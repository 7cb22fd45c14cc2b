"""Follows what is wanted: apps, formations, deployments and marks of deleted apps, as one watch of the store.

A record that does not decode is reported and left out, so that one bad value never stops the rest.
Called by `loop` and `deploy`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from controller import keys
from controller.bell import Bell
from controller.scheduler.diff import Group
from controller.types import App, Deployment, Formation
from discovery.client import Store
from discovery.types import WatchEvent
from discovery.wire.errors import ServiceError

log = logging.getLogger(__name__)
_RETRY_S = 0.5


def _decoder(into: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(into).decode


class Wanted:
    """The wanted half of the controller's state, up to date to the last event."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.apps: dict[str, App] = {}
        self.formations: dict[str, Formation] = {}
        self.deployments: dict[str, Deployment] = {}
        self.deleted_apps: dict[str, float] = {}
        self.pins: dict[str, str] = {}
        self.is_current = False
        self.bell = Bell()
        self._tables: Mapping[str, tuple[dict[str, Any], Callable[[bytes], Any]]] = {
            keys.APPS: (self.apps, _decoder(App)),
            keys.FORMATIONS: (self.formations, _decoder(Formation)),
            keys.DEPLOYMENTS: (self.deployments, _decoder(Deployment)),
            keys.DELETED: (self.deleted_apps, _decoder(float)),
            keys.PINS: (self.pins, bytes.decode),
        }

    def counts(self) -> dict[Group, int]:
        """Return how many jobs of each group are wanted."""
        return {
            Group(formation.app_id, formation.release_id, type): count
            for formation in self.formations.values()
            if formation.app_id in self.apps
            for type, count in formation.processes.items()
            if count > 0
        }

    def unfinished(self) -> list[Deployment]:
        return [d for d in self.deployments.values() if d.status in ("pending", "running")]

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                async for event in self._store.watch(keys.WANTED):
                    self._apply(event)
            except ServiceError as error:
                log.warning("cannot follow the store: %s", error.message)
            self.is_current = False
            # the next watch starts with a snapshot, which does not tell what vanished meanwhile
            for table, _ in self._tables.values():
                table.clear()
            await asyncio.sleep(_RETRY_S)

    def _apply(self, event: WatchEvent) -> None:
        if event.is_current:
            self.is_current = True
            self.bell.ring()
            return
        for prefix, (table, decode) in self._tables.items():
            if event.key.startswith(prefix):
                name = event.key.removeprefix(prefix)
                if event.value is None:
                    table.pop(name, None)
                else:
                    self._put(table, name, event, decode)
        if self.is_current:
            self.bell.ring()

    def _put(self, table: dict[str, Any], name: str, event: WatchEvent, decode: Callable[[bytes], Any]) -> None:
        try:
            table[name] = decode(event.value or b"")
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.error("%s does not decode: %s", event.key, error)
