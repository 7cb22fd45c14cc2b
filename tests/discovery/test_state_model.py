"""Any sequence of commands leaves the store and a plain model of it equal, in every answer and every change.

A few seconds here; `python -m tests.discovery.test_state_model --examples 5000 --seed 1` for as long as one likes.
"""

from __future__ import annotations

import argparse
import unittest
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from discovery import codec
from discovery.operations import (
    Body,
    Compact,
    CompareClause,
    DeleteRequest,
    Event,
    LeaseGrant,
    LeaseRevoke,
    PutRequest,
    RangeRequest,
    Refused,
    TxnRequest,
)
from discovery.state import State
from discovery.watches import Watch, Watches
from tests.discovery.model import Model, No, is_in

KEYS = st.sampled_from([b"a", b"a/1", b"a/2", b"a/3", b"b", b"b/1", b"c", b"\xff", b"\xff\xff"])
ENDS = st.sampled_from([b"", b"", b"\0", b"a0", b"a/3", b"b", b"c", b"\xff", b"\xff\xff\xff"])
VALUES = st.sampled_from([b"", b"1", b"2", b"v" * 100])
LEASES = st.sampled_from([0, 0, 0, 1, 2, 3])
SMALL = st.integers(0, 40)
FLAG = st.booleans()

PUTS = st.builds(
    PutRequest,
    key=KEYS,
    value=VALUES,
    lease=LEASES,
    prev_kv=FLAG,
    ignore_value=st.sampled_from([False] * 5 + [True]),
    ignore_lease=st.sampled_from([False] * 5 + [True]),
)
DELETES = st.builds(DeleteRequest, key=KEYS, range_end=ENDS, prev_kv=FLAG)
RANGES = st.builds(
    RangeRequest,
    key=KEYS,
    range_end=ENDS,
    limit=st.sampled_from([0, 0, 0, 1, 2]),
    revision=st.sampled_from([0, 0, 0, 1, 2, 2, 3, 6]),
    sort_order=st.sampled_from(["NONE", "ASCEND", "DESCEND"]),
    sort_target=st.sampled_from(["KEY", "VERSION", "CREATE", "MOD", "VALUE"]),
    keys_only=FLAG,
    count_only=st.sampled_from([False] * 4 + [True]),
    min_mod_revision=st.just(0) | SMALL,
    max_mod_revision=st.just(0) | SMALL,
    min_create_revision=st.just(0) | SMALL,
    max_create_revision=st.just(0) | SMALL,
)
RESULTS = st.sampled_from(["EQUAL", "NOT_EQUAL", "GREATER", "LESS"])
CLAUSES = st.builds(
    CompareClause,
    key=KEYS,
    target=st.sampled_from(["VERSION", "CREATE", "MOD", "LEASE"]),
    result=RESULTS,
    value=SMALL,
    range_end=ENDS,
) | st.builds(CompareClause, key=KEYS, target=st.just("VALUE"), result=RESULTS, value=VALUES, range_end=ENDS)


def transactions(steps: st.SearchStrategy[object]) -> st.SearchStrategy[TxnRequest]:
    branch = st.lists(steps, max_size=4).map(tuple)
    return st.builds(TxnRequest, compare=st.lists(CLAUSES, max_size=3).map(tuple), success=branch, failure=branch)


def near(step: Any, now: int) -> Any:
    """Read at revisions about the present: that 1 is the next one, 2 this one, and so on back."""
    if isinstance(step, RangeRequest) and step.revision:
        return msgspec.structs.replace(step, revision=max(1, now + 2 - step.revision))
    if isinstance(step, TxnRequest):
        success, failure = (tuple(near(one, now) for one in branch) for branch in (step.success, step.failure))
        return msgspec.structs.replace(step, success=success, failure=failure)
    return step


FLAT = PUTS | DELETES | RANGES
TRANSACTIONS = transactions(FLAT | transactions(FLAT))


class Follower:
    """Somebody who watches a range, takes when it suits, and must have missed nothing."""

    def __init__(self, watch: Watch, key: bytes, range_end: bytes, start: int) -> None:
        self.watch, self.key, self.range_end, self.next_revision = watch, key, range_end, start


class StoreMachine(RuleBasedStateMachine):
    """Commands go to both; what they answer and leave behind is compared."""

    @initialize()
    def begin(self) -> None:
        self.model = Model()
        self.state = State()
        self.watches = Watches(self.state)
        self.open = ExitStack()
        self.followers: list[Follower] = []

    def apply(self, body: Body) -> None:
        before = self.state.image()
        try:
            outcome = self.state.apply(body)
        except Refused:
            assert self.state.image() == before, "a refused command left a trace"
            with pytest.raises(No):
                self.model.apply(body)
            return
        seen = len(self.model.events) if not isinstance(body, Compact) else 0
        assert outcome.result == self.model.apply(body)
        assert outcome.revision == self.model.revision
        if not isinstance(body, Compact):
            assert outcome.events == [Event(*event) for event in self.model.events[seen:]]
        if outcome.events:
            self.watches.on_applied(outcome.events)

    @rule(put=PUTS)
    def put(self, put: PutRequest) -> None:
        self.apply(put)

    @rule(delete=DELETES)
    def delete(self, delete: DeleteRequest) -> None:
        self.apply(delete)

    @rule(txn=TRANSACTIONS)
    def transact(self, txn: TxnRequest) -> None:
        self.apply(near(txn, self.state.revision))

    @rule(id=st.integers(-1, 3), ttl_s=st.sampled_from([-1, 0, 1, 60, 9_000_000_000, 9_000_000_001]))
    def grant(self, id: int, ttl_s: int) -> None:
        self.apply(LeaseGrant(id=id, ttl_s=ttl_s))

    @rule(id=st.integers(0, 3))
    def revoke(self, id: int) -> None:
        self.apply(LeaseRevoke(id=id))

    @rule(back=st.integers(-1, 20))
    def compact(self, back: int) -> None:
        self.apply(Compact(revision=self.state.revision - back))

    @rule(request=RANGES)
    def read(self, request: RangeRequest) -> None:
        self.compare_read(near(request, self.state.revision))

    def compare_read(self, request: RangeRequest) -> None:
        try:
            found = self.state.read(request)
        except Refused:
            with pytest.raises(No):
                self.model.read(request)
            return
        assert found == self.model.read(request)

    @rule(back=st.integers(0, 10))
    def read_all_of_the_past(self, back: int) -> None:
        self.compare_read(RangeRequest(key=b"\0", range_end=b"\0", revision=max(1, self.state.revision - back)))

    @rule(key=KEYS, range_end=ENDS, back=st.integers(-2, 8))
    def watch(self, key: bytes, range_end: bytes, back: int) -> None:
        start = max(1, self.state.revision + 1 - back)
        watch = self.open.enter_context(self.watches.open(key, range_end, start))
        self.followers.append(Follower(watch, key, range_end, start))

    @precondition(lambda self: self.followers)
    @rule(which=st.integers(0, 100))
    def take(self, which: int) -> None:
        follower = self.followers[which % len(self.followers)]
        wanted = [
            Event(*event)
            for event in self.model.events
            if event[0].mod_revision >= follower.next_revision and is_in(event[0].key, follower.key, follower.range_end)
        ]
        try:
            taken = follower.watch.take()
        except Refused:
            assert follower.next_revision < self.model.compacted
            self.followers.remove(follower)
            return
        assert taken == wanted
        follower.next_revision = max(follower.next_revision, self.state.revision + 1)

    @rule()
    def restart(self) -> None:
        """What a snapshot holds is all that there is; watchers come again from where they were."""
        self.open.close()
        chunks = list(codec.encode_image(self.state.image()))
        self.state = State.from_image(codec.decode_image(chunks))
        self.watches, self.open = Watches(self.state), ExitStack()
        for follower in self.followers:
            opened = self.watches.open(follower.key, follower.range_end, follower.next_revision)
            follower.watch = self.open.enter_context(opened)

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "model"):
            return
        assert (self.state.revision, self.state.compacted) == (self.model.revision, self.model.compacted)
        everything = self.state.read(RangeRequest(key=b"\0", range_end=b"\0")).records
        assert everything == [self.model.keys[key] for key in sorted(self.model.keys)]
        assert {lease.id: lease.ttl_s for lease in self.state.leases()} == self.model.leases
        for id in self.model.leases:
            assert self.state.lease_keys(id) == sorted(k for k, r in self.model.keys.items() if r.lease == id)
        assert self.state.history_events == len(self.model.events)
        first = max(self.state.compacted, 1)
        assert self.state.events_from(first) == [Event(*event) for event in self.model.events]

    def teardown(self) -> None:
        if hasattr(self, "open"):
            self.open.close()


def machine(examples: int, steps: int) -> type[unittest.TestCase]:
    case: type[unittest.TestCase] = StoreMachine.TestCase
    case.settings = settings(  # type: ignore[attr-defined]
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    return case


TestStore = machine(60, 40)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.discovery.test_state_model", description=__doc__)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    case = machine(given.examples, given.steps)
    case.settings = settings(case.settings, derandomize=False, database=None)  # type: ignore[attr-defined]
    seed(given.seed)(case.runTest)  # type: ignore[attr-defined]
    result = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(case))
    print(f"{given.examples} sequences of up to {given.steps} commands, seed {given.seed}")
    raise SystemExit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
