"""etcd v3's JSON gateway over one member: a request's path and body in, an answer's bytes out, whatever carries them.

It speaks as etcd 3.4 does, and is compared with it by a test (`tests/discovery/test_etcd_differential.py`). Where
the two differ on purpose: what would make etcd itself panic is refused, as is anything after a request's JSON; there is
no user database, since access is by certificate (`access`), so whatever would make users or roles is refused.
`api` puts it on HTTP, `lane` calls it for the requests that have to be fast; watches are in `watchstream`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import zlib
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec

from discovery import codec, etcdjson
from discovery.access import CONTROLLER, Role
from discovery.etcdjson import Json
from discovery.jsonstream import Messages
from discovery.leases import Leases
from discovery.membership import Peer
from discovery.operations import (
    DEADLINE,
    FAILED_PRECONDITION,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OUT_OF_RANGE,
    PERMISSION_DENIED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    Body,
    Compact,
    Image,
    Outcome,
    PutResult,
    Refused,
)
from discovery.peerwire import Change
from discovery.remote import addresses_of
from discovery.replica import Replica
from discovery.wire.errors import AlreadyExists, Conflict, DeadlineExceeded, Invalid, NotFound, ServiceError

log = logging.getLogger(__name__)

ETCD_VERSION, ETCD_CLUSTER = "3.4.23", "3.4.0"
"""The release of etcd whose gateway this speaks (and is compared with); clients choose their dialect by it."""
LEASE_TTL_S_MIN = 2
PREFIXES = ("/v3", "/v3beta", "/v3alpha")

_PEER_URL = re.compile(r"https?://([^/\s@]+:\d+)/?")
_ALONE = "hostd"
_STATUS = {
    INVALID_ARGUMENT: 400,
    DEADLINE: 504,
    NOT_FOUND: 404,
    PERMISSION_DENIED: 403,
    FAILED_PRECONDITION: 412,
    OUT_OF_RANGE: 400,
    UNIMPLEMENTED: 501,
    UNAVAILABLE: 503,
}

Handler = Callable[[bytes, Role], Awaitable[bytes]]


class Gateway:
    """etcd's endpoints over one member; `handlers` is all of them but the watch, by path."""

    def __init__(self, member: Replica, leases: Leases | None) -> None:
        self._member = member
        self._leases = cast(Leases, leases)  # an agent has none, and no handler that would use them
        self.member_id = number(member.member_id)
        self._head = (0, b"")
        plain: dict[str, Handler] = {
            "/kv/range": self._range,
            "/kv/put": self._put,
            "/kv/deleterange": self._delete_range,
            "/kv/txn": self._txn,
            "/kv/compaction": self._compaction,
            "/lease/grant": self._lease_grant,
            "/lease/revoke": self._lease_revoke,
            "/kv/lease/revoke": self._lease_revoke,
            "/lease/timetolive": self._lease_time_to_live,
            "/kv/lease/timetolive": self._lease_time_to_live,
            "/lease/leases": self._lease_list,
            "/kv/lease/leases": self._lease_list,
            "/lease/keepalive": self._lease_keep_alive,
            "/maintenance/status": self._status,
            "/maintenance/alarm": self._alarm,
            "/maintenance/hash": self._hash,
            "/maintenance/defragment": self._defragment,
            "/maintenance/snapshot": self._not_here,
            "/maintenance/transfer-leadership": self._not_here,
            "/cluster/member/list": self._members,
            "/cluster/member/add": self._member_add,
            "/cluster/member/remove": self._member_remove,
            "/cluster/member/update": self._member_update,
            "/cluster/member/promote": self._member_promote,
            "/auth/enable": _refusing(FAILED_PRECONDITION, "root user does not exist"),
            "/auth/disable": self._nothing_to_do,
            "/auth/authenticate": _refusing(FAILED_PRECONDITION, "authentication is not enabled"),
            "/auth/user/list": self._nothing_to_do,
            "/auth/role/list": self._nothing_to_do,
        }
        for verb in ("get", "delete", "changepw", "grant", "revoke"):
            plain["/auth/user/" + verb] = _refusing(FAILED_PRECONDITION, "user name not found")
        for verb in ("get", "delete", "grant", "revoke"):
            plain["/auth/role/" + verb] = _refusing(FAILED_PRECONDITION, "role name not found")
        for path in ("/auth/user/add", "/auth/role/add"):
            plain[path] = _refusing(UNIMPLEMENTED, "there are no users: access is by certificate")
        self.handlers = {prefix + path: handler for prefix in PREFIXES for path, handler in plain.items()}

    async def answer(self, path: str, raw: bytes, role: Role = CONTROLLER) -> tuple[int, bytes]:
        """Answer one request; return the HTTP status and the JSON. `path` is one of `handlers`; never raises."""
        if role.grant is not None:
            role = role.now(self._member.state.value)
        try:
            return 200, await self.handlers[path](raw, role)
        except (Refused, ServiceError) as error:
            return refusal(error)
        except Exception:
            log.exception("%s failed", path)
            return refusal(Refused(INTERNAL, "internal error"))

    def header(self, revision: int | None = None) -> Json:
        """Return what stands at the head of every message of a stream; revision 0 is left out, as etcd does."""
        return {"header": msgspec.Raw(self._header_of(self._member.state.revision if revision is None else revision))}

    def _header_of(self, revision: int) -> bytes:
        cluster, head = self._head
        if cluster != self._member.cluster_id or not head:  # it becomes known when the member has joined
            cluster = self._member.cluster_id
            head = b'{"cluster_id":"%d","member_id":"%d",' % (cluster or number(_ALONE), self.member_id)
            self._head = cluster, head
        shown = b'"revision":"%d",' % revision if revision else b""
        return head + shown + b'"raft_term":"%d"}' % self._member.term

    def _answer(self, body: Json, revision: int | None = None) -> bytes:
        head = b'{"header":' + self._header_of(self._member.state.revision if revision is None else revision)
        return head + b"," + msgspec.json.encode(body)[1:] if body else head + b"}"

    # Keys

    async def _range(self, raw: bytes, role: Role) -> bytes:
        request = etcdjson.decode(raw, etcdjson.RangeJson)
        operation = request.to_operation()
        if role is not CONTROLLER:
            role.check_range(operation.key, operation.range_end)
        result = await self._member.read(operation, serializable=request.serializable)
        return self._answer(etcdjson.range_answer(result))

    async def _put(self, raw: bytes, role: Role) -> bytes:
        done = await self._propose(etcdjson.decode(raw, etcdjson.PutJson).to_operation(), role)
        if isinstance(done.result, PutResult) and done.result.previous is None:
            return b'{"header":' + self._header_of(done.revision) + b"}"
        return self._answer(etcdjson.outcome(done), done.revision)

    async def _delete_range(self, raw: bytes, role: Role) -> bytes:
        done = await self._propose(etcdjson.decode(raw, etcdjson.DeleteJson).to_operation(), role)
        return self._answer(etcdjson.outcome(done), done.revision)

    async def _txn(self, raw: bytes, role: Role) -> bytes:
        done = await self._propose(etcdjson.decode(raw, etcdjson.TxnJson).to_operation(), role)
        return self._answer(etcdjson.outcome(done), done.revision)

    async def _compaction(self, raw: bytes, role: Role) -> bytes:
        role.check_operator()
        revision = etcdjson.decode(raw, etcdjson.CompactJson).revision
        if revision or self._member.state.compacted:
            await self._member.propose(Compact(revision=revision))
        return self._answer({})

    async def _propose(self, operation: Body, role: Role) -> Outcome:
        if role is not CONTROLLER:
            role.check_step(operation)  # type: ignore[arg-type]  # the three that can be asked for here
        return await self._member.propose(operation)

    # Leases

    async def _lease_grant(self, raw: bytes, role: Role) -> bytes:
        role.check_lease()
        request = etcdjson.decode(raw, etcdjson.GrantJson)
        lease = await self._leases.grant(max(request.TTL, LEASE_TTL_S_MIN), request.ID)
        return self._answer({"ID": str(lease.id), "TTL": str(lease.ttl_s)})

    async def _lease_revoke(self, raw: bytes, role: Role) -> bytes:
        id = etcdjson.decode(raw, etcdjson.LeaseJson).ID
        role.check_lease(self._member.state.lease_keys(id))
        outcome = await self._leases.revoke(id)
        return self._answer({}, outcome.revision)

    async def _lease_keep_alive(self, raw: bytes, role: Role) -> bytes:
        """Renew one lease after the other; body and answer are streams of messages, and what is renewed stays so."""
        role.check_lease()
        answers: list[bytes] = []
        messages = Messages()
        messages.feed(raw)
        try:
            for message in messages.take():
                answers.append(await self._renew(etcdjson.decode(message, etcdjson.LeaseJson).ID))
            if messages.has_rest:
                raise Refused(INVALID_ARGUMENT, "unexpected EOF")
        except Refused:
            if not answers:
                raise
        return b"".join(answers)

    async def _renew(self, id: int) -> bytes:
        remaining = await self._leases.keep_alive(id)
        answer = self.header() | ({"ID": str(id)} if id else {}) | ({"TTL": str(remaining)} if remaining > 0 else {})
        return msgspec.json.encode({"result": answer}) + b"\n"

    async def _lease_time_to_live(self, raw: bytes, role: Role) -> bytes:
        request = etcdjson.decode(raw, etcdjson.LeaseJson)
        keys = self._member.state.lease_keys(request.ID)
        role.check_look(keys if request.keys else ())
        answer: Json = {"ID": str(request.ID)} if request.ID else {}
        if remaining := (await self._leases.remaining_s([request.ID]))[0]:
            answer["TTL"] = str(remaining)
        lease = self._member.state.lease(request.ID)
        if lease is not None:
            answer["grantedTTL"] = str(lease.ttl_s)
        if request.keys and keys:
            answer["keys"] = keys
        return self._answer(answer)

    async def _lease_list(self, raw: bytes, role: Role) -> bytes:
        """List the leases, the one that ends first at the head."""
        etcdjson.decode(raw, etcdjson.EmptyJson)
        role.check_range(b"\x00", b"\x00")  # of everybody: as good as reading everything
        ids = [lease.id for lease in self._member.state.leases()]
        ends = dict(zip(ids, await self._leases.remaining_s(ids), strict=True))
        ids.sort(key=ends.__getitem__)
        return self._answer({"leases": [{"ID": str(id)} for id in ids]} if ids else {})

    # The cluster

    async def _status(self, raw: bytes, _: Role) -> bytes:
        etcdjson.decode(raw, etcdjson.EmptyJson)
        status, size = self._member.status(), str(self._member.disk_bytes())
        answer: Json = {
            "version": ETCD_VERSION,
            "dbSize": size,
            "raftIndex": str(status.index),
            "raftTerm": str(status.term),
            "raftAppliedIndex": str(status.applied),
            "dbSizeInUse": size,
        }
        if status.leader_id:
            answer["leader"] = str(number(status.leader_id))
        else:
            answer["errors"] = ["etcdserver: no leader"]
        return self._answer(answer | ({"isLearner": True} if status.is_learner else {}))

    def _shown(self, peer: Peer) -> Json:
        shown: Json = {"ID": str(number(peer.id)), "name": peer.id}
        if peer.address:
            shown["peerURLs"] = ["https://" + peer.address]
        if urls := addresses_of(self._member, peer.id):
            shown["clientURLs"] = urls
        return shown if peer.is_voter else shown | {"isLearner": True}

    def _all_shown(self) -> Json:
        peers = sorted(self._member.status().members, key=lambda peer: number(peer.id))
        return {"members": [self._shown(peer) for peer in peers]}

    async def _members(self, raw: bytes, _: Role) -> bytes:
        etcdjson.decode(raw, etcdjson.EmptyJson)
        return self._answer(self._all_shown(), 0)

    async def _member_add(self, raw: bytes, role: Role) -> bytes:
        """Let a new member come; it has to be started under the name `host:port`, as in its URL."""
        role.check_operator()
        request = etcdjson.decode(raw, etcdjson.UrlsJson)
        matches = [_PEER_URL.fullmatch(url) for url in request.peerURLs]
        if not matches or matches[0] is None or not all(matches):
            raise Refused(INVALID_ARGUMENT, "given member URLs are invalid")
        name = matches[0][1]
        await self._change(Change("add", name, name))
        if request.isLearner:
            await self._change(Change("demote", name))
        added = next((peer for peer in self._member.status().members if peer.id == name), Peer(name, name))
        return self._answer({"member": self._shown(added)} | self._all_shown(), 0)

    async def _member_remove(self, raw: bytes, role: Role) -> bytes:
        await self._change(Change("remove", self._named(raw, role).id))
        return self._answer(self._all_shown(), 0)

    async def _member_promote(self, raw: bytes, role: Role) -> bytes:
        peer = self._named(raw, role)
        if peer.is_voter:
            raise Refused(FAILED_PRECONDITION, "can only promote a learner member")
        await self._change(Change("promote", peer.id))
        return self._answer(self._all_shown(), 0)

    async def _member_update(self, raw: bytes, role: Role) -> bytes:
        self._named(raw, role)
        raise Refused(UNIMPLEMENTED, "a member with another address is another member: add it, remove this one")

    def _named(self, raw: bytes, role: Role) -> Peer:
        """Return the member that a request means.

        Raises:
            Refused: there is none, or it may not be changed by this role.
        """
        role.check_operator()
        id = etcdjson.decode(raw, etcdjson.UrlsJson).ID
        for peer in self._member.status().members:
            if number(peer.id) == id:
                return peer
        raise Refused(NOT_FOUND, "member not found")

    async def _change(self, change: Change) -> None:
        try:
            await self._member.change(change)
        except AlreadyExists as error:
            raise Refused(FAILED_PRECONDITION, "Peer URLs already exists") from error
        except NotFound as error:
            raise Refused(NOT_FOUND, "member not found") from error
        except (Conflict, Invalid) as error:
            raise Refused(FAILED_PRECONDITION, error.message) from error

    async def _alarm(self, raw: bytes, role: Role) -> bytes:
        """There is nothing to raise or to clear: a full disk is noticed, and noticed to be over, by itself."""
        if etcdjson.decode(raw, etcdjson.AlarmJson).action in (1, "ACTIVATE"):
            role.check_operator()
            return await self._not_here(raw, role)
        return b"{}"

    async def _hash(self, raw: bytes, role: Role) -> bytes:
        """Say the checksum of the whole state: the same on members that have applied the same."""
        role.check_range(b"\x00", b"\x00")
        etcdjson.decode(raw, etcdjson.HashJson)
        revision, image = self._member.state.revision, self._member.state.image()
        return self._answer({"hash": await asyncio.to_thread(_checksum, image)}, revision)

    async def _defragment(self, _: bytes, role: Role) -> bytes:
        role.check_operator()
        return b"{}"  # nothing to do: compaction gives the space back by itself

    async def _nothing_to_do(self, _: bytes, role: Role) -> bytes:
        role.check_operator()
        return self._answer({})

    async def _not_here(self, _: bytes, role: Role) -> bytes:
        role.check_operator()
        raise Refused(UNIMPLEMENTED, "not supported")


def _refusing(code: int, message: str) -> Handler:
    async def refuse(_: bytes, __: Role) -> bytes:
        raise Refused(code, message)

    return refuse


def _checksum(image: Image) -> int:
    found = 0
    for chunk in codec.encode_image(image):
        found = zlib.crc32(chunk, found)
    return found


def number(name: str) -> int:
    """Make the 63-bit number that etcd's clients expect where we have names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def refusal(error: Refused | ServiceError) -> tuple[int, bytes]:
    """Return the HTTP status and the JSON of an error."""
    if isinstance(error, Refused):
        code, message = error.code, error.message
    elif isinstance(error, DeadlineExceeded):
        code, message = DEADLINE, f"etcdserver: request timed out: {error.message}"
    else:
        code = UNAVAILABLE if error.retry else INTERNAL
        message = f"etcdserver: {error.message}"
    return _STATUS.get(code, 500), msgspec.json.encode({"error": message, "message": message, "code": code})
