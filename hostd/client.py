"""The front door of hostd for other rooms: one method per endpoint of its API.

`address` is `unix:///run/hostd/api/hostd.sock` or, from another host, an `https://` one. Every
method raises what hostd raised (`hostd.errors`), or `Unavailable` when hostd cannot be reached.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import quote, urlencode

import aiohttp
import msgspec

from discovery.wire.call import Caller
from hostd.types import (
    API_VERSION,
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


def labels_query(labels: Mapping[str, str] | None) -> str:
    """Write labels as the repeated `label=KEY=VALUE` of a query string (without `?`)."""
    return urlencode([("label", f"{key}={value}") for key, value in sorted((labels or {}).items())])


def _path(base: str, *parts: str) -> str:
    query = "&".join(part for part in parts if part)
    return base + ("?" + query if query else "")


def _job(job_id: str) -> str:
    return "/jobs/" + quote(job_id, safe="")


def _snapshot(volume: str, name: str) -> str:
    return f"/volumes/{quote(volume, safe='')}/snapshots/{quote(name, safe='')}"


class HostClient:
    """Speaks to the hostd of one host."""

    def __init__(self, address: str, *, timeout_s: float = 30.0, tls: ssl.SSLContext | None = None) -> None:
        """Take an address and, for an `https://` one, the context with our certificate (`wire.mutual`)."""
        self._caller = Caller(address, timeout_s=timeout_s, tls=tls, prefix=f"/v{API_VERSION}")
        self.address = address

    async def close(self) -> None:
        """Close all connections."""
        await self._caller.close()

    async def __aenter__(self) -> HostClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # jobs

    async def jobs(self, labels: Mapping[str, str] | None = None, *, is_active: bool = False) -> list[Job]:
        """Return the jobs that have all `labels`, oldest first; with `is_active` only those not ended."""
        path = _path("/jobs", labels_query(labels), "active" if is_active else "")
        return await self._caller.request("GET", path, into=list[Job])

    async def job(self, job_id: str) -> Job:
        """Return one job."""
        return await self._caller.request("GET", _job(job_id), into=Job)

    async def wait(self, job_id: str, *, timeout_s: float = 3600.0) -> Job:
        """Return the job once it has ended."""
        return await self._caller.request("GET", _job(job_id) + "?wait", into=Job, timeout_s=timeout_s)

    async def start(self, spec: JobSpec) -> Job:
        """Have the job recorded and started; answers when it is recorded. The same spec again is the same job."""
        return await self._caller.request("PUT", _job(spec.id), into=Job, body=spec)

    async def stop(self, job_id: str, *, is_waiting: bool = False, timeout_s: float = 120.0) -> Job:
        """Have the job stopped (deregister, drain, signal, kill); with `is_waiting` answers when it has ended."""
        path = _path(_job(job_id) + "/stop", "wait" if is_waiting else "")
        return await self._caller.request("POST", path, into=Job, timeout_s=timeout_s)

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal to the job's program."""
        await self._caller.request("POST", _job(job_id) + "/signal", body=SignalRequest(number=number))

    async def forget(self, job_id: str) -> None:
        """Remove the record and the log of an ended job."""
        await self._caller.request("DELETE", _job(job_id))

    def attach(
        self, job_id: str, *, has_logs: bool = False
    ) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """Open an attach connection (`wire.attach` frames); releases a job that waits for its first client."""
        return self._caller.websocket(_job(job_id) + "/attach", {"logs": "true"} if has_logs else None)

    @asynccontextmanager
    async def exec(self, job_id: str, spec: ExecSpec) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """Run a program inside a running job, for as long as the block lasts (`wire.attach` frames)."""
        async with self._caller.websocket(_job(job_id) + "/exec") as websocket:
            await websocket.send_str(msgspec.json.encode(spec).decode())
            yield websocket

    async def exec_detached(self, job_id: str, spec: ExecSpec) -> ExecStarted:
        """Run a program inside a running job and leave it alone; its output is dropped."""
        return await self._caller.request("POST", _job(job_id) + "/exec", into=ExecStarted, body=spec)

    # logs and events

    def log(
        self, job_id: str, *, is_following: bool = False, lines: int | None = None, since: int = 0
    ) -> AsyncIterator[LogLine]:
        """Read one job's log: the last `lines` (all if `None`) after sequence `since`, then live if `is_following`."""
        query = {"since": str(since)} if since else {}
        query |= {"follow": "true"} if is_following else {}
        query |= {"lines": str(lines)} if lines is not None else {}
        return self._caller.events(_job(job_id) + "/log", LogLine, query)

    def logs(
        self,
        labels: Mapping[str, str] | None = None,
        *,
        is_following: bool = False,
        lines: int | None = None,
        stream: int | None = None,
    ) -> AsyncIterator[LogLine]:
        """Read the logs of all jobs that have all `labels`, merged by time; new jobs join while following."""
        extra = {"follow": "true"} if is_following else {}
        extra |= {"lines": str(lines)} if lines is not None else {}
        extra |= {"stream": str(stream)} if stream is not None else {}
        return self._caller.events(_path("/log", labels_query(labels), urlencode(extra)), LogLine)

    def events(self, labels: Mapping[str, str] | None = None) -> AsyncIterator[JobEvent]:
        """Watch jobs: a `snapshot` of each, `current`, then every change."""
        return self._caller.events(_path("/events", labels_query(labels)), JobEvent)

    # the host

    async def status(self) -> HostStatus:
        """Return the state of the host."""
        return await self._caller.request("GET", "/status", into=HostStatus)

    async def stats(self) -> Stats:
        """Return what the machine and every living job use."""
        return await self._caller.request("GET", "/stats", into=Stats)

    async def images(self) -> list[Image]:
        """Return the images of the host's store."""
        return await self._caller.request("GET", "/images", into=list[Image])

    async def image(self, name: str) -> Image:
        """Return one image."""
        return await self._caller.request("GET", "/images/" + quote(name, safe=""), into=Image)

    async def image_user(self, name: str, user: str = "") -> ImageUser:
        """Return whom `USER[:GROUP]` means in an image (empty: the image's own user)."""
        path = f"/images/{quote(name, safe='')}/user?" + urlencode({"user": user})
        return await self._caller.request("GET", path, into=ImageUser, timeout_s=600.0)

    async def remove_image(self, name: str) -> None:
        """Forget an image that no job uses."""
        await self._caller.request("DELETE", "/images/" + quote(name, safe=""), timeout_s=600.0)

    async def prune_images(self) -> Pruned:
        """Remove layers that no image and no job needs."""
        return await self._caller.request("POST", "/images/prune", into=Pruned, timeout_s=600.0)

    async def volumes(self) -> list[Volume]:
        """Return the host's volumes."""
        return await self._caller.request("GET", "/volumes", into=list[Volume])

    async def remove_volume(self, name: str) -> None:
        """Delete a volume that no job uses, with its content."""
        await self._caller.request("DELETE", "/volumes/" + quote(name, safe=""), timeout_s=600.0)

    async def snapshot(self, volume: str, name: str, *, may_freeze: bool = False) -> Snapshot:
        """Copy a volume; with `may_freeze` jobs that use it are held still meanwhile."""
        path = _path(_snapshot(volume, name), "freeze" if may_freeze else "")
        return await self._caller.request("PUT", path, into=Snapshot, timeout_s=3600.0)

    async def snapshots(self, volume: str) -> list[Snapshot]:
        """Return a volume's snapshots, oldest first."""
        return await self._caller.request("GET", f"/volumes/{quote(volume, safe='')}/snapshots", into=list[Snapshot])

    async def restore(self, volume: str, snapshot: str) -> None:
        """Make an unused volume what it was."""
        await self._caller.request("POST", _snapshot(volume, snapshot) + "/restore", timeout_s=3600.0)

    async def remove_snapshot(self, volume: str, snapshot: str) -> None:
        """Delete a snapshot."""
        await self._caller.request("DELETE", _snapshot(volume, snapshot), timeout_s=600.0)

    async def df(self) -> list[DiskUse]:
        """Return what takes the host's disk, by kind."""
        return await self._caller.request("GET", "/df", into=list[DiskUse], timeout_s=600.0)

    async def gc(self, *, is_dry_run: bool = False, is_pressed: bool = False) -> list[Removed]:
        """Remove what nobody needs, and return what that was."""
        path = _path("/gc", "dry_run" if is_dry_run else "", "pressure" if is_pressed else "")
        return await self._caller.request("POST", path, into=list[Removed], timeout_s=600.0)

    async def shutdown(self, *, has_jobs: bool = False) -> None:
        """Stop hostd; with `has_jobs` everything that it runs, too. Answers before it is done."""
        await self._caller.request("POST", _path("/shutdown", "jobs" if has_jobs else ""))
