"""Merges what the hosts keep of an app's output into one stream.

History is merged by time; while following, lines come in the order of arrival, each host's in its own order. A host
that cannot be reached is left out of history and, while following, asked again. Called by `api`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from controller.scheduler.hosts import Host, Hosts
from discovery.wire.errors import ServiceError
from hostd.types import LogLine

log = logging.getLogger(__name__)
_QUEUE_MAX = 1000
_LOOK_FOR_HOSTS_S = 2.0


def labels_of(app_id: str, type: str | None) -> dict[str, str]:
    return {"app": app_id} | ({} if type is None else {"type": type})


async def history(hosts: Hosts, labels: Mapping[str, str], lines: int | None) -> list[LogLine]:
    """Return the last `lines` (all if `None`) of the matching jobs, oldest first."""
    found: list[LogLine] = []
    for host in list(hosts.all.values()):
        try:
            found += [line async for line in host.client.logs(labels, lines=lines)]
        except ServiceError as error:
            log.warning("no log from host %s: %s", host.id, error.message)
    # one host's lines are in order already; the sort is stable, so they stay so
    found.sort(key=lambda line: line.at)
    return found if lines is None else found[len(found) - min(lines, len(found)) :]


@asynccontextmanager
async def following(
    hosts: Hosts, labels: Mapping[str, str], lines: int | None
) -> AsyncIterator[AsyncIterator[LogLine]]:
    """Open a stream of history and then what comes, also from jobs and hosts that come later; it never ends."""
    queue: asyncio.Queue[LogLine] = asyncio.Queue(_QUEUE_MAX)
    async with asyncio.TaskGroup() as group:
        joiner = group.create_task(_join(hosts, labels, lines, queue, group))
        try:
            yield _drain(queue)
        finally:
            joiner.cancel()


async def _drain(queue: asyncio.Queue[LogLine]) -> AsyncIterator[LogLine]:
    while True:
        yield await queue.get()


async def _one(host: Host, labels: Mapping[str, str], lines: int | None) -> AsyncIterator[LogLine]:
    try:
        async for line in host.client.logs(labels, is_following=True, lines=lines):
            yield line
    except ServiceError as error:
        log.warning("log of host %s: %s", host.id, error.message)


async def _join(
    hosts: Hosts,
    labels: Mapping[str, str],
    lines: int | None,
    queue: asyncio.Queue[LogLine],
    group: asyncio.TaskGroup,
) -> None:
    """Follow every host, the ones that are there with history, later ones without."""
    tasks: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            seen = hosts.bell.count
            for id, host in hosts.all.items():
                if id not in tasks or tasks[id].done():
                    tasks[id] = group.create_task(_pour(host, labels, lines if id not in tasks else 0, queue))
            await hosts.bell.wait(seen, _LOOK_FOR_HOSTS_S)
            await asyncio.sleep(0.5)
    finally:
        for task in tasks.values():
            task.cancel()


async def _pour(host: Host, labels: Mapping[str, str], lines: int | None, queue: asyncio.Queue[LogLine]) -> None:
    async for line in _one(host, labels, lines):
        await queue.put(line)
