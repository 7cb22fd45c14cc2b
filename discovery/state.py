"""The store's state machine: command in, answer and events out; multi-version, with leases and transactions.

Pure in the sense that counts for replication: no clock, no dice, no I/O, and the same commands make
the same state on every member. A command is checked as a whole before the first change, so a
`Refused` one (and even one that trips over a bug in the checking) leaves no trace. Semantics are
etcd v3's: the revision starts at 1 and grows by one for each command that changes a key; all
changes of a transaction share it. Only `raft` applies commands; `api`, `services` and `dns` read.

Invariant: `_versions[key]` is at most one version from before `compacted`, then every later one,
and `_events` is the same later versions of all keys in the order in which they happened.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from discovery.operations import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OUT_OF_RANGE,
    Body,
    Compact,
    CompareClause,
    DeleteRequest,
    DeleteResult,
    Event,
    Image,
    Lease,
    LeaseGrant,
    LeaseResult,
    LeaseRevoke,
    Outcome,
    PutRequest,
    PutResult,
    RangeRequest,
    RangeResult,
    Record,
    Refused,
    Result,
    Step,
    TxnRequest,
    TxnResult,
    is_inside,
)

VALUE_BYTES_MAX = 1024 * 1024
KEY_BYTES_MAX = 64 * 1024
TXN_STEPS_MAX = 128
TXN_DEPTH_MAX = 8
LEASE_TTL_S_MAX = 9_000_000_000


@dataclass(frozen=True)
class _Branch:
    """A transaction after its compares: which way it goes, nested ones decided as well."""

    succeeded: bool
    steps: list[RangeRequest | PutRequest | DeleteRequest | _Branch]


class State:
    """Keys with their retained versions, leases, and the changes since the last compaction."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.history_bytes = 0
        self._versions: dict[bytes, list[Record]] = {}
        self._live: list[bytes] = []
        self._known: list[bytes] = []
        self._events: list[Event] = []
        self._leases: dict[int, Lease] = {}
        self._lease_keys: dict[int, set[bytes]] = {}

    # What it answers

    def read(self, request: RangeRequest) -> RangeResult:
        """Read one key or a range, now or at a retained revision.

        Raises:
            Refused: the revision is compacted, or still to come.
        """
        return self._read(request, has_changed=False)

    def value(self, key: bytes) -> bytes | None:
        """Return what a key holds now, if it is there."""
        record = self._current(key)
        return None if record is None else record.value

    def leases(self) -> list[Lease]:
        """Return all leases, by id."""
        return [self._leases[id] for id in sorted(self._leases)]

    def lease(self, id: int) -> Lease | None:
        """Return a lease, if there is one of this id."""
        return self._leases.get(id)

    def lease_keys(self, id: int) -> list[bytes]:
        """Return the keys that end with a lease, sorted."""
        return sorted(self._lease_keys.get(id, ()))

    def events_from(self, revision: int) -> list[Event]:
        """Return every change at or after a revision, in order.

        Raises:
            Refused: the revision is compacted.
        """
        if revision < self.compacted:
            raise Refused(OUT_OF_RANGE, "mvcc: required revision has been compacted")
        start = bisect_left(self._events, revision, key=lambda event: event.record.mod_revision)
        return self._events[start:]

    @property
    def key_count(self) -> int:
        """Return how many keys there are."""
        return len(self._live)

    @property
    def lease_count(self) -> int:
        """Return how many leases there are."""
        return len(self._leases)

    @property
    def history_events(self) -> int:
        """Return how many changes are retained."""
        return len(self._events)

    def revision_keeping(self, events_max: int, bytes_max: int) -> int:
        """Return the oldest revision worth keeping, if so many changes of so many bytes are (0: all are)."""
        kept_bytes = 0
        for count, event in enumerate(reversed(self._events)):
            kept_bytes += _size(event.record)
            if count >= events_max or kept_bytes > bytes_max:
                return event.record.mod_revision
        return 0

    # What changes it

    def apply(self, body: Body) -> Outcome:
        """Carry out one command.

        Raises:
            Refused: it cannot be done; nothing was changed.
        """
        events: list[Event] = []
        result: Result
        match body:
            case PutRequest():
                self._check_put(body)
                result = self._put(body, events)
            case DeleteRequest():
                _check_key(body.key)
                result = self._delete(body, events)
            case TxnRequest():
                _check_transaction(body)
                branch = self._choose(body)
                self._check_branch(branch)
                result = self._run(branch, events)
            case LeaseGrant():
                result = self._grant(body)
            case LeaseRevoke():
                self._revoke(body, events)
                result = None
            case Compact():
                self._compact(body.revision)
                result = None
        if events:
            self.revision += 1
            self._note(events)
        return Outcome(result, self.revision, events)

    # The whole, as data

    def image(self) -> Image:
        """Return the whole state as data that later changes do not touch."""
        base = [versions[0] for versions in self._versions.values() if versions[0].mod_revision < self.compacted]
        return Image(self.revision, self.compacted, self.leases(), base, [event.record for event in self._events])

    @classmethod
    def from_image(cls, image: Image) -> State:
        """Make the state that an image was taken of."""
        state = cls()
        state.revision, state.compacted = image.revision, image.compacted
        for lease in image.leases:
            state._leases[lease.id], state._lease_keys[lease.id] = lease, set()
        for record in image.base:
            state._versions[record.key] = [record]
        for record in image.events:
            versions = state._versions.setdefault(record.key, [])
            previous = versions[-1] if versions and versions[-1].version else None
            versions.append(record)
            state._events.append(Event(record, previous))
            state.history_bytes += _size(record)
        state._known = sorted(state._versions)
        state._live = [key for key in state._known if state._versions[key][-1].version]
        for key in state._live:
            if lease_id := state._versions[key][-1].lease:
                state._lease_keys.setdefault(lease_id, set()).add(key)
        return state

    def become(self, other: State) -> None:
        """Take the place of what this was, for everybody who holds it; `other` must not be used any more."""
        self.__dict__.update(other.__dict__)

    # As a copy of another

    def follow(self, records: Sequence[Record]) -> list[Event]:
        """Take over what another copy of the store changed at one later revision; return the changes.

        Raises:
            ValueError: a key is removed that is not there: this is no copy of that store.
        """
        events: list[Event] = []
        for record in records:
            previous = self._current(record.key)
            if record.version == 0:
                if previous is None:
                    raise ValueError(f"key {record.key[:80]!r} is removed and was not there")
                del self._live[bisect_left(self._live, record.key)]
            elif previous is None:
                insort(self._live, record.key)
            self._append(previous, record)
            events.append(Event(record, previous))
        self.revision = records[-1].mod_revision
        self._note(events)
        return events

    # Reading

    def _read(self, request: RangeRequest, *, has_changed: bool) -> RangeResult:
        """Read; inside a transaction that has changed something the present revision is already the past."""
        self._check_revision(request.revision)
        is_now = request.revision == 0 or (request.revision == self.revision and not has_changed)
        if is_now and request.sort_order == "NONE" and request.sort_target == "KEY" and not _has_bounds(request):
            return self._read_now(request)
        records = list(self._records_at(request, 0 if is_now else request.revision))
        return _select(records, request)

    def _current(self, key: bytes) -> Record | None:
        versions = self._versions.get(key)
        return versions[-1] if versions and versions[-1].version else None

    def _live_span(self, start: bytes, end: bytes) -> tuple[int, int]:
        return _span(self._live, start, end)

    def _read_now(self, request: RangeRequest) -> RangeResult:
        if not request.range_end:
            found = self._current(request.key)
            records = [] if found is None or request.count_only else [_shown(found, request)]
            return RangeResult(records, int(found is not None))
        low, high = self._live_span(request.key, request.range_end)
        if request.count_only:
            return RangeResult([], high - low)
        stop = min(high, low + request.limit) if request.limit > 0 else high
        records = [_shown(self._versions[key][-1], request) for key in self._live[low:stop]]
        return RangeResult(records, high - low, stop < high)

    def _records_at(self, request: RangeRequest, revision: int) -> Iterator[Record]:
        """Yield the records of a range as they were at a revision (0: now), in key order."""
        low, high = _span(self._known, request.key, request.range_end)
        for key in self._known[low:high]:
            versions = self._versions[key]
            at = len(versions)
            if revision:
                at = bisect_right(versions, revision, key=lambda record: record.mod_revision)
            if at and versions[at - 1].version:
                yield versions[at - 1]

    def _check_revision(self, revision: int) -> None:
        if revision > self.revision:
            raise Refused(OUT_OF_RANGE, "mvcc: required revision is a future revision")
        if 0 < revision < self.compacted:
            raise Refused(OUT_OF_RANGE, "mvcc: required revision has been compacted")

    # Transactions: decide, check, run

    def _choose(self, txn: TxnRequest) -> _Branch:
        succeeded = all(self._holds(clause) for clause in txn.compare)
        steps = txn.success if succeeded else txn.failure
        return _Branch(succeeded, [self._choose(step) if isinstance(step, TxnRequest) else step for step in steps])

    def _holds(self, clause: CompareClause) -> bool:
        low, high = self._live_span(clause.key, clause.range_end)
        records = [self._versions[key][-1] for key in self._live[low:high]]
        if not records:
            # A key that is not there compares as all zeros, but has no value at all.
            return clause.target != "VALUE" and _compares(Record(clause.key, b"", 0, 0, 0), clause)
        return all(_compares(record, clause) for record in records)

    def _check_branch(self, branch: _Branch) -> None:
        for step in branch.steps:
            match step:
                case PutRequest():
                    self._check_put(step)
                case RangeRequest():
                    self._check_revision(step.revision)
                case _Branch():
                    self._check_branch(step)
                case DeleteRequest():
                    pass

    def _check_put(self, put: PutRequest) -> None:
        _check_key(put.key)
        if len(put.value) > VALUE_BYTES_MAX or len(put.key) > KEY_BYTES_MAX:
            raise Refused(INVALID_ARGUMENT, "request is too large")
        if put.lease and not put.ignore_lease and put.lease not in self._leases:
            raise Refused(NOT_FOUND, "requested lease not found")
        if put.ignore_value and put.value:
            raise Refused(INVALID_ARGUMENT, "value is provided")
        if put.ignore_lease and put.lease:
            raise Refused(INVALID_ARGUMENT, "lease is provided")
        if (put.ignore_value or put.ignore_lease) and self._current(put.key) is None:
            raise Refused(INVALID_ARGUMENT, "key not found")

    def _run(self, branch: _Branch, events: list[Event]) -> TxnResult:
        answers: list[RangeResult | PutResult | DeleteResult | TxnResult] = []
        for step in branch.steps:
            match step:
                case PutRequest():
                    answers.append(self._put(step, events))
                case DeleteRequest():
                    answers.append(self._delete(step, events))
                case RangeRequest():
                    answers.append(self._read(step, has_changed=bool(events)))
                case _Branch():
                    answers.append(self._run(step, events))
        return TxnResult(branch.succeeded, answers)

    # The changes themselves: all checked before, none can fail

    def _put(self, put: PutRequest, events: list[Event]) -> PutResult:
        previous = self._current(put.key)
        revision = self.revision + 1
        record = Record(
            put.key,
            previous.value if put.ignore_value and previous else put.value,
            previous.create_revision if previous else revision,
            revision,
            previous.version + 1 if previous else 1,
            previous.lease if put.ignore_lease and previous else put.lease,
        )
        if previous is None:
            insort(self._live, put.key)
        self._append(previous, record)
        events.append(Event(record, previous))
        return PutResult(previous if put.prev_kv else None)

    def _delete(self, request: DeleteRequest, events: list[Event]) -> DeleteResult:
        low, high = self._live_span(request.key, request.range_end)
        keys = self._live[low:high]
        del self._live[low:high]
        return DeleteResult([self._bury(key, events) for key in keys], request.prev_kv)

    def _bury(self, key: bytes, events: list[Event]) -> Record:
        previous = self._versions[key][-1]
        tombstone = Record(key, b"", 0, self.revision + 1, 0)
        self._append(previous, tombstone)
        events.append(Event(tombstone, previous))
        return previous

    def _append(self, previous: Record | None, record: Record) -> None:
        """Add a version of a key; a copy may not know of the lease."""
        if previous is not None and previous.lease:
            self._lease_keys[previous.lease].discard(record.key)
        if record.lease:
            self._lease_keys.setdefault(record.lease, set()).add(record.key)
        if record.key not in self._versions:
            insort(self._known, record.key)
        self._versions.setdefault(record.key, []).append(record)

    def _note(self, events: list[Event]) -> None:
        self._events.extend(events)
        self.history_bytes += sum(_size(event.record) for event in events)

    def _grant(self, grant: LeaseGrant) -> LeaseResult:
        if grant.id in self._leases:
            raise Refused(FAILED_PRECONDITION, "lease already exists")
        if grant.ttl_s > LEASE_TTL_S_MAX:
            raise Refused(OUT_OF_RANGE, "too large lease TTL")
        if grant.id == 0 or grant.ttl_s <= 0:
            raise Refused(INVALID_ARGUMENT, "a lease needs an id that is not 0, and a positive TTL")
        self._leases[grant.id] = Lease(grant.id, grant.ttl_s)
        self._lease_keys[grant.id] = set()
        return LeaseResult(grant.id, grant.ttl_s)

    def _revoke(self, revoke: LeaseRevoke, events: list[Event]) -> None:
        if revoke.id not in self._leases:
            raise Refused(NOT_FOUND, "requested lease not found")
        for key in sorted(self._lease_keys[revoke.id]):
            del self._live[bisect_left(self._live, key)]
            self._bury(key, events)
        del self._leases[revoke.id], self._lease_keys[revoke.id]

    def _compact(self, revision: int) -> None:
        if revision <= self.compacted:
            raise Refused(OUT_OF_RANGE, "mvcc: required revision has been compacted")
        if revision > self.revision:
            raise Refused(OUT_OF_RANGE, "mvcc: required revision is a future revision")
        first = bisect_left(self._events, revision, key=lambda event: event.record.mod_revision)
        forgotten, self._events = self._events[:first], self._events[first:]
        self.history_bytes -= sum(_size(event.record) for event in forgotten)
        self.compacted = revision
        has_gone = False
        for key in {event.record.key for event in forgotten}:
            versions = self._versions[key]
            at = bisect_left(versions, revision, key=lambda record: record.mod_revision)
            kept = versions[max(at - 1, 0) :]
            if at and not kept[0].version:
                del kept[0]
            if kept:
                self._versions[key] = kept
            else:
                del self._versions[key]
                has_gone = True
        if has_gone:
            self._known = [key for key in self._known if key in self._versions]


def _span(keys: list[bytes], start: bytes, end: bytes) -> tuple[int, int]:
    low = bisect_left(keys, start)
    if not end:
        return low, low + (low < len(keys) and keys[low] == start)
    high = len(keys) if end == b"\x00" else bisect_left(keys, end)
    return low, max(low, high)


def _size(record: Record) -> int:
    return len(record.key) + len(record.value) + 100


def _shown(record: Record, request: RangeRequest) -> Record:
    if not request.keys_only:
        return record
    return Record(record.key, b"", record.create_revision, record.mod_revision, record.version, record.lease)


def _has_bounds(request: RangeRequest) -> bool:
    return bool(
        request.min_mod_revision
        or request.max_mod_revision
        or request.min_create_revision
        or request.max_create_revision
    )


def _is_within(record: Record, request: RangeRequest) -> bool:
    return (
        record.mod_revision >= request.min_mod_revision
        and record.create_revision >= request.min_create_revision
        and (not request.max_mod_revision or record.mod_revision <= request.max_mod_revision)
        and (not request.max_create_revision or record.create_revision <= request.max_create_revision)
    )


def _select(records: list[Record], request: RangeRequest) -> RangeResult:
    """Filter, sort and limit, in etcd's order; the count is that before the filter, as etcd's is."""
    count = len(records)
    if request.count_only:
        return RangeResult([], count)
    if _has_bounds(request):
        records = [record for record in records if _is_within(record, request)]
    if request.sort_target != "KEY":
        records.sort(key=lambda record: _sort_key(record, request))
    if request.sort_order == "DESCEND":
        records.reverse()
    shown = records[: request.limit] if request.limit > 0 else records
    return RangeResult([_shown(record, request) for record in shown], count, len(shown) < len(records))


def _sort_key(record: Record, request: RangeRequest) -> tuple[int, bytes]:
    match request.sort_target:
        case "VERSION":
            return record.version, b""
        case "CREATE":
            return record.create_revision, b""
        case "MOD":
            return record.mod_revision, b""
        case _:
            return 0, record.value


def _compares(record: Record, clause: CompareClause) -> bool:
    if clause.target == "VALUE":
        wanted = clause.value if isinstance(clause.value, bytes) else b""
        order = (record.value > wanted) - (record.value < wanted)
    else:
        number = clause.value if isinstance(clause.value, int) else 0
        seen = {
            "VERSION": record.version,
            "CREATE": record.create_revision,
            "MOD": record.mod_revision,
            "LEASE": record.lease,
        }[clause.target]
        order = (seen > number) - (seen < number)
    return {"EQUAL": order == 0, "NOT_EQUAL": order != 0, "GREATER": order > 0, "LESS": order < 0}[clause.result]


def _check_key(key: bytes) -> None:
    if not key:
        raise Refused(INVALID_ARGUMENT, "key is not provided")


def _check_transaction(txn: TxnRequest, depth: int = 1) -> None:
    """Refuse a transaction whose shape is wrong, whichever way it would go.

    Raises:
        Refused: too many or too deep steps, empty keys, or one key written twice in a branch.
    """
    if max(len(txn.compare), len(txn.success), len(txn.failure)) > TXN_STEPS_MAX or depth > TXN_DEPTH_MAX:
        raise Refused(INVALID_ARGUMENT, "too many operations in txn request")
    for clause in txn.compare:
        _check_key(clause.key)
    for steps in (txn.success, txn.failure):
        _check_no_overlap(steps)
        for step in steps:
            if isinstance(step, TxnRequest):
                _check_transaction(step, depth + 1)
            else:
                _check_key(step.key)


def _check_no_overlap(steps: Iterable[Step]) -> None:
    puts, deletes = list(_puts(steps)), list(_deletes(steps))
    is_twice = len(set(puts)) < len(puts)
    if is_twice or any(is_inside(key, gone.key, gone.range_end) for key in puts for gone in deletes):
        raise Refused(INVALID_ARGUMENT, "duplicate key given in txn request")


def _puts(steps: Iterable[Step]) -> Iterator[bytes]:
    """Yield the keys that a branch writes; of nested branches, which exclude each other, each key once."""
    for step in steps:
        if isinstance(step, PutRequest):
            yield step.key
        elif isinstance(step, TxnRequest):
            yield from {*_puts(step.success), *_puts(step.failure)}


def _deletes(steps: Iterable[Step]) -> Iterator[DeleteRequest]:
    for step in steps:
        if isinstance(step, DeleteRequest):
            yield step
        elif isinstance(step, TxnRequest):
            yield from (*_deletes(step.success), *_deletes(step.failure))
