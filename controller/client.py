"""Asks the controller: one method per endpoint of its HTTP API, for the other daemons and for bootstrap.

Refuses nothing itself: whatever the controller raises is raised here. Commands use `wire.blocking`
on the same paths instead, because they must start fast. `address` may be `http://NAME.discoverd`:
then the instance is looked up (SRV) when first needed and again after a connection failed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp

from controller.types import (
    ActualJob,
    App,
    AppChange,
    AppDeleted,
    Artifact,
    ClusterInfo,
    Deployment,
    DeploymentEvent,
    Event,
    Formation,
    Key,
    NewApp,
    NewArtifact,
    NewDeployment,
    NewJob,
    NewKey,
    NewRelease,
    NewRoute,
    Release,
    ReleaseRef,
    Scale,
)
from discovery.client import resolve
from discovery.wire.call import Caller
from discovery.wire.errors import Unavailable
from hostd.types import LogLine
from router.types import Route

T = TypeVar("T")
SERVICE_DOMAIN = ".discoverd"


def service_of(address: str) -> str:
    """Return the service that an address such as `http://controller.discoverd` names, or ``""``."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    return host.removesuffix(SERVICE_DOMAIN) if host.endswith(SERVICE_DOMAIN) and not parts.port else ""


class ControllerClient:
    """Speaks to the controller at `address` with one of its keys; safe for many tasks."""

    def __init__(self, address: str, key: str, *, timeout_s: float = 30.0) -> None:
        self.address = address
        self._key = key
        self._timeout_s = timeout_s
        self._service = service_of(address)
        self._caller: Caller | None = None
        self._is_stale = False
        self._retired: list[Caller] = []

    async def close(self) -> None:
        """Close all connections."""
        callers = [*self._retired, *([self._caller] if self._caller is not None else [])]
        self._retired, self._caller = [], None
        for caller in callers:
            await caller.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _connect(self) -> Caller:
        if self._caller is not None and not self._is_stale:
            return self._caller
        address = await self._locate()
        if self._caller is None or self._caller.address != address:
            if self._caller is not None:
                self._retired.append(self._caller)  # other tasks may still be reading from it
            self._caller = Caller(address, key=self._key, timeout_s=self._timeout_s)
        self._is_stale = False
        return self._caller

    async def _locate(self) -> str:
        if not self._service:
            return self.address
        places = await resolve(self._service)
        if not places:
            raise Unavailable(f"service {self._service} has no instance", hint="the controller may be starting")
        host, port = random.choice(places)  # noqa: S311 — spreads load, keeps no secret
        return f"http://{host}:{port}"

    async def _ask(self, method: str, path: str, into: type[T], body: Any = None, **query: str) -> T:
        caller = await self._connect()
        try:
            return await caller.request(method, path, into=into, body=body, query=query)
        except Unavailable:
            self._is_stale = bool(self._service)  # its instance may have moved
            raise

    async def _tell(self, method: str, path: str) -> None:
        caller = await self._connect()
        try:
            await caller.request(method, path)
        except Unavailable:
            self._is_stale = bool(self._service)  # its instance may have moved
            raise

    async def _follow(self, path: str, into: type[T], **query: str) -> AsyncIterator[T]:
        caller = await self._connect()
        try:
            async for item in caller.events(path, into, query):
                yield item
        except Unavailable:
            self._is_stale = bool(self._service)  # its instance may have moved
            raise

    # the cluster and its apps

    async def cluster(self) -> ClusterInfo:
        return await self._ask("GET", "/cluster", ClusterInfo)

    async def apps(self) -> list[App]:
        return await self._ask("GET", "/apps", list[App])

    async def create_app(self, new: NewApp) -> App:
        """Create an app; with `id` given, the same request again answers with the same app. Raises `AppExists`."""
        return await self._ask("POST", "/apps", App, new)

    async def app(self, app: str) -> App:
        """Return an app by id or name. Raises `AppNotFound`."""
        return await self._ask("GET", f"/apps/{quote(app, safe='')}", App)

    async def change_app(self, app: str, change: AppChange) -> App:
        return await self._ask("POST", f"/apps/{quote(app, safe='')}", App, change)

    async def delete_app(self, app: str) -> AppDeleted:
        """Stop and remove an app with its routes, formations and releases. Raises `AppProtected`."""
        return await self._ask("DELETE", f"/apps/{quote(app, safe='')}", AppDeleted)

    # what to run

    async def create_artifact(self, new: NewArtifact) -> Artifact:
        return await self._ask("POST", "/artifacts", Artifact, new)

    async def artifact(self, id: str) -> Artifact:
        return await self._ask("GET", f"/artifacts/{id}", Artifact)

    async def releases(self, app: str) -> list[Release]:
        """List an app's releases, newest first."""
        return await self._ask("GET", f"/apps/{app}/releases", list[Release])

    async def create_release(self, app: str, new: NewRelease) -> Release:
        """Add a release; it runs once deployed (or set). Raises `ArtifactNotFound`, `InvalidName`."""
        return await self._ask("POST", f"/apps/{app}/releases", Release, new)

    async def release(self, app: str, release: str) -> Release:
        """Return a release by id or `vN`."""
        return await self._ask("GET", f"/apps/{app}/releases/{release}", Release)

    async def current_release(self, app: str) -> Release:
        """Return the app's current release. Raises `NoRelease` before the first."""
        return await self._ask("GET", f"/apps/{app}/release", Release)

    async def set_release(self, app: str, release_id: str) -> Release:
        """Make a release the current one without deploying it."""
        return await self._ask("PUT", f"/apps/{app}/release", Release, ReleaseRef(release_id=release_id))

    async def formations(self, app: str) -> list[Formation]:
        return await self._ask("GET", f"/apps/{app}/formations", list[Formation])

    async def scale(self, app: str, scale: Scale) -> Formation:
        """Set counts and return at once; follow `events` or `jobs` to see it happen.

        Raises:
            NoRelease: nothing was pushed. UnknownProcessType: the release has no such type.
            DeploymentInProgress: try again when it is done.
        """
        return await self._ask("PUT", f"/apps/{app}/scale", Formation, scale)

    # deployments

    async def deployments(self, app: str) -> list[Deployment]:
        """List the newest deployments of an app, newest first."""
        return await self._ask("GET", f"/apps/{app}/deployments", list[Deployment])

    async def create_deployment(self, app: str, new: NewDeployment) -> Deployment:
        """Start to move the app to a release. Raises `DeploymentInProgress`."""
        return await self._ask("POST", f"/apps/{app}/deployments", Deployment, new)

    async def deployment(self, id: str) -> Deployment:
        return await self._ask("GET", f"/deployments/{id}", Deployment)

    def deployment_events(self, id: str) -> AsyncIterator[DeploymentEvent]:
        """Yield every step from the first; ends after the one with status `complete` or `failed`."""
        return self._follow(f"/deployments/{id}/events", DeploymentEvent)

    # jobs

    async def jobs(self, app: str, *, is_all: bool = False) -> list[ActualJob]:
        """List an app's living jobs, or with `is_all` also the ended ones that hosts remember."""
        return await self._ask("GET", f"/apps/{app}/jobs", list[ActualJob], **({"all": "1"} if is_all else {}))

    async def run_job(self, app: str, new: NewJob) -> ActualJob:
        """Start a one-off job."""
        return await self._ask("POST", f"/apps/{app}/jobs", ActualJob, new)

    async def job(self, app: str, job: str) -> ActualJob:
        return await self._ask("GET", f"/apps/{app}/jobs/{job}", ActualJob)

    async def stop_job(self, app: str, job: str) -> None:
        """Stop a job; one of a formation is replaced by the scheduler."""
        await self._tell("DELETE", f"/apps/{app}/jobs/{job}")

    def wait_job(self, app: str, job: str) -> AsyncIterator[ActualJob]:
        """Yield the job now and after each change; ends once it has ended."""
        return self._follow(f"/apps/{app}/jobs/{job}/wait", ActualJob)

    @asynccontextmanager
    async def attach(self, app: str, job: str, *, has_logs: bool = False) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:  # fmt: skip  # noqa: E501
        """Open the attach connection of a job; see `wire.attach` for its frames."""
        caller = await self._connect()
        query = {"logs": "1"} if has_logs else {}
        async with caller.websocket(f"/apps/{app}/jobs/{job}/attach", query) as websocket:
            yield websocket

    def log(
        self, app: str, *, is_follow: bool = False, lines: int = 0, type: str = "", job: str = ""
    ) -> AsyncIterator[LogLine]:
        """Yield an app's log: the last `lines` (0 = all that is kept), then with `is_follow` what comes."""
        query = {"follow": "1"} if is_follow else {}
        query |= {name: value for name, value in (("type", type), ("job", job)) if value}
        return self._follow(f"/apps/{app}/log", LogLine, **query, **({"lines": str(lines)} if lines else {}))

    # routes, keys, events

    async def all_routes(self) -> list[Route]:
        return await self._ask("GET", "/routes", list[Route])

    async def routes(self, app: str) -> list[Route]:
        return await self._ask("GET", f"/apps/{app}/routes", list[Route])

    async def add_route(self, app: str, new: NewRoute) -> Route:
        """Add a route to the app. Raises `router.errors.RouteExists`, `InvalidRoute`."""
        return await self._ask("POST", f"/apps/{app}/routes", Route, new)

    async def remove_route(self, app: str, id: str) -> None:
        await self._tell("DELETE", f"/apps/{app}/routes/{quote(id, safe='')}")

    async def keys(self) -> list[Key]:
        return await self._ask("GET", "/keys", list[Key])

    async def add_key(self, new: NewKey) -> Key:
        """Register an SSH public key (`type base64 [comment]`). Raises `KeyExists`, `Invalid`."""
        return await self._ask("POST", "/keys", Key, new)

    async def key(self, fingerprint: str) -> Key:
        """Return a key by fingerprint, MD5 (`15:2d:…`) or `SHA256:…`. Raises `KeyNotFound`."""
        return await self._ask("GET", f"/keys/{quote(fingerprint, safe='')}", Key)

    async def remove_key(self, fingerprint: str) -> None:
        await self._tell("DELETE", f"/keys/{quote(fingerprint, safe='')}")

    def events(self, *, app: str = "", since: int | None = None) -> AsyncIterator[Event]:
        """Yield the kept events after `since` (none if `None`), one of kind `current`, then what happens."""
        query = {"app": app} if app else {}
        return self._follow("/events", Event, **query, **({} if since is None else {"since": str(since)}))
