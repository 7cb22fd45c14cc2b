"""A controller for tests: the endpoints that git-receive uses, on a real socket; build jobs are real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from controller.errors import AppNotFound, KeyNotFound, NoRelease
from controller.types import (
    ActualJob,
    App,
    Artifact,
    Deployment,
    DeploymentEvent,
    JobState,
    Key,
    NewArtifact,
    NewDeployment,
    NewJob,
    NewRelease,
    Release,
)
from discovery.wire.errors import Unavailable
from discovery.wire.serve import Call, Endpoint, application, send_events
from hostd.types import LogLine

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass
class FakeJob:
    new: NewJob
    job: ActualJob
    lines: list[LogLine] = field(default_factory=list)
    process: asyncio.subprocess.Process | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def is_ended(self) -> bool:
        return self.job.state in ("down", "crashed", "failed")


class FakeController:
    """Holds what the real one would; tests look into it and turn its knobs."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.apps: dict[str, App] = {}
        self.keys: dict[str, Key] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.releases: list[Release] = []
        self.current: dict[str, Release] = {}
        self.jobs: dict[str, FakeJob] = {}
        self.stopped: list[str] = []
        self.deployment_error = ""
        self.is_away = False
        self.command: Callable[[NewJob], list[str]] = lambda new: [sys.executable, *new.args[1:]]
        self.tasks: asyncio.TaskGroup | None = None

    def application(self) -> web.Application:
        table: list[tuple[str, str, Any, Any]] = [
            ("GET", "/keys/{fingerprint}", self._key, None),
            ("GET", "/apps/{app}", self._app, None),
            ("GET", "/apps/{app}/release", self._current, None),
            ("POST", "/apps/{app}/releases", self._new_release, NewRelease),
            ("GET", "/apps/{app}/jobs", self._living_jobs, None),
            ("POST", "/apps/{app}/jobs", self._run_job, NewJob),
            ("DELETE", "/apps/{app}/jobs/{job}", self._stop_job, None),
            ("GET", "/apps/{app}/jobs/{job}/wait", self._wait_job, None),
            ("GET", "/apps/{app}/log", self._log, None),
            ("POST", "/artifacts", self._new_artifact, NewArtifact),
            ("POST", "/apps/{app}/deployments", self._new_deployment, NewDeployment),
            ("GET", "/deployments/{id}/events", self._deployment_events, None),
        ]
        endpoints = [
            Endpoint(method=method, path=path, handler=self._guarded(handler), summary=path, request=request)
            for method, path, handler, request in table
        ]
        return application("fake", "1", endpoints)

    def _guarded(self, handler: Any) -> Any:
        async def answer(call: Call) -> Any:
            if self.is_away:
                raise Unavailable("the controller is away")
            return await handler(call)

        return answer

    def add_app(self, name: str, **meta: str) -> App:
        app = App(id=f"id-{name}", name=name, meta=meta)
        self.apps[app.id] = self.apps[name] = app
        return app

    async def _key(self, call: Call) -> Key:
        key = self.keys.get(call.path["fingerprint"])
        if key is None:
            raise KeyNotFound("no such key")
        return key

    async def _app(self, call: Call) -> App:
        app = self.apps.get(call.path["app"])
        if app is None:
            raise AppNotFound(f"no app {call.path['app']}")
        return app

    async def _current(self, call: Call) -> Release:
        release = self.current.get(call.path["app"])
        if release is None:
            raise NoRelease("nothing was pushed")
        return release

    async def _new_release(self, call: Call) -> Release:
        new: NewRelease = call.body
        number = len(self.releases) + 1
        release = Release(
            id=f"release-{number}",
            app_id=call.path["app"],
            number=number,
            artifact_ids=new.artifact_ids,
            env=new.env,
            processes=new.processes,
            meta=new.meta,
        )
        self.releases.append(release)
        return release

    async def _new_artifact(self, call: Call) -> Artifact:
        new: NewArtifact = call.body
        artifact = Artifact(
            id=f"artifact-{len(self.artifacts)}", kind=new.kind, layers=new.layers, config=new.config, meta=new.meta
        )
        self.artifacts[artifact.id] = artifact
        return artifact

    async def _new_deployment(self, call: Call) -> Deployment:
        new: NewDeployment = call.body
        app = call.path["app"]
        if not self.deployment_error:
            self.current[app] = next(release for release in self.releases if release.id == new.release_id)
        return Deployment(
            id="deployment", app_id=app, old_release_id="", new_release_id=new.release_id, status="pending", timeout_s=9
        )

    async def _deployment_events(self, call: Call) -> web.StreamResponse:
        async def events() -> AsyncIterator[DeploymentEvent]:
            yield DeploymentEvent(
                deployment_id="deployment", status="running", at=1, job_type="web", job_id="web-1", job_state="up"
            )
            status: Any = "failed" if self.deployment_error else "complete"
            yield DeploymentEvent(deployment_id="deployment", status=status, at=2, error=self.deployment_error)

        return await send_events(call, events())

    # jobs

    async def _living_jobs(self, call: Call) -> list[ActualJob]:
        return [fake.job for fake in self.jobs.values() if not fake.is_ended]

    async def _run_job(self, call: Call) -> ActualJob:
        new: NewJob = call.body
        id = f"job-{len(self.jobs)}"
        job = ActualJob(id=id, app_id=call.path["app"], release_id="", type="", host_id="h", state="up", args=new.args)
        fake = self.jobs[id] = FakeJob(new, job)
        folders = {name: self.scratch / id / name for name in ("build", "work")} | {"cache": self.scratch / "cache"}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        fake.process = await asyncio.create_subprocess_exec(
            *self.command(new),
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONDONTWRITEBYTECODE": "1",
                "BUILD_DIR": str(folders["build"]),
                "CACHE_DIR": str(folders["cache"]),
                "WORK_DIR": str(folders["work"]),
                **new.env,
            },
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.tasks is not None
        self.tasks.create_task(self._pump(fake))
        return job

    async def _pump(self, fake: FakeJob) -> None:
        assert fake.process is not None
        assert fake.process.stdout is not None
        async for line in fake.process.stdout:
            async with fake.changed:
                text = line.decode().rstrip("\n")
                number = len(fake.lines)
                fake.lines.append(LogLine(job_id=fake.job.id, sequence=number, at=0, stream=1, text=text))
                fake.changed.notify_all()
        status = await fake.process.wait()
        state: JobState = "down" if status == 0 else "crashed"
        async with fake.changed:
            fake.job = ActualJob(
                id=fake.job.id,
                app_id=fake.job.app_id,
                release_id="",
                type="",
                host_id="h",
                state=state,
                exit_status=status if status >= 0 else 128 - status,
            )
            fake.changed.notify_all()

    async def _stop_job(self, call: Call) -> None:
        self.stopped.append(call.path["job"])
        self.kill(call.path["job"])

    def kill(self, id: str) -> None:
        process = self.jobs[id].process
        if process is not None and process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)

    async def _wait_job(self, call: Call) -> web.StreamResponse:
        fake = self.jobs[call.path["job"]]

        async def changes() -> AsyncIterator[ActualJob]:
            yield fake.job
            async with fake.changed:
                await fake.changed.wait_for(lambda: fake.is_ended)
            yield fake.job

        return await send_events(call, changes())

    async def _log(self, call: Call) -> web.StreamResponse:
        fake = self.jobs[call.query["job"]]

        async def lines() -> AsyncIterator[LogLine]:
            sent = 0
            while True:
                while sent < len(fake.lines):
                    yield fake.lines[sent]
                    sent += 1
                if not call.flag("follow"):
                    return
                async with fake.changed:
                    if sent == len(fake.lines):
                        await fake.changed.wait()

        return await send_events(call, lines())
