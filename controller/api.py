"""The controller's HTTP API: a table of endpoints, and handlers that check, call one verb and answer.

Refuses callers without a key (but for `/ping` and `/openapi.json`), and what `admit` refuses. Streams
are Server-Sent Events. Called by `daemon`; people reach it with `flynn`, other daemons with `client`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from controller import admit, deploy, logs
from controller.deployments import Deployments
from controller.errors import AppProtected, NoRelease
from controller.jobs import Jobs
from controller.scheduler.hosts import Hosts
from controller.store import ControllerStore, event_put, new_id
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
    service_name,
)
from discovery.wire import clock
from discovery.wire.errors import AlreadyExists, Invalid
from discovery.wire.serve import Authorize, Call, Endpoint, Handler, application, open_websocket, send_events
from discovery.wire.version import VERSION
from hostd.types import LogLine
from router.client import Routes
from router.errors import RouteNotFound
from router.types import Route

DEPLOY_TIMEOUT_MAX_S = 3600.0


class Api:
    """Answers the API of one controller."""

    def __init__(
        self, store: ControllerStore, hosts: Hosts, jobs: Jobs, routes: Routes, *, domain: str, git_address: str
    ) -> None:
        self.store = store
        self.deployments = Deployments(store)
        self.hosts = hosts
        self.jobs = jobs
        self.routes = routes
        self.domain = domain
        self.git_address = git_address

    def application(self, authorize: Authorize) -> web.Application:
        return application("controller", VERSION, self.endpoints(), authorize)

    async def _app(self, call: Call) -> App:
        return await self.store.app(call.path["app"])

    # the cluster and its apps

    async def cluster(self, _: Call) -> ClusterInfo:
        return ClusterInfo(
            version=VERSION,
            domain=self.domain,
            git_address=self.git_address,
            host_count=len(self.hosts.all),
        )

    async def list_apps(self, _: Call) -> list[App]:
        return await self.store.apps()

    async def create_app(self, call: Call) -> App:
        new: NewApp = call.body
        app = admit.app(new, clock.now_s())
        if admit.is_system(app) or not self.domain:
            return await self.store.create_app(app)
        # the route first: it costs nothing without an app, and the sweep removes it should we end here
        route = await self._default_route(app)
        try:
            created = await self.store.create_app(app)
        except AlreadyExists:
            if route is not None:
                await self.routes.remove(route.id)
            raise
        return created

    async def _default_route(self, app: App) -> Route | None:
        """Route APP.CLUSTER_DOMAIN to the app's web jobs, unless somebody has that domain."""
        try:
            return await self.routes.add(
                Route(
                    id=new_id(),
                    kind="http",
                    service=service_name(app.name, "web"),
                    owner=app.id,
                    domain=f"{app.name}.{self.domain}",
                    created_at=clock.now_s(),
                )
            )
        except AlreadyExists:
            return None

    async def get_app(self, call: Call) -> App:
        return await self._app(call)

    async def change_app(self, call: Call) -> App:
        change: AppChange = call.body
        app = await self._app(call)
        if change.deploy_timeout_s is not None and not 1 <= change.deploy_timeout_s <= DEPLOY_TIMEOUT_MAX_S:
            raise Invalid(f"deploy_timeout_s={change.deploy_timeout_s:g}", hint=f"1 to {DEPLOY_TIMEOUT_MAX_S:g}")

        def changed(app: App) -> App:
            meta = app.meta if change.meta is None else change.meta
            timeout_s = app.deploy_timeout_s if change.deploy_timeout_s is None else change.deploy_timeout_s
            return msgspec.structs.replace(app, meta=meta, deploy_timeout_s=timeout_s)

        return await self.store.change_app(app.id, changed)

    async def delete_app(self, call: Call) -> AppDeleted:
        app = await self._app(call)
        if admit.is_system(app):
            raise AppProtected(f"{app.name} is part of the platform", hint="it cannot be deleted")
        releases = await self.store.delete_app(app)
        return AppDeleted(app_id=app.id, routes=await self.routes.remove_owned(app.id), releases=releases)

    # artifacts, releases, formations

    async def create_artifact(self, call: Call) -> Artifact:
        return await self.store.create_artifact(admit.artifact(call.body, clock.now_s()))

    async def get_artifact(self, call: Call) -> Artifact:
        return await self.store.artifact(call.path["artifact"])

    async def list_releases(self, call: Call) -> list[Release]:
        return await self.store.releases((await self._app(call)).id)

    async def create_release(self, call: Call) -> Release:
        app = await self._app(call)
        release = admit.release(call.body, app, clock.now_s())
        await self.store.artifacts(release.artifact_ids)
        return await self.store.create_release(release)

    async def get_release(self, call: Call) -> Release:
        return await self.store.release((await self._app(call)).id, call.path["release"])

    async def current_release(self, call: Call) -> Release:
        return await self._current(await self._app(call))

    async def _current(self, app: App) -> Release:
        if not app.release_id:
            raise NoRelease(f"{app.name} has no release yet", hint="git push flynn master makes one")
        return await self.store.release(app.id, app.release_id)

    async def set_release(self, call: Call) -> Release:
        ref: ReleaseRef = call.body
        app = await self._app(call)
        release = await self.store.release(app.id, ref.release_id)
        await self.store.change_app(app.id, lambda app: msgspec.structs.replace(app, release_id=release.id))
        return release

    async def list_formations(self, call: Call) -> list[Formation]:
        return await self.store.formations((await self._app(call)).id)

    async def scale(self, call: Call) -> Formation:
        scale: Scale = call.body
        app = await self._app(call)
        release = await self.store.release(app.id, scale.release_id) if scale.release_id else await self._current(app)
        return await self.store.set_formation(
            app.id, release.id, lambda before: admit.counts(scale, release, app, before)
        )

    # deployments

    async def list_deployments(self, call: Call) -> list[Deployment]:
        return await self.deployments.of_app((await self._app(call)).id)

    async def create_deployment(self, call: Call) -> Deployment:
        new: NewDeployment = call.body
        app = await self._app(call)
        if not 0 <= new.timeout_s <= DEPLOY_TIMEOUT_MAX_S:
            raise Invalid(f"timeout_s={new.timeout_s:g}", hint=f"0 (the app's) to {DEPLOY_TIMEOUT_MAX_S:g}")
        release = await self.store.release(app.id, new.release_id)
        if not release.artifact_ids:
            raise Invalid(f"release v{release.number} has nothing to run", hint="git push flynn master makes one")
        return await deploy.begin(self.store, app, release, id=new_id(), timeout_s=new.timeout_s)

    async def get_deployment(self, call: Call) -> Deployment:
        return await self.deployments.get(call.path["deployment"])

    async def deployment_events(self, call: Call) -> web.StreamResponse:
        deployment = await self.deployments.get(call.path["deployment"])
        return await send_events(call, self.deployments.steps(deployment.id))

    # jobs

    async def list_jobs(self, call: Call) -> list[ActualJob]:
        return await self.jobs.of_app(await self._app(call), is_all=call.flag("all"))

    async def run_job(self, call: Call) -> ActualJob:
        return await self.jobs.run(await self._app(call), call.body)

    async def get_job(self, call: Call) -> ActualJob:
        return await self.jobs.show(await self._app(call), call.path["job"])

    async def stop_job(self, call: Call) -> None:
        await self.jobs.stop(await self._app(call), call.path["job"])

    async def wait_job(self, call: Call) -> web.StreamResponse:
        app, job = await self._app(call), call.path["job"]
        await self.jobs.find(app, job)
        return await send_events(call, self.jobs.wait(app, job))

    async def attach(self, call: Call) -> web.StreamResponse:
        app = await self._app(call)
        job = await self.jobs.find(app, call.path["job"])
        async with open_websocket(call) as websocket:
            await self.jobs.attach(app, job.spec.id, websocket, has_logs=call.flag("logs"))
        return websocket

    # logs

    async def log(self, call: Call) -> web.StreamResponse:
        app = await self._app(call)
        job_id, is_following = call.query.get("job", ""), call.flag("follow")
        lines = call.number("lines", -1, low=-1, high=1_000_000)
        wanted = None if lines < 0 else lines
        if job_id:
            job = await self.jobs.find(app, job_id)
            client = self.hosts.host_of(job.spec.id).client
            return await send_events(call, client.log(job.spec.id, is_following=is_following, lines=wanted))
        labels = logs.labels_of(app.id, call.query.get("type"))
        if is_following:
            async with logs.following(self.hosts, labels, wanted) as stream:
                return await send_events(call, stream)
        return await send_events(call, _each(await logs.history(self.hosts, labels, wanted)))

    # routes

    async def list_routes(self, call: Call) -> list[Route]:
        owner = (await self._app(call)).id if "app" in call.path else ""
        return [public_route(route) for route in await self.routes.list(owner)]

    async def add_route(self, call: Call) -> Route:
        new: NewRoute = call.body
        app = await self._app(call)
        route = await self.routes.add(
            Route(
                id=new_id(),
                kind=new.kind,
                service=new.service or service_name(app.name, "web"),
                owner=app.id,
                domain=new.domain,
                path=new.path,
                port=new.port,
                is_sticky=new.is_sticky,
                certificate=new.certificate,
                private_key=new.private_key,
                created_at=clock.now_s(),
            )
        )
        shown = public_route(route)
        await self.store.add_events([event_put("route", app.id, route.id, shown)])
        return shown

    async def remove_route(self, call: Call) -> None:
        app = await self._app(call)
        route = await self.routes.get(call.path["route"])
        if route.owner != app.id:
            raise RouteNotFound(f"{app.name} has no route {route.id}", hint="flynn route lists them")
        if admit.is_system(app):
            raise AppProtected(f"this route belongs to {app.name}, which is part of the platform")
        await self.routes.remove(route.id)
        await self.store.add_events([event_put("route_deleted", app.id, route.id, public_route(route))])

    # SSH keys

    async def list_keys(self, _: Call) -> list[Key]:
        return await self.store.ssh_keys()

    async def add_key(self, call: Call) -> Key:
        new: NewKey = call.body
        return await self.store.add_ssh_key(admit.ssh_key(new.public_key, clock.now_s()))

    async def get_key(self, call: Call) -> Key:
        return await self.store.ssh_key(call.path["fingerprint"])

    async def remove_key(self, call: Call) -> None:
        await self.store.remove_ssh_key(call.path["fingerprint"])

    # events

    async def events(self, call: Call) -> web.StreamResponse:
        app_id = (await self.store.app(call.query["app"])).id if call.query.get("app") else ""
        since = call.number("since", -1, low=-1)
        return await send_events(call, self.store.events(app_id=app_id, since=None if since < 0 else since))

    def endpoints(self) -> list[Endpoint]:
        """Return the whole API, one line an endpoint."""
        app = "/apps/{app}"
        follow = {"follow": "go on with what comes", "lines": "only the last so many of what is kept"}
        return [
            _get("/cluster", self.cluster, "What cluster this is", ClusterInfo),
            _get("/apps", self.list_apps, "List apps by name", list[App]),
            _post("/apps", self.create_app, "Create an app", NewApp, App),
            _get(app, self.get_app, "One app, by name or id", App),
            _post(app, self.change_app, "Change an app's meta or deploy timeout", AppChange, App),
            _delete(app, self.delete_app, "Stop and remove an app and all that belongs to it", AppDeleted),
            _post("/artifacts", self.create_artifact, "Register an image or a slug", NewArtifact, Artifact),
            _get("/artifacts/{artifact}", self.get_artifact, "One artifact", Artifact),
            _get(app + "/releases", self.list_releases, "List releases, newest first", list[Release]),
            _post(app + "/releases", self.create_release, "Add a release", NewRelease, Release),
            _get(app + "/releases/{release}", self.get_release, "One release, by id or vN", Release),
            _get(app + "/release", self.current_release, "The current release", Release),
            _put(app + "/release", self.set_release, "Set the current release, undeployed", ReleaseRef, Release),
            _get(app + "/formations", self.list_formations, "What should run", list[Formation]),
            _put(app + "/scale", self.scale, "Set how many of each type should run", Scale, Formation),
            _get(app + "/deployments", self.list_deployments, "List deployments, newest first", list[Deployment]),
            _post(app + "/deployments", self.create_deployment, "Deploy a release", NewDeployment, Deployment),
            _get("/deployments/{deployment}", self.get_deployment, "One deployment", Deployment),
            _sse("/deployments/{deployment}/events", self.deployment_events, "Follow until done", DeploymentEvent),
            _get(app + "/jobs", self.list_jobs, "List jobs", list[ActualJob], {"all": "ended ones, too"}),
            _post(app + "/jobs", self.run_job, "Start a one-off job", NewJob, ActualJob),
            _get(app + "/jobs/{job}", self.get_job, "One job", ActualJob),
            _delete(app + "/jobs/{job}", self.stop_job, "Stop a job"),
            Endpoint(
                method="GET",
                path=app + "/jobs/{job}/attach",
                handler=self.attach,
                summary="Attach to a job (frames: discovery.wire.attach)",
                kind="websocket",
                query={"logs": "begin with what the job wrote so far"},
            ),
            _sse(app + "/jobs/{job}/wait", self.wait_job, "Follow a job until it has ended", ActualJob),
            _sse(
                app + "/log",
                self.log,
                "Read an app's log",
                LogLine,
                follow | {"type": "only this process type", "job": "only this job"},
            ),
            _get(app + "/routes", self.list_routes, "List the app's routes", list[Route]),
            _post(app + "/routes", self.add_route, "Add a route", NewRoute, Route),
            _delete(app + "/routes/{route}", self.remove_route, "Remove a route"),
            _get("/routes", self.list_routes, "List all routes", list[Route]),
            _get("/keys", self.list_keys, "List SSH keys", list[Key]),
            _post("/keys", self.add_key, "Register an SSH public key", NewKey, Key),
            _get("/keys/{fingerprint}", self.get_key, "One SSH key, by MD5 or SHA256 fingerprint", Key),
            _delete("/keys/{fingerprint}", self.remove_key, "Remove an SSH key"),
            _sse(
                "/events",
                self.events,
                "Follow events: those kept after `since`, one `current`, then new ones",
                Event,
                {"app": "only this app's", "since": "an event id; 0 for all that are kept"},
            ),
        ]


def public_route(route: Route) -> Route:
    """Return the route as it may be shown: without its private key."""
    return msgspec.structs.replace(route, private_key="")


async def _each(items: list[LogLine]) -> AsyncIterator[LogLine]:
    for item in items:
        yield item


def _get(path: str, handler: Handler, summary: str, response: object, query: dict[str, str] | None = None) -> Endpoint:
    return Endpoint(method="GET", path=path, handler=handler, summary=summary, response=response, query=query or {})


def _sse(path: str, handler: Handler, summary: str, response: object, query: dict[str, str] | None = None) -> Endpoint:
    return Endpoint(
        method="GET", path=path, handler=handler, summary=summary, response=response, kind="sse", query=query or {}
    )


def _post(path: str, handler: Handler, summary: str, request: object, response: object) -> Endpoint:
    return Endpoint(method="POST", path=path, handler=handler, summary=summary, request=request, response=response)


def _put(path: str, handler: Handler, summary: str, request: object, response: object) -> Endpoint:
    return Endpoint(method="PUT", path=path, handler=handler, summary=summary, request=request, response=response)


def _delete(path: str, handler: Handler, summary: str, response: object = None) -> Endpoint:
    return Endpoint(method="DELETE", path=path, handler=handler, summary=summary, response=response)
