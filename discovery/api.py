"""The HTTP face of discovery: etcd v3's JSON gateway, and our services; shapes and errors only.

Under `/v3` (and `/v3beta`, `/v3alpha`) errors are the gateway's (`error`, `message`, `code` with
gRPC's numbers), everywhere else ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from discovery.access import Role, role_of
from discovery.errors import ServiceNotFound
from discovery.gateway import ETCD_CLUSTER, ETCD_VERSION, PREFIXES, Gateway, refusal
from discovery.jsonstream import Messages
from discovery.operating import Operating
from discovery.operations import INVALID_ARGUMENT, Refused
from discovery.replica import Replica
from discovery.services import Directory as ServiceDirectory
from discovery.services import Services, check_label
from discovery.types import Instance, InstanceEvent, LeaderChoice, Service, ServiceMeta
from discovery.watches import Watches
from discovery.watchstream import Lines, WatchStream
from discovery.wire import roles
from discovery.wire.errors import DeadlineExceeded, Invalid, NotFound, ServiceError, Unauthorized
from discovery.wire.serve import BODY_S, Call, Endpoint, application, json_response, send_events
from discovery.wire.version import VERSION

_JSON = "application/json"


class EtcdApi:
    """etcd's endpoints on HTTP."""

    def __init__(self, gateway: Gateway, member: Replica, watches: Watches) -> None:
        self._gateway = gateway
        self._member = member
        self._watches = watches
        self._lines = Lines()
        self._streams: set[WatchStream] = set()

    def add_to(self, app: web.Application) -> None:
        """Add the endpoints to an application."""
        for path in self._gateway.handlers:
            app.router.add_post(path, self._answering(path))
        for prefix in PREFIXES:
            app.router.add_post(prefix + "/watch", self.watch)
        app.router.add_get("/version", self.version)
        app.router.add_get("/health", self.health)
        app.on_shutdown.append(self._on_shutdown)

    def _answering(self, path: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            try:
                async with asyncio.timeout(BODY_S):
                    raw = await request.read()
            except web.HTTPRequestEntityTooLarge:
                return _refusal(Refused(INVALID_ARGUMENT, "request is too large"))
            except TimeoutError:
                return _refusal(DeadlineExceeded(f"the request body did not come within {BODY_S:g} s"))
            status, body = await self._gateway.answer(path, raw, caller_of(request))
            return web.Response(status=status, body=body, content_type=_JSON)

        return answer

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"etcdserver": ETCD_VERSION, "etcdcluster": ETCD_CLUSTER})

    async def health(self, _: web.Request) -> web.Response:
        return json_response({"health": "true" if self._member.status().leader_id else "false"})

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """Stream changes as lines of JSON, until the client goes."""
        stream = WatchStream(self._watches, self._member.state, caller_of(request), self._gateway.header, self._lines)
        chunks, messages = request.content.iter_any(), Messages()
        try:
            self._member.check_ready()
            async with asyncio.timeout(BODY_S):
                await stream.first(chunks, messages)
        except (Refused, ServiceError) as error:
            return _refusal(error)
        except TimeoutError:
            return _refusal(DeadlineExceeded(f"no message came within {BODY_S:g} s"))
        response = web.StreamResponse(headers={"Content-Type": _JSON})
        await response.prepare(request)
        self._streams.add(stream)
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(stream.read(chunks, messages))
                try:
                    async for line in stream.lines():
                        await response.write(line)
                except ConnectionResetError:
                    pass
                reading.cancel()
        finally:
            self._streams.discard(stream)
            stream.close()
        return response

    async def _on_shutdown(self, _: web.Application) -> None:
        self._watches.close()
        for stream in list(self._streams):
            stream.close()


class ServicesApi:
    """Our own endpoints."""

    def __init__(self, services: Services, directory: ServiceDirectory) -> None:
        self._services = services
        self._directory = directory

    def endpoints(self) -> list[Endpoint]:
        """Return the table that `wire.serve` serves and documents."""
        follow = {"follow": "stream events: the instances there are, `current`, then changes"}
        one, instances = "/services/{service}", "/services/{service}/instances"
        return [
            Endpoint(
                method="GET", path="/services", handler=self.list, summary="List services", response=list[Service]
            ),
            Endpoint(
                method="PUT",
                path=one,
                handler=self.create,
                summary="Create a service",
                request=Service,
                response=Service,
            ),
            Endpoint(method="GET", path=one, handler=self.get, summary="Show a service", response=Service),
            Endpoint(method="DELETE", path=one, handler=self.remove, summary="Remove a service and its instances"),
            Endpoint(
                method="GET",
                path="/instances",
                handler=self.instances,
                summary="List the instances of all services",
                response=list[Instance],
                query=follow,
            ),
            Endpoint(
                method="GET",
                path=instances,
                handler=self.instances,
                summary="List instances, oldest first",
                response=list[Instance],
                query=follow,
            ),
            Endpoint(
                method="PUT",
                path=instances + "/{id}",
                handler=self.register,
                summary="Register an instance",
                request=Instance,
                response=Instance,
                query={"lease": "the lease that it ends with"},
            ),
            Endpoint(method="DELETE", path=instances + "/{id}", handler=self.deregister, summary="Remove an instance"),
            Endpoint(
                method="GET",
                path=one + "/leader",
                handler=self.leader,
                summary="Show who leads",
                response=Instance,
                query={"follow": "stream events: who leads, `current`, then whoever does after that"},
            ),
            Endpoint(
                method="PUT",
                path=one + "/leader",
                handler=self.set_leader,
                summary="Say who leads",
                request=LeaderChoice,
            ),
            Endpoint(
                method="GET", path=one + "/meta", handler=self.meta, summary="Show metadata", response=ServiceMeta
            ),
            Endpoint(
                method="PUT",
                path=one + "/meta",
                handler=self.set_meta,
                summary="Change metadata at an index",
                request=ServiceMeta,
                response=ServiceMeta,
            ),
        ]

    async def list(self, _: Call) -> list[Service]:
        return self._directory.services()

    async def create(self, call: Call) -> Service:
        name = call.path["service"]
        if call.body.name not in ("", name):
            raise Invalid(f"the path says {name[:80]}, the body {call.body.name[:80]}")
        return await self._services.create(Service(name=name, leader_type=call.body.leader_type))

    async def get(self, call: Call) -> Service:
        return self._service(call)

    async def remove(self, call: Call) -> None:
        await self._services.remove(call.path["service"])

    async def instances(self, call: Call) -> Any:
        service = call.path.get("service", "")
        if service:
            check_label(service, "service")
        if _is_follow(call):
            return await send_events(call, self._follow(service))
        names = [service] if service else [known.name for known in self._directory.services()]
        return [instance for name in names for instance in self._directory.instances(name)]

    async def register(self, call: Call) -> Instance:
        instance: Instance = call.body
        if (instance.service, instance.id) != (call.path["service"], call.path["id"]):
            raise Invalid("the path and the body name different instances")
        return await self._services.register(instance, call.number("lease", 0, high=2**63 - 1))

    async def deregister(self, call: Call) -> None:
        await self._services.deregister(call.path["service"], call.path["id"])

    async def leader(self, call: Call) -> Any:
        if _is_follow(call):
            check_label(call.path["service"], "service")
            return await send_events(call, self._services.follow_leader(call.path["service"]))
        leader = self._directory.leader(self._service(call).name)
        if leader is None:
            raise NotFound(f"service {call.path['service']} has no leader", hint="it has no instance, or none is set")
        return leader

    async def set_leader(self, call: Call) -> None:
        await self._services.set_leader(call.path["service"], call.body.id)

    async def meta(self, call: Call) -> ServiceMeta:
        return await self._services.meta(call.path["service"])

    async def set_meta(self, call: Call) -> ServiceMeta:
        return await self._services.set_meta(call.path["service"], call.body)

    def _service(self, call: Call) -> Service:
        found = self._directory.service(call.path["service"])
        if found is None:
            raise ServiceNotFound(f"there is no service {call.path['service'][:80]}")
        return found

    def _follow(self, service: str) -> AsyncIterator[InstanceEvent]:
        return self._services.follow(service)


def _is_follow(call: Call) -> bool:
    return "follow" in call.query or call.raw.headers.get("Accept") == "text/event-stream"


def make_application(
    etcd: EtcdApi, services: ServicesApi, operating: Operating, middlewares: Sequence[Middleware] = ()
) -> web.Application:
    """Return the application with all faces."""
    endpoints = services.endpoints() + operating.endpoints()
    app = application("discovery", VERSION, endpoints, authorize, middlewares=middlewares)
    etcd.add_to(app)
    return app


async def authorize(request: web.Request) -> str:
    """Return the role of who asks for services.

    Raises:
        Unauthorized: it does not allow that.
    """
    role = caller_of(request)
    is_looking = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)
    if not (role.may_read_services if is_looking else role.may_write_services):
        raise Unauthorized(f"a certificate of role {role.name!r} may not do this", hint="hostd tls client --role")
    return role.name


def caller_of(request: web.Request) -> Role:
    """Return the role of who asks."""
    return role_of(roles.certificate_of(request.transport))


def _refusal(error: Refused | ServiceError) -> web.Response:
    status, body = refusal(error)
    return web.Response(status=status, body=body, content_type=_JSON)
