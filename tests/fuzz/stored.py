"""Targets of discovery: DNS queries, the store's JSON, the services' JSON and values, and what is in our files."""

from __future__ import annotations

import random
from collections.abc import Iterable

import dns.message
import dns.rcode
import msgspec

from discovery import answers, codec, etcdjson, frames, resolvers
from discovery import dns as our_dns
from discovery.codec import Unreadable
from discovery.frames import Damaged
from discovery.operations import (
    Body,
    Command,
    CompareClause,
    DeleteRequest,
    LeaseGrant,
    PutRequest,
    RangeRequest,
    Refused,
    TxnRequest,
)
from discovery.services import INSTANCES, LEADERS, SERVICES, Directory, check_instance, check_label
from discovery.state import State
from discovery.types import Instance, LeaderChoice, Service, ServiceMeta
from discovery.wire.errors import Invalid
from tests.fuzz import mutation
from tests.fuzz.harness import Violation


def filled() -> State:
    state = State()
    for service, host in (("web", "10.0.0.1"), ("web", "10.0.0.2"), ("v6", "fd00::1"), ("big", "10.1.0.1")):
        for number in range(30 if service == "big" else 1):
            id = f"{host[-1]}-{number}"
            value = msgspec.json.encode(Instance(id=id, service=service, host=host, port=number + 1))
            state.apply(PutRequest(key=INSTANCES + f"{service}/{id}".encode(), value=value))
    state.apply(PutRequest(key=SERVICES + b"db", value=b'{"name":"db","leader_type":"manual"}'))
    return state


_FILLED = filled().image()


class DnsQueries:
    """Answer a datagram: a kept answer says what a fresh one does, none is longer than asked for, nothing else raises."""

    def open(self) -> None:
        directory = Directory(filled())
        self._kept, self._fresh = answers.Answers(directory), answers.Answers(directory)

    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        for name in ("web", "leader.web", "_web._tcp", "1-0.web._i", "big", "v6", "db", "nosuch", "_i"):
            for kind in ("A", "AAAA", "SRV", "ANY", "SOA"):
                yield dns.message.make_query(f"{name}.discoverd", kind).to_wire()
        yield dns.message.make_query("WeB.DiscoverD", "SRV", use_edns=0, payload=1232, want_dnssec=True).to_wire()
        yield dns.message.make_query("discoverd", "AXFR", use_edns=1).to_wire()
        yield dns.message.make_query("example.test", "A").to_wire()

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.2 and len(data) > 16:
            at = dice.randrange(2, 12)
            return data[:at] + dice.randbytes(1) + data[at + 1 :]
        return mutation.of_bytes(data, dice)

    def run(self, data: bytes) -> str:
        resolvers._is_answer(data, data)
        if len(data) < 12 or data[2] & 0x80:
            return "ignored"
        for is_udp in (True, False):
            quick = self._kept.quick(data, is_udp=is_udp)
            query = our_dns._parse(data)
            if isinstance(query, bytes):
                if quick is not None:
                    raise Violation("an answer to what is no query")
                dns.message.from_wire(query, ignore_trailing=True)
                return f"refused {dns.rcode.Rcode(query[3] & 15).name}"
            if not answers.is_ours(query):
                if quick is not None:
                    raise Violation("an answer about other names")
                return "forwarded"
            fresh = self._fresh.answer(data, query, is_udp=is_udp)
            self._kept.answer(data, query, is_udp=is_udp)
            outcome = self._check(data, fresh, answers._limit(query, is_udp=is_udp))
            if quick is not None and self._check(data, quick, answers._limit(query, is_udp=is_udp)) != outcome:
                raise Violation("a kept answer is not what a fresh one is")
        return outcome

    @staticmethod
    def _check(data: bytes, answer: bytes, limit: int) -> str:
        if len(answer) > limit:
            raise Violation(f"{len(answer)} bytes for {limit}")
        if answer[:2] != data[:2]:
            raise Violation("the id of another")
        shown = dns.message.from_wire(answer)
        if not dns.message.from_wire(data).is_response(shown):
            raise Violation("no answer to this")
        counts = [sum(map(len, section)) for section in (shown.answer, shown.authority)]
        return f"{dns.rcode.to_text(shown.rcode())} {counts} {shown.flags:x}"


REQUESTS: dict[str, type[msgspec.Struct]] = {
    "range": etcdjson.RangeJson,
    "put": etcdjson.PutJson,
    "delete": etcdjson.DeleteJson,
    "txn": etcdjson.TxnJson,
    "watch": etcdjson.WatchJson,
    "grant": etcdjson.GrantJson,
    "lease": etcdjson.LeaseJson,
    "compact": etcdjson.CompactJson,
}
_STEP = {"request_put": {"key": "YQ==", "value": "MQ==", "prev_kv": True, "ignore_lease": False}}
_DOCUMENTS = (
    ("range", {"key": "YQ==", "range_end": "Yg==", "limit": "5", "revision": 1, "sort_order": "DESCEND", "sort_target": 3}),
    ("put", {"key": "YQ==", "value": "MQ==", "lease": "7"}),
    ("delete", {"key": "YQ==", "rangeEnd": "AA==", "prevKv": True}),
    ("txn", {
        "compare": [{"key": "YQ==", "target": "VALUE", "result": "EQUAL", "value": "MQ=="},
                    {"key": "YQ==", "target": 1, "result": 1, "create_revision": "3", "range_end": "Yg=="}],
        "success": [_STEP, {"request_range": {"key": "YQ=="}}, {"request_delete_range": {"key": "Yg=="}}],
        "failure": [{"request_txn": {"success": [_STEP]}}],
    }),
    ("watch", {"create_request": {"key": "YQ==", "start_revision": "1", "filters": ["NOPUT"], "progress_notify": True}}),
    ("grant", {"TTL": 10, "ID": "7"}),
    ("lease", {"ID": "7", "keys": True}),
    ("compact", {"revision": "5", "physical": True}),
)  # fmt: skip


class EtcdRequests:
    """Decode a request of the gateway, carry it out, write its answer: all that is wrong with it is `Refused`."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        for kind, document in _DOCUMENTS:
            yield kind.encode() + b" " + mutation.dump(document)

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        kind, _, text = data.partition(b" ")
        if dice.random() < 0.05:
            kind = dice.choice(list(REQUESTS)).encode()
        return (
            kind + b" " + (mutation.of_bytes(text, dice) if dice.random() < 0.1 else mutation.of_json_text(text, dice))
        )

    def run(self, data: bytes) -> str:
        word, _, text = data.partition(b" ")
        kind = word.decode("ascii", "replace")
        if kind not in REQUESTS:
            return "unknown"
        state = filled()
        try:
            request = etcdjson.decode(text, REQUESTS[kind])
            if not isinstance(request, etcdjson.RangeJson | etcdjson.PutJson | etcdjson.DeleteJson | etcdjson.TxnJson):
                return f"{kind} decoded"
            operation = request.to_operation()
            if isinstance(operation, RangeRequest):
                msgspec.json.encode(etcdjson.range_answer(state.read(operation)))
                return f"{kind} read"
            before = state.image()
            payload = codec.encode_command(Command(id=1, time_ms=0, body=operation))
            if codec.decode_command(payload).body != operation:
                raise Violation("another command comes out of the log than went in")
            try:
                outcome = state.apply(operation)
            except Refused:
                if state.image() != before:
                    raise Violation("a refused command left a trace") from None
                raise
            msgspec.json.encode(etcdjson.outcome(outcome))
            for event in outcome.events:
                msgspec.json.encode(etcdjson.event(event, has_previous=True))
            if codec.decode_image(codec.encode_image(state.image())) != state.image():
                raise Violation("another state comes out of a snapshot than went in")
        except Refused as refused:
            msgspec.json.encode(refused.message)
            return f"{kind} {refused.code}"
        return f"{kind} applied {len(outcome.events)}"


class ServiceDocuments:
    """Decode what registers and what is stored under our prefix: refusals are typed, and nonsense in the store is skipped."""

    KINDS = (Instance, Service, ServiceMeta, LeaderChoice)

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        yield mutation.dump(
            {"id": "a", "service": "web", "host": "10.0.0.1", "port": 1, "protocol": "tcp", "meta": {"a": "1"}}
        )
        yield mutation.dump({"name": "web", "leader_type": "manual"})
        yield mutation.dump({"data": {"a": "1"}, "index": 3})
        yield mutation.dump({"id": "a", "service": "web", "host": "fd00::1", "port": 65535, "created_index": 3})

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_bytes(data, dice) if dice.random() < 0.1 else mutation.of_json_text(data, dice)

    def run(self, data: bytes) -> str:
        taken = []
        for kind in self.KINDS:
            try:
                made = msgspec.json.decode(data, type=kind)
                taken.append(kind.__name__)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue
            if isinstance(made, Instance):
                try:
                    check_instance(made)
                    taken.append("fit")
                except Invalid as error:
                    msgspec.json.encode(error.message)
        self._stored(data)
        return " ".join(taken) or "nothing"

    @staticmethod
    def _stored(data: bytes) -> None:
        """Anybody with the right to write may put anything there; DNS must live with it."""
        state = filled()
        for key in (
            INSTANCES + b"web/odd",
            SERVICES + b"web",
            LEADERS + b"db",
            INSTANCES + data[:40],
            INSTANCES + b"odd/",
        ):
            state.apply(PutRequest(key=key, value=data[: 1 << 20]))
        directory = Directory(state)
        made = answers.Answers(directory)
        for name in ("web", "leader.db", "odd"):
            query = dns.message.make_query(f"{name}.discoverd", "SRV" if name == "web" else "ANY")
            dns.message.from_wire(made.answer(query.to_wire(), query, is_udp=False))
        for service in directory.services():
            msgspec.json.encode(service)
        for instance in directory.instances("web"):
            msgspec.json.encode(instance)
            check_label(instance.service, "service")


class StoredBytes:
    """Read a log or a snapshot back from its frames: what comes out was put in, all else is `Damaged` or `Unreadable`."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        put = PutRequest(key=b"a", value=b"1", lease=7)
        clause = CompareClause(key=b"a", target="MOD", result="EQUAL", value=3)
        bodies: tuple[Body, ...] = (
            put,
            LeaseGrant(id=7, ttl_s=10),
            TxnRequest(compare=(clause,), success=(put, DeleteRequest(key=b"b"))),
        )
        payloads = [codec.encode_command(Command(id=n, time_ms=n, body=body)) for n, body in enumerate(bodies)]
        yield frames.header(b"JRN") + b"".join(map(frames.encode, payloads))
        yield frames.header(b"JRN") + frames.encode(payloads[0]) + frames.encode(payloads[1], durable=40)
        yield frames.header(b"SNP") + b"".join(frames.encode(chunk) for chunk in codec.encode_image(filled().image()))

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.4:
            return mutation.of_bytes(data, dice)
        try:  # inside a record, with its check put right again: a damaged disk does not do that, a newer version might
            records = list(frames.decode_all(data, "it", may_be_torn=True))
        except Damaged:
            records = []
        if not records:
            return mutation.of_bytes(data, dice)
        at = dice.randrange(len(records))
        made = [record.payload for record in records]
        made[at] = mutation.of_bytes(made[at], dice)
        return data[: frames.HEADER_BYTES] + b"".join(map(frames.encode, made))

    def run(self, data: bytes) -> str:
        is_log = data[:8] == b"HOSTDJRN"
        try:
            frames.check_header(data, b"JRN" if is_log else b"SNP", "it")
            payloads = [record.payload for record in frames.decode_all(data, "it", may_be_torn=is_log)]
        except Damaged as error:
            return "".join(letter for letter in str(error) if not letter.isdigit())[:30]
        state = State()
        try:
            if not is_log:
                image = codec.decode_image(payloads)
                return self._load(image)
            for payload in payloads:
                command = codec.decode_command(payload)
                if codec.decode_command(codec.encode_command(command)) != command:
                    raise Violation("a command comes back as another")
                try:
                    state.apply(command.body)
                except Refused:
                    continue
        except Unreadable:
            return "unreadable"
        return f"{len(payloads)} commands"

    @staticmethod
    def _load(image: object) -> str:
        state = State.from_image(image)  # type: ignore[arg-type]
        return f"image with {len(state.leases())} leases"
