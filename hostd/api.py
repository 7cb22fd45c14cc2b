"""hostd's HTTP API: a table of endpoints, each a call to `jobs` or to the host, no logic of its own.

Served on a unix socket in a 0700 directory: who can open it may run jobs as root, so nobody but
root and the platform's own jobs that were given the directory can.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Protocol, TypedDict, TypeVar, cast

from aiohttp import web
from aiohttp.typedefs import Middleware

from discovery.wire import serve
from discovery.wire.errors import Invalid, ServiceError
from discovery.wire.serve import Call, Endpoint
from discovery.wire.version import VERSION
from hostd import logpieces, metrics
from hostd.attach import attach_client, exec_client
from hostd.execs import Execs
from hostd.jobs import Jobs
from hostd.logpieces import Pieces
from hostd.logreader import Reader
from hostd.logtext import KEEP_ALIVE, Lines, Raw
from hostd.types import (
    API_VERSION,
    ENDED,
    DiskUse,
    ExecSpec,
    ExecStarted,
    HostStatus,
    Image,
    ImageUser,
    Job,
    JobEvent,
    JobSpec,
    LogLine,
    Pruned,
    Removed,
    SignalRequest,
    Snapshot,
    Stats,
    Volume,
)

T = TypeVar("T")
_LINES_MAX = 1_000_000
_LINES_PER_TURN = 500
_FOLLOW_QUEUE = 8
_TAKE_UP_S = 0.05
"""How often to look whether a hostd that has just begun has taken up the job."""
_OUTPUT_BUFFER_BYTES = 1024 * 1024


class Host(Protocol):
    """What the API needs of the daemon besides jobs."""

    async def status(self) -> HostStatus:
        """Return the state of the host."""

    async def images(self) -> list[Image]:
        """Return the images of the store."""

    async def image(self, name: str) -> Image:
        """Return one image."""

    async def image_user(self, name: str, user: str) -> ImageUser:
        """Return whom a name means in an image."""

    async def remove_image(self, name: str) -> None:
        """Forget an image that no job uses."""

    async def prune_images(self) -> Pruned:
        """Remove what no image and no job needs."""

    def volumes(self) -> list[Volume]:
        """Return the volumes."""

    async def remove_volume(self, name: str) -> None:
        """Delete a volume that no job uses."""

    async def stats(self, *, has_pressure: bool) -> Stats:
        """Measure the machine and every living job."""

    async def metrics(self) -> str:
        """Say the same, and what has happened so far, in Prometheus' text format."""

    async def snapshots(self, name: str) -> list[Snapshot]:
        """Return the snapshots of a volume, or of all."""

    async def snapshot(self, name: str, snapshot: str, *, may_freeze: bool) -> Snapshot:
        """Copy a volume."""

    async def restore(self, name: str, snapshot: str) -> None:
        """Make a volume what it was."""

    async def remove_snapshot(self, name: str, snapshot: str) -> None:
        """Delete a snapshot."""

    async def df(self, *, has_volumes: bool) -> list[DiskUse]:
        """Measure what takes the disk."""

    async def gc(self, *, is_dry_run: bool, is_pressed: bool) -> list[Removed]:
        """Remove what nobody needs."""

    def shut_down(self, *, has_jobs: bool) -> None:
        """Begin to shut down."""


def labels_of(call: Call) -> dict[str, str]:
    """Read the repeated `label=KEY=VALUE`.

    Raises:
        Invalid: one has no `=`.
    """
    found = {}
    for text in call.raw.query.getall("label", []):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise Invalid(f"label {text!r}", hint="label=KEY=VALUE")
        found[key] = value
    return found


def _lines_of(call: Call) -> int | None:
    return call.number("lines", 0, high=_LINES_MAX) if call.query.get("lines") else None


def _stream_of(call: Call) -> int | None:
    return call.number("stream", 0, high=2) if call.query.get("stream") else None


class Start(TypedDict):
    """Where to begin to read a log."""

    since: int
    at: float
    lines: int | None


def _start_of(call: Call) -> Start:
    return Start(since=call.number("since", 0), at=call.number("since_ms", 0) / 1000, lines=_lines_of(call))


class Api:
    """The handlers, bound to one host."""

    def __init__(self, jobs: Jobs, execs: Execs, host: Host) -> None:
        self._jobs = jobs
        self._execs = execs
        self._host = host

    # jobs

    async def list_jobs(self, call: Call) -> list[Job]:
        return self._jobs.list(labels_of(call), is_active=call.flag("active"))

    async def get_job(self, call: Call) -> Job:
        if call.flag("wait"):
            return await self._jobs.wait(call.path["id"])
        return self._jobs.records.get(call.path["id"]).job

    async def put_job(self, call: Call) -> Job:
        spec: JobSpec = call.body
        if spec.id != call.path["id"]:
            raise Invalid(f"the path names job {call.path['id']!r}, the body {spec.id!r}")
        return await self._jobs.start(spec)

    async def stop_job(self, call: Call) -> Job:
        return await self._jobs.stop(call.path["id"], is_waiting=call.flag("wait"))

    async def signal_job(self, call: Call) -> None:
        if not 1 <= call.body.number <= 64:
            raise Invalid(f"signal {call.body.number}", hint="1 to 64")
        await self._jobs.signal(call.path["id"], call.body.number)

    async def forget_job(self, call: Call) -> None:
        await self._jobs.forget(call.path["id"])

    async def attach(self, call: Call) -> web.StreamResponse:
        return await attach_client(self._jobs, call)

    async def exec_attached(self, call: Call) -> web.StreamResponse:
        return await exec_client(self._execs, call)

    async def exec_detached(self, call: Call) -> ExecStarted:
        run = await self._execs.start(call.path["id"], call.body)
        run.detach()
        return ExecStarted(id=run.id, job_id=run.job_id, pid=run.pid)

    # logs and events

    async def job_log(self, call: Call) -> web.StreamResponse:
        job_id = call.path["id"]
        job = self._jobs.records.get(job_id).job
        reader = self._jobs.logs.reader(job_id, job.spec.labels, **_start_of(call))
        try:
            if call.flag("follow"):
                return await serve.send_events(call, _follow_job(self._jobs, job_id, reader.read))
            return await serve.send_events(call, _all_of(reader.read))
        finally:
            reader.close()

    async def job_output(self, call: Call) -> web.StreamResponse:
        job_id, stream = call.path["id"], _stream_of(call)
        job = self._jobs.records.get(job_id).job
        logs, start = self._jobs.logs, _start_of(call)
        text: Lines | Raw
        if call.flag("raw"):
            text = Raw(logs.folder(job_id), logs.start(job_id, stream=stream, **start), stream=stream)
        else:
            reader = logs.reader(job_id, job.spec.labels, stream=stream, **start)
            text = Lines(reader, has_times=call.flag("times"), stream=stream)
        try:
            parts = _follow_job(self._jobs, job_id, text.read) if call.flag("follow") else _all_of(text.read)
            return await serve.send_stream(
                call, parts, "application/octet-stream", KEEP_ALIVE, buffer_bytes=_OUTPUT_BUFFER_BYTES
            )
        finally:
            text.close()

    async def job_pieces(self, call: Call) -> web.StreamResponse:
        job_id, stream = call.path["id"], _stream_of(call)
        self._jobs.records.get(job_id)
        logs = self._jobs.logs
        found = Pieces(logs.folder(job_id), logs.start(job_id, stream=stream, **_start_of(call)), stream=stream)
        try:
            parts = _follow_job(self._jobs, job_id, found.read) if call.flag("follow") else _all_of(found.read)
            return await serve.send_stream(
                call, parts, "application/octet-stream", logpieces.KEEP_ALIVE, buffer_bytes=_OUTPUT_BUFFER_BYTES
            )
        finally:
            found.close()

    async def log(self, call: Call) -> web.StreamResponse:
        labels, lines = labels_of(call), _lines_of(call)
        stream = _stream_of(call)
        merged = Merged(self._jobs, labels, lines, stream)
        if not call.flag("follow"):
            return await serve.send_events(call, merged.read())
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(merged.watch())
            try:
                return await serve.send_events(call, merged.follow())
            finally:
                watching.cancel()

    async def events(self, call: Call) -> web.StreamResponse:
        return await serve.send_events(call, self._jobs.records.watch(labels_of(call)))

    # the host

    async def status(self, _: Call) -> HostStatus:
        return await self._host.status()

    async def images(self, _: Call) -> list[Image]:
        return await self._host.images()

    async def image(self, call: Call) -> Image:
        return await self._host.image(call.path["name"])

    async def image_user(self, call: Call) -> ImageUser:
        return await self._host.image_user(call.path["name"], call.query.get("user", ""))

    async def remove_image(self, call: Call) -> None:
        await self._host.remove_image(call.path["name"])

    async def prune_images(self, _: Call) -> Pruned:
        return await self._host.prune_images()

    async def volumes(self, _: Call) -> list[Volume]:
        return self._host.volumes()

    async def remove_volume(self, call: Call) -> None:
        await self._host.remove_volume(call.path["name"])

    async def stats(self, call: Call) -> Stats | web.StreamResponse:
        if call.flag("follow"):
            interval_s = call.number("interval_s", 2, low=1, high=60)
            return await serve.send_events(call, _measured(self._host, interval_s, has_pressure=call.flag("pressure")))
        return await self._host.stats(has_pressure=call.flag("pressure"))

    async def metrics(self, _: Call) -> web.StreamResponse:
        return web.Response(text=await self._host.metrics(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def snapshots(self, call: Call) -> list[Snapshot]:
        return await self._host.snapshots(call.path.get("name", ""))

    async def make_snapshot(self, call: Call) -> Snapshot:
        return await self._host.snapshot(call.path["name"], call.path["snapshot"], may_freeze=call.flag("freeze"))

    async def restore_snapshot(self, call: Call) -> None:
        await self._host.restore(call.path["name"], call.path["snapshot"])

    async def remove_snapshot(self, call: Call) -> None:
        await self._host.remove_snapshot(call.path["name"], call.path["snapshot"])

    async def df(self, call: Call) -> list[DiskUse]:
        return await self._host.df(has_volumes=call.flag("volumes"))

    async def gc(self, call: Call) -> list[Removed]:
        return await self._host.gc(is_dry_run=call.flag("dry_run"), is_pressed=call.flag("pressure"))

    async def shutdown(self, call: Call) -> None:
        self._host.shut_down(has_jobs=call.flag("jobs"))

    def application(self, authorize: serve.Authorize | None = None, *middlewares: Middleware) -> web.Application:
        """Make an application that answers the table, for one listener."""
        return serve.application(
            "hostd", VERSION, self.endpoints(), authorize, api_version=API_VERSION, middlewares=middlewares
        )

    def endpoints(self) -> list[Endpoint]:
        """Return the table."""
        label = {"label": "KEY=VALUE that a job must have; may be repeated"}
        tail = {"follow": "go on with what comes", "lines": "only the last so many lines"}
        since = {
            "since": "only lines after this sequence number",
            "since_ms": "only what came at this time (milliseconds since the epoch) or later",
        }
        return [
            Endpoint(
                method="GET", path="/jobs", handler=self.list_jobs, summary="List jobs", response=list[Job],
                query=label | {"active": "only jobs that have not ended"},
            ),
            Endpoint(
                method="GET", path="/jobs/{id}", handler=self.get_job, summary="Show one job", response=Job,
                query={"wait": "answer when the job has ended"},
            ),
            Endpoint(
                method="PUT", path="/jobs/{id}", handler=self.put_job, summary="Record a job and have it started",
                request=JobSpec, response=Job,
            ),
            Endpoint(
                method="POST", path="/jobs/{id}/stop", handler=self.stop_job, response=Job,
                summary="Deregister, drain and end a job", query={"wait": "answer when the job has ended"},
            ),
            Endpoint(
                method="POST", path="/jobs/{id}/signal", handler=self.signal_job, request=SignalRequest,
                summary="Send a signal to a job's program",
            ),
            Endpoint(
                method="DELETE", path="/jobs/{id}", handler=self.forget_job, summary="Forget an ended job and its log"
            ),
            Endpoint(
                method="GET", path="/jobs/{id}/attach", handler=self.attach, kind="websocket",
                summary="Attach to a job's input and output", query={"logs": "first what it has printed so far"},
            ),
            Endpoint(
                method="GET", path="/jobs/{id}/exec", handler=self.exec_attached, kind="websocket",
                summary="Run a program inside a job and be its terminal: the first message is an ExecSpec, as text",
            ),
            Endpoint(
                method="POST", path="/jobs/{id}/exec", handler=self.exec_detached, request=ExecSpec,
                response=ExecStarted, summary="Run a program inside a job and leave it alone; its output is dropped",
            ),
            Endpoint(
                method="GET", path="/jobs/{id}/log", handler=self.job_log, kind="sse", response=LogLine,
                summary="Read a job's log", query=tail | since,
            ),
            Endpoint(
                method="GET", path="/jobs/{id}/output", handler=self.job_output, kind="bytes", response=bytes,
                summary="Read a job's log as text, in frames (`hostd.logtext` draws them)",
                query=tail | since | {
                    "stream": "only 0, 1 or 2", "times": "begin each line with its time",
                    "raw": "what the job wrote, byte for byte",
                },
            ),
            Endpoint(
                method="GET", path="/jobs/{id}/pieces", handler=self.job_pieces, kind="bytes", response=bytes,
                summary="Read a job's log as it lies on the disk, in frames (`hostd.logpieces` draws them)",
                query=tail | since | {"stream": "only 0, 1 or 2"},
            ),
            Endpoint(
                method="GET", path="/log", handler=self.log, kind="sse", response=LogLine,
                summary="Read the logs of several jobs, merged", query=label | tail | {"stream": "0, 1 or 2"},
            ),
            Endpoint(
                method="GET", path="/events", handler=self.events, kind="sse", response=JobEvent,
                summary="Watch jobs: snapshot, current, changes", query=label,
            ),
            Endpoint(
                method="GET", path="/status", handler=self.status, summary="Show the host", response=HostStatus
            ),
            Endpoint(
                method="GET", path="/stats", handler=self.stats, response=Stats,
                summary="Measure the machine and every living job",
                query={
                    "follow": "again and again, as Server-Sent Events", "interval_s": "1 to 60, default 2",
                    "pressure": "also how long each job's tasks waited (PSI)",
                },
            ),
            Endpoint(
                method="GET", path="/metrics", handler=self.metrics, kind="bytes", response=bytes,
                summary="The same for Prometheus, as text",
            ),
            Endpoint(
                method="GET", path="/images", handler=self.images, summary="List images", response=list[Image]
            ),
            Endpoint(
                method="GET", path="/images/{name}", handler=self.image, summary="Show one image", response=Image
            ),
            Endpoint(
                method="GET", path="/images/{name}/user", handler=self.image_user, response=ImageUser,
                summary="Say whom a user's name means in an image", query={"user": "USER[:GROUP], or the image's own"},
            ),
            Endpoint(
                method="DELETE", path="/images/{name}", handler=self.remove_image, summary="Forget an unused image"
            ),
            Endpoint(
                method="POST", path="/images/prune", handler=self.prune_images, response=Pruned,
                summary="Remove layers that no image and no job needs",
            ),
            Endpoint(
                method="GET", path="/volumes", handler=self.volumes, summary="List volumes", response=list[Volume]
            ),
            Endpoint(
                method="DELETE", path="/volumes/{name}", handler=self.remove_volume, summary="Delete an unused volume"
            ),
            Endpoint(
                method="GET", path="/volumes/{name}/snapshots", handler=self.snapshots, response=list[Snapshot],
                summary="List a volume's snapshots",
            ),
            Endpoint(
                method="GET", path="/snapshots", handler=self.snapshots, response=list[Snapshot],
                summary="List all volumes' snapshots",
            ),
            Endpoint(
                method="PUT", path="/volumes/{name}/snapshots/{snapshot}", handler=self.make_snapshot,
                response=Snapshot, summary="Copy a volume as it is now",
                query={"freeze": "hold jobs that use it still meanwhile, instead of refusing"},
            ),
            Endpoint(
                method="POST", path="/volumes/{name}/snapshots/{snapshot}/restore", handler=self.restore_snapshot,
                summary="Make an unused volume what it was",
            ),
            Endpoint(
                method="DELETE", path="/volumes/{name}/snapshots/{snapshot}", handler=self.remove_snapshot,
                summary="Delete a snapshot",
            ),
            Endpoint(
                method="GET", path="/df", handler=self.df, response=list[DiskUse],
                summary="Measure what takes the host's disk", query={"volumes": "each volume and snapshot instead"},
            ),
            Endpoint(
                method="POST", path="/gc", handler=self.gc, response=list[Removed],
                summary="Remove what nobody needs: ended jobs, layers and blobs by age",
                query={"dry_run": "only say what", "pressure": "as if the disk were full: any age, and unused images"},
            ),
            Endpoint(
                method="POST", path="/shutdown", handler=self.shutdown, summary="Stop hostd",
                query={"jobs": "and every job, and all that hostd has made in the kernel"},
            ),
        ]  # fmt: skip


async def _measured(host: Host, interval_s: float, *, has_pressure: bool) -> AsyncIterator[Stats]:
    while True:
        yield await host.stats(has_pressure=has_pressure)
        await asyncio.sleep(interval_s)


async def _follow_job(jobs: Jobs, job_id: str, read: Callable[[], T]) -> AsyncIterator[T]:
    """Follow one job from before its first line to its end."""
    async for found in jobs.logs.follow(job_id, read):
        yield found
    if await _is_to_come(jobs, job_id):
        async for found in jobs.logs.follow(job_id, read):
            yield found


async def _is_to_come(jobs: Jobs, job_id: str) -> bool:
    """Wait for a log that has yet to be opened; say whether there was one to wait for."""
    has_waited = False
    while job_id in jobs.records and jobs.records.get(job_id).job.status not in ENDED:
        run = jobs.run_of(job_id)
        if run is not None:
            has_waited = has_waited or run.output is None
            await run.launched_or_ended.wait()
            return has_waited
        has_waited = True
        await asyncio.sleep(_TAKE_UP_S)
    return has_waited


async def _all_of(read: Callable[[], T]) -> AsyncIterator[T]:
    """Yield what is there, leaving the loop to others in between."""
    while found := read():
        yield found
        await asyncio.sleep(0)


class Merged:
    """The logs of all jobs that have some labels, as one."""

    def __init__(self, jobs: Jobs, labels: dict[str, str], lines: int | None, stream: int | None) -> None:
        self._jobs = jobs
        self._labels = labels
        self._lines = lines
        self._stream = stream
        self._readers: dict[str, Reader] = {}
        self._living: set[str] = set()
        self._opened = asyncio.Event()
        self._queue: asyncio.Queue[list[LogLine] | ServiceError] = asyncio.Queue(_FOLLOW_QUEUE)

    def _open(self) -> None:
        for job in self._jobs.list(self._labels):
            if job.status not in ENDED:
                self._living.add(job.spec.id)
            self._readers[job.spec.id] = self._jobs.logs.reader(
                job.spec.id, job.spec.labels, lines=self._lines, stream=self._stream
            )

    def _is_wanted(self, line: LogLine) -> bool:
        return self._stream is None or line.stream == self._stream

    def _merged(self) -> Iterator[LogLine]:
        readers = self._readers.values()
        lines = heapq.merge(*(reader.iterate() for reader in readers), key=lambda line: line.at)
        wanted = filter(self._is_wanted, lines)
        return wanted if self._lines is None else iter(list(wanted)[-self._lines :] if self._lines else [])

    async def read(self) -> AsyncIterator[list[LogLine]]:
        """Yield what is there."""
        with ExitStack() as stack:
            self._open()
            for reader in self._readers.values():
                stack.callback(reader.close)
            merged = self._merged()
            async for batch in _all_of(lambda: list(islice(merged, _LINES_PER_TURN))):
                yield batch

    async def follow(self) -> AsyncIterator[list[LogLine]]:
        """Yield what is there, then what `watch`, a task of the caller, brings."""
        try:
            self._open()
            merged = self._merged()
            async for batch in _all_of(lambda: list(islice(merged, _LINES_PER_TURN))):
                yield batch
            self._opened.set()
            while True:
                item = await self._queue.get()
                if isinstance(item, ServiceError):
                    raise item
                yield item
        finally:
            for reader in self._readers.values():
                reader.close()

    async def watch(self) -> None:
        """Bring what comes, also from jobs that are new, for ever."""
        await self._opened.wait()
        try:
            async with asyncio.TaskGroup() as followers:
                async for event in self._jobs.records.watch(self._labels):
                    if event.job is not None and event.kind in ("snapshot", "created"):
                        self._join(event.job, followers)
        except* ServiceError as group:
            await self._queue.put(cast(ServiceError, group.exceptions[0]))

    def _join(self, job: Job, followers: asyncio.TaskGroup) -> None:
        reader = self._readers.get(job.spec.id)
        if reader is None:
            reader = self._jobs.logs.reader(job.spec.id, job.spec.labels)
        elif job.spec.id not in self._living:
            return  # it had ended before we read it
        followers.create_task(self._pass_on(reader))

    async def _pass_on(self, reader: Reader) -> None:
        try:
            async for lines in _follow_job(self._jobs, reader.job_id, reader.read):
                if wanted := [line for line in lines if self._is_wanted(line)]:
                    await self._queue.put(wanted)
        finally:
            reader.close()
