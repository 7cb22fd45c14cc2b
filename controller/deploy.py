"""Moves an app from one release to the next, process by process: new up and healthy, then old down.

What is done lies in the formations of both releases, so a controller that takes over in the middle
goes on from there. A new job that ends, or is not up in time, ends the deployment: the old release
is scaled back, waited for, and the new one removed. Types with a fixed port (there can be only one
on a host) go the other way round: old down, then new up. `plan` is pure; the rest is called by `daemon`
in the leading controller, `begin` by `api`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from controller import translate
from controller.deployments import Deployments
from controller.errors import AppNotFound, DeploymentInProgress, DeploymentNotFound
from controller.scheduler.diff import Group
from controller.scheduler.hosts import Hosts, fixed_numbers
from controller.scheduler.loop import Scheduler, group_of
from controller.scheduler.wanted import Wanted
from controller.store import ControllerStore
from controller.types import App, Deployment, Formation, Release
from discovery.wire import clock
from discovery.wire.errors import Conflict, NotFound, ServiceError
from hostd.types import ENDED, Job

log = logging.getLogger(__name__)
STEADY_S = 1.0
"""A job that registers no service counts as up once it has run for this long."""
RETURN_TIMEOUT_S = 60.0
RETRY_S = 1.0
LOOK_S = 0.25
LAST_LINES = 10
BEGIN_TRIES = 10


class StepDidNotWork(Exception):
    """A step of a deployment failed; the text is for the person who deploys."""


def plan(app: App, release: Release, formations: Iterable[Formation], *, id: str, timeout_s: float, now_s: float) -> Deployment:  # fmt: skip  # noqa: E501
    """Work out what a deployment has to reach: the counts of the old release, for the types that the new one has."""
    by_release = {formation.release_id: formation.processes for formation in formations}
    old_id = app.release_id if app.release_id != release.id else ""
    old = by_release.get(old_id, {}) if old_id else {}
    already = by_release.get(release.id, {})
    wanted = {
        type: max(old.get(type, 0), already.get(type, 0)) for type in release.processes if type in {**old, **already}
    }
    return Deployment(
        id=id,
        app_id=app.id,
        old_release_id=old_id,
        new_release_id=release.id,
        status="pending",
        timeout_s=timeout_s or app.deploy_timeout_s,
        processes={type: count for type, count in wanted.items() if count},
        old_processes=old,
        created_at=now_s,
    )


def is_instant(deployment: Deployment) -> bool:
    """Return whether nothing runs that would have to be replaced."""
    return not any(deployment.old_processes.values())


async def begin(store: ControllerStore, app: App, release: Release, *, id: str, timeout_s: float) -> Deployment:
    """Start a deployment; with nothing running it is complete at once.

    Raises:
        DeploymentInProgress: one runs already.
    """
    deployments = Deployments(store)
    for _ in range(BEGIN_TRIES):
        app, formations, unchanged = await deployments.base_of(app.id, release.id)
        deployment = plan(app, release, formations, id=id, timeout_s=timeout_s, now_s=clock.now_s())
        if is_instant(deployment):
            ended = msgspec.structs.replace(deployment, status="complete", finished_at=deployment.created_at)
            if await deployments.complete_at_once(app, ended, unchanged):
                return ended
        elif await deployments.begin(deployment, unchanged):
            return deployment
        # somebody scaled, or set a release, meanwhile: plan again
    raise Conflict("this app changes too fast", retry=True)


class Deployer:
    """Carries out the deployments that are recorded, each app's one at a time, apps side by side."""

    def __init__(self, store: ControllerStore, wanted: Wanted, hosts: Hosts, scheduler: Scheduler) -> None:
        self._store = store
        self._deployments = Deployments(store)
        self._wanted = wanted
        self._hosts = hosts
        self._scheduler = scheduler

    async def run(self) -> None:
        """Deploy until cancelled."""
        running: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                seen = self._wanted.bell.count
                for deployment in self._wanted.unfinished() if self._wanted.is_current else []:
                    if deployment.id not in running:
                        running[deployment.id] = group.create_task(self._carry(deployment), name="deployment")
                for id in [id for id, task in running.items() if task.done() and id not in self._wanted.deployments]:
                    del running[id]
                await self._wanted.bell.wait(seen, 10.0)

    async def _carry(self, deployment: Deployment) -> None:
        """Carry out one deployment; what cannot be reached is tried again, what is gone is let go."""
        while True:
            try:
                await Rollout(self._store, self._hosts, self._scheduler, deployment).carry_out()
                return
            except (AppNotFound, DeploymentNotFound, DeploymentInProgress) as error:
                log.info("deployment %s ends: %s", deployment.id, error.message)
                return
            except ServiceError as error:
                log.warning("deployment %s waits: %s", deployment.id, error.message)
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("deployment %s broke", deployment.id)
                await self._deployments.finish(deployment, error="internal error; the controller's log has it")
                return


class Rollout:
    """One deployment on its way."""

    def __init__(self, store: ControllerStore, hosts: Hosts, scheduler: Scheduler, deployment: Deployment) -> None:
        self._store = store
        self._deployments = Deployments(store)
        self._hosts = hosts
        self._scheduler = scheduler
        self._deployment = deployment
        self._told: set[tuple[str, str]] = set()

    async def carry_out(self) -> None:
        """Roll forward; on failure roll back. Ends with the deployment's last record written."""
        deployment = await self._deployments.get(self._deployment.id)
        if deployment.finished_at:
            return
        self._deployment = deployment
        new = await self._release(deployment.new_release_id)
        if new is None:
            await self._deployments.finish(deployment, error="the new release is gone")
            return
        old = await self._release(deployment.old_release_id)
        log.info("deployment %s: release v%d of app %s", deployment.id, new.number, deployment.app_id)
        try:
            for type in sorted({*deployment.processes, *deployment.old_processes}):
                await self._roll(type, is_exclusive=_is_exclusive(type, (new, old)))
        except StepDidNotWork as failure:
            await self._return(str(failure), new, old)
            return
        await self._deployments.finish(deployment, release_id=deployment.new_release_id)

    async def _release(self, release_id: str) -> Release | None:
        if not release_id:
            return None
        try:
            return await self._store.release(self._deployment.app_id, release_id)
        except NotFound:
            return None

    # forward

    async def _roll(self, type: str, *, is_exclusive: bool) -> None:
        """Replace the jobs of one type, one by one."""
        deployment = self._deployment
        target = deployment.processes.get(type, 0)
        while True:
            up = await self._count(deployment.new_release_id, type)
            if not is_exclusive:
                await self._until_up(deployment.new_release_id, type, up)
            left = await self._count(deployment.old_release_id, type)
            if up >= target and left == 0:
                break
            if is_exclusive and left:
                await self._step(deployment.old_release_id, type, left - 1)
                await self._until_down(deployment.old_release_id, type, left - 1, is_ended=True)
            if up < target:
                await self._step(deployment.new_release_id, type, up + 1)
                await self._until_up(deployment.new_release_id, type, up + 1)
            if not is_exclusive and left:
                await self._step(deployment.old_release_id, type, left - 1)
                await self._until_down(deployment.old_release_id, type, left - 1, is_ended=False)
        await self._until_up(deployment.new_release_id, type, target)

    async def _count(self, release_id: str, type: str) -> int:
        if not release_id:
            return 0
        return (await self._store.formation(self._deployment.app_id, release_id)).processes.get(type, 0)

    async def _step(self, release_id: str, type: str, count: int) -> None:
        await self._store.set_formation(
            self._deployment.app_id,
            release_id,
            lambda processes: {**processes, type: count},
            deployment_id=self._deployment.id,
        )

    def _jobs(self, release_id: str, type: str) -> list[Job]:
        group = Group(self._deployment.app_id, release_id, type)
        return [job for job in self._hosts.jobs() if group_of(job) == group]

    async def _until_up(self, release_id: str, type: str, count: int) -> None:
        """Wait until `count` jobs serve.

        Raises:
            StepDidNotWork: one of them ended, or the time is up.
        """

        def is_done() -> bool:
            return sum(map(_serves, self._jobs(release_id, type))) >= count

        deadline = clock.monotonic_s() + self._deployment.timeout_s
        while not is_done():
            if (ended := self._first_end(release_id, type)) is not None:
                raise StepDidNotWork(await self._why(ended))
            if clock.monotonic_s() >= deadline:
                raise StepDidNotWork(self._too_slow(release_id, type))
            await self._hosts.bell.wait(self._hosts.bell.count, LOOK_S)
        await self._tell(release_id, type, "up")

    def _first_end(self, release_id: str, type: str) -> Job | None:
        """Return the first new job that ended unasked since the deployment began."""
        ended = [
            job
            for job in self._jobs(release_id, type)
            if job.status in ENDED
            and job.created_at >= self._deployment.created_at - 1
            and not (job.is_stop_asked or self._hosts.was_told(job.spec.id))
        ]
        return min(ended, key=lambda job: job.ended_at, default=None)

    async def _until_down(self, release_id: str, type: str, count: int, *, is_ended: bool) -> None:
        """Wait until at most `count` jobs take work, or with `is_ended` exist."""

        def remaining() -> int:
            return sum(
                job.status not in ENDED and (is_ended or job.status != "stopping")
                for job in self._jobs(release_id, type)
            )

        if not await self._hosts.bell.until(lambda: remaining() <= count, self._deployment.timeout_s):
            raise StepDidNotWork(f"an old {type} job did not stop within {self._deployment.timeout_s:g} s")
        await self._tell(release_id, type, "down")

    # backward

    async def _return(self, reason: str, new: Release, old: Release | None) -> None:
        """Bring the old release back, then remove the new one and say why."""
        deployment = self._deployment
        log.warning("deployment %s fails: %s", deployment.id, reason.splitlines()[0])
        event = self._deployments.event(deployment, status="running", error=reason)
        await self._deployments.add_events(deployment, [event])
        exclusive = [t for t in new.processes if _is_exclusive(t, (new, old))]
        for type in exclusive:
            await self._step(deployment.new_release_id, type, 0)
            await self._hosts.bell.until(
                lambda type=type: all(j.status in ENDED for j in self._jobs(deployment.new_release_id, type)),  # type: ignore[misc]
                RETURN_TIMEOUT_S,
            )
        if deployment.old_release_id:
            await self._store.set_formation(
                deployment.app_id,
                deployment.old_release_id,
                lambda processes: {**processes, **deployment.old_processes},
                deployment_id=deployment.id,
            )
            await self._hosts.bell.until(self._is_old_up, RETURN_TIMEOUT_S)
        await self._store.set_formation(
            deployment.app_id, deployment.new_release_id, lambda _: {}, deployment_id=deployment.id
        )
        await self._deployments.finish(deployment, error=reason)

    def _is_old_up(self) -> bool:
        deployment = self._deployment
        return all(
            sum(translate.state_of(job) == "up" for job in self._jobs(deployment.old_release_id, type)) >= count
            for type, count in deployment.old_processes.items()
        )

    # telling

    async def _tell(self, release_id: str, type: str, word: Literal["up", "down"]) -> None:
        """Record the jobs that came up, or were told to end, since we looked last."""
        began = self._deployment.created_at - 1

        def is_news(job: Job) -> bool:
            if word == "up":
                return _serves(job) and job.created_at >= began
            is_over = job.status in ENDED and job.ended_at < began
            return self._hosts.was_told(job.spec.id) and not is_over

        ids = [job.spec.id for job in self._jobs(release_id, type) if is_news(job)]
        fresh = [id for id in ids if (id, word) not in self._told]
        self._told |= {(id, word) for id in fresh}
        events = [
            self._deployments.event(self._deployment, status="running", job_type=type, job_id=id, job_state=word)
            for id in fresh
        ]
        if events:
            await self._deployments.add_events(self._deployment, events)

    async def _why(self, job: Job) -> str:
        """Say how a new job ended, with the last that it wrote."""
        type = job.spec.labels.get("type", "")
        if job.error is not None:
            how = f"could not start: {job.error.message}"
        elif job.exit_status is None:
            how = "ended, nobody knows how"
        else:
            how = f"ended with status {job.exit_status} before it was up"
        lines = await self._last_lines(job)
        shown = "".join(f"\n  {line}" for line in lines)
        return f"{type} job {job.spec.id} {how}" + (f"; it wrote last:{shown}" if lines else "; it wrote nothing")

    async def _last_lines(self, job: Job) -> Sequence[str]:
        try:
            host = self._hosts.host_of(job.spec.id)
            async with asyncio.timeout(5.0):
                lines = [line.text async for line in host.client.log(job.spec.id, lines=LAST_LINES)]
        except (ServiceError, TimeoutError):
            return []
        return [line[:300] for line in lines]

    def _too_slow(self, release_id: str, type: str) -> str:
        group = Group(self._deployment.app_id, release_id, type)
        if group in self._scheduler.blocked:
            return f"no host could take a {type} job within {self._deployment.timeout_s:g} s"
        waiting = [job.spec.id for job in self._jobs(release_id, type) if translate.state_of(job) == "starting"]
        does_what = "listen on $PORT" if translate.is_web(type) else "come up"
        which = f" ({waiting[0]})" if waiting else ""
        return f"a new {type} job{which} did not {does_what} within {self._deployment.timeout_s:g} s"


def _is_exclusive(type: str, releases: Iterable[Release | None]) -> bool:
    """Return whether two jobs of this type cannot run on one host."""
    return any(
        fixed_numbers(process.ports)
        for release in releases
        if release is not None and (process := release.processes.get(type)) is not None
    )


def _serves(job: Job) -> bool:
    if translate.state_of(job) != "up":
        return False
    return any(port.service for port in job.spec.ports) or clock.now_s() - job.started_at >= STEADY_S
