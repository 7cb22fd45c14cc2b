"""Starts one-off jobs and shows, stops, attaches to and waits for the jobs of an app.

Jobs are not stored here: hosts own them, and `scheduler.hosts` knows what they say. Called by `api`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import WSMsgType, web

from controller import admit, translate
from controller.errors import JobNotFound, NoHosts, NoRelease
from controller.scheduler.hosts import Hosts
from controller.scheduler.place import place
from controller.store import ControllerStore
from controller.types import ActualJob, App, NewJob, Release
from discovery.wire import clock
from discovery.wire.errors import NotFound, ServiceError, Unavailable
from hostd.types import ENDED, Job, JobSpec

HOSTS_KNOWN_S = 10.0
_LOOK_AGAIN_S = 30.0
_START_AGAIN_S = 0.25


class Jobs:
    """The jobs of the cluster's apps."""

    def __init__(self, store: ControllerStore, hosts: Hosts) -> None:
        self._store = store
        self._hosts = hosts

    async def ready(self) -> None:
        """Wait until the hosts are known, as they are a moment after the controller started.

        Raises:
            NoHosts: they still are not.
        """

        def is_known() -> bool:
            return bool(self._hosts.all) and self._hosts.is_known(HOSTS_KNOWN_S)

        if not is_known() and not await self._hosts.bell.until(is_known, HOSTS_KNOWN_S):
            raise NoHosts("the cluster has no host that answers", hint="hostd status, on each host")

    async def _reachable(self) -> None:
        """Wait a while for a host that takes jobs: one that just restarted is followed again in a second or two."""
        await self.ready()
        await self._hosts.bell.until(lambda: any(h.is_current for h in self._hosts.all.values()), HOSTS_KNOWN_S)

    async def of_app(self, app: App, *, is_all: bool) -> list[ActualJob]:
        """List an app's jobs, oldest first."""
        await self.ready()
        jobs = [job for job in self._hosts.jobs() if job.spec.labels.get("app") == app.id]
        jobs = [job for job in jobs if is_all or job.status not in ENDED]
        return [translate.actual_job(job) for job in sorted(jobs, key=lambda j: (j.created_at, j.spec.id))]

    async def find(self, app: App, job_id: str) -> Job:
        """Return a job of the app; one that another controller started a moment ago is asked for.

        Raises:
            JobNotFound: the app has none such.
        """
        await self.ready()
        job = self._hosts.job(job_id) or await self._asked(job_id)
        if job is None or job.spec.labels.get("app") != app.id:
            raise JobNotFound(f"{app.name} has no job {job_id[:80]!r}", hint="flynn ps lists the jobs of an app")
        return job

    async def show(self, app: App, job_id: str) -> ActualJob:
        return translate.actual_job(await self.find(app, job_id))

    async def _asked(self, job_id: str) -> Job | None:
        for host in list(self._hosts.all.values()):
            try:
                return await host.client.job(job_id)
            except ServiceError:
                continue
        return None

    async def run(self, app: App, new: NewJob) -> ActualJob:
        """Start a one-off job.

        Raises:
            NoRelease: the app has none, and no artifacts were given. NoHosts: none can take it. Unavailable: the host
            that was to run it does not answer.
        """
        admit.job(new)
        release = await self._release(app, new)
        ids = new.artifact_ids or (release.artifact_ids if release else ())
        if not ids:
            raise NoRelease(f"{app.name} has no release to run", hint="git push flynn master makes one")
        artifacts = await self._store.artifacts(ids)
        await self._reachable()
        volumes = [volume.name for volume in new.volumes]
        pins = {name: host for name in volumes if (host := await self._store.pinned(name))}
        host_id = place((app.id, ""), self._hosts.loads(), volumes=volumes, pins=pins)
        if host_id is None:
            raise NoHosts("no host can take the job now", hint="hostd status, on each host")
        for name in volumes:
            if name not in pins:
                await self._store.pin_volume(name, host_id)
        spec = translate.one_off_spec(
            app=app,
            release=release,
            new=new,
            artifacts=artifacts,
            place=self._hosts.all[host_id].place,
            id=translate.job_id(app.name, "run", secrets.token_hex(5)),
        )
        return translate.actual_job(await self._start(host_id, spec))

    async def _start(self, host_id: str, spec: JobSpec) -> Job:
        """Start a job; ask a host that restarts again for a while, as a start is idempotent by its id."""
        until_s = clock.monotonic_s() + HOSTS_KNOWN_S
        while True:
            try:
                return await self._hosts.start(host_id, spec)
            except Unavailable:
                if clock.monotonic_s() >= until_s:
                    raise
                await asyncio.sleep(_START_AGAIN_S)

    async def _release(self, app: App, new: NewJob) -> Release | None:
        release_id = new.release_id or app.release_id
        return await self._store.release(app.id, release_id) if release_id else None

    async def stop(self, app: App, job_id: str) -> None:
        job = await self.find(app, job_id)
        try:
            await self._hosts.stop(job.spec.id)
        except JobNotFound:
            await self._hosts.all[job.host_id].client.stop(job.spec.id)

    async def wait(self, app: App, job_id: str) -> AsyncIterator[ActualJob]:
        """Yield the job now and after each change; ends once it has ended or is forgotten."""
        job: Job | None = await self.find(app, job_id)
        shown: ActualJob | None = None
        while job is not None:
            seen = self._hosts.bell.count
            actual = translate.actual_job(job)
            if actual != shown:
                shown = actual
                yield actual
            if job.status in ENDED:
                return
            await self._hosts.bell.wait(seen, _LOOK_AGAIN_S)
            job = self._hosts.job(job_id) or await self._asked(job_id)

    async def attach(self, app: App, job_id: str, client: web.WebSocketResponse, *, has_logs: bool) -> None:
        """Relay an attach connection to the job's host, both ways, until either side ends it."""
        job = await self.find(app, job_id)
        host = self._hosts.all.get(job.host_id)
        if host is None:
            raise NotFound(f"host {job.host_id} is gone")
        async with host.client.attach(job_id, has_logs=has_logs) as upstream:
            await _relay_both(client, upstream)


async def _relay_both(client: web.WebSocketResponse, host: aiohttp.ClientWebSocketResponse) -> None:
    """Carry messages both ways; the host's end is the end (its last frame is the exit), so is the client's."""

    async def relay(source: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, to: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:  # fmt: skip  # noqa: E501
        try:
            async for message in source:
                if message.type is WSMsgType.BINARY:
                    await to.send_bytes(message.data)
        except (ConnectionResetError, aiohttp.ClientError):
            pass  # the other direction notices too

    async with asyncio.TaskGroup() as group:
        tasks = {group.create_task(relay(client, host)), group.create_task(relay(host, client))}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
