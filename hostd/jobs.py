"""The jobs of this host: who is let in, who follows whom, who is forgotten.

Takes specs, records them, and keeps one `JobRun` for each job that has not ended. After a restart
`open` compares three lists, the records, what the spawner holds, and what the kernel holds, and
makes them one: the living are adopted, also those that a dead spawner left behind, the dead reported, the
rest removed; what has to come back does so in the order in which it was first started. Called by `api` and
`daemon`. Refuses new jobs while the host starts up or shuts down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from discovery.wire import clock
from discovery.wire.errors import Conflict, ServiceError, Unavailable
from hostd import admission
from hostd.errors import JobExists, JobNotFound, JobNotRunning
from hostd.lifecycle import JobRun, Parts, undo
from hostd.records import has_labels, lost
from hostd.runtime.network import NetworkState
from hostd.runtime.process import Belongings, Child, Exited, Listing, Spawner
from hostd.store import Record
from hostd.types import ENDED, Job, JobSpec

log = logging.getLogger(__name__)

RESTART_FIRST_S, RESTART_MAX_S, RESTART_RESET_S = 0.1, 5.0, 60.0
SWEEP_S = 60.0
SHUTDOWN_DRAIN_S = 1.0
_STOPS_AT_ONCE = 8
_NEXT_S = 2.0
"""How long a job that comes back waits for the one before it to be launched."""
_ID_ROOT_MAX = 54
_LOST_OUTPUT = "it ended just as it was found again: what it printed while neither hostd nor the spawner ran is lost"
"""Its pipes went with it, before anybody else had their other ends."""


def restart_delay_s(restarts: int) -> float:
    """Return how long to wait before a job's next restart."""
    return float(min(RESTART_FIRST_S * 2 ** min(restarts, 16), RESTART_MAX_S))


def restarts_after(record: Record) -> int:
    """Return how many quick restarts lead to the successor: none if the job was up for long."""
    lived_s = record.job.ended_at - record.job.started_at if record.job.started_at else 0.0
    return 0 if lived_s >= RESTART_RESET_S else record.restarts + 1


def has_to_restart(record: Record) -> bool:
    """Tell whether an ended job still needs its successor."""
    if record.job.status not in ENDED or record.is_stop_asked or record.successor:
        return False
    has_failed = record.job.status != "done" or record.job.end_reason == "stopped"  # by a host that went down
    return record.job.spec.restart == "always" or (record.job.spec.restart == "on-failure" and has_failed)


def place_of(record: Record) -> int:
    """Return where a job stands when all come back: where the first of its chain did."""
    return record.order or record.number


def successor_id(record: Record, token: str) -> str:
    """Return the id of a job's successor: the first id of the chain and a token."""
    return f"{(record.root or record.job.spec.id)[:_ID_ROOT_MAX]}-{token}"


def to_forget(records: Iterable[Record], *, now: float, keep_count: int, keep_s: float) -> list[str]:
    """Return the ended jobs that are old enough to forget: all but the newest `keep_count` and the last `keep_s`."""
    ended = [record for record in records if record.job.status in ENDED and not has_to_restart(record)]
    ended.sort(key=lambda record: record.job.ended_at, reverse=True)
    return [record.job.spec.id for record in ended[keep_count:] if now - record.job.ended_at > keep_s]


class Jobs:
    """All jobs of this host."""

    def __init__(self, parts: Parts, spawner: Spawner, group: asyncio.TaskGroup) -> None:
        self.records = parts.records
        self.logs = parts.logs
        self._parts = parts
        self._spawner = spawner
        self._group = group
        self._runs: dict[str, JobRun] = {}
        self._recording: dict[str, asyncio.Future[Job]] = {}
        self._is_open = False
        self._is_closing = False

    # after a start of hostd

    async def find_living(self, held: Collection[str]) -> None:
        """Have the spawner adopt the jobs that live and that it does not know: the one that started them is dead."""
        for record in self.records.active():
            job_id = record.job.spec.id
            place = self._place_of(record)
            if job_id in held or place is None or (living := self._parts.launcher.find(job_id)) is None:
                continue
            names = ("stdout", "stderr", "stdin") if record.job.spec.has_stdin else ("stdout", "stderr")
            adopted = await self._parts.launcher.adopt(job_id, living, *place, names)
            if adopted.stdout_fd < 0 and record.job.spec.has_log and not record.job.spec.has_tty:
                self.logs.say(job_id, _LOST_OUTPUT)
            adopted.close()

    def places(self, held: Collection[str]) -> dict[str, tuple[NetworkState, int]]:
        """Return the network and the user ids of the jobs that are held by the spawner."""
        found = {record.job.spec.id: self._place_of(record) for record in self.records.active()}
        return {job_id: place for job_id, place in found.items() if place is not None and job_id in held}

    def _place_of(self, record: Record) -> tuple[NetworkState, int] | None:
        """Return what a job got for its life, from its record or, if it had just begun, from its launch's note."""
        if record.network is not None:
            return record.network, record.uid_base
        note = self._parts.launcher.noted(record.job.spec.id)
        return None if note is None else (note.network, note.uid_base)

    async def open(self, listing: Listing, leftovers: Iterable[str], *, is_new_boot: bool = False) -> None:
        """Adopt the living, report the dead, remove what belongs to nobody, start what has to come back."""
        held = {child.id: child for child in listing.children if admission.is_job(child.id)}
        back: list[Record] = []
        for record in self.records.active():
            if await self._take_up(record, held.pop(record.job.spec.id, None), is_new_boot=is_new_boot):
                back.append(record)
        for child in held.values():
            await self._end_stranger(child)
        for job_id in set(leftovers) - set(self._runs):
            await undo(self._parts.launcher, job_id)
        for record in self.records:
            if has_to_restart(record) and record.job.end_reason in ("stopped", "lost"):
                back.append(record)
            elif has_to_restart(record):
                self._group.create_task(self._restart(record))
        self._group.create_task(self._come_back(sorted(back, key=place_of)))
        self._is_open = True

    async def _come_back(self, records: list[Record]) -> None:
        """Start the jobs that went down with the host, in order, each once the one before it is launched."""
        for record in records:
            run = self._runs.get(record.job.spec.id)
            if run is not None:
                self._group.create_task(self._live(run))
            else:
                run = await self._follow(record)
            if run is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_NEXT_S):
                        await run.launched_or_ended.wait()

    async def _take_up(self, record: Record, child: Child | None, *, is_new_boot: bool) -> bool:
        """Go on with one job; tell whether it has yet to be launched, its run is made then."""
        job, place = record.job, self._place_of(record)
        note = self._parts.launcher.noted(job.spec.id)
        if child is not None and place is not None:
            try:
                fds = await self._spawner.take(job.spec.id)
            except JobNotFound:  # it was being started, and has failed
                return await self._take_up(record, None, is_new_boot=is_new_boot)
            run = self._make_run(record.full_spec())
            run.adopt(fds, *place, is_waiting=child.state == "waiting")
            if job.status == "stopping":
                run.ask_stop(is_final=record.is_stop_asked)
            self._group.create_task(self._live(run))
            return False
        if child is not None:
            await self._end_stranger(child)
        await undo(self._parts.launcher, job.spec.id)
        if job.status in ("pending", "starting") and (note is None or not note.has_begun):
            self._make_run(record.full_spec())
            return True
        await self._report_lost(job, is_new_boot=is_new_boot)
        return False

    async def _report_lost(self, job: Job, *, is_new_boot: bool) -> None:
        """Record the end of a job that nobody has seen; one that had been told to end has just done so."""
        why = "the machine went down" if is_new_boot else "it ended while neither hostd nor the spawner ran"
        self.logs.say(job.spec.id, f"{why}: how it ended is unknown")
        is_stopped = job.status == "stopping"
        reason = "stopped" if is_stopped else "lost" if is_new_boot else "unknown"
        await self.records.change(
            job.spec.id,
            "ended",
            status="done" if is_stopped else "crashed",
            is_up=False,
            is_stop_asked=is_stopped,
            ended_at=clock.now_s(),
            end_reason=reason,
            error=None if is_stopped else lost(why),
        )

    async def _end_stranger(self, child: Child) -> None:
        log.info("process %s belongs to no job: removed", child.id)
        try:
            if child.state != "exited":
                await self._spawner.kill(child.id)
            await self._spawner.ack(child.id)
        except JobNotFound:
            pass
        if not child.job_id:
            await undo(self._parts.launcher, child.id)

    def belongings(self, job_id: str) -> Belongings | None:
        """Return what a new spawner has to know of a process; None if there is nothing to hand over."""
        run = self._runs.get(job_id)
        return Belongings() if run is None else run.belongings()

    def on_exit(self, exited: Exited) -> None:
        """Pass on that a process of the spawner has ended."""
        if run := self._runs.get(exited.id):
            run.on_exit(exited)

    # one job's life, and what follows

    def _make_run(self, spec: JobSpec) -> JobRun:
        run = self._runs[spec.id] = JobRun(self._parts, spec)
        return run

    async def _live(self, run: JobRun) -> None:
        try:
            await run.live()
        finally:
            self._runs.pop(run.spec.id, None)
        if run.spec.id not in self.records:
            return
        record = self.records.get(run.spec.id)
        if has_to_restart(record):
            await self._restart(record)

    async def _restart(self, record: Record) -> None:
        await asyncio.sleep(restart_delay_s(record.restarts))
        await self._follow(record)

    async def _follow(self, record: Record) -> JobRun | None:
        """Start a job's successor, if it still needs one."""
        if self._is_closing or record.job.spec.id not in self.records:
            return None
        record = self.records.get(record.job.spec.id)
        if not has_to_restart(record):
            return None
        spec = msgspec.structs.replace(record.full_spec(), id=successor_id(record, secrets.token_hex(4)))
        await self._start(spec, predecessor=record, restarts=restarts_after(record))
        return self._runs.get(spec.id)

    async def _start(self, spec: JobSpec, *, predecessor: Record | None = None, restarts: int = 0) -> Job:
        job = Job(
            spec=spec,
            host_id=self._parts.host_id,
            host_ip=self._parts.host_ip,
            status="pending",
            created_at=clock.now_s(),
        )
        recorded: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._recording[spec.id] = recorded
        recorded.add_done_callback(lambda _: self._recording.pop(spec.id, None))

        async def record_and_live(run: JobRun) -> None:
            try:
                record = await self.records.add(job, predecessor=predecessor, restarts=restarts)
            except ServiceError as error:
                self._runs.pop(spec.id, None)
                recorded.set_exception(error)
                return
            recorded.set_result(record.job)
            await self._live(run)

        # its own task from the beginning: a client that goes away must not take a half recorded job with it
        self._group.create_task(record_and_live(self._make_run(spec)))
        return await asyncio.shield(recorded)

    # what the API asks

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("this host is starting up", hint="try again in a moment")
        if self._is_closing:
            raise Unavailable("this host is shutting down")

    def list(self, labels: Mapping[str, str], *, is_active: bool = False) -> list[Job]:
        """Return the jobs that have all the labels, oldest first."""
        records = self.records.active() if is_active else self.records
        return [record.job for record in records if has_labels(record.job, labels)]

    async def start(self, spec: JobSpec) -> Job:
        """Record a job and have it started; the same spec again is answered with the same job.

        Raises:
            Invalid, JobExists, Unavailable
        """
        self._check_open()
        admission.check(spec)
        while spec.id in self._recording:  # somebody asks the same at the same time: answer when it is on disk
            await asyncio.wait({self._recording[spec.id]})
        if spec.id in self.records:
            known = self.records.get(spec.id)
            if known.full_spec() == spec:
                return known.job
            raise JobExists(f"job {spec.id} exists with another spec", hint="choose another id")
        return await self._start(spec)

    def run_of(self, job_id: str) -> JobRun | None:
        """Return the job's run if it has not ended.

        Raises:
            JobNotFound: there is no such job.
        """
        self.records.get(job_id)
        return self._runs.get(job_id)

    async def stop(self, job_id: str, *, is_waiting: bool = False) -> Job:
        """Have a job end, without a successor; an ended one is fine."""
        run = self.run_of(job_id)
        if run is None:
            if has_to_restart(self.records.get(job_id)):
                await self.records.change(job_id, None, record={"is_stop_asked": True})
            return self.records.get(job_id).job
        run.ask_stop()
        await (run.ended if is_waiting else run.stopping_or_ended).wait()
        return self.records.get(job_id).job

    async def wait(self, job_id: str) -> Job:
        """Return a job once it has ended."""
        if run := self.run_of(job_id):
            await run.ended.wait()
        return self.records.get(job_id).job

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal to a job's program.

        Raises:
            JobNotRunning: it is not running.
        """
        job = self.records.get(job_id).job
        if job.status not in ("running", "stopping"):
            raise JobNotRunning(f"job {job_id} is {job.status}")
        try:
            await self._spawner.signal(job_id, number)
        except JobNotFound:
            raise JobNotRunning(f"job {job_id} has ended") from None

    async def forget(self, job_id: str) -> None:
        """Remove an ended job and its log.

        Raises:
            Conflict: it has not ended.
        """
        job = self.records.get(job_id).job
        if job.status in ENDED and (run := self._runs.get(job_id)):
            await run.gone.wait()
        if job.status not in ENDED:
            raise Conflict(f"job {job_id} is {job.status}", hint="stop it first")
        self.logs.remove(job_id)
        await self.records.remove([job_id])

    # the host's own work

    async def sweep(self, leftovers: Callable[[], Iterable[str]]) -> None:
        """Remove logs of nobody, and undo what an earlier undo could not, for ever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for job_id in set(self.logs.names()):
                if job_id not in self.records:
                    self.logs.remove(job_id)
            for job_id in set(leftovers()):
                if job_id not in self._runs:
                    await undo(self._parts.launcher, job_id)

    async def forget_old(self, *, keep_count: int, keep_s: float) -> None:
        """Remove what `to_forget` says, with the logs; `hostd.space` says when."""
        gone = to_forget(self.records, now=clock.now_s(), keep_count=keep_count, keep_s=keep_s)
        for job_id in gone:
            self.logs.remove(job_id)
        await self.records.remove(gone)

    async def stop_all(self) -> None:
        """Stop every job, the youngest first; those that restart come back with the next start of hostd."""
        self._is_closing = True
        turn = asyncio.Semaphore(_STOPS_AT_ONCE)

        async def stop(run: JobRun) -> None:
            try:
                run.ask_stop(is_final=False, drain_s=SHUTDOWN_DRAIN_S)
                await run.ended.wait()
            finally:
                turn.release()

        async with asyncio.TaskGroup() as group:
            order = sorted(self._runs.values(), key=lambda run: -self.records.get(run.spec.id).number)
            for run in order:
                await turn.acquire()
                group.create_task(stop(run))

    def leave(self) -> None:
        """Let go of every job's pipes; the jobs live on."""
        for run in self._runs.values():
            run.leave()
