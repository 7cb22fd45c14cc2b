"""Serve one attached client: what a job (or a program beside it) prints, live (and before), and what the client types.

Any number of clients may be attached to one job, and all may type. The first one releases a job
that waits. The last frame tells how the job ended: `EXIT` with its status, or `ERROR` if it never
ran. A program that was started for a client ends when the client goes. Called by `api`; the frames are drawn in
`wire.attach`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from aiohttp import WSMsgType, web

from discovery.wire import attach, serve
from discovery.wire.errors import Invalid, ServiceError
from hostd.errors import JobNotRunning
from hostd.execs import Exec, Execs
from hostd.jobs import Jobs
from hostd.lifecycle import JobRun
from hostd.logreader import raw_chunks
from hostd.pump import Input, Listener
from hostd.types import ExecSpec, Job

_PAYLOAD_BYTES_MAX = attach.FRAME_BYTES_MAX - 2
_UNKNOWN_STATUS = 255
_FIRST_MESSAGE_S = 10.0


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


class Heard(Protocol):
    """What a client types to: a job's run, or a program beside a job's own."""

    @property
    def input(self) -> Input | None:
        """Its stdin or terminal."""

    async def close_stdin(self) -> None:
        """Have the spawner drop its write end."""


async def _guard(act: Awaitable[None]) -> ServiceError | None:
    """Return a refusal rather than raise it, so that the group hands it on bare."""
    try:
        await act
    except ServiceError as error:
        return error
    except ConnectionResetError:
        return None
    return None


async def _both_ways(receive: Awaitable[None], send: Awaitable[None]) -> None:
    """Receive and send until either is done: it has ended, or the client has gone."""
    async with asyncio.TaskGroup() as group:
        receiving = group.create_task(_guard(receive))
        sending = group.create_task(_guard(send))
        await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
        receiving.cancel()
        sending.cancel()
    for task in (receiving, sending):
        if not task.cancelled() and (error := task.result()) is not None:
            raise error


async def _pass_on(listener: Listener, websocket: web.WebSocketResponse) -> None:
    async for stream, data in listener:
        if data:
            await _send(websocket, stream, data)
        else:
            await websocket.send_bytes(attach.encode(attach.Data(stream, b"")))


async def _hear(heard: Heard, signal: Callable[[int], Awaitable[None]], websocket: web.WebSocketResponse) -> None:
    async for frame in serve.frames(websocket):
        match frame:
            case attach.Data(attach.STDIN, payload) if heard.input is not None:
                if payload:
                    await heard.input.write(payload)
                elif await heard.input.end():
                    await heard.close_stdin()
            case attach.Resize(rows, columns) if heard.input is not None:
                heard.input.resize(rows, columns)
            case attach.Signal(number):
                await signal(number)
            case attach.Data(attach.STDIN) | attach.Resize():
                pass
            case _:
                raise Invalid(f"a client cannot send {type(frame).__name__} frames")


class Session:
    """One client attached to one job that has not ended."""

    def __init__(self, jobs: Jobs, run: JobRun, websocket: web.WebSocketResponse, *, has_logs: bool) -> None:
        self._jobs = jobs
        self._run = run
        self._websocket = websocket
        self._has_logs = has_logs

    async def serve(self) -> None:
        """Serve until the job has ended or the client goes."""
        await _both_ways(self._receive(), self._send_all())

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
                await _pass_on(listener, self._websocket)
        await self._run.ended.wait()
        await _say_end(self._jobs.records.get(job_id).job, self._websocket)

    async def _receive(self) -> None:
        await self._run.launched_or_ended.wait()
        await _hear(self._run, self._signal, self._websocket)

    async def _signal(self, number: int) -> None:
        with contextlib.suppress(JobNotRunning):
            await self._jobs.signal(self._run.spec.id, number)


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


async def exec_client(execs: Execs, call: serve.Call) -> web.StreamResponse:
    """Answer `GET /jobs/{id}/exec`: run what the first message asks for, for as long as the client stays."""
    job_id = call.path["id"]
    execs.check(job_id)  # before the upgrade, so that an unknown job is an ordinary 404
    async with serve.open_websocket(call) as websocket:
        spec = await _first_message(websocket)
        async with execs.client(job_id, spec) as run:
            await _both_ways(_hear(run, run.signal, websocket), _tell_all(run, websocket))
    return websocket


async def _first_message(websocket: web.WebSocketResponse) -> ExecSpec:
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            message = await websocket.receive()
    except TimeoutError:
        raise Invalid(f"no ExecSpec came within {_FIRST_MESSAGE_S:g} s") from None
    if message.type is not WSMsgType.TEXT:
        raise Invalid("the first message has to be an ExecSpec, as text")
    try:
        return msgspec.json.decode(message.data, type=ExecSpec)
    except msgspec.MsgspecError as error:
        raise Invalid(f"ExecSpec: {error}", hint="see /openapi.json for the fields") from error


async def _tell_all(run: Exec, websocket: web.WebSocketResponse) -> None:
    await _pass_on(run.listener, websocket)
    await run.ended.wait()
    status = _UNKNOWN_STATUS if run.status is None else run.status
    await websocket.send_bytes(attach.encode(attach.Exit(status)))
