"""Follows every host's jobs, so that the controller knows what runs without asking.

Hosts are the instances of service `hostd`; each is watched (snapshot, current, changes) and watched
again when the connection breaks. Hosts own the truth about jobs: nothing of it is stored twice.
A host that cannot be reached keeps its last known jobs until discovery says that it is gone.
Called by `loop`, `deploy`, `jobs` and `logs`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

from controller.bell import Bell
from controller.errors import JobNotFound
from controller.scheduler.place import HostLoad, Kind, with_job
from controller.translate import Place, place_of
from discovery.client import Services
from discovery.types import Instance
from discovery.wire import clock
from discovery.wire.errors import NotFound, ServiceError
from hostd.client import HostClient
from hostd.types import ENDED, Job, JobEvent, JobSpec, Port

log = logging.getLogger(__name__)
SERVICE = "hostd"
_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_REFUSED_MAX = 100


class Host:
    """One host as seen last. `is_current` while its watch is connected and past the snapshot."""

    def __init__(self, instance: Instance, client: HostClient) -> None:
        self.instance = instance
        self.place: Place = place_of(instance)
        self.client = client
        self.jobs: dict[str, Job] = {}
        self.is_current = False
        self.was_current = False
        self.since = clock.monotonic_s()

    @property
    def id(self) -> str:
        return self.instance.id


class Listener(Protocol):
    """Told of every change of a job; `before` is `None` when it is new to us, `is_live` false in a snapshot."""

    def __call__(self, before: Job | None, job: Job, *, is_live: bool) -> None: ...


class Hosts:
    """All hosts of the cluster and their jobs."""

    def __init__(self, services: Services, *, connect: Callable[[str], HostClient] = HostClient) -> None:
        self._services = services
        self._connect = connect
        self._hosts: dict[str, Host] = {}
        self._is_listed = False
        self._refused: deque[Job] = deque(maxlen=_REFUSED_MAX)
        self._told: set[str] = set()
        self.bell = Bell()
        self.listeners: list[Listener] = []

    # what is known

    @property
    def all(self) -> Mapping[str, Host]:
        return self._hosts

    def is_known(self, patience_s: float) -> bool:
        """Return whether every host was seen once, so that nothing would be started twice.

        A host that is registered but never answered holds everything up for `patience_s` only.
        """
        now = clock.monotonic_s()
        return self._is_listed and all(
            host.was_current or now - host.since >= patience_s for host in self._hosts.values()
        )

    def jobs(self) -> Iterator[Job]:
        """Yield every job that hosts remember, and the newest that they refused."""
        for host in self._hosts.values():
            yield from host.jobs.values()
        yield from self._refused

    def job(self, job_id: str) -> Job | None:
        for host in self._hosts.values():
            if (found := host.jobs.get(job_id)) is not None:
                return found
        return next((job for job in self._refused if job.spec.id == job_id), None)

    def host_of(self, job_id: str) -> Host:
        """Return the host that has a job. Raises `JobNotFound`."""
        for host in self._hosts.values():
            if job_id in host.jobs:
                return host
        raise JobNotFound(f"no job {job_id[:80]!r}", hint="flynn ps lists the jobs of an app")

    def was_told(self, job_id: str) -> bool:
        """Return whether somebody asked for the job's end, as far as we saw."""
        return job_id in self._told

    def loads(self, extra: Iterable[tuple[str, Kind, Collection[int]]] = ()) -> list[HostLoad]:
        """Return what each reachable host runs, plus `extra` jobs (host, kind, fixed ports) that are on their way."""
        loads = {host.id: HostLoad(host.id) for host in self._hosts.values() if host.is_current}
        for host in self._hosts.values():
            for job in host.jobs.values():
                if host.id in loads and job.status not in ENDED:
                    labels = job.spec.labels
                    kind = (labels.get("app", ""), labels.get("type", ""))
                    loads[host.id] = with_job(loads[host.id], kind, fixed_numbers(job.spec.ports))
        for host_id, kind, numbers in extra:
            if host_id in loads:
                loads[host_id] = with_job(loads[host_id], kind, numbers)
        return list(loads.values())

    # acting

    async def start(self, host_id: str, spec: JobSpec) -> Job:
        """Start a job on a host and know of it at once. Raises what hostd raised."""
        host = self._hosts.get(host_id)
        if host is None:
            raise NotFound(f"host {host_id} is gone", retry=True)
        job = await host.client.start(spec)
        if spec.id not in host.jobs:
            self._note(host, job)
        return self.job(spec.id) or job

    async def stop(self, job_id: str, *, is_waiting: bool = False) -> None:
        """Stop a job. Raises `JobNotFound`, or what hostd raised."""
        host = self.host_of(job_id)
        job = await host.client.stop(job_id, is_waiting=is_waiting)
        known = host.jobs.get(job_id)
        if known is not None and known.status not in ENDED and known.status != "stopping":
            self._note(host, job)

    def refuse(self, job: Job) -> None:
        """Remember a job that its host would not take, so that people and the deployer see why."""
        self._refused.append(job)
        self._tell(None, job, is_live=True)

    # following

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            tasks: dict[str, asyncio.Task[None]] = {}
            pause = iter(_RETRY_S)
            while True:
                try:
                    async for event in self._services.watch(SERVICE):
                        pause = iter(_RETRY_S)
                        if event.kind == "current":
                            self._is_listed = True
                            self.bell.ring()
                        elif event.instance is not None:
                            await self._host_changed(event.kind, event.instance, tasks, group)
                except ServiceError as error:
                    log.warning("cannot follow the hosts: %s", error.message)
                await asyncio.sleep(next(pause, _RETRY_S[-1]))

    async def _host_changed(
        self, kind: str, instance: Instance, tasks: dict[str, asyncio.Task[None]], group: asyncio.TaskGroup
    ) -> None:
        known = self._hosts.get(instance.id)
        url = instance.meta.get("url", "")
        if kind != "down" and known is not None and known.client.address == url:
            known.instance, known.place = instance, place_of(instance)
            return
        if known is not None:
            log.info("host %s is gone", instance.id)
            await _cancel(tasks.pop(instance.id))
            del self._hosts[instance.id]
            await known.client.close()
        if kind != "down" and url:
            log.info("host %s at %s", instance.id, url)
            host = Host(instance, self._connect(url))
            self._hosts[instance.id] = host
            tasks[instance.id] = group.create_task(self._follow(host), name=f"host {instance.id}")
        self.bell.ring()

    async def _follow(self, host: Host) -> None:
        attempt = 0
        while True:
            try:
                async for event in self._events(host):
                    attempt = 0
                    self._apply(host, event)
                reason = "it ended the stream"
            except ServiceError as error:
                reason = error.message
            if host.is_current or attempt == 0:
                log.warning("host %s: %s", host.id, reason)
            host.is_current = False
            self.bell.ring()
            await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            attempt += 1

    async def _events(self, host: Host) -> AsyncIterator[JobEvent]:
        """Yield changes, the snapshot folded into them: a job that it lacks is `removed`."""
        missing: set[str] | None = set(host.jobs)
        async for event in host.client.events():
            if missing is not None and event.job is not None:
                missing.discard(event.job.spec.id)
            if missing is not None and event.kind == "current":
                for job_id in missing:
                    yield JobEvent(sequence=event.sequence, kind="removed", at=event.at, job=host.jobs[job_id])
                missing = None
            yield event

    def _apply(self, host: Host, event: JobEvent) -> None:
        if event.kind == "current":
            host.is_current = host.was_current = True
            self.bell.ring()
        elif event.job is not None and event.kind == "removed":
            host.jobs.pop(event.job.spec.id, None)
            self._told.discard(event.job.spec.id)
            self.bell.ring()
        elif event.job is not None:
            self._note(host, event.job, is_live=host.was_current)

    def _note(self, host: Host, job: Job, *, is_live: bool = True) -> None:
        before = host.jobs.get(job.spec.id)
        if before == job or (before is not None and before.status in ENDED and job.status not in ENDED):
            return  # nothing new, or an answer that was overtaken by the stream
        host.jobs[job.spec.id] = job
        if job.status == "stopping":
            self._told.add(job.spec.id)
        self._tell(before, job, is_live=is_live)

    def _tell(self, before: Job | None, job: Job, *, is_live: bool) -> None:
        for listener in self.listeners:
            listener(before, job, is_live=is_live)
        self.bell.ring()


def fixed_numbers(ports: Iterable[Port]) -> frozenset[int]:
    """Return the port numbers that a job insists on having for itself."""
    return frozenset(port.number for port in ports if port.number and not port.is_shared)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
