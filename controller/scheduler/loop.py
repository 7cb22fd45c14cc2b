"""Watches, compares, places, acts: the scheduler's loop, run only by the leading controller.

It turns on every change of what is wanted or seen, and compares everything every `COMPARE_S` anyway.
What it decides is pure (`diff`, `place`, `backoff`); here is the state between turns: starts on
their way, and how often each group's jobs ended unasked. Called by `daemon`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from controller import translate
from controller.scheduler import backoff
from controller.scheduler.backoff import Ends
from controller.scheduler.diff import Group, Plan, SeenJob, Stop, diff
from controller.scheduler.hosts import Hosts, fixed_numbers
from controller.scheduler.place import kind_of, place
from controller.scheduler.wanted import Wanted
from controller.store import ControllerStore, event_put
from controller.types import App, Artifact, Release
from discovery.types import Put
from discovery.wire import clock
from discovery.wire.errors import NotFound, ServiceError
from hostd.types import ENDED, Job, JobSpec
from router.client import Routes

log = logging.getLogger(__name__)
COMPARE_S = 10.0
SWEEP_S = 60.0
UNKNOWN_HOST_PATIENCE_S = 30.0
SELF_RESTART_S = 15.0
"""How long hostd gets to bring back a job with `restart="always"` before the scheduler steps in."""
START_ATTEMPTS_MAX = 4
STARTS_AT_ONCE = 8
EVENTS_AT_ONCE = 50
EVENTS_WAITING_MAX = 2000


@dataclass
class Coming:
    """A start that its host has not confirmed yet; the same id is asked for until it has."""

    group: Group
    host_id: str
    spec: JobSpec
    attempts: int = 0
    next_at: float = 0.0


def group_of(job: Job) -> Group:
    labels = job.spec.labels
    return Group(labels.get("app", ""), labels.get("release", ""), labels.get("type", ""))


class Scheduler:
    """Keeps what runs equal to what is wanted."""

    def __init__(self, store: ControllerStore, wanted: Wanted, hosts: Hosts, routes: Routes) -> None:
        self._store = store
        self._wanted = wanted
        self._hosts = hosts
        self._routes = routes
        self._ends: dict[Group, Ends] = {}
        self._coming: dict[str, Coming] = {}
        self._events: asyncio.Queue[Put] = asyncio.Queue(EVENTS_WAITING_MAX)
        self.blocked: set[Group] = set()
        """Groups that no host can take now."""

    async def run(self) -> None:
        """Schedule until cancelled."""
        for job in self._hosts.jobs():
            self._note_end(None, job)
        self._hosts.listeners.append(self._job_changed)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._turns(), name="scheduler turns")
                group.create_task(self._write_events(), name="scheduler events")
                group.create_task(self._sweeps(), name="scheduler sweeps")
        finally:
            self._hosts.listeners.remove(self._job_changed)

    async def _turns(self) -> None:
        async with asyncio.TaskGroup() as group:
            woken = asyncio.Event()
            group.create_task(self._relay(self._wanted, woken))
            group.create_task(self._relay(self._hosts, woken))
            while True:
                woken.clear()
                try:
                    pause = await self.turn()
                except ServiceError as error:
                    log.warning("a turn was cut short: %s", error.message)
                    pause = 1.0
                except Exception:
                    log.exception("a turn failed")
                    pause = COMPARE_S
                try:
                    async with asyncio.timeout(pause):
                        await woken.wait()
                except TimeoutError:
                    pass

    async def _relay(self, source: Wanted | Hosts, woken: asyncio.Event) -> None:
        seen = source.bell.count
        while True:
            await source.bell.wait(seen, COMPARE_S)
            seen = source.bell.count
            woken.set()

    # one turn

    async def turn(self) -> float:
        """Compare once and act; return for how long nothing will change by itself."""
        if not self._wanted.is_current or not self._hosts.is_known(UNKNOWN_HOST_PATIENCE_S):
            return 1.0
        self._forget_arrived()
        counts = self._wanted.counts()
        held = await self._held(counts)
        plan = diff(counts, self._seen(), deleted_apps=self._wanted.deleted_apps, held=held.keys())
        has_failed = False
        for stop in plan.stops:
            has_failed |= not await self._stop(stop)
        await self._admit(plan)
        await self._start_coming()
        await self._bury()
        now = clock.now_s()
        waits = [at - now for group, at in held.items() if group in plan.missing]
        waits += [coming.next_at - now for coming in self._coming.values()]
        return min([COMPARE_S, *([1.0] if has_failed else []), *(max(0.05, wait) for wait in waits)])

    def _seen(self) -> list[SeenJob]:
        seen = [
            SeenJob(
                job.spec.id,
                group_of(job),
                job.host_id,
                translate.state_of(job),
                job.created_at,
                job.spec.labels.get("origin") == translate.ORIGIN_BOOTSTRAP,
            )
            for job in self._hosts.jobs()
            if job.status not in ENDED and "app" in job.spec.labels
        ]
        now = clock.now_s()
        return seen + [SeenJob(id, c.group, c.host_id, "pending", now) for id, c in self._coming.items()]

    def _forget_arrived(self) -> None:
        for job_id, coming in list(self._coming.items()):
            if self._hosts.job(job_id) is not None or coming.host_id not in self._hosts.all:
                del self._coming[job_id]

    async def _held(self, counts: dict[Group, int]) -> dict[Group, float]:
        """Return the groups that must not start a job yet, with the time when they may."""
        for group in [g for g in self._ends if g not in counts]:
            del self._ends[group]
        now = clock.now_s()
        held: dict[Group, float] = {}
        for group, ends in self._ends.items():
            at = backoff.ready_at(ends, counts[group])
            if await self._restarts_itself(group):
                at = max(at, ends.last_at + SELF_RESTART_S)
            if at > now:
                held[group] = at
        return held

    async def _restarts_itself(self, group: Group) -> bool:
        try:
            release = await self._store.release(group.app_id, group.release_id)
        except NotFound:
            return False
        process = release.processes.get(group.type)
        return process is not None and process.restart == "always"

    async def _stop(self, stop: Stop) -> bool:
        """Stop a job; tell whether that worked."""
        log.info("stop %s on %s: %s", stop.job_id, stop.host_id, stop.reason)
        coming = self._coming.pop(stop.job_id, None)
        try:
            if coming is not None and self._hosts.job(stop.job_id) is None:
                # whether the host has it is not known: its answer was lost
                await self._hosts.all[coming.host_id].client.stop(stop.job_id)
            else:
                await self._hosts.stop(stop.job_id)
        except (NotFound, KeyError):
            return True
        except ServiceError as error:
            log.warning("stop %s: %s", stop.job_id, error.message)
            return False
        return True

    # starting

    async def _admit(self, plan: Plan) -> None:
        """Give every missing job an id, a host and a spec."""
        blocked: set[Group] = set()
        for start in plan.starts:
            try:
                app = self._wanted.apps[start.group.app_id]
                release = await self._store.release(start.group.app_id, start.group.release_id)
                artifacts = await self._store.artifacts(release.artifact_ids)
            except (KeyError, NotFound) as error:
                log.error("%s cannot start: %s", "/".join(start.group), error)
                continue
            if start.group.type not in release.processes:
                log.error("release %s has no process type %s", release.id, start.group.type)
                continue
            for _ in range(start.count):
                if not await self._admit_one(start.group, app, release, artifacts):
                    blocked.add(start.group)
                    break
        for group in blocked - self.blocked:
            log.warning("no host can take %s now", "/".join(group))
        self.blocked = blocked

    async def _admit_one(self, group: Group, app: App, release: Release, artifacts: Sequence[Artifact]) -> bool:
        process = release.processes[group.type]
        volumes = [volume.name for volume in process.volumes]
        numbers = fixed_numbers(process.ports)
        on_the_way = ((c.host_id, kind_of(c.group), fixed_numbers(c.spec.ports)) for c in self._coming.values())
        host_id = place(
            kind_of(group), self._hosts.loads(on_the_way), volumes=volumes, numbers=numbers, pins=self._wanted.pins
        )
        if host_id is None:
            return False
        for volume in volumes:
            if volume not in self._wanted.pins:
                await self._store.pin_volume(volume, host_id)
        spec = translate.job_spec(
            app=app,
            release=release,
            type=group.type,
            artifacts=artifacts,
            place=self._hosts.all[host_id].place,
            id=translate.job_id(app.name, group.type, secrets.token_hex(5)),
        )
        self._coming[spec.id] = Coming(group, host_id, spec)
        return True

    async def _start_coming(self) -> None:
        now = clock.now_s()
        due = [coming for coming in self._coming.values() if coming.next_at <= now]
        limit = asyncio.Semaphore(STARTS_AT_ONCE)

        async def start(coming: Coming) -> None:
            async with limit:
                await self._start(coming)

        async with asyncio.TaskGroup() as group:
            for coming in due:
                group.create_task(start(coming))

    async def _start(self, coming: Coming) -> None:
        spec = coming.spec
        log.info("start %s on %s", spec.id, coming.host_id)
        try:
            await self._hosts.start(coming.host_id, spec)
        except ServiceError as error:
            coming.attempts += 1
            if error.retry and coming.attempts < START_ATTEMPTS_MAX:
                log.warning("start %s: %s", spec.id, error.message)
                coming.next_at = clock.now_s() + 0.5 * coming.attempts
                return
            log.error("%s was refused: %s", spec.id, error.message)
            now = clock.now_s()
            self._hosts.refuse(
                Job(
                    spec=spec,
                    host_id=coming.host_id,
                    status="failed",
                    created_at=now,
                    ended_at=now,
                    error=error.to_body(),
                )
            )
        self._coming.pop(spec.id, None)

    # what happened

    def _job_changed(self, before: Job | None, job: Job, *, is_live: bool) -> None:
        self._note_end(before, job)
        if is_live and (before is None or translate.state_of(before) != translate.state_of(job)):
            actual = translate.actual_job(job)
            if actual.app_id and not self._events.full():
                self._events.put_nowait(event_put("job", actual.app_id, actual.id, actual))

    def _note_end(self, before: Job | None, job: Job) -> None:
        """Count an end that nobody asked for, once."""
        group = group_of(job)
        if not group.type or job.status not in ENDED or (before is not None and before.status in ENDED):
            return
        # also when another controller, or a person at the host, asked for it
        if job.is_stop_asked or self._hosts.was_told(job.spec.id):
            return
        up_s = job.ended_at - job.started_at if job.started_at else 0.0
        self._ends[group] = backoff.after_end(self._ends.get(group, Ends()), up_s=up_s, at=job.ended_at)

    async def _write_events(self) -> None:
        while True:
            events = [await self._events.get()]
            while len(events) < EVENTS_AT_ONCE and not self._events.empty():
                events.append(self._events.get_nowait())
            try:
                await self._store.add_events(events)
            except ServiceError as error:
                log.warning("%d job events were not recorded: %s", len(events), error.message)

    # tidying up

    async def _bury(self) -> None:
        """Forget deleted apps whose last job has ended."""
        if not self._wanted.deleted_apps:
            return
        living = {group_of(job).app_id for job in self._hosts.jobs() if job.status not in ENDED}
        for app_id, deleted_at in list(self._wanted.deleted_apps.items()):
            if app_id not in living and clock.now_s() - deleted_at > COMPARE_S:
                await self._store.bury(app_id)

    async def _sweeps(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except ServiceError as error:
                log.warning("a sweep was cut short: %s", error.message)

    async def sweep(self) -> None:
        """Drop old events, and routes whose app was never finished or is gone."""
        await self._store.prune_events()
        if not self._wanted.is_current:
            return
        for route in await self._routes.list():
            is_orphan = route.owner and route.owner not in self._wanted.apps
            if is_orphan and clock.now_s() - route.created_at > SWEEP_S:
                log.info("route %s belongs to no app", route.id)
                await self._routes.remove(route.id)
