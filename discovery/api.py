"""The HTTP face of discovery: etcd v3's JSON gateway, and our services; shapes and errors only.

Under `/v3` (and `/v3beta`, `/v3alpha`) errors are the gateway's (`error`, `code`, `message` with
gRPC's numbers), everywhere else ours. There is no user database: access is by who can reach the
socket (later by certificate), so `/v3/auth/*` answers that authentication is not enabled.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from discovery import etcdjson
from discovery.errors import ServiceNotFound
from discovery.etcdjson import Json
from discovery.leases import Leases
from discovery.operations import (
    DEADLINE,
    FAILED_PRECONDITION,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OUT_OF_RANGE,
    UNAVAILABLE,
    UNIMPLEMENTED,
    Compact,
    Refused,
)
from discovery.raft import Member
from discovery.services import Directory as ServiceDirectory
from discovery.services import Services, check_label
from discovery.types import Instance, InstanceEvent, LeaderChoice, Service, ServiceMeta
from discovery.watches import Watches
from discovery.wire.errors import DeadlineExceeded, Invalid, NotFound, ServiceError
from discovery.wire.serve import Call, Endpoint, application, send_events
from discovery.wire.version import VERSION

log = logging.getLogger(__name__)

ETCD_VERSION = "3.5.0"
"""The release of etcd whose gateway this speaks; clients choose their dialect by it."""
WATCH_PROGRESS_S = 60.0

_STATUS = {
    INVALID_ARGUMENT: 400,
    DEADLINE: 504,
    NOT_FOUND: 404,
    FAILED_PRECONDITION: 400,
    OUT_OF_RANGE: 400,
    UNIMPLEMENTED: 501,
    UNAVAILABLE: 503,
}
_JSON = "application/json"


class Gateway:
    """etcd's endpoints over one member."""

    def __init__(self, member: Member, leases: Leases, watches: Watches, cluster: str = "hostd") -> None:
        self._member = member
        self._leases = leases
        self._watches = watches
        self._cluster_id = _number(cluster)
        self._member_id = _number(member.member_id)

    def add_to(self, app: web.Application) -> None:
        """Add the endpoints to an application."""
        plain: dict[str, Callable[[bytes], Awaitable[Json]]] = {
            "/kv/range": self.range,
            "/kv/put": self.put,
            "/kv/deleterange": self.delete_range,
            "/kv/txn": self.txn,
            "/kv/compaction": self.compaction,
            "/lease/grant": self.lease_grant,
            "/lease/revoke": self.lease_revoke,
            "/kv/lease/revoke": self.lease_revoke,
            "/lease/timetolive": self.lease_time_to_live,
            "/kv/lease/timetolive": self.lease_time_to_live,
            "/lease/leases": self.lease_list,
            "/kv/lease/leases": self.lease_list,
            "/lease/keepalive": self.lease_keep_alive,
            "/maintenance/status": self.status,
            "/maintenance/hash": self.not_here,
            "/maintenance/defragment": self.defragment,
            "/cluster/member/list": self.members,
            "/cluster/member/add": self.not_here,
            "/cluster/member/remove": self.not_here,
            "/auth/{rest:.*}": self.no_auth,
        }
        for prefix in ("/v3", "/v3beta", "/v3alpha"):
            for path, handler in plain.items():
                app.router.add_post(prefix + path, _answering(handler))
            app.router.add_post(prefix + "/watch", self.watch)
        app.router.add_get("/version", self.version)
        app.router.add_get("/health", self.health)
        app.on_shutdown.append(self._on_shutdown)

    # Keys

    async def range(self, raw: bytes) -> Json:
        request = etcdjson.decode(raw, etcdjson.RangeJson)
        operation = request.to_operation()
        result = self._member.state.read(operation) if request.serializable else await self._member.read(operation)
        return self._header() | etcdjson.range_answer(result)

    async def put(self, raw: bytes) -> Json:
        outcome = await self._member.propose(etcdjson.decode(raw, etcdjson.PutJson).to_operation())
        return self._header(outcome.revision) | etcdjson.outcome(outcome)

    async def delete_range(self, raw: bytes) -> Json:
        outcome = await self._member.propose(etcdjson.decode(raw, etcdjson.DeleteJson).to_operation())
        return self._header(outcome.revision) | etcdjson.outcome(outcome)

    async def txn(self, raw: bytes) -> Json:
        outcome = await self._member.propose(etcdjson.decode(raw, etcdjson.TxnJson).to_operation())
        return self._header(outcome.revision) | etcdjson.outcome(outcome)

    async def compaction(self, raw: bytes) -> Json:
        await self._member.propose(Compact(revision=etcdjson.decode(raw, etcdjson.CompactJson).revision))
        return self._header()

    # Leases

    async def lease_grant(self, raw: bytes) -> Json:
        request = etcdjson.decode(raw, etcdjson.GrantJson)
        lease = await self._leases.grant(request.TTL, request.ID)
        return self._header() | {"ID": str(lease.id), "TTL": str(lease.ttl_s)}

    async def lease_revoke(self, raw: bytes) -> Json:
        outcome = await self._leases.revoke(etcdjson.decode(raw, etcdjson.LeaseJson).ID)
        return self._header(outcome.revision)

    async def lease_keep_alive(self, raw: bytes) -> Json:
        request = etcdjson.decode(raw, etcdjson.LeaseJson)
        self._member.check_leading()
        remaining = self._leases.keep_alive(request.ID)
        answer: Json = self._header() | {"ID": str(request.ID)}
        if remaining > 0:
            answer["TTL"] = str(remaining)
        return {"result": answer}

    async def lease_time_to_live(self, raw: bytes) -> Json:
        request = etcdjson.decode(raw, etcdjson.LeaseJson)
        answer = self._header() | {"ID": str(request.ID), "TTL": str(self._leases.remaining_s(request.ID))}
        lease = self._member.state.lease(request.ID)
        if lease is not None:
            answer["grantedTTL"] = str(lease.ttl_s)
        if lease is not None and request.keys and (keys := self._member.state.lease_keys(request.ID)):
            answer["keys"] = keys
        return answer

    async def lease_list(self, raw: bytes) -> Json:
        etcdjson.decode(raw, etcdjson.EmptyJson)
        return self._header() | {"leases": [{"ID": str(lease.id)} for lease in self._member.state.leases()]}

    # The cluster

    async def status(self, raw: bytes) -> Json:
        etcdjson.decode(raw, etcdjson.EmptyJson)
        return self._header() | {
            "version": ETCD_VERSION,
            "dbSize": str(self._member.disk_bytes()),
            "leader": str(self._member_id),
            "raftIndex": str(self._member.index),
            "raftTerm": str(self._member.term),
            "raftAppliedIndex": str(self._member.index),
        }

    async def members(self, raw: bytes) -> Json:
        etcdjson.decode(raw, etcdjson.EmptyJson)
        return self._header() | {"members": [{"ID": str(self._member_id), "name": self._member.member_id}]}

    async def defragment(self, _: bytes) -> Json:
        return self._header()  # nothing to do: compaction gives the space back by itself

    async def no_auth(self, _: bytes) -> Json:
        raise Refused(FAILED_PRECONDITION, "authentication is not enabled")

    async def not_here(self, _: bytes) -> Json:
        raise Refused(UNIMPLEMENTED, "not supported")

    async def version(self, _: web.Request) -> web.Response:
        return _response({"etcdserver": ETCD_VERSION, "etcdcluster": ETCD_VERSION})

    async def health(self, _: web.Request) -> web.Response:
        return _response({"health": "true" if self._member.is_leader else "false"})

    # Watches

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """Stream changes as lines of JSON, until the client goes or falls behind a compaction."""
        try:
            wanted = await _watch_request(request)
            self._member.check_leading()
        except (Refused, ServiceError) as error:
            return _refusal(error)
        response = web.StreamResponse(headers={"Content-Type": _JSON})
        await response.prepare(request)
        try:
            async for line in self._watch_lines(wanted):
                await response.write(msgspec.json.encode({"result": line}) + b"\n")
        except ConnectionResetError:
            pass
        return response

    async def _watch_lines(self, wanted: etcdjson.WatchCreateJson) -> AsyncIterator[Json]:
        shared: Json = {"watch_id": str(wanted.watch_id)} if wanted.watch_id else {}
        state = self._member.state
        start = wanted.start_revision if wanted.start_revision > 0 else state.revision + 1
        with self._watches.open(wanted.key, wanted.range_end, start) as watch:
            yield self._header() | shared | {"created": True}
            while True:
                try:
                    async with asyncio.timeout(WATCH_PROGRESS_S if wanted.progress_notify else None):
                        await watch.wait()
                    events = [event for event in watch.take() if wanted.wants(event)]
                except TimeoutError:
                    yield self._header() | shared
                    continue
                except Refused as refused:
                    if refused.code == UNAVAILABLE:
                        return  # the client sees the stream end and connects again
                    yield self._header() | shared | {"canceled": True, "compact_revision": str(state.compacted)}
                    return
                if events:
                    shown = [etcdjson.event(event, has_previous=wanted.prev_kv) for event in events]
                    yield self._header() | shared | {"events": shown}

    async def _on_shutdown(self, _: web.Application) -> None:
        self._watches.close()

    def _header(self, revision: int = 0) -> Json:
        return {
            "header": {
                "cluster_id": str(self._cluster_id),
                "member_id": str(self._member_id),
                "revision": str(revision or self._member.state.revision),
                "raft_term": str(self._member.term),
            }
        }


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
                method="GET", path=one + "/leader", handler=self.leader, summary="Show who leads", response=Instance
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
        if "follow" in call.query or call.raw.headers.get("Accept") == "text/event-stream":
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

    async def leader(self, call: Call) -> Instance:
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


def make_application(gateway: Gateway, services: ServicesApi) -> web.Application:
    """Return the application with both faces."""
    app = application("discovery", VERSION, services.endpoints())
    gateway.add_to(app)
    return app


def _number(name: str) -> int:
    """Make the 63-bit number that etcd's clients expect where we have names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def _response(body: Json, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type=_JSON)


def _refusal(error: Refused | ServiceError) -> web.Response:
    if isinstance(error, Refused):
        code, message = error.code, error.message
    elif isinstance(error, DeadlineExceeded):
        code, message = DEADLINE, f"etcdserver: request timed out: {error.message}"
    else:
        code = UNAVAILABLE if error.retry else INTERNAL
        message = f"etcdserver: {error.message}"
    return _response({"error": message, "code": code, "message": message}, _STATUS.get(code, 500))


def _answering(handler: Callable[[bytes], Awaitable[Json]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        try:
            return _response(await handler(await request.read()))
        except web.HTTPRequestEntityTooLarge:
            return _refusal(Refused(INVALID_ARGUMENT, "request is too large"))
        except (Refused, ServiceError) as error:
            return _refusal(error)
        except Exception:
            log.exception("%s failed", request.path)
            return _refusal(Refused(INTERNAL, "internal error"))

    return answer


async def _watch_request(request: web.Request) -> etcdjson.WatchCreateJson:
    """Read the first message of the body; a client may leave its body open for as long as it watches."""
    raw = b""
    while True:
        chunk = await request.content.readany()
        raw += chunk
        if len(raw) > 1024 * 1024:
            raise Refused(INVALID_ARGUMENT, "request is too large")
        try:
            wanted = etcdjson.decode(raw, etcdjson.WatchJson)
        except Refused:
            if chunk:
                continue  # perhaps only a part of it
            raise
        if wanted.create_request is None:
            raise Refused(INVALID_ARGUMENT, "the first message of a watch is a create_request")
        if not wanted.create_request.key and not wanted.create_request.range_end:
            raise Refused(INVALID_ARGUMENT, "key is not provided")
        return wanted.create_request
