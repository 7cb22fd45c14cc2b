"""One job from its record to its end: launch, release, watch, stop, clean up.

    pending -> starting -> running -> stopping -> done | crashed      (failed: never ran)

`JobRun.live` is read top to bottom; each state is recorded before what follows from it is done. A
restarted hostd makes a `JobRun` for every job that the spawner still holds and goes on in the
middle. Made and kept by `jobs`; refuses nothing, because `admission` and the steps did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

from discovery.types import Instance
from discovery.wire import clock
from discovery.wire.errors import ErrorBody, Internal, ServiceError
from hostd import drain
from hostd.disk_watch import DiskWatch
from hostd.errors import JobNotFound, LaunchFailed, SpawnerUnavailable
from hostd.execs import Execs
from hostd.health import CommandLook, PortWatch
from hostd.logs import Logs
from hostd.pump import Input, Output
from hostd.records import Records
from hostd.registry import Registry
from hostd.runtime.adoption import Living
from hostd.runtime.cgroup import Incidents
from hostd.runtime.launch import Launched, Note
from hostd.runtime.network import NetworkState
from hostd.runtime.process import Belongings, Exited, Spawned
from hostd.types import JobSpec, Port, Resources

log = logging.getLogger(__name__)

_OUTPUT_END_S = 5.0
_KILLED_S = 30.0
_LAUNCH_GRACE_S = 2.0
_SPAWNERS_LOST_MAX = 2
_KILLED = 128 + 9


class Launching(Protocol):
    """`hostd.runtime.launch.Launcher`, as far as a job needs it."""

    async def launch(self, spec: JobSpec) -> Launched:
        """Take every launch step."""

    async def undo(self, job_id: str) -> None:
        """Remove all that a job had."""

    def find(self, job_id: str) -> Living | None:
        """Return a job's first process if it lives."""

    async def adopt(
        self, job_id: str, living: Living, network: NetworkState, uid_base: int, names: Sequence[str]
    ) -> Spawned:
        """Tell the spawner of a job that another one started."""

    def noted(self, job_id: str) -> Note | None:
        """Return what a launch noted."""


class Spawning(Protocol):
    """`hostd.runtime.process.Spawner`, as far as a job needs it."""

    async def start(self, job_id: str) -> None:
        """Release a process that waits."""

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal."""

    async def close_stdin(self, job_id: str) -> None:
        """Drop the spawner's own write end."""

    async def ack(self, job_id: str) -> None:
        """Forget an ended process."""


class Killing(Protocol):
    """`hostd.runtime.cgroup.CgroupStep`, as far as a job needs it."""

    async def kill(self, job_id: str, timeout_s: float = 5.0) -> None:
        """Kill every process of the job."""

    def pids(self, job_id: str) -> tuple[int, ...]:
        """Return the job's processes."""

    def incidents(self, job_id: str) -> Incidents:
        """Count how often the job met its limits."""

    def unenforced(self, resources: Resources) -> tuple[str, ...]:
        """Name the limits that this machine cannot enforce."""


class Limits(Protocol):
    """`hostd.limits.LimitWatch`, as far as a job needs it."""

    def add(
        self,
        job_id: str,
        on_met: Callable[[Incidents], None],
        cpu_millis: int,
        on_yield: Callable[[bool], None],
        is_held_back: Callable[[], bool],
    ) -> None:
        """Tell when a limit is met; have a job that takes more than its part by weight yield, and tell that."""

    def remove(self, job_id: str) -> None:
        """Watch no longer."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every job of this host is run with."""

    host_id: str
    host_ip: str
    records: Records
    logs: Logs
    registry: Registry
    launcher: Launching
    spawner: Spawning
    cgroups: Killing
    limits: Limits
    disks: DiskWatch
    execs: Execs
    starts: asyncio.Semaphore


class JobRun:
    """A job that has not ended."""

    def __init__(self, parts: Parts, spec: JobSpec) -> None:
        self.spec = spec
        self.output: Output | None = None
        self.input: Input | None = None
        self.launched_or_ended = asyncio.Event()
        self.ended = asyncio.Event()
        self.gone = asyncio.Event()
        self.stopping_or_ended = asyncio.Event()
        self._parts = parts
        self._launched: Spawned | None = None
        self._network: NetworkState | None = None
        self._uid_base = 0
        self._is_waiting = False
        self._is_adopted = False
        self._has_client = asyncio.Event()
        self._stop = asyncio.Event()
        self._is_final = False
        self._began_at = 0.0
        self._drain_s = spec.drain_timeout_s
        self._is_released = False
        self._has_lost_its_start = asyncio.Event()
        self._is_late = asyncio.Event()
        self._exited: asyncio.Future[Exited] = asyncio.get_running_loop().create_future()
        self._error: ErrorBody | None = None
        self._recording: asyncio.Future[None] | None = None
        self._met = Incidents()
        self._up: dict[int, bool] = {}
        self._health: asyncio.Queue[tuple[int, bool, str] | None] = asyncio.Queue()

    # what others tell it

    def adopt(self, fds: Spawned, network: NetworkState, uid_base: int, *, is_waiting: bool) -> None:
        """Go on with a process that the spawner held while hostd was away."""
        self._network, self._uid_base = network, uid_base
        self._met = self._parts.cgroups.incidents(self.spec.id)
        self._launched, self._is_waiting, self._is_adopted = fds, is_waiting, True
        if self._parts.records.get(self.spec.id).job.is_up:
            for index, port in self._service_ports():
                self._parts.registry.want(self.instance(index, port))

    def on_exit(self, exited: Exited) -> None:
        """Take note that the process has ended."""
        if not self._exited.done():
            self._exited.set_result(exited)

    def belongings(self) -> Belongings | None:
        """Return what a new spawner has to know of our process; None if that waited for its start, and so is dead.

        Such a job is launched again: its program has not run.
        """
        if self._launched is None:
            return Belongings()
        if self._is_waiting and not self._is_released:
            self._has_lost_its_start.set()
            return None
        streams = self._launched.by_name()
        if self.output is not None and self.input is not None:
            streams = self.output.fds() | self.input.fds()
        netns = "" if self._network is None else self._network.netns_name or ""
        return Belongings(netns, self._uid_base, self._began_at, streams)

    def release(self) -> None:
        """Let a job that waits for its first client begin."""
        self._has_client.set()

    def ask_stop(self, *, is_final: bool = True, drain_s: float | None = None) -> None:
        """Have the job deregistered, drained and ended, without a successor if `is_final`."""
        self._is_final = self._is_final or is_final
        if drain_s is not None:
            self._drain_s = min(self._drain_s, drain_s)
        self._stop.set()

    def leave(self) -> None:
        """Let go of the pipes; the job lives on without us."""
        if self.output is not None:
            self.output.close()
        if self.input is not None:
            self.input.close()

    # its life

    async def live(self) -> None:
        """Run the job to its end, which is recorded when this returns."""
        try:
            while True:
                if self._launched is None and not await self._launch():
                    return
                self._open_pipes()
                await self._until_released()
                if not self._has_lost_its_start.is_set():
                    break
                await self._give_up_launch()
            await self._begin()
            await self._serve()
            await self._finish(self._exited.result())
        finally:
            self._parts.limits.remove(self.spec.id)
            self.leave()
            self.gone.set()

    async def _give_up_launch(self) -> None:
        log.warning("job %s was waiting when the spawner died: it is launched again", self.spec.id)
        self.leave()
        await undo(self._parts.launcher, self.spec.id)
        self._launched = self._network = self.output = self.input = None
        self._has_lost_its_start.clear()

    async def _launch(self) -> bool:
        async with self._parts.starts:
            if self._stop.is_set():
                await self._end("done", None, "stopped")
                return False
            self._parts.records.note(self.spec.id, status="starting")
            self._began_at = clock.now_s()
            outcome = await self._launch_unless_stopped()
            if outcome is None:
                await self._end("done", None, "stopped")
                return False
            if isinstance(outcome, ServiceError):
                await self._fail(outcome)
                return False
            launched = outcome
            self._launched, self._is_waiting = launched.fds, launched.is_waiting
            self._network, self._uid_base = launched.network, launched.uid_base
        if self._is_waiting:  # it may wait for long; the others are recorded when they run, a moment later
            await self._parts.records.change(self.spec.id, None, record=self._record(), **self._place())
        return True

    async def _launch_unless_stopped(self) -> Launched | ServiceError | None:
        """Take the launch steps; give up on one that takes long (a layer that does not come) when a stop is asked."""
        async with asyncio.TaskGroup() as group:
            launching = group.create_task(self._try_launch())
            stopping = group.create_task(self._stop.wait())
            await asyncio.wait({launching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not launching.done():
                await asyncio.wait({launching}, timeout=_LAUNCH_GRACE_S)
                launching.cancel()
        return None if launching.cancelled() else launching.result()

    async def _try_launch(self) -> Launched | ServiceError:
        try:
            for _ in range(_SPAWNERS_LOST_MAX):
                try:
                    return await self._parts.launcher.launch(self.spec)
                except SpawnerUnavailable as error:  # it was killed, all is undone and nothing of the job has run
                    log.warning("job %s: %s; launching it again", self.spec.id, error.message)
            return await self._parts.launcher.launch(self.spec)
        except ServiceError as error:
            return error
        except OSError as error:
            return LaunchFailed(str(error))

    def _record(self) -> dict[str, Any]:
        return {} if self._network is None else {"network": self._network, "uid_base": self._uid_base}

    def _place(self) -> dict[str, Any]:
        if self._network is None or self._launched is None:
            return {}
        return {
            "pid": self._launched.pid,
            "host_ip": self._parts.host_ip,
            "ip": self._network.ip,
            "ports": self._network.numbers,
        }

    async def _fail(self, error: ServiceError) -> None:
        step = error.detail.get("step", "")
        log.warning("job %s failed to start%s: %s", self.spec.id, f" at {step}" if step else "", error.message)
        self._say(f"the job could not be started: {error.message}")
        self._error = error.to_body()
        await self._end("failed", None, "start-failed")

    def _open_pipes(self) -> None:
        assert self._launched is not None
        job_log = self._parts.logs.open(self.spec.id) if self.spec.has_log else None
        self.output = Output(self._launched, job_log)
        self.input = Input(self._launched)
        self.launched_or_ended.set()

    async def close_stdin(self) -> None:
        """Have the spawner drop its write end as well, so that the job reads end of file."""
        await self._parts.spawner.close_stdin(self.spec.id)

    async def _until_released(self) -> None:
        if not self._is_waiting:
            return
        waits = [self._has_client.wait(), self._stop.wait(), self._has_lost_its_start.wait(), self._ended_early()]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait) for wait in waits]
            await asyncio.wait(tasks, timeout=self.spec.attach_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()

    async def _ended_early(self) -> None:
        await asyncio.wait({self._exited})

    async def _begin(self) -> None:
        """Start the program if it waits, and record that the job runs."""
        if self._is_waiting:
            if self._stop.is_set() or self._exited.done() or not await self._start_program():
                return
        elif self._is_adopted and self._parts.records.get(self.spec.id).job.status not in ("pending", "starting"):
            return  # it was recorded then
        for name in self._parts.cgroups.unenforced(self.spec.resources):
            self._say(f"not enforced on this machine: {name}")
        self._recording = self._parts.records.changing(  # a job may end sooner than the disk has this
            self.spec.id,
            "started",
            record=self._record(),
            status="running",
            started_at=self._began_at or clock.now_s(),
            is_up=not self._service_ports(),
            **self._place(),
        )

    async def _start_program(self) -> bool:
        self._began_at, self._is_released = clock.now_s(), True
        try:
            await self._parts.spawner.start(self.spec.id)
        except LaunchFailed as error:
            self._say(f"the job could not be started: {error.message}")
            self._error = error.to_body()
            return False
        except JobNotFound:
            return False  # it ended: `_exited` tells
        return True

    def _service_ports(self) -> list[tuple[int, Port]]:
        return [(index, port) for index, port in enumerate(self.spec.ports) if port.service]

    def _on_yield(self, is_yielding: bool) -> None:
        if self.output is not None:
            self.output.slow(is_yielding)

    def _is_held_back(self) -> bool:
        return self.output is not None and self.output.is_held_back()

    async def _serve(self) -> None:
        """Watch its ports, its limits and its orders until it has ended."""
        self._parts.limits.add(
            self.spec.id, self._on_met, self.spec.resources.cpu_millis, self._on_yield, self._is_held_back
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(watch.run()) for watch in self._watches()]
            watching = [group.create_task(self._stop_when_asked(tasks)), *tasks]
            if tasks:  # without ports there is no health, and nobody is late
                group.create_task(self._tell_health())
                watching.append(group.create_task(self._kill_when_late()))
            await self._until_exited()
            for task in watching:
                task.cancel()
            await asyncio.wait(watching)
            self._health.put_nowait(None)

    async def _until_exited(self) -> None:
        """Wait for the end; that it runs is written meanwhile, and if that fails it is a failure of ours."""
        if self._recording is not None:
            waits: set[asyncio.Future[Any]] = {self._exited, self._recording}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._recording.done():
                self._recording.result()
        if not self._exited.done():
            await asyncio.wait({self._exited})

    # health

    def instance(self, index: int, port: Port) -> Instance:
        """Return how this job's port is announced."""
        number = self._parts.records.get(self.spec.id).job.ports[index]
        return Instance(
            id=f"{self._parts.host_id}-{number}" + (f"-{crc32(self.spec.id.encode()):08x}" if port.is_shared else ""),
            service=port.service,
            host=self._parts.host_ip,
            port=number,
            protocol=port.protocol,
            meta={**self.spec.labels, "job_id": self.spec.id, "host_id": self._parts.host_id},
        )

    def _watches(self) -> list[PortWatch]:
        job = self._parts.records.get(self.spec.id).job
        if job.status != "running":
            return []
        found = []
        for index, port in self._service_ports():
            self._up[index] = job.is_up

            def on_change(is_up: bool, why: str, index: int = index) -> None:
                self._health.put_nowait((index, is_up, why))

            found.append(
                PortWatch(
                    host=self._parts.host_ip if self.spec.has_host_network else job.ip,
                    port=job.ports[index],
                    check=port.check,
                    instance=self.instance(index, port),
                    registry=self._parts.registry,
                    on_change=on_change,
                    is_up=job.is_up,
                    listens=self._listens(port),
                    on_late=self._is_late.set,
                    look_inside=CommandLook(self._parts.execs, self.spec.id),
                )
            )
        return found

    def _listens(self, port: Port) -> Callable[[], bool]:
        if not port.is_shared:
            return lambda: True
        return lambda: drain.listens(self._parts.cgroups.pids(self.spec.id), port.number)

    async def _tell_health(self) -> None:
        while (item := await self._health.get()) is not None:
            index, is_up, why = item
            if self._up[index] and not is_up:
                self._say(f"port {self._parts.records.get(self.spec.id).job.ports[index]} is down: {why}")
            elif not is_up:
                self._say(f"port {self._parts.records.get(self.spec.id).job.ports[index]}: {why}")
            self._up[index] = is_up
            job = self._parts.records.get(self.spec.id).job
            if job.status == "running" and (job.is_up != all(self._up.values()) or not is_up):
                now_up = all(self._up.values())
                await self._parts.records.change(self.spec.id, "up" if now_up else "down", is_up=now_up)

    # the end

    async def _stop_when_asked(self, watches: list[asyncio.Task[None]]) -> None:
        await self._stop.wait()
        job = self._parts.records.get(self.spec.id).job
        was_running = job.status in ("running", "stopping")
        record = {"is_stop_asked": self._is_final}
        await self._parts.records.change(self.spec.id, "stopping", record=record, status="stopping", is_up=False)
        self.stopping_or_ended.set()
        for watch in watches:
            watch.cancel()
        await self._deregister()
        was_up = [
            index
            for index, port in self._service_ports()
            # who shares a port is connected to as long as it listens: it has to drain by itself
            if port.protocol == "tcp" and not port.is_shared and self._up.get(index)
        ]
        numbers = [job.ports[index] for index in was_up]
        if was_running and numbers:
            left = await drain.drain(job.pid, numbers, self._drain_s)
            if left:
                self._say(f"{left} connections were still open after {self._drain_s:g} s")
        if was_running:
            with contextlib.suppress(JobNotFound):
                await self._parts.spawner.signal(self.spec.id, self.spec.stop_signal)
            done, _ = await asyncio.wait({self._exited}, timeout=self.spec.stop_grace_s)
            if not done:
                self._say(f"still alive {self.spec.stop_grace_s:g} s after signal {self.spec.stop_signal}: killed")
        await self._kill()

    async def _kill_when_late(self) -> None:
        await self._is_late.wait()
        self._say("the job does not serve in time: killed")
        await self._kill()

    async def _kill(self) -> None:
        while not self._exited.done():
            try:
                await self._parts.cgroups.kill(self.spec.id)
                await self._parts.spawner.signal(self.spec.id, 9)
            except JobNotFound:
                return
            except OSError as error:
                log.error("job %s does not die: %s; trying on", self.spec.id, error)
            await asyncio.wait({self._exited}, timeout=_KILLED_S)

    async def _deregister(self) -> None:
        job = self._parts.records.get(self.spec.id).job
        if not job.ports:
            return
        for index, port in self._service_ports():
            await self._parts.registry.deregister(port.service, self.instance(index, port).id)

    async def _finish(self, exited: Exited) -> None:
        await self._deregister()
        assert self.output is not None
        self.output.finish()
        if not self.output.finished.is_set():
            try:
                async with asyncio.timeout(_OUTPUT_END_S):
                    await self.output.finished.wait()
            except TimeoutError:
                log.warning("job %s ended, but somebody holds its output open", self.spec.id)
        reason = self._end_reason(exited)
        self._say_end(exited, reason)
        if self._error is not None:
            status = "failed"
        elif exited.status == 0 or self._stop.is_set():
            status = "done"
        else:
            status = "crashed"
        await self._end(status, exited, reason)

    def _end_reason(self, exited: Exited) -> str:
        """Say why it ended: only a kill that the kernel counts as one for memory is an `oom`."""
        if self._error is not None:
            return "start-failed"
        if self._stop.is_set():
            return "stopped"
        if self._is_late.is_set():
            return "start-timeout"
        if exited.status is None:
            return "unknown"
        if exited.status == _KILLED and self._parts.cgroups.incidents(self.spec.id).oom_kills:
            return "oom"
        if self._parts.disks.look(self.spec) and exited.status != 0:
            return "disk-full"
        return "signaled" if exited.status > 128 else "exited"

    def _say_end(self, exited: Exited, reason: str) -> None:
        self._on_met(self._parts.cgroups.incidents(self.spec.id))
        if reason == "oom":
            self._say("the job was killed because its memory ran out")
        elif exited.status is None:
            self._say("ended, and nobody could see how: its exit status is unknown")
        elif exited.status != 0 and reason in ("signaled", "exited"):
            what = f"signal {exited.status - 128}" if exited.status > 128 else f"exit status {exited.status}"
            self._say(f"ended with {what}")

    def _on_met(self, met: Incidents) -> None:
        """Say which limits were met since the last time."""
        kills = met.oom_kills - self._met.oom_kills
        if kills > 0:
            limit = f"for the memory limit of {self.spec.resources.memory_bytes // 2**20} MiB"
            why = "because the host has no memory left" if met.is_host_oom else limit
            self._say(f"{kills} {'process was' if kills == 1 else 'processes were'} killed {why}")
        if met.forks_refused > self._met.forks_refused:
            limit = f"pids limit of {self.spec.resources.pids_max} reached"
            self._say(f"{limit}: {met.forks_refused - self._met.forks_refused} new processes or threads refused")
        self._met = met

    async def _end(self, status: str, exited: Exited | None, reason: str) -> None:
        """Give everything back, record the end, let the spawner forget."""
        if self._recording is not None:  # `undo` takes the note away: without a record the job would begin again
            await self._recording
        await undo(self._parts.launcher, self.spec.id)
        await self._parts.records.change(
            self.spec.id,
            "ended",
            record={"is_stop_asked": self._is_final},
            status=status,
            is_up=False,
            exit_status=None if exited is None or status == "failed" else exited.status,
            is_stop_asked=self._stop.is_set(),
            end_reason=reason,
            ended_at=clock.now_s() if exited is None else exited.at,
            error=self._error,
        )
        self._parts.logs.end(self.spec.id)
        self.ended.set()
        self.stopping_or_ended.set()
        self.launched_or_ended.set()
        if exited is not None:
            await self._parts.spawner.ack(self.spec.id)

    def _say(self, text: str) -> None:
        if self.spec.has_log:
            self._parts.logs.say(self.spec.id, text)


async def undo(launcher: Launching, job_id: str) -> None:
    """Undo all launch steps; what fails is logged, and tried again by the sweep of `jobs`."""
    try:
        await launcher.undo(job_id)
    except (OSError, Internal) as error:
        log.error("job %s left something behind, trying again later: %s", job_id, error)
