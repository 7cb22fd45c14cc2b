"""etcd v3's JSON gateway shapes: requests into `operations`, answers into JSON with etcd's names.

As the gateway does: 64-bit integers are strings (numbers are taken too), bytes are base64, enums
are names (numbers are taken too), zero values are left out, both `range_end` and `rangeEnd` are
understood, `null` is a field that is not there, and fields that nobody knows are not looked at.
Called by `gateway` and `watchstream` only.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar, get_args

import msgspec

from discovery.operations import (
    INVALID_ARGUMENT,
    CompareClause,
    CompareResult,
    CompareTarget,
    DeleteRequest,
    DeleteResult,
    Event,
    Outcome,
    PutRequest,
    PutResult,
    RangeRequest,
    RangeResult,
    Record,
    Refused,
    SortOrder,
    SortTarget,
    TxnRequest,
    TxnResult,
)

T = TypeVar("T", bound=msgspec.Struct)
Json = dict[str, Any]
Enum = str | int
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class RangeJson(msgspec.Struct, forbid_unknown_fields=True):
    key: bytes = b""
    range_end: bytes = b""
    limit: Int64 = 0
    revision: Int64 = 0
    sort_order: Enum = 0
    sort_target: Enum = 0
    serializable: bool = False
    keys_only: bool = False
    count_only: bool = False
    min_mod_revision: Int64 = 0
    max_mod_revision: Int64 = 0
    min_create_revision: Int64 = 0
    max_create_revision: Int64 = 0

    def to_operation(self) -> RangeRequest:
        """Return the request as the state takes it."""
        if not self.key:
            raise Refused(INVALID_ARGUMENT, "key is not provided")
        order = _name(self.sort_order, get_args(SortOrder), "sort_order")
        target = _name(self.sort_target, get_args(SortTarget), "sort_target")
        return RangeRequest(
            key=self.key,
            range_end=self.range_end,
            limit=self.limit,
            revision=max(self.revision, 0),
            sort_order=order,
            sort_target=target,
            keys_only=self.keys_only,
            count_only=self.count_only,
            min_mod_revision=self.min_mod_revision,
            max_mod_revision=self.max_mod_revision,
            min_create_revision=self.min_create_revision,
            max_create_revision=self.max_create_revision,
        )


class PutJson(msgspec.Struct, forbid_unknown_fields=True):
    key: bytes = b""
    value: bytes = b""
    lease: Int64 = 0
    prev_kv: bool = False
    ignore_value: bool = False
    ignore_lease: bool = False

    def to_operation(self) -> PutRequest:
        """Return the request as the state takes it."""
        return PutRequest(
            key=self.key,
            value=self.value,
            lease=self.lease,
            prev_kv=self.prev_kv,
            ignore_value=self.ignore_value,
            ignore_lease=self.ignore_lease,
        )


class DeleteJson(msgspec.Struct, forbid_unknown_fields=True):
    key: bytes = b""
    range_end: bytes = b""
    prev_kv: bool = False

    def to_operation(self) -> DeleteRequest:
        """Return the request as the state takes it."""
        return DeleteRequest(key=self.key, range_end=self.range_end, prev_kv=self.prev_kv)


class CompareJson(msgspec.Struct, forbid_unknown_fields=True):
    key: bytes = b""
    range_end: bytes = b""
    target: Enum = 0
    result: Enum = 0
    version: Int64 = 0
    create_revision: Int64 = 0
    mod_revision: Int64 = 0
    lease: Int64 = 0
    value: bytes = b""

    def to_operation(self) -> CompareClause:
        """Return the condition as the state takes it."""
        target: CompareTarget = _name(self.target, get_args(CompareTarget), "target")
        result: CompareResult = _name(self.result, get_args(CompareResult), "result")
        values: dict[str, int | bytes] = {
            "VERSION": self.version,
            "CREATE": self.create_revision,
            "MOD": self.mod_revision,
            "VALUE": self.value,
            "LEASE": self.lease,
        }
        return CompareClause(key=self.key, range_end=self.range_end, target=target, result=result, value=values[target])


class StepJson(msgspec.Struct, forbid_unknown_fields=True):
    request_range: RangeJson | None = None
    request_put: PutJson | None = None
    request_delete_range: DeleteJson | None = None
    request_txn: TxnJson | None = None

    def to_operation(self) -> RangeRequest | PutRequest | DeleteRequest | TxnRequest:
        """Return the one step that is set."""
        steps = (self.request_range, self.request_put, self.request_delete_range, self.request_txn)
        given = [step for step in steps if step is not None]
        if not given:
            raise Refused(INVALID_ARGUMENT, "key not found")
        if len(given) > 1:
            raise Refused(INVALID_ARGUMENT, "an operation of a txn has exactly one request")
        return given[0].to_operation()


class TxnJson(msgspec.Struct, forbid_unknown_fields=True):
    compare: list[CompareJson] = []
    success: list[StepJson] = []
    failure: list[StepJson] = []

    def to_operation(self) -> TxnRequest:
        """Return the request as the state takes it."""
        return TxnRequest(
            compare=tuple(clause.to_operation() for clause in self.compare),
            success=tuple(step.to_operation() for step in self.success),
            failure=tuple(step.to_operation() for step in self.failure),
        )


class CompactJson(msgspec.Struct, forbid_unknown_fields=True):
    revision: Int64 = 0
    physical: bool = False


class GrantJson(msgspec.Struct, forbid_unknown_fields=True):
    TTL: Int64 = 0
    ID: Int64 = 0


class LeaseJson(msgspec.Struct, forbid_unknown_fields=True):
    ID: Int64 = 0
    keys: bool = False


class EmptyJson(msgspec.Struct, forbid_unknown_fields=True):
    linearizable: bool = False


class WatchCreateJson(msgspec.Struct, forbid_unknown_fields=True):
    key: bytes = b""
    range_end: bytes = b""
    start_revision: Int64 = 0
    progress_notify: bool = False
    filters: list[Enum] = []
    prev_kv: bool = False
    watch_id: Int64 = 0
    fragment: bool = False

    def wants(self, event: Event) -> bool:
        """Tell whether the filters let an event pass."""
        kind = "NODELETE" if event.record.version == 0 else "NOPUT"
        return all(_name(name, ("NOPUT", "NODELETE"), "filters") != kind for name in self.filters)


class WatchCancelJson(msgspec.Struct, forbid_unknown_fields=True):
    watch_id: Int64 = 0


class WatchJson(msgspec.Struct, forbid_unknown_fields=True):
    create_request: WatchCreateJson | None = None
    cancel_request: WatchCancelJson | None = None
    progress_request: EmptyJson | None = None


class UrlsJson(msgspec.Struct, forbid_unknown_fields=True):
    """What is asked about members: add (`peerURLs`, `isLearner`), remove, update and promote (`ID`)."""

    ID: Int64 = 0
    peerURLs: list[str] = []
    isLearner: bool = False


class HashJson(msgspec.Struct, forbid_unknown_fields=True):
    revision: Int64 = 0


class AlarmJson(msgspec.Struct, forbid_unknown_fields=True):
    action: Enum = 0
    memberID: Int64 = 0
    alarm: Enum = 0


@cache
def _decoder(wanted: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(wanted, strict=False)


def decode(raw: bytes | bytearray, wanted: type[T]) -> T:
    """Read a request.

    Raises:
        Refused: it is not JSON, or not of this shape.
    """
    try:
        decoder: msgspec.json.Decoder[T] = _decoder(wanted)
        return decoder.decode(raw or b"{}")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        try:
            return convert(msgspec.json.decode(raw), wanted)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Refused(INVALID_ARGUMENT, f"request does not parse: {error}") from error


def convert(message: Any, wanted: type[T]) -> T:
    """Make a request of a message that is decoded already.

    Raises:
        msgspec.ValidationError: it is not of this shape.
    """
    return msgspec.convert(_fit(message, wanted), wanted, strict=False)


def _fit(value: Any, wanted: type[msgspec.Struct] | None) -> Any:
    """Leave of a message what its type has, by the names that the type has."""
    if isinstance(value, list):
        return [_fit(item, wanted) for item in value]
    if not isinstance(value, dict) or wanted is None:
        return value
    known = _fields(wanted)
    return {
        known[key][0]: _fit(item, known[key][1]) for key, item in value.items() if key in known and item is not None
    }


@cache
def _fields(wanted: type[msgspec.Struct]) -> dict[str, tuple[str, type[msgspec.Struct] | None]]:
    """Return each name that a field goes by: as which, and the type of message inside it, if it is one."""
    found: dict[str, tuple[str, type[msgspec.Struct] | None]] = {}
    for field in msgspec.structs.fields(wanted):
        inner = next((part for part in (field.type, *get_args(field.type)) if _is_message(part)), None)
        first, *others = field.name.split("_")
        found[field.name] = found[first + "".join(word.capitalize() for word in others)] = (field.name, inner)
    return found


def _is_message(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, msgspec.Struct)


def _name(value: Enum, names: tuple[str, ...], field: str) -> Any:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if value in names:
        return value
    raise Refused(INVALID_ARGUMENT, f"{field}: {value!r} is none of {', '.join(names)}")


def kv(record: Record) -> Json:
    """Write a key as etcd does."""
    shown: Json = {"key": record.key}
    for name, number in (
        ("create_revision", record.create_revision),
        ("mod_revision", record.mod_revision),
        ("version", record.version),
    ):
        if number:
            shown[name] = str(number)
    if record.value:
        shown["value"] = record.value
    if record.lease:
        shown["lease"] = str(record.lease)
    return shown


def event(change: Event, *, has_previous: bool) -> Json:
    """Write a change as etcd does; a put is the default type and so goes unnamed."""
    shown: Json = {} if change.record.version else {"type": "DELETE"}
    shown["kv"] = kv(change.record)
    if has_previous and change.previous is not None:
        shown["prev_kv"] = kv(change.previous)
    return shown


def range_answer(result: RangeResult) -> Json:
    """Write what a range held."""
    shown: Json = {}
    if result.records:
        shown["kvs"] = [kv(record) for record in result.records]
    if result.more:
        shown["more"] = True
    if result.count:
        shown["count"] = str(result.count)
    return shown


def outcome(done: Outcome) -> Json:
    """Write the answer to a command that changed or read keys."""
    assert isinstance(done.result, (RangeResult, PutResult, DeleteResult, TxnResult))
    if isinstance(done.result, TxnResult):
        return _Transaction(done).shown(done.result)
    return _named(done.result)[1]


def _named(result: RangeResult | PutResult | DeleteResult) -> tuple[str, Json]:
    """Write the answer to one operation, and the name that it has inside a transaction's."""
    match result:
        case RangeResult():
            return "response_range", range_answer(result)
        case PutResult():
            return "response_put", {} if result.previous is None else {"prev_kv": kv(result.previous)}
        case DeleteResult():
            shown: Json = {"deleted": str(len(result.deleted))} if result.deleted else {}
            if result.has_previous and result.deleted:
                shown["prev_kvs"] = [kv(record) for record in result.deleted]
            return "response_delete_range", shown


class _Transaction:
    """Writes the answers of a transaction; each says the revision of its moment: the new one after a change."""

    def __init__(self, done: Outcome) -> None:
        self._after = done.revision
        self._now = done.revision - 1 if done.events else done.revision

    def shown(self, result: TxnResult) -> Json:
        shown: Json = {"succeeded": True} if result.succeeded else {}
        if result.answers:
            shown["responses"] = [self._response(one) for one in result.answers]
        return shown

    def _response(self, one: RangeResult | PutResult | DeleteResult | TxnResult) -> Json:
        if isinstance(one, TxnResult):
            return {"response_txn": {"header": {}} | self.shown(one)}
        if isinstance(one, PutResult) or (isinstance(one, DeleteResult) and one.deleted):
            self._now = self._after
        name, body = _named(one)
        return {name: {"header": {"revision": str(self._now)}} | body}
