"""A small controller for the commands' tests: the real API's paths and types over `wire.serve`, state in memory."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import web

from controller import types as t
from controller.errors import (
    AppExists,
    AppNotFound,
    KeyExists,
    KeyNotFound,
    NoRelease,
    ReleaseNotFound,
    UnknownProcessType,
)
from discovery.wire import attach, clock, serve
from discovery.wire.errors import Unauthorized, Unavailable
from hostd.errors import JobNotFound
from hostd.types import LogLine
from router.errors import RouteExists, RouteNotFound
from router.types import Route

KEY = "bb1fbd27bdc88fc897f286ed3646d522"
DOMAIN = "example.test"


class Controller:
    """State and handlers. `trouble` names what should go wrong; `slow_s` delays every answer."""

    def __init__(self) -> None:
        self.apps: dict[str, t.App] = {}
        self.releases: dict[str, list[t.Release]] = {}
        self.scales: dict[str, dict[str, int]] = {}
        self.jobs: dict[str, t.ActualJob] = {}
        self.deployments: list[t.Deployment] = []
        self.routes: list[Route] = []
        self.keys: list[t.Key] = []
        self.lines: list[LogLine] = []
        self.new_jobs: list[t.NewJob] = []
        self.requests: list[str] = []
        self.frames: list[attach.Frame] = []
        self.trouble: set[str] = set()
        self.slow_s = 0.0
        self.count = 0

    def id(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count:04d}"

    # what tests set up

    def add_app(self, name: str) -> t.App:
        app = t.App(id=self.id("app"), name=name, created_at=clock.now_s())
        self.apps[app.id] = app
        self.releases[app.id] = []
        self.scales[app.id] = {}
        return app

    def add_release(self, name: str, **fields: Any) -> t.Release:
        app = self.find(name)
        given: dict[str, Any] = {
            "artifact_ids": ("slug1",),
            "processes": {
                "web": t.ProcessType(args=("start", "web")),
                "worker": t.ProcessType(args=("start", "worker")),
            },
        }
        release = t.Release(
            id=self.id("release"),
            app_id=app.id,
            number=len(self.releases[app.id]) + 1,
            created_at=clock.now_s() - 300,
            **(given | fields),
        )
        self.releases[app.id].append(release)
        self.apps[app.id] = msgspec.structs.replace(app, release_id=release.id)
        return release

    def add_job(self, name: str, type: str = "web", state: t.JobState = "up", **fields: Any) -> t.ActualJob:
        app = self.find(name)
        job = t.ActualJob(
            id=self.id("job"), app_id=app.id, release_id=app.release_id, type=type, host_id="host1", state=state,
            created_at=clock.now_s() - 120, **fields,
        )  # fmt: skip
        self.jobs[job.id] = job
        return job

    def find(self, name: str) -> t.App:
        for app in self.apps.values():
            if name in (app.id, app.name):
                return app
        raise AppNotFound(f"no app {name!r}", hint="flynn apps")

    # the API

    async def cluster(self, call: serve.Call) -> t.ClusterInfo:
        return t.ClusterInfo(version="1", domain=DOMAIN, git_address="git.example.test:2222", host_count=1)

    async def list_apps(self, call: serve.Call) -> list[t.App]:
        return list(self.apps.values())

    async def create_app(self, call: serve.Call) -> t.App:
        name = call.body.name or self.id("made-up-")
        if any(app.name == name for app in self.apps.values()):
            raise AppExists(f"an app named {name!r} exists already")
        app = self.add_app(name)
        self.routes.append(
            Route(id=self.id("r"), kind="http", service=f"{name}-web", owner=app.id, domain=f"{name}.{DOMAIN}")
        )
        return app

    async def get_app(self, call: serve.Call) -> t.App:
        return self.find(call.path["app"])

    async def change_app(self, call: serve.Call) -> t.App:
        app = msgspec.structs.replace(self.find(call.path["app"]), deploy_timeout_s=call.body.deploy_timeout_s)
        self.apps[app.id] = app
        return app

    async def delete_app(self, call: serve.Call) -> t.AppDeleted:
        app = self.find(call.path["app"])
        del self.apps[app.id]
        gone = [route for route in self.routes if route.owner == app.id]
        self.routes = [route for route in self.routes if route.owner != app.id]
        return t.AppDeleted(app_id=app.id, routes=len(gone), releases=len(self.releases[app.id]))

    async def list_releases(self, call: serve.Call) -> list[t.Release]:
        return self.releases[self.find(call.path["app"]).id][::-1]

    async def create_release(self, call: serve.Call) -> t.Release:
        app = self.find(call.path["app"])
        release = t.Release(
            id=self.id("release"), app_id=app.id, number=len(self.releases[app.id]) + 1, created_at=clock.now_s(),
            **{name: value for name, value in msgspec.structs.asdict(call.body).items() if name != "id"},
        )  # fmt: skip
        self.releases[app.id].append(release)
        return release

    async def get_release(self, call: serve.Call) -> t.Release:
        wanted = call.path["release"]
        for release in self.releases[self.find(call.path["app"]).id]:
            if wanted in (release.id, f"v{release.number}"):
                return release
        raise ReleaseNotFound(f"no release {wanted!r}")

    async def current(self, call: serve.Call) -> t.Release:
        app = self.find(call.path["app"])
        if not app.release_id:
            raise NoRelease(f"{app.name} has no release yet", hint="git push flynn master")
        return next(one for one in self.releases[app.id] if one.id == app.release_id)

    async def set_current(self, call: serve.Call) -> t.Release:
        app = self.find(call.path["app"])
        self.apps[app.id] = msgspec.structs.replace(app, release_id=call.body.release_id)
        return await self.current(call)

    async def formations(self, call: serve.Call) -> list[t.Formation]:
        app = self.find(call.path["app"])
        return [t.Formation(app_id=app.id, release_id=app.release_id, processes=self.scales[app.id])]

    async def scale(self, call: serve.Call) -> t.Formation:
        release = await self.current(call)
        for kind in call.body.processes:
            if kind not in release.processes:
                raise UnknownProcessType(
                    f"release v{release.number} has no process type {kind!r}", hint="it has: web, worker"
                )
        counts = self.scales[release.app_id] | call.body.processes
        self.scales[release.app_id] = counts
        return t.Formation(app_id=release.app_id, release_id=release.id, processes=counts)

    async def list_jobs(self, call: serve.Call) -> list[t.ActualJob]:
        if "away" in self.trouble:
            self.trouble.discard("away")
            raise Unavailable("the controller is starting")
        app = self.find(call.path["app"])
        self._schedule(app)
        jobs = [job for job in self.jobs.values() if job.app_id == app.id]
        return jobs if call.flag("all") else [job for job in jobs if job.state not in ("down", "crashed", "failed")]

    def _schedule(self, app: t.App) -> None:
        """Move every job one state on and fill up to the wanted count: a scheduler that works when looked at."""
        if "stuck" in self.trouble:
            return
        steps: dict[str, t.JobState] = {"pending": "starting", "starting": "up", "stopping": "down"}
        if "crash" in self.trouble:
            steps["starting"] = "crashed"
        for kind, wanted in self.scales[app.id].items():
            mine = [job for job in self.jobs.values() if job.app_id == app.id and job.type == kind]
            for job in mine:
                state = steps.get(job.state, job.state)
                status = 1 if state == "crashed" else None
                self.jobs[job.id] = msgspec.structs.replace(job, state=state, exit_status=status)
            alive = [self.jobs[job.id] for job in mine if self.jobs[job.id].state in ("pending", "starting", "up")]
            for _ in range(wanted - len(alive)):
                self.add_job(app.name, kind, "pending")
            for job in alive[wanted:]:
                self.jobs[job.id] = msgspec.structs.replace(job, state="stopping")

    async def create_job(self, call: serve.Call) -> t.ActualJob:
        self.new_jobs.append(call.body)
        return self.add_job(call.path["app"], "", "starting", args=call.body.args)

    async def stop_job(self, call: serve.Call) -> None:
        if call.path["job"] not in self.jobs:
            raise JobNotFound(f"no job {call.path['job']!r}", hint="flynn ps")
        job = self.jobs[call.path["job"]]
        self.jobs[job.id] = msgspec.structs.replace(job, state="down")

    async def attach_job(self, call: serve.Call) -> Any:
        """Run the job's command here, with pipes."""
        job = self.jobs[call.path["job"]]
        async with serve.open_websocket(call) as websocket:
            process = await asyncio.create_subprocess_exec(
                *job.args,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            assert process.stdin is not None
            async for frame in serve.frames(websocket):
                self.frames.append(frame)
                if isinstance(frame, attach.Data) and not frame.payload:
                    break
                if isinstance(frame, attach.Data):
                    process.stdin.write(frame.payload)
                if isinstance(frame, attach.Resize):
                    break  # a terminal never ends its stdin
            process.stdin.close()
            out, err = await process.communicate()
            for stream, data in ((attach.STDOUT, out), (attach.STDERR, err)):
                if data:
                    await websocket.send_bytes(attach.encode(attach.Data(stream, data)))
            await websocket.send_bytes(attach.encode(attach.Exit(process.returncode or 0)))
        return websocket

    async def create_deployment(self, call: serve.Call) -> t.Deployment:
        app = self.find(call.path["app"])
        status: t.DeploymentStatus = "failed" if "deploy" in self.trouble else "complete"
        error = "web job0099 crashed with exit status 1" if status == "failed" else ""
        now = clock.now_s()
        deployment = t.Deployment(
            id=self.id("deployment"), app_id=app.id, old_release_id=app.release_id, new_release_id=call.body.release_id,
            status=status, timeout_s=120, error=error, created_at=now - 2.5, finished_at=now,
        )  # fmt: skip
        self.deployments.append(deployment)
        if status == "complete":
            self.apps[app.id] = msgspec.structs.replace(app, release_id=call.body.release_id)
        return deployment

    async def list_deployments(self, call: serve.Call) -> list[t.Deployment]:
        return self.deployments[::-1]

    async def get_deployment(self, call: serve.Call) -> t.Deployment:
        return next(one for one in self.deployments if one.id == call.path["id"])

    async def deployment_events(self, call: serve.Call) -> Any:
        deployment = await self.get_deployment(call)

        async def events() -> AsyncIterator[t.DeploymentEvent]:
            for index, state in enumerate(("starting", "up")):
                if index == 1 and "cut" in self.trouble:
                    self.trouble.discard("cut")
                    raise Unavailable("the controller stops")
                yield t.DeploymentEvent(
                    deployment_id=deployment.id, status="running", at=1700000000.0 + index,
                    job_type="web", job_id="job0099", job_state=state,
                )  # fmt: skip
            yield t.DeploymentEvent(
                deployment_id=deployment.id, status=deployment.status, at=1700000002.0, error=deployment.error
            )

        return await serve.send_events(call, events())

    async def log(self, call: serve.Call) -> Any:
        async def lines() -> AsyncIterator[LogLine]:
            wanted = [
                line
                for line in self.lines
                if call.query.get("type", line.labels["type"]) == line.labels["type"]
                and call.query.get("job", line.job_id) == line.job_id
            ]
            for index, line in enumerate(wanted[-call.number("lines", 0) :]):
                if index == 1 and "cut" in self.trouble:
                    self.trouble.discard("cut")
                    raise Unavailable("the controller stops")
                yield line

        return await serve.send_events(call, lines())

    async def list_routes(self, call: serve.Call) -> list[Route]:
        app = self.find(call.path["app"])
        return [route for route in self.routes if route.owner == app.id]

    async def add_route(self, call: serve.Call) -> Route:
        app = self.find(call.path["app"])
        new: t.NewRoute = call.body
        if any(new.kind == "http" and (one.domain, one.path) == (new.domain, new.path) for one in self.routes):
            raise RouteExists(f"a route for {new.domain} exists already", hint="flynn route")
        fields = msgspec.structs.asdict(new) | {"service": new.service or f"{app.name}-web", "port": new.port or 3000}
        if new.kind == "http":
            fields["port"] = 0
        self.routes.append(Route(id=self.id("route"), owner=app.id, **fields))
        return self.routes[-1]

    async def remove_route(self, call: serve.Call) -> None:
        found = [route for route in self.routes if route.id == call.path["route"]]
        if not found:
            raise RouteNotFound("no such route")
        self.routes.remove(found[0])

    async def list_keys(self, call: serve.Call) -> list[t.Key]:
        return self.keys

    async def add_key(self, call: serve.Call) -> t.Key:
        kind, blob, *comment = call.body.public_key.split(" ", 2)
        raw = base64.b64decode(blob)
        digest = hashlib.md5(raw).hexdigest()
        key = t.Key(
            fingerprint=":".join(digest[at : at + 2] for at in range(0, 32, 2)),
            sha256="SHA256:" + base64.b64encode(hashlib.sha256(raw).digest()).decode().rstrip("="),
            public_key=f"{kind} {blob}",
            comment=comment[0] if comment else "",
        )
        if any(one.fingerprint == key.fingerprint for one in self.keys):
            raise KeyExists(f"key {key.fingerprint} is registered already")
        self.keys.append(key)
        return key

    async def remove_key(self, call: serve.Call) -> None:
        found = [key for key in self.keys if key.fingerprint == call.path["fingerprint"]]
        if not found:
            raise KeyNotFound("no such key")
        self.keys.remove(found[0])

    async def authorize(self, request: web.Request) -> str:
        self.requests.append(f"{request.method} {request.raw_path}")
        await asyncio.sleep(self.slow_s)
        wanted = "Basic " + base64.b64encode(f":{KEY}".encode()).decode()
        if request.headers.get("Authorization") != wanted:
            raise Unauthorized("the key is wrong", hint="flynn cluster add")
        if "bug" in self.trouble:
            raise RuntimeError("a bug")
        return "admin"

    def application(self) -> web.Application:
        """Return the API."""
        table: list[tuple[str, str, Any, Any]] = [
            ("GET", "/cluster", self.cluster, None),
            ("GET", "/apps", self.list_apps, None),
            ("POST", "/apps", self.create_app, t.NewApp),
            ("GET", "/apps/{app}", self.get_app, None),
            ("POST", "/apps/{app}", self.change_app, t.AppChange),
            ("DELETE", "/apps/{app}", self.delete_app, None),
            ("GET", "/apps/{app}/releases", self.list_releases, None),
            ("POST", "/apps/{app}/releases", self.create_release, t.NewRelease),
            ("GET", "/apps/{app}/releases/{release}", self.get_release, None),
            ("GET", "/apps/{app}/release", self.current, None),
            ("PUT", "/apps/{app}/release", self.set_current, t.ReleaseRef),
            ("GET", "/apps/{app}/formations", self.formations, None),
            ("PUT", "/apps/{app}/scale", self.scale, t.Scale),
            ("GET", "/apps/{app}/deployments", self.list_deployments, None),
            ("POST", "/apps/{app}/deployments", self.create_deployment, t.NewDeployment),
            ("GET", "/deployments/{id}", self.get_deployment, None),
            ("GET", "/deployments/{id}/events", self.deployment_events, None),
            ("GET", "/apps/{app}/jobs", self.list_jobs, None),
            ("POST", "/apps/{app}/jobs", self.create_job, t.NewJob),
            ("DELETE", "/apps/{app}/jobs/{job}", self.stop_job, None),
            ("GET", "/apps/{app}/jobs/{job}/attach", self.attach_job, None),
            ("GET", "/apps/{app}/log", self.log, None),
            ("GET", "/apps/{app}/routes", self.list_routes, None),
            ("POST", "/apps/{app}/routes", self.add_route, t.NewRoute),
            ("DELETE", "/apps/{app}/routes/{route}", self.remove_route, None),
            ("GET", "/keys", self.list_keys, None),
            ("POST", "/keys", self.add_key, t.NewKey),
            ("DELETE", "/keys/{fingerprint}", self.remove_key, None),
        ]
        endpoints = [
            serve.Endpoint(method=method, path=path, handler=handler, summary=path, request=body)
            for method, path, handler, body in table
        ]
        return serve.application("fake", "1", endpoints, self.authorize)


@contextmanager
def serving(controller: Controller) -> Iterator[str]:
    """Serve on a loopback port from a thread; yields the URL."""
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()
    port: list[int] = []

    async def main() -> None:
        async with serve.listen_tcp(controller.application(), "127.0.0.1", 0) as number:
            port.append(number)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
