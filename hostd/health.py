"""Look whether a job's ports serve, and say so in discovery: first success registers, three failures take back.

One watch per service port, from the host to the job's own address, or by a command inside the job. First looks are
quick (a job is up milliseconds after it listens), then one each `interval_s`. Started and ended by `lifecycle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import aiohttp

from discovery.types import Instance
from discovery.wire import clock
from discovery.wire.errors import ServiceError
from hostd.execs import Exec, Execs
from hostd.registry import Registry
from hostd.types import ExecSpec, HealthCheck

log = logging.getLogger(__name__)

FIRST_S = 0.05
_GROWTH = 1.3
_KILLED_S = 5.0
_WORDS_BYTES_MAX = 500


async def probe(host: str, port: int, check: HealthCheck) -> str:
    """Look once; return what is wrong, nothing if all is well."""
    try:
        async with asyncio.timeout(check.timeout_s):
            if check.kind == "http":
                return await _probe_http(host, port, check)
            if check.kind == "tcp":
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
            return ""
    except TimeoutError:
        return f"no answer in {check.timeout_s:g} s"
    except (OSError, aiohttp.ClientError) as error:
        return str(error) or type(error).__name__


async def _probe_http(host: str, port: int, check: HealthCheck) -> str:
    # no session is kept: one connection per look is what a client that has never been here does
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.get(f"http://{host}:{port}{check.path}", allow_redirects=False) as response,
    ):
        return "" if response.status < 400 else f"GET {check.path} answered {response.status}"


class CommandLook:
    """Looks by a command inside the job: well is what ends with 0 in time. What hangs is killed before the next."""

    def __init__(self, execs: Execs, job_id: str) -> None:
        self._execs = execs
        self._job_id = job_id
        self._last: Exec | None = None

    async def __call__(self, check: HealthCheck) -> str:
        """Look once; return what is wrong, nothing if all is well."""
        if self._last is not None and not self._last.ended.is_set():
            return "the last command was killed and does not die"
        try:
            self._last = await self._execs.start(self._job_id, ExecSpec(args=check.command))
        except ServiceError as error:
            return error.message
        try:
            async with asyncio.timeout(check.timeout_s):
                said = await self._last_words(self._last)
        except TimeoutError:
            self._last.leave(is_patient=False)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILLED_S):
                    await self._last.ended.wait()
            return f"the command was killed after {check.timeout_s:g} s"
        finally:
            self._last.leave(is_patient=False)
        status = self._last.status
        return "" if status == 0 else f"exit status {'unknown' if status is None else status}" + (said and f": {said}")

    async def _last_words(self, run: Exec) -> str:
        """Return the last line that it prints, once it has ended."""
        tail = b""
        async for _, data in run.listener:
            tail = (tail + data)[-_WORDS_BYTES_MAX:]
        await run.ended.wait()
        lines = tail.decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class PortWatch:
    """Watches one service port of one job."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        check: HealthCheck,
        instance: Instance,
        registry: Registry,
        on_change: Callable[[bool, str], None],
        is_up: bool = False,
        listens: Callable[[], bool] = lambda: True,
        on_late: Callable[[], None] = lambda: None,
        look_inside: Callable[[HealthCheck], Awaitable[str]] | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._check = check
        self._instance = instance
        self._registry = registry
        self._on_change = on_change
        self._is_up = is_up
        self._listens = listens
        self._on_late = on_late
        self._look_inside = look_inside

    async def run(self) -> None:
        """Watch until cancelled; calls `on_change(is_up, why)` after discovery knows."""
        if self._check.kind == "none":
            await self._registry.register(self._instance)
            self._on_change(True, "")
            return
        if not self._is_up:
            await self._until_up(has_been_up=False)
        while True:
            await self._until_down()
            await self._until_up()

    async def _look(self) -> str:
        """Look once; on a shared port another job would answer as well, so the listener has to be ours."""
        if not self._listens():
            return "it does not listen"
        if self._check.kind == "command" and self._look_inside is not None:
            return await self._look_inside(self._check)
        return await probe(self._host, self._port, self._check)

    async def _until_up(self, *, has_been_up: bool = True) -> None:
        began = clock.monotonic_s()
        pause, has_complained = FIRST_S, False
        while problem := await self._look():
            waited = clock.monotonic_s() - began
            if waited > self._check.start_timeout_s and not has_complained:
                has_complained = True
                self._on_change(False, f"not up after {self._check.start_timeout_s:g} s: {problem}")
                if self._check.has_to_start_in_time and not has_been_up:
                    self._on_late()
            await asyncio.sleep(pause)
            pause = min(pause * _GROWTH, max(FIRST_S, self._check.interval_s))
        await self._registry.register(self._instance)
        self._is_up = True
        self._on_change(True, "")

    async def _until_down(self) -> None:
        failures = 0
        while failures < self._check.failures_until_down:
            await asyncio.sleep(self._check.interval_s)
            problem = await self._look()
            failures = failures + 1 if problem else 0
        await self._registry.deregister(self._instance.service, self._instance.id)
        self._is_up = False
        self._on_change(False, problem)
