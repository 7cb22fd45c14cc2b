"""A host with the API of hostd whose jobs are only records, and end as their arguments say.

`["serve"]` is up at once, `["slow"]` never, `["crash", "7"]` ends with 7 as soon as it runs, `["refuse"]`
is refused, `["fail"]` fails to launch, `["late", "0.5"]` is up after half a second. Arguments that name
one of `programs` are run for real, as a process of this machine with its PORT.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from aiohttp import web

from discovery.client import Services, Store
from discovery.types import Instance
from discovery.wire import attach, clock
from discovery.wire.errors import ErrorBody, Unavailable
from discovery.wire.serve import Call, Endpoint, application, frames, listen_unix, open_websocket, send_events
from hostd.errors import InvalidSpec, JobNotFound, PortTaken
from hostd.types import API_VERSION, ENDED, HostStatus, Image, Job, JobEvent, JobSpec, Layer, LogLine

DIGEST = "sha256:" + "a" * 64


class FakeHost:
    def __init__(self, id: str, run_dir: Path, discoverd: str, programs: Collection[str] = ()) -> None:
        self.id = id
        self.run_dir = run_dir
        self.socket = run_dir / "api" / "hostd.sock"
        self.discoverd = discoverd
        self.jobs: dict[str, Job] = {}
        self.starts: list[JobSpec] = []
        self.stops: list[str] = []
        self.lines: dict[str, list[LogLine]] = {}
        self.images = {
            name: Image(name=name, digest=DIGEST, layers=(Layer(digest=DIGEST, size_bytes=1),))
            for name in ("system", "stack", "build")
        }
        self.stop_s = 0.0
        self.starting_up = 0
        self.history: list[tuple[str, str, str]] = []
        self._programs = programs
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []
        self._queues: set[asyncio.Queue[JobEvent]] = set()
        self._sequence = itertools.count(1)
        self._ports = itertools.count(55000)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._services: Services | None = None
        self.lease = 0

    # the life of a job

    def emit(self, kind: str, job: Job) -> None:
        self.jobs[job.spec.id] = job
        self.history.append((job.spec.id, job.spec.labels.get("release", ""), kind))
        event = msgspec.convert({"sequence": next(self._sequence), "kind": kind, "at": clock.now_s()}, JobEvent)
        for queue in self._queues:
            queue.put_nowait(msgspec.structs.replace(event, job=job))

    def write(self, job_id: str, text: str) -> None:
        lines = self.lines.setdefault(job_id, [])
        labels = self.jobs[job_id].spec.labels
        lines.append(
            LogLine(job_id=job_id, sequence=len(lines) + 1, at=clock.now_s(), stream=1, text=text, labels=labels)
        )

    def up(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.status == "running" and job.is_up]

    def running(self, type: str = "web") -> list[Job]:
        return [job for job in self.jobs.values() if job.status == "running" and job.spec.labels.get("type") == type]

    def end(self, job_id: str, *, status: str = "crashed", exit_status: int = 137, is_stop_asked: bool = False) -> None:
        """End a job, by default unasked, as a kill -9 does."""
        job = self.jobs[job_id]
        if job.status not in ENDED:
            ended = msgspec.structs.replace(
                job,
                is_up=False,
                exit_status=exit_status,
                ended_at=clock.now_s(),
                status=status,
                is_stop_asked=is_stop_asked,
            )
            self.emit("ended", ended)

    async def _live(self, spec: JobSpec) -> None:
        await asyncio.sleep(0)
        job = msgspec.structs.replace(self.jobs[spec.id], status="starting")
        self.emit("created", job)
        how = spec.args[0] if spec.args else "serve"
        if how == "fail":
            error = ErrorBody(code="launch_failed", message="no layer", detail={"step": "files"})
            self.emit("ended", msgspec.structs.replace(job, status="failed", error=error, ended_at=clock.now_s()))
            return
        if job.spec.id not in self.jobs or self.jobs[spec.id].status in ("stopping", *ENDED):
            return
        job = msgspec.structs.replace(job, status="running", started_at=clock.now_s(), pid=4242)
        self.emit("started", job)
        if any(program in spec.args for program in self._programs):
            await self._run(spec, job)
            return
        if how == "crash":
            self.write(spec.id, "cannot find module express")
            self.end(spec.id, exit_status=int(spec.args[1]))
        elif how == "exit":
            self.end(spec.id, status="done", exit_status=0)
        elif how != "slow":
            await asyncio.sleep(float(spec.args[1]) if how == "late" else 0)
            if self.jobs[spec.id].status == "running":
                await self._register(spec)
                self.emit("up", msgspec.structs.replace(self.jobs[spec.id], is_up=True))

    async def _register(self, spec: JobSpec) -> None:
        assert self._services is not None
        for port, number in zip(spec.ports, self.jobs[spec.id].ports, strict=True):
            if port.service:
                await self._services.register(
                    Instance(id=f"{self.id}-{number}", service=port.service, host="127.0.0.1", port=number),
                    lease=self.lease,
                )

    async def _deregister(self, job: Job) -> None:
        assert self._services is not None
        for port, number in zip(job.spec.ports, job.ports, strict=True):
            if port.service:
                await self._services.deregister(port.service, f"{self.id}-{number}")

    async def _run(self, spec: JobSpec, job: Job) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *spec.args[1:],
            env={**os.environ, **spec.env, "PORT": str(job.ports[0]), "CONTROLLER_ID": spec.id},
            cwd=Path(__file__).parent.parent.parent,
        )
        self._processes[spec.id] = process
        for _ in range(200):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", job.ports[0])
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                break
        await self._register(spec)
        self.emit("up", msgspec.structs.replace(self.jobs[spec.id], is_up=True))
        status = await process.wait()
        await self._deregister(job)
        self.end(spec.id, exit_status=status)

    # the API

    def endpoints(self) -> list[Endpoint]:
        table = [
            ("GET", "/jobs", self.list_jobs, None),
            ("GET", "/jobs/{id}", self.get_job, None),
            ("PUT", "/jobs/{id}", self.start, JobSpec),
            ("POST", "/jobs/{id}/stop", self.stop, None),
            ("GET", "/jobs/{id}/attach", self.attach, None),
            ("GET", "/jobs/{id}/log", self.job_log, None),
            ("GET", "/log", self.log, None),
            ("GET", "/events", self.events, None),
            ("GET", "/status", self.status, None),
            ("GET", "/images", self.list_images, None),
            ("GET", "/images/{name}", self.get_image, None),
        ]
        return [
            Endpoint(method=method, path=path, handler=handler, summary="", request=request)
            for method, path, handler, request in table
        ]

    def _labels(self, call: Call) -> dict[str, str]:
        pairs = [text.partition("=") for text in call.raw.query.getall("label", [])]
        return {key: value for key, _, value in pairs}

    def _matching(self, call: Call) -> list[Job]:
        labels = self._labels(call).items()
        return [job for job in self.jobs.values() if labels <= job.spec.labels.items()]

    def _job(self, call: Call) -> Job:
        if call.path["id"] not in self.jobs:
            raise JobNotFound(f"no job {call.path['id']}")
        return self.jobs[call.path["id"]]

    async def list_jobs(self, call: Call) -> list[Job]:
        return [job for job in self._matching(call) if not call.flag("active") or job.status not in ENDED]

    async def get_job(self, call: Call) -> Job:
        return self._job(call)

    async def start(self, call: Call) -> Job:
        spec: JobSpec = call.body
        if self.starting_up:
            self.starting_up -= 1
            raise Unavailable("this host is starting up")
        if spec.id in self.jobs:
            return self.jobs[spec.id]
        if spec.args[:1] == ("refuse",):
            raise InvalidSpec("not this one")
        fixed = {port.number for port in spec.ports if port.number}
        shared = {port.number for port in spec.ports if port.is_shared}
        living = [job for job in self.jobs.values() if job.status not in ENDED]
        taken = {n for job in living for n in job.ports} - shared
        if fixed & taken:
            raise PortTaken(f"port {min(fixed & taken)} is taken")
        self.starts.append(spec)
        is_real = any(program in spec.args for program in self._programs)
        ports = tuple(port.number or (free_port() if is_real else next(self._ports)) for port in spec.ports)
        job = Job(
            spec=spec,
            host_id=self.id,
            status="pending",
            host_ip="127.0.0.1",
            ports=ports,
            created_at=clock.now_s(),
        )
        self.jobs[spec.id] = job
        self._tasks.append(self._group.create_task(self._live(spec)))
        return job

    async def stop(self, call: Call) -> Job:
        job = self._job(call)
        self.stops.append(job.spec.id)
        if job.status in ENDED:
            return job
        await self._deregister(job)
        stopping = msgspec.structs.replace(job, status="stopping", is_up=False)
        self.emit("stopping", stopping)

        async def finish() -> None:
            if (process := self._processes.get(job.spec.id)) is not None and process.returncode is None:
                process.terminate()
                await process.wait()
            await asyncio.sleep(self.stop_s)
            self.end(job.spec.id, status="done", exit_status=143, is_stop_asked=True)

        self._tasks.append(self._group.create_task(finish()))
        return stopping

    async def attach(self, call: Call) -> web.StreamResponse:
        job = self._job(call)
        async with open_websocket(call) as websocket:
            async for frame in frames(websocket):
                if isinstance(frame, attach.Data) and frame.payload:
                    await websocket.send_bytes(attach.encode(attach.Data(attach.STDOUT, frame.payload.upper())))
                elif isinstance(frame, attach.Data):
                    break
            self.end(job.spec.id, status="crashed", exit_status=42)
            await websocket.send_bytes(attach.encode(attach.Exit(42)))
        return websocket

    async def job_log(self, call: Call) -> web.StreamResponse:
        found = self.lines.get(self._job(call).spec.id, [])
        return await send_events(call, _each(found[-call.number("lines", 1000) :]))

    async def log(self, call: Call) -> web.StreamResponse:
        kept = call.number("lines", 1000)
        found = [line for job in self._matching(call) for line in self.lines.get(job.spec.id, [])]
        found = sorted(found, key=lambda line: line.at)[len(found) - min(kept, len(found)) :]
        return await send_events(call, self._follow(call, found) if call.flag("follow") else _each(found))

    async def _follow(self, call: Call, shown: list[LogLine]) -> AsyncIterator[LogLine]:
        for line in shown:
            yield line
        seen = {(line.job_id, line.sequence) for lines in self.lines.values() for line in lines}
        while True:
            for job in self._matching(call):
                for line in self.lines.get(job.spec.id, []):
                    if (line.job_id, line.sequence) not in seen:
                        seen.add((line.job_id, line.sequence))
                        yield line
            await asyncio.sleep(0.02)

    async def events(self, call: Call) -> web.StreamResponse:
        return await send_events(call, self._events())

    async def _events(self) -> AsyncIterator[JobEvent]:
        queue: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._queues.add(queue)
        try:
            for job in list(self.jobs.values()):
                yield JobEvent(sequence=0, kind="snapshot", at=clock.now_s(), job=job)
            yield JobEvent(sequence=0, kind="current", at=clock.now_s())
            while True:
                yield await queue.get()
        finally:
            self._queues.discard(queue)

    async def status(self, _: Call) -> HostStatus:
        return HostStatus(
            host_id=self.id,
            version="0",
            host_ip="127.0.0.1",
            subnet="",
            bridge="",
            nat_backend="",
            cgroup_version=1,
            jobs_running=len(self.up()),
            discovery="",
        )

    async def list_images(self, _: Call) -> list[Image]:
        return list(self.images.values())

    async def get_image(self, call: Call) -> Image:
        return self.images[call.path["name"]]

    # being a host

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        async with (
            self._group,
            listen_unix(application("fake", "0", self.endpoints(), api_version=API_VERSION), self.socket),
        ):
            yield
            for task in self._tasks:
                task.cancel()
            await self.kill_processes()

    @asynccontextmanager
    async def registered(self) -> AsyncIterator[None]:
        async with Services(self.discoverd) as services, Store(self.discoverd) as store:
            self._services = services
            self.lease = await store.lease_grant(600)
            instance = Instance(
                id=self.id, service="hostd", host="127.0.0.1", port=1113, meta={"url": f"unix://{self.socket}"}
            )
            await services.register(instance, lease=self.lease)
            yield
            await services.deregister("hostd", self.id)

    async def kill_processes(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _each(lines: list[LogLine]) -> AsyncIterator[LogLine]:
    for line in lines:
        yield line
