from __future__ import annotations

import pytest

from discovery.operations import Compact, PutRequest, Refused, TxnRequest
from discovery.state import State
from discovery.watches import Watches


def apply(state: State, watches: Watches, *keys: bytes, size: int = 1) -> None:
    steps = tuple(PutRequest(key=key, value=bytes(size)) for key in keys)
    watches.on_applied(state.apply(TxnRequest(success=steps)).events)


def test_a_watch_sees_its_keys_only_and_each_change_once() -> None:
    state = State()
    watches = Watches(state)
    with watches.open(b"a", b"", 2) as one, watches.open(b"a", b"b", 2) as many:
        apply(state, watches, b"a")
        apply(state, watches, b"a/1", b"z")
        assert [event.record.key for event in one.take()] == [b"a"]
        assert [event.record.key for event in many.take()] == [b"a", b"a/1"]
        assert one.take() == many.take() == []
    assert not watches._by_key
    assert not watches._ranges


def test_much_is_handed_out_in_groups_that_split_no_revision() -> None:
    state = State()
    watches = Watches(state)
    with watches.open(b"a", b"b", 2) as watch:
        for _ in range(6):
            apply(state, watches, b"a1", b"a2", size=400_000)
        groups = []
        while group := watch.take():
            groups.append([event.record.mod_revision for event in group])
    assert len(groups) > 1
    assert [revision for group in groups for revision in group] == sorted([2, 3, 4, 5, 6, 7] * 2)
    assert not set(groups[0]) & set(groups[1])


def test_an_idle_watch_is_not_harmed_by_compaction_but_a_lagging_one_is() -> None:
    state = State()
    watches = Watches(state)
    with watches.open(b"idle", b"", 2) as idle, watches.open(b"a", b"", 2) as lagging:
        for _ in range(5):
            apply(state, watches, b"a")
        state.apply(Compact(revision=5))
        apply(state, watches, b"idle")
        assert len(idle.take()) == 1
        with pytest.raises(Refused, match="compacted"):
            lagging.take()
