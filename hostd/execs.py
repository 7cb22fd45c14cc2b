"""Run one more program inside a living job, beside its own: for `hostd exec` and for health checks by command.

Such a process has no record and no log. It belongs to whoever asked for it: a client that goes takes it along
(SIGHUP, then SIGKILL after `HANGUP_GRACE_S`, to its whole process group), a detached one belongs to the job. All of
them end with the job, and with hostd: the next one ends those that it finds, for nobody reads them any more.

Called by `attach`, `api`, `health` and `daemon`. Refuses jobs that do not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from discovery.wire.errors import ServiceError
from hostd import admission
from hostd.errors import JobNotFound, JobNotRunning
from hostd.pump import Input, Listener, Output
from hostd.records import Records
from hostd.runtime.process import ExecRequest, Exited, Listing, Spawned
from hostd.types import ExecSpec, Job, JobSpec

log = logging.getLogger(__name__)

HANGUP_GRACE_S = 3.0
OUTPUT_END_S = 1.0
"""How long we read on after the process has ended, if somebody else holds its output open."""


class Executing(Protocol):
    """`hostd.runtime.process.Spawner`, as far as it is needed here."""

    async def exec(self, request: ExecRequest) -> Spawned:
        """Run a process inside a job."""

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal."""

    async def close_stdin(self, job_id: str) -> None:
        """Drop the spawner's own write end."""

    async def kill(self, job_id: str) -> Exited:
        """Kill a process and return when it is dead."""

    async def ack(self, job_id: str) -> None:
        """Forget an ended process."""


Plan = Callable[[str, JobSpec, tuple[int, ...], ExecSpec], ExecRequest]
"""`hostd.runtime.launch.Launcher.exec_request`."""


class Exec:
    """One process beside a job's own, running or just ended."""

    def __init__(self, request: ExecRequest, spawner: Executing) -> None:
        self.id = request.id
        self.job_id = request.job_id
        self.pid = 0
        self.ended = asyncio.Event()
        self.status: int | None = None
        self.output: Output | None = None
        self.input: Input | None = None
        self.exited: asyncio.Future[Exited] = asyncio.get_running_loop().create_future()
        self.is_left = asyncio.Event()
        self._spawner = spawner
        self._is_patient = True
        self._stack = contextlib.ExitStack()
        self._listener: Listener | None = None

    def open(self, fds: Spawned) -> None:
        """Begin to read what it prints: all of it goes to the one listener."""
        self.pid = fds.pid
        self.output, self.input = Output(fds, None), Input(fds)
        self._listener = self._stack.enter_context(self.output.listen())

    @property
    def listener(self) -> Listener:
        """What it prints, from its first byte on."""
        assert self._listener is not None
        return self._listener

    async def signal(self, number: int) -> None:
        """Send a signal; an ended process is fine."""
        with contextlib.suppress(JobNotFound):
            await self._spawner.signal(self.id, number)

    async def close_stdin(self) -> None:
        """Have the spawner drop its write end as well, so that the process reads end of file."""
        await self._spawner.close_stdin(self.id)

    def detach(self) -> None:
        """Read no more of it: what it prints from now on is dropped."""
        self._stack.close()

    def leave(self, *, is_patient: bool = True) -> None:
        """Say that its client has gone: it is ended, at once unless `is_patient`; an ended process is fine."""
        self._is_patient = self._is_patient and is_patient
        self.is_left.set()
        self.detach()

    async def live(self) -> None:
        """See it to its end, or bring it there when its client goes."""
        assert self.output is not None
        assert self.input is not None
        async with asyncio.TaskGroup() as group:
            hanging_up = group.create_task(self._hang_up_when_left())
            await asyncio.wait({self.exited})
            hanging_up.cancel()
        self.output.finish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_END_S):
                await self.output.finished.wait()
        self.status = self.exited.result().status
        self.output.close()
        self.input.close()
        self.ended.set()
        await self._spawner.ack(self.id)

    async def _hang_up_when_left(self) -> None:
        await self.is_left.wait()
        for number in (signal.SIGHUP, signal.SIGKILL) if self._is_patient else (signal.SIGKILL,):
            _signal_group(self.pid, number)
            await self.signal(number)
            await asyncio.wait({self.exited}, timeout=HANGUP_GRACE_S)


def _signal_group(pid: int, number: int) -> None:
    """Send a signal to all that a process has started and that has not left its group."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:  # it leads a group of its own, unless it has just ended
            os.killpg(pid, number)


class Execs:
    """All such processes of this host."""

    def __init__(self, spawner: Executing, records: Records, plan: Plan, group: asyncio.TaskGroup) -> None:
        self._spawner = spawner
        self._records = records
        self._plan = plan
        self._group = group
        self._running: dict[str, Exec] = {}

    async def open(self, listing: Listing) -> None:
        """End what an earlier hostd has left."""
        for child in listing.children:
            if not admission.is_exec(child.id):
                continue
            log.info("process %s has lost its client: ended", child.id)
            with contextlib.suppress(JobNotFound):
                if child.state != "exited":
                    _signal_group(child.pid, signal.SIGKILL)
                    await self._spawner.kill(child.id)
                await self._spawner.ack(child.id)

    def on_exit(self, exited: Exited) -> None:
        """Take note that a process has ended."""
        if (run := self._running.get(exited.id)) and not run.exited.done():
            run.exited.set_result(exited)

    def check(self, job_id: str) -> Job:
        """Return a job that something can be run in.

        Raises:
            JobNotFound, JobNotRunning: there is none such.
        """
        job = self._records.get(job_id).job
        if job.status not in ("running", "stopping"):
            raise JobNotRunning(f"job {job_id} is {job.status}", hint="only a running job can be executed in")
        return job

    async def start(self, job_id: str, spec: ExecSpec) -> Exec:
        """Run a program in a job. Whoever asked says `leave` when it has gone, or the process runs until it ends.

        Raises:
            JobNotFound, JobNotRunning, Invalid: as their names say.
            LaunchFailed: the program could not be run; `detail` says why.
        """
        job = self.check(job_id)
        admission.check_exec(spec)
        request = self._plan(admission.exec_id(job_id, secrets.token_hex(4)), job.spec, job.ports, spec)
        run = self._running[request.id] = Exec(request, self._spawner)
        started: asyncio.Future[Exec] = asyncio.get_running_loop().create_future()
        # its own task from the beginning: a client that goes away must not leave a process that nobody knows
        self._group.create_task(self._run(run, request, started))
        try:
            return await asyncio.shield(started)
        except asyncio.CancelledError:
            run.is_left.set()
            started.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody hears of it
            raise

    async def _run(self, run: Exec, request: ExecRequest, started: asyncio.Future[Exec]) -> None:
        try:
            try:
                run.open(await self._spawner.exec(request))
            except ServiceError as error:
                started.set_exception(self._refusal(run.job_id, error))
                return
            started.set_result(run)
            await run.live()
        finally:
            del self._running[run.id]

    def _refusal(self, job_id: str, error: ServiceError) -> ServiceError:
        try:
            self.check(job_id)  # it may have ended meanwhile
        except ServiceError as ended:
            return ended
        return error

    @contextlib.asynccontextmanager
    async def client(self, job_id: str, spec: ExecSpec) -> AsyncIterator[Exec]:
        """Run a program for as long as this block lasts."""
        run = await self.start(job_id, spec)
        try:
            yield run
        finally:
            run.leave()
