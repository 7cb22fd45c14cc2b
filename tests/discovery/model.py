"""The store as one would write it without any thought of speed: a copy of everything for every revision.

What `discovery.state` must be equal to. Nothing is shared with it but the shapes of requests and records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from discovery.operations import (
    Body,
    Compact,
    CompareClause,
    DeleteRequest,
    DeleteResult,
    LeaseGrant,
    LeaseResult,
    LeaseRevoke,
    PutRequest,
    PutResult,
    RangeRequest,
    RangeResult,
    Record,
    Result,
    TxnRequest,
    TxnResult,
)

Changes = list[tuple[Record, Record | None]]


class No(Exception):
    """The request is refused."""


Keys = dict[bytes, Record]


def is_in(key: bytes, start: bytes, end: bytes) -> bool:
    return key == start if not end else start <= key and (end == b"\0" or key < end)


@dataclass
class Model:
    revision: int = 1
    compacted: int = 0
    keys: Keys = field(default_factory=dict)
    before: dict[int, Keys] = field(default_factory=lambda: {1: {}})
    leases: dict[int, int] = field(default_factory=dict)
    events: Changes = field(default_factory=list)

    def apply(self, body: Body) -> Result:
        """Carry out a command on a copy, and make it the present if it was not refused."""
        keys, leases, events = dict(self.keys), dict(self.leases), list(self.events)
        result: Result
        match body:
            case PutRequest() | DeleteRequest() | TxnRequest():
                if isinstance(body, TxnRequest):
                    check_shape(body)
                result = self._step(body, keys, events)
            case LeaseGrant(id=id, ttl_s=ttl_s):
                if id == 0 or ttl_s <= 0 or ttl_s > 9_000_000_000 or id in leases:
                    raise No
                leases[id] = ttl_s
                result = LeaseResult(id, ttl_s)
            case LeaseRevoke(id=id):
                if leases.pop(id, None) is None:
                    raise No
                for key in sorted(key for key in keys if keys[key].lease == id):
                    self._remove(key, keys, events)
                result = None
            case Compact(revision=revision):
                if not self.compacted < revision <= self.revision:
                    raise No
                self.compacted = revision
                self.before = {at: past for at, past in self.before.items() if at >= revision}
                events = [event for event in events if event[0].mod_revision >= revision]
                result = None
        if len(events) > len(self.events):
            self.revision += 1
            self.before[self.revision] = keys
        self.keys, self.leases, self.events = keys, leases, events
        return result

    def read(self, request: RangeRequest, keys: Keys | None = None) -> RangeResult:
        if request.revision > self.revision or 0 < request.revision < self.compacted:
            raise No
        present = self.keys if keys is None else keys
        source = self.before[request.revision] if request.revision else present
        found = [source[key] for key in sorted(source) if is_in(key, request.key, request.range_end)]
        if request.count_only:
            return RangeResult([], len(found))
        shown = [record for record in found if within(record, request)]
        order = {
            "KEY": lambda record: record.key,
            "VERSION": lambda record: record.version,
            "CREATE": lambda record: record.create_revision,
            "MOD": lambda record: record.mod_revision,
            "VALUE": lambda record: record.value,
        }[request.sort_target]
        shown = sorted(shown, key=order)
        if request.sort_order == "DESCEND":
            shown = shown[::-1]
        limited = shown[: request.limit] if request.limit > 0 else shown
        return RangeResult([bare(record, request) for record in limited], len(found), len(limited) < len(shown))

    def _step(
        self,
        step: PutRequest | DeleteRequest | RangeRequest | TxnRequest,
        keys: Keys,
        events: list[tuple[Record, Record | None]],
    ) -> RangeResult | PutResult | DeleteResult | TxnResult:
        match step:
            case PutRequest():
                return self._put(step, keys, events)
            case DeleteRequest():
                if not step.key:
                    raise No
                gone = sorted(key for key in keys if is_in(key, step.key, step.range_end))
                return DeleteResult([self._remove(key, keys, events) for key in gone], step.prev_kv)
            case RangeRequest():
                return self.read(step, keys)
            case TxnRequest():
                succeeded = all(self._holds(clause) for clause in step.compare)
                branch = step.success if succeeded else step.failure
                return TxnResult(succeeded, [self._step(one, keys, events) for one in branch])

    def _put(self, put: PutRequest, keys: Keys, events: Changes) -> PutResult:
        previous = keys.get(put.key)
        if not put.key or (put.ignore_value and put.value) or (put.ignore_lease and put.lease):
            raise No
        if put.lease and put.lease not in self.leases:
            raise No
        if (put.ignore_value or put.ignore_lease) and previous is None:
            raise No
        record = Record(
            put.key,
            previous.value if put.ignore_value and previous else put.value,
            previous.create_revision if previous else self.revision + 1,
            self.revision + 1,
            previous.version + 1 if previous else 1,
            previous.lease if put.ignore_lease and previous else put.lease,
        )
        keys[put.key] = record
        events.append((record, previous))
        return PutResult(previous if put.prev_kv else None)

    def _remove(self, key: bytes, keys: Keys, events: Changes) -> Record:
        previous = keys.pop(key)
        events.append((Record(key, b"", 0, self.revision + 1, 0), previous))
        return previous

    def _holds(self, clause: CompareClause) -> bool:
        """Compare with what was before the transaction, also in a nested one."""
        found = [record for key, record in self.keys.items() if is_in(key, clause.key, clause.range_end)]
        if not found:
            return clause.target != "VALUE" and compares(Record(clause.key, b"", 0, 0, 0), clause)
        return all(compares(record, clause) for record in found)


def within(record: Record, request: RangeRequest) -> bool:
    bounds = (
        (record.mod_revision, request.min_mod_revision, request.max_mod_revision),
        (record.create_revision, request.min_create_revision, request.max_create_revision),
    )
    return all(value >= low and (high == 0 or value <= high) for value, low, high in bounds)


def bare(record: Record, request: RangeRequest) -> Record:
    if not request.keys_only:
        return record
    return Record(record.key, b"", record.create_revision, record.mod_revision, record.version, record.lease)


def compares(record: Record, clause: CompareClause) -> bool:
    seen: object = {
        "VERSION": record.version,
        "CREATE": record.create_revision,
        "MOD": record.mod_revision,
        "LEASE": record.lease,
        "VALUE": record.value,
    }[clause.target]
    return {
        "EQUAL": seen == clause.value,
        "NOT_EQUAL": seen != clause.value,
        "GREATER": seen > clause.value,  # type: ignore[operator]
        "LESS": seen < clause.value,  # type: ignore[operator]
    }[clause.result]


def check_shape(txn: TxnRequest) -> None:
    """Refuse what no branch may be: a key written twice, or written and deleted, and empty keys."""
    if any(not clause.key for clause in txn.compare):
        raise No
    for steps in (txn.success, txn.failure):
        written = [key for step in steps for key in puts(step)]
        deleted = [gone for step in steps for gone in deletes(step)]
        if len(set(written)) < len(written):
            raise No
        if any(is_in(key, gone.key, gone.range_end) for key in written for gone in deleted):
            raise No
        for step in steps:
            if isinstance(step, TxnRequest):
                check_shape(step)
            elif not step.key:
                raise No


def puts(step: object) -> Iterable[bytes]:
    if isinstance(step, PutRequest):
        return {step.key}
    if isinstance(step, TxnRequest):
        return {key for inner in (*step.success, *step.failure) for key in puts(inner)}
    return ()


def deletes(step: object) -> Iterator[DeleteRequest]:
    if isinstance(step, DeleteRequest):
        yield step
    elif isinstance(step, TxnRequest):
        for inner in (*step.success, *step.failure):
            yield from deletes(inner)
