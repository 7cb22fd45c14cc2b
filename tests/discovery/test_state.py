"""The state machine against a plain model, and the corners of etcd's semantics."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from discovery import codec
from discovery.operations import (
    Body,
    Command,
    Compact,
    CompareClause,
    DeleteRequest,
    DeleteResult,
    LeaseGrant,
    LeaseRevoke,
    PutRequest,
    PutResult,
    RangeRequest,
    RangeResult,
    Refused,
    TxnRequest,
    TxnResult,
    prefix_end,
)
from discovery.state import State


def put(key: bytes, value: bytes = b"v", lease: int = 0) -> PutRequest:
    return PutRequest(key=key, value=value, lease=lease)


def keys_of(result: RangeResult) -> list[bytes]:
    return [record.key for record in result.records]


@dataclass
class Model:
    """The store as a list of whole pictures, one per revision: slow, and plain to see."""

    pictures: dict[int, dict[bytes, bytes]] = field(default_factory=lambda: {1: {}})
    revision: int = 1
    compacted: int = 0
    leases: dict[int, set[bytes]] = field(default_factory=dict)

    def change(self, picture: dict[bytes, bytes], is_changed: bool) -> None:
        if is_changed:
            self.revision += 1
            self.pictures[self.revision] = picture

    @property
    def now(self) -> dict[bytes, bytes]:
        return dict(self.pictures[self.revision])


KEYS = st.sampled_from([b"a", b"a/1", b"a/2", b"b", b"b/x", b"c"])
ACTIONS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.binary(max_size=3), st.integers(0, 2)),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("delete_prefix"), st.sampled_from([b"a", b"b/", b"c"])),
    st.tuples(st.just("swap"), KEYS, st.binary(max_size=2), st.binary(max_size=2)),
    st.tuples(st.just("grant"), st.integers(1, 2)),
    st.tuples(st.just("revoke"), st.integers(1, 2)),
    st.tuples(st.just("compact"), st.integers(0, 30)),
    st.tuples(st.just("reload")),
)


def to_body(action: tuple[object, ...]) -> Body:
    match action:
        case ("put", bytes(key), bytes(value), int(lease)):
            return put(key, value, lease)
        case ("delete", bytes(key)):
            return DeleteRequest(key=key)
        case ("delete_prefix", bytes(key)):
            return DeleteRequest(key=key, range_end=prefix_end(key))
        case ("swap", bytes(key), bytes(old), bytes(new)):
            compare = CompareClause(key=key, target="VALUE", result="EQUAL", value=old)
            return TxnRequest(compare=(compare,), success=(put(key, new),), failure=(RangeRequest(key=key),))
        case ("grant", int(id)):
            return LeaseGrant(id=id, ttl_s=5)
        case ("revoke", int(id)):
            return LeaseRevoke(id=id)
        case ("compact", int(revision)):
            return Compact(revision=revision)
    raise AssertionError(action)


def model_apply(model: Model, action: tuple[object, ...]) -> bool:
    """Do to the model what the action says; tell whether it is allowed."""
    picture = model.now
    match action:
        case ("put", bytes(key), bytes(value), int(lease)):
            if lease and lease not in model.leases:
                return False
            picture[key] = value
            for bound in model.leases.values():
                bound.discard(key)
            if lease:
                model.leases[lease].add(key)
            model.change(picture, True)
        case ("delete" | "delete_prefix" as kind, bytes(key)):
            gone = {known for known in picture if known == key or (kind == "delete_prefix" and known.startswith(key))}
            drop(model, picture, gone)
        case ("swap", bytes(key), bytes(old), bytes(new)):
            if picture.get(key) == old:
                picture[key] = new
                for bound in model.leases.values():
                    bound.discard(key)
                model.change(picture, True)
        case ("grant", int(id)):
            if id in model.leases:
                return False
            model.leases[id] = set()
        case ("revoke", int(id)):
            if id not in model.leases:
                return False
            drop(model, picture, model.leases.pop(id))
        case ("compact", int(revision)):
            if not model.compacted < revision <= model.revision:
                return False
            model.compacted = revision
    return True


def drop(model: Model, picture: dict[bytes, bytes], gone: set[bytes]) -> None:
    for key in set(gone):
        picture.pop(key)
        for bound in model.leases.values():
            bound.discard(key)
    model.change(picture, bool(gone))


def check_same(state: State, model: Model) -> None:
    everything = RangeRequest(key=b"\x00", range_end=b"\x00")
    assert {r.key: r.value for r in state.read(everything).records} == model.now
    assert state.revision == model.revision
    for revision in range(max(model.compacted, 1), model.revision + 1):
        past = state.read(RangeRequest(key=b"\x00", range_end=b"\x00", revision=revision))
        assert {r.key: r.value for r in past.records} == model.pictures[revision], revision
    for id, bound in model.leases.items():
        assert set(state.lease_keys(id)) == bound


def check_events_tell_the_story(state: State, model: Model) -> None:
    """Replaying the retained changes over the picture before them gives every later picture."""
    first = max(model.compacted, 1)
    picture = dict(model.pictures[first])
    by_revision: dict[int, list[tuple[bytes, bytes | None]]] = {}
    for event in state.events_from(first + 1):
        record = event.record
        by_revision.setdefault(record.mod_revision, []).append((record.key, record.value if record.version else None))
    for revision in range(first + 1, model.revision + 1):
        for key, value in by_revision.get(revision, []):
            if value is None:
                del picture[key]
            else:
                picture[key] = value
        assert picture == model.pictures[revision]


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_behaves_like_a_list_of_pictures(actions: list[tuple[object, ...]]) -> None:
    state, model = State(), Model()
    for action in actions:
        if action[0] == "reload":
            state = State.from_image(codec.decode_image(codec.encode_image(state.image())))
        else:
            before = state.image()
            command = codec.decode_command(codec.encode_command(Command(id=1, time_ms=2, body=to_body(action))))
            try:
                state.apply(command.body)
                is_allowed = True
            except Refused:
                is_allowed = False
                assert state.image() == before, "a refused command changed something"
            assert is_allowed == model_apply(model, action), action
        check_same(state, model)
    check_events_tell_the_story(state, model)


def test_revision_starts_at_one_and_transactions_share_theirs() -> None:
    state = State()
    outcome = state.apply(TxnRequest(success=(put(b"a"), put(b"b"), DeleteRequest(key=b"nothing"))))
    assert outcome.revision == state.revision == 2
    assert [event.record.mod_revision for event in outcome.events] == [2, 2]
    assert state.apply(DeleteRequest(key=b"nothing")).revision == 2


def test_versions_restart_after_a_deletion() -> None:
    state = State()
    for body in (put(b"a"), put(b"a"), DeleteRequest(key=b"a"), put(b"a")):
        state.apply(body)
    (record,) = state.read(RangeRequest(key=b"a")).records
    assert (record.version, record.create_revision, record.mod_revision) == (1, 5, 5)


def test_reads_inside_a_transaction_see_its_earlier_writes() -> None:
    outcome = State().apply(TxnRequest(success=(put(b"a", b"1"), RangeRequest(key=b"a"))))
    assert isinstance(outcome.result, TxnResult)
    read = outcome.result.answers[1]
    assert isinstance(read, RangeResult)
    assert read.records[0].value == b"1"


def test_nested_transactions_choose_before_anything_is_written() -> None:
    is_missing = CompareClause(key=b"a", target="CREATE", result="EQUAL", value=0)
    nested = TxnRequest(compare=(is_missing,), success=(put(b"chosen"),))
    state = State()
    state.apply(TxnRequest(success=(put(b"a"), nested)))
    assert keys_of(state.read(RangeRequest(key=b"\x00", range_end=b"\x00"))) == [b"a", b"chosen"]


def test_one_key_is_not_written_twice_in_a_branch() -> None:
    state = State()
    for steps in ((put(b"a"), put(b"a")), (put(b"a/1"), DeleteRequest(key=b"a", range_end=b"b"))):
        with pytest.raises(Refused, match="duplicate key"):
            state.apply(TxnRequest(success=steps))
    assert state.revision == 1


def test_a_missing_key_compares_as_zero_but_has_no_value() -> None:
    state = State()
    for clause, holds in (
        (CompareClause(key=b"a", target="VERSION", result="EQUAL", value=0), True),
        (CompareClause(key=b"a", target="MOD", result="LESS", value=1), True),
        (CompareClause(key=b"a", target="VALUE", result="EQUAL", value=b""), False),
        (CompareClause(key=b"a", target="VALUE", result="NOT_EQUAL", value=b"x"), False),
    ):
        result = state.apply(TxnRequest(compare=(clause,))).result
        assert isinstance(result, TxnResult)
        assert result.succeeded is holds, clause


def test_compares_over_a_range_must_hold_for_every_key() -> None:
    state = State()
    state.apply(put(b"a/1", b"x"))
    state.apply(put(b"a/2", b"y"))
    clause = CompareClause(key=b"a/", range_end=b"a0", target="VALUE", result="EQUAL", value=b"x")
    result = state.apply(TxnRequest(compare=(clause,))).result
    assert isinstance(result, TxnResult)
    assert not result.succeeded


def test_limit_counts_sort_and_bounds() -> None:
    state = State()
    for key in (b"k3", b"k1", b"k2"):
        state.apply(put(key, key[::-1]))
    state.apply(put(b"k1", b"zz"))
    span = RangeRequest(key=b"k", range_end=b"l")
    limited = state.read(RangeRequest(key=b"k", range_end=b"l", limit=2))
    assert (keys_of(limited), limited.count, limited.more) == ([b"k1", b"k2"], 3, True)
    by_mod = replace(span, sort_target="MOD", sort_order="DESCEND", limit=1)
    assert keys_of(state.read(by_mod)) == [b"k1"]
    assert keys_of(state.read(replace(span, sort_target="VALUE"))) == [b"k2", b"k3", b"k1"]
    assert keys_of(state.read(replace(span, min_create_revision=3, max_mod_revision=4))) == [b"k2"]
    counted = state.read(replace(span, count_only=True))
    assert (counted.records, counted.count) == ([], 3)
    assert state.read(replace(span, keys_only=True)).records[0].value == b""


def test_the_whole_store_is_from_zero_byte_to_zero_byte() -> None:
    state = State()
    state.apply(put(b"\xff\xff"))
    state.apply(put(b"a"))
    assert keys_of(state.read(RangeRequest(key=b"\x00", range_end=b"\x00"))) == [b"a", b"\xff\xff"]
    assert keys_of(state.read(RangeRequest(key=b"b", range_end=b"\x00"))) == [b"\xff\xff"]
    assert prefix_end(b"a\xff") == b"b"
    assert prefix_end(b"\xff") == b"\x00"


def test_revisions_outside_the_retained_are_refused() -> None:
    state = State()
    for _ in range(4):
        state.apply(put(b"a"))
    state.apply(Compact(revision=4))
    with pytest.raises(Refused, match="compacted"):
        state.read(RangeRequest(key=b"a", revision=3))
    with pytest.raises(Refused, match="compacted"):
        state.events_from(3)
    with pytest.raises(Refused, match="future"):
        state.read(RangeRequest(key=b"a", revision=6))
    with pytest.raises(Refused, match="compacted"):
        state.apply(Compact(revision=4))
    assert len(state.events_from(4)) == 2


def test_compaction_forgets_deleted_keys_altogether() -> None:
    state = State()
    for number in range(100):
        state.apply(put(b"%d" % number))
        state.apply(DeleteRequest(key=b"%d" % number))
    state.apply(put(b"last"))
    state.apply(Compact(revision=state.revision))
    assert state.image().base == []
    assert len(state._versions) == len(state._known) == 1
    assert state.history_events == 1


def test_a_key_follows_its_newest_lease() -> None:
    state = State()
    for id in (1, 2):
        state.apply(LeaseGrant(id=id, ttl_s=5))
    state.apply(put(b"a", lease=1))
    state.apply(put(b"a", lease=2))
    assert state.apply(LeaseRevoke(id=1)).events == []
    assert [event.record.key for event in state.apply(LeaseRevoke(id=2)).events] == [b"a"]


def test_previous_values_and_ignored_ones() -> None:
    state = State()
    state.apply(LeaseGrant(id=1, ttl_s=5))
    state.apply(put(b"a", b"old", lease=1))
    result = state.apply(PutRequest(key=b"a", value=b"new", prev_kv=True, ignore_lease=True)).result
    assert isinstance(result, PutResult)
    assert result.previous is not None
    assert result.previous.value == b"old"
    state.apply(PutRequest(key=b"a", ignore_value=True))
    (record,) = state.read(RangeRequest(key=b"a")).records
    assert (record.value, record.lease) == (b"new", 0)
    assert state.lease_keys(1) == []
    deleted = state.apply(DeleteRequest(key=b"a", prev_kv=True)).result
    assert isinstance(deleted, DeleteResult)
    assert [record.value for record in deleted.deleted] == [b"new"]
    with pytest.raises(Refused, match="key not found"):
        state.apply(PutRequest(key=b"a", ignore_value=True))


def test_values_of_a_mebibyte_and_no_more() -> None:
    state = State()
    state.apply(put(b"a", bytes(1024 * 1024)))
    with pytest.raises(Refused, match="too large"):
        state.apply(put(b"a", bytes(1024 * 1024 + 1)))
    with pytest.raises(Refused, match="not provided"):
        state.apply(put(b""))


def test_a_read_at_the_present_revision_does_not_see_what_its_transaction_writes() -> None:
    """etcd's way: only a read without a revision sees the transaction's own writes. Found by `test_state_model`."""
    state = State()
    state.apply(put(b"a", b"old"))
    reads = (RangeRequest(key=b"a", revision=state.revision), RangeRequest(key=b"a"))
    outcome = state.apply(TxnRequest(success=(put(b"a", b"new"), *reads)))
    assert isinstance(outcome.result, TxnResult)
    then, now = outcome.result.answers[1:]
    assert isinstance(then, RangeResult)
    assert isinstance(now, RangeResult)
    assert [then.records[0].value, now.records[0].value] == [b"old", b"new"]
