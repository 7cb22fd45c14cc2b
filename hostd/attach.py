"""Serve one attached client: what a job prints, live (and before), and what the client types.

Any number of clients may be attached to one job, and all may type. The first one releases a job
that waits. The last frame tells how the job ended: `EXIT` with its status, or `ERROR` if it never
ran. Called by `api`; the frames are drawn in `wire.attach`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from aiohttp import web

from discovery.wire import attach, serve
from discovery.wire.errors import Invalid, ServiceError
from hostd.errors import JobNotRunning
from hostd.jobs import Jobs
from hostd.lifecycle import JobRun
from hostd.logreader import raw_chunks
from hostd.types import Job

_PAYLOAD_BYTES_MAX = attach.FRAME_BYTES_MAX - 2
_UNKNOWN_STATUS = 255


def _pieces(data: bytes) -> list[bytes]:
    return [data[start : start + _PAYLOAD_BYTES_MAX] for start in range(0, len(data), _PAYLOAD_BYTES_MAX)]


async def _send(websocket: web.WebSocketResponse, stream: int, data: bytes) -> None:
    for piece in _pieces(data):
        await websocket.send_bytes(attach.encode(attach.Data(stream, piece)))


async def _replay(jobs: Jobs, job_id: str, until: int, websocket: web.WebSocketResponse) -> None:
    for stream, data in raw_chunks(jobs.logs.folder(job_id), until):
        if stream and data:
            await _send(websocket, stream, data)


async def _say_end(job: Job, websocket: web.WebSocketResponse) -> None:
    if job.error is not None:
        frame: attach.Frame = attach.Error(job.error)
    else:
        frame = attach.Exit(_UNKNOWN_STATUS if job.exit_status is None else job.exit_status)
    await websocket.send_bytes(attach.encode(frame))


class Session:
    """One client attached to one job that has not ended."""

    def __init__(self, jobs: Jobs, run: JobRun, websocket: web.WebSocketResponse, *, has_logs: bool) -> None:
        self._jobs = jobs
        self._run = run
        self._websocket = websocket
        self._has_logs = has_logs

    async def serve(self) -> None:
        """Serve until the job has ended or the client goes."""
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(self._guard(self._receive))
            sending = group.create_task(self._guard(self._send_all))
            await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
            receiving.cancel()
            sending.cancel()
        for task in (receiving, sending):
            if not task.cancelled() and (error := task.result()) is not None:
                raise error

    async def _guard(self, act: Callable[[], Awaitable[None]]) -> ServiceError | None:
        """Return a refusal rather than raise it, so that the group hands it on bare."""
        try:
            await act()
        except ServiceError as error:
            return error
        except ConnectionResetError:
            return None
        return None

    async def _send_all(self) -> None:
        job_id = self._run.spec.id
        await self._run.launched_or_ended.wait()
        output = self._run.output
        if output is not None:
            with output.listen() as listener:
                if self._has_logs and self._run.spec.has_log:
                    until = self._jobs.logs.position(job_id)
                    await _replay(self._jobs, job_id, until, self._websocket)
                self._run.release()
                async for stream, data in listener:
                    if data:
                        await _send(self._websocket, stream, data)
                    else:
                        await self._websocket.send_bytes(attach.encode(attach.Data(stream, b"")))
        await self._run.ended.wait()
        await _say_end(self._jobs.records.get(job_id).job, self._websocket)

    async def _receive(self) -> None:
        await self._run.launched_or_ended.wait()
        async for frame in serve.frames(self._websocket):
            match frame:
                case attach.Data(attach.STDIN, payload):
                    await self._type(payload)
                case attach.Signal(number):
                    with contextlib.suppress(JobNotRunning):
                        await self._jobs.signal(self._run.spec.id, number)
                case attach.Resize(rows, columns) if self._run.input is not None:
                    self._run.input.resize(rows, columns)
                case attach.Resize():
                    pass
                case _:
                    raise Invalid(f"a client cannot send {type(frame).__name__} frames")

    async def _type(self, payload: bytes) -> None:
        if self._run.input is None:
            return
        if payload:
            await self._run.input.write(payload)
        elif await self._run.input.end():
            await self._run.close_stdin()


async def attach_client(jobs: Jobs, call: serve.Call) -> web.StreamResponse:
    """Answer `GET /jobs/{id}/attach`."""
    job_id, has_logs = call.path["id"], call.flag("logs")
    run = jobs.run_of(job_id)  # before the upgrade, so that an unknown job is an ordinary 404
    async with serve.open_websocket(call) as websocket:
        if run is not None:
            await Session(jobs, run, websocket, has_logs=has_logs).serve()
        else:
            job = jobs.records.get(job_id).job
            if has_logs and job.spec.has_log:
                await _replay(jobs, job_id, 2**62, websocket)
            await _say_end(job, websocket)
    return websocket
