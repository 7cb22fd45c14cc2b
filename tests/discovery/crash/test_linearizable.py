"""The checker agrees with trying every order, accepts what a real register did, and finds every seeded fault."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.discovery.crash import history as histories
from tests.discovery.crash.history import Operation, Seen
from tests.discovery.crash.linearizable import ABSENT, State, check, check_key, step
from tests.discovery.crash.revisions import check_revisions

KEY = "k"


def get(start: float, end: float, value: str | None, version: int = -1) -> Operation:
    return Operation(client=0, kind="get", key=KEY, start_s=start, end_s=end, seen=Seen(value, version))


def put(start: float, end: float, value: str, seen: Seen | None = None) -> Operation:
    return Operation(client=0, kind="put", key=KEY, start_s=start, end_s=end, value=value, seen=seen)


def unknown(operation: Operation) -> Operation:
    return msgspec.structs.replace(operation, outcome="unknown", seen=None)


def is_fine(*operations: Operation) -> bool:
    return not check(operations)


def test_textbook_cases() -> None:
    assert is_fine(put(0, 1, "a"), get(2, 3, "a"))
    assert not is_fine(put(0, 1, "a"), get(2, 3, None))
    assert is_fine(put(0, 5, "a"), get(1, 2, None), get(3, 4, "a"))
    assert not is_fine(put(0, 5, "a"), get(1, 2, "a"), get(3, 4, None))
    assert is_fine(put(0, 5, "a"), put(0, 5, "b"), get(6, 7, "a"), get(8, 9, "a"))
    assert not is_fine(put(0, 5, "a"), put(0, 5, "b"), get(6, 7, "a"), get(8, 9, "b"))
    assert not is_fine(get(0, 1, "never written"))


def test_an_unknown_write_may_happen_late_or_never_but_once() -> None:
    write = unknown(put(0, 1, "a"))
    assert is_fine(write, get(2, 3, None), get(4, 5, None))
    assert is_fine(write, get(2, 3, None), get(4, 5, "a"))
    assert not is_fine(write, get(2, 3, "a"), get(4, 5, None))
    assert is_fine(write, put(2, 3, "b"), get(4, 5, "b", 1), get(6, 7, "a", 2))
    assert not is_fine(write, get(2, 3, "a", 1), put(4, 5, "b"), get(6, 7, "a", 3))
    assert not is_fine(get(0, 1, "a"), unknown(put(2, 3, "a")))


def test_a_write_that_was_refused_is_never_seen() -> None:
    refused = msgspec.structs.replace(put(0, 1, "a"), outcome="refused")
    assert is_fine(refused, get(2, 3, None))
    assert not is_fine(refused, get(2, 3, "a"))


def test_a_write_that_was_applied_twice_shows_in_the_version() -> None:
    assert is_fine(put(0, 1, "a"), get(2, 3, "a", 1))
    assert not is_fine(put(0, 1, "a"), get(2, 3, "a", 2))
    assert is_fine(put(0, 1, "a"), unknown(put(0, 1, "b")), put(2, 3, "c", Seen("a", 2)), get(4, 5, "c", 3))
    assert not is_fine(put(0, 1, "a"), unknown(put(0, 1, "b")), get(4, 5, "a", 3))


def test_compare_and_swap() -> None:
    swap = Operation(client=0, kind="cas", key=KEY, start_s=2, end_s=3, expected="a", value="b")
    failed = msgspec.structs.replace(swap, succeeded=False, seen=Seen("a", 1))
    assert is_fine(put(0, 1, "a"), swap, get(4, 5, "b", 2))
    assert not is_fine(swap, get(4, 5, "b", 1))
    assert not is_fine(put(0, 1, "a"), swap, msgspec.structs.replace(swap, client=1, value="c"))
    assert not is_fine(put(0, 1, "a"), failed)
    assert not is_fine(put(0, 1, "a"), unknown(swap), get(4, 5, "b", 3))


# Against trying every order


def brute(operations: list[Operation]) -> bool:
    """Try every order of every choice of the unknown ones."""
    known = [o for o in operations if o.outcome == "ok"]
    unknowns = [o for o in operations if o.outcome == "unknown" and o.is_write]
    return any(
        _fits(order)
        for count in range(len(unknowns) + 1)
        for chosen in itertools.combinations(unknowns, count)
        for order in itertools.permutations([*known, *chosen])
    )


def _fits(order: tuple[Operation, ...]) -> bool:
    state: State | None = ABSENT
    latest_start = 0.0
    for operation in order:
        if operation.outcome == "ok" and operation.end_s < latest_start:
            return False
        latest_start = max(latest_start, operation.start_s)
        state = step(state, operation) if state is not None else None
        if state is None:
            return False
    return True


@st.composite
def small(draw: st.DrawFn) -> list[Operation]:
    values = st.sampled_from(["a", "b", "c", None])
    versions = st.sampled_from([-1, -1, 0, 1, 2, 3])
    operations = []
    for number in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 8))
        kind = draw(st.sampled_from(["get", "get", "put", "put", "cas", "delete"]))
        is_known = draw(st.booleans()) or kind == "get"
        seen = Seen(draw(values), draw(versions)) if kind == "get" or draw(st.booleans()) else None
        operations.append(
            Operation(
                client=number,
                kind=kind,  # type: ignore[arg-type]
                key=KEY,
                start_s=start,
                end_s=start + draw(st.integers(0, 5)),
                outcome="ok" if is_known else draw(st.sampled_from(["unknown", "unknown", "refused"])),
                value=draw(st.sampled_from(["a", "b", "c"])) if kind in ("put", "cas") else None,
                expected=draw(values),
                succeeded=draw(st.booleans()),
                seen=seen,
            )
        )
    return operations


@given(small())
@settings(max_examples=500, deadline=None)
def test_agrees_with_trying_every_order(operations: list[Operation]) -> None:
    assert (not check(operations)) == brute(operations)


# Against a register that is right, and one that is wrong once


@dataclass
class Register:
    """Answers at random moments within each call; `faults` says at which operation it does what is wrong."""

    seed: int
    fault: str = ""
    is_fault_done: bool = False
    unknown_share: float = 0.0
    has_deletes: bool = True
    values: dict[str, State] = field(default_factory=dict)
    past: dict[str, list[State]] = field(default_factory=dict)

    def history(self, count: int, keys: int = 3, clients: int = 8) -> list[Operation]:
        dice = random.Random(self.seed)
        calls = sorted(self._calls(dice, count, keys, clients), key=lambda call: call[0])
        fault_at = dice.randrange(count // 4, count // 2)
        done: list[Operation] = []
        for number, (at, call) in enumerate(calls):
            due = self.fault and not self.is_fault_done and number >= fault_at
            done.append(self._answer(dice, at, call, self.fault if due else ""))
        end = max(operation.end_s for operation in done)
        for key, state in sorted(self.values.items()):
            done.append(Operation(client=99, kind="get", key=key, start_s=end + 1, end_s=end + 2, seen=Seen(*state)))
        dice.shuffle(done)
        return done

    def _calls(self, dice: random.Random, count: int, keys: int, clients: int) -> list[tuple[float, Operation]]:
        calls = []
        free = [0.0] * clients
        for number in range(count):
            client = min(range(clients), key=free.__getitem__)
            start = free[client] + dice.random()
            end = start + dice.expovariate(1.0)
            free[client] = end
            kind = dice.choice(
                ["get", "put", "cas", "cas", "delete"]
                if self.has_deletes and dice.random() < 0.2
                else ["get", "put", "cas"]
            )
            key = f"k{dice.randrange(keys)}"
            call = Operation(client=client, kind=kind, key=key, start_s=start, end_s=end, value=f"v{number}")  # type: ignore[arg-type]
            calls.append((dice.uniform(start, end), call))
        return calls

    def _answer(self, dice: random.Random, at: float, call: Operation, fault: str) -> Operation:
        state = self.values.get(call.key, ABSENT)
        past = self.past.setdefault(call.key, [ABSENT])
        expected = state[0] if dice.random() < 0.7 else "nothing like it"
        call = msgspec.structs.replace(call, expected=expected if call.kind == "cas" else None)
        if call.is_write and dice.random() < self.unknown_share:
            call = msgspec.structs.replace(call, outcome="unknown")
            if dice.random() < 0.5:
                return call
        after = step(state, unknown(call))
        assert after is not None
        is_held = call.kind != "cas" or state[0] == call.expected
        seen = Seen(*state) if call.kind == "get" or not is_held or dice.random() < 0.5 else None
        wrong = self._fault(fault, call, state, after, past)
        if wrong is not None:
            self.is_fault_done = True
            call, after, seen = wrong.call or call, wrong.after or after, wrong.seen or seen
        self.values[call.key] = after
        if after != state:
            past.append(after)
        return msgspec.structs.replace(call, succeeded=is_held, seen=seen if call.outcome == "ok" else None)

    def _fault(self, fault: str, call: Operation, state: State, after: State, past: list[State]) -> Wrong | None:
        is_changed = after != state and call.outcome == "ok"
        if fault == "lost" and is_changed and call.kind != "delete":
            return Wrong(after=state)
        if fault == "twice" and is_changed and call.kind == "put":
            return Wrong(after=(after[0], after[1] + 1))
        if fault == "stale" and call.kind == "get" and len(past) > 12:
            return Wrong(seen=Seen(*past[-12]))
        if fault == "refused" and is_changed and call.kind == "put":
            return Wrong(call=msgspec.structs.replace(call, outcome="refused"))
        if fault == "rolled back" and len(past) > 12 and call.kind == "get":
            return Wrong(after=past[-9])
        if fault == "torn value" and call.kind == "get" and len(past) > 12:
            return Wrong(seen=Seen(past[-9][0], state[1]))
        if fault == "cas without compare" and call.kind == "cas" and call.outcome == "ok" and after == state:
            return Wrong(after=(call.value, state[1] + 1))
        return None


@dataclass(frozen=True)
class Wrong:
    call: Operation | None = None
    after: State | None = None
    seen: Seen | None = None


FAULTS = ["lost", "twice", "stale", "refused", "rolled back", "torn value", "cas without compare"]


@pytest.mark.parametrize("seed", range(25))
def test_what_a_real_register_did_is_accepted(seed: int) -> None:
    assert check(Register(seed).history(400)) == []
    assert check(Register(seed, unknown_share=0.1).history(400)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_every_seeded_fault_is_found(fault: str) -> None:
    for seed in range(40):
        register = Register(seed, fault=fault, has_deletes=False)  # a delete can hide what was lost before it
        history = register.history(400)
        assert register.is_fault_done, f"seed {seed}: the fault had no occasion"
        assert check(history), f"seed {seed}: {fault} was not found"


@pytest.mark.parametrize("fault", ["lost", "twice", "stale", "rolled back"])
def test_seeded_faults_are_found_among_unknown_outcomes(fault: str) -> None:
    """A few unknown writes can hide a fault (one of them may have done it), many faults cannot be hidden."""
    found = 0
    for seed in range(30):
        register = Register(seed, fault=fault, unknown_share=0.02, has_deletes=False)
        history = register.history(400)
        found += register.is_fault_done and bool(check(history))
    assert found >= 24


def test_a_swapped_pair_of_answers_is_found() -> None:
    for seed in range(20):
        history = sorted(Register(seed).history(400, keys=1), key=lambda o: o.start_s)
        gets = [i for i, o in enumerate(history) if o.kind == "get" and o.seen is not None]
        first = gets[len(gets) // 2]
        second = next(
            i for i in gets if history[i].start_s > history[first].end_s + 20 and history[i].seen != history[first].seen
        )
        one, other = history[first], history[second]
        history[first] = msgspec.structs.replace(one, seen=other.seen)
        history[second] = msgspec.structs.replace(other, seen=one.seen)
        assert check(history)


def test_thousands_of_operations_take_seconds() -> None:
    history = Register(1, unknown_share=0.05).history(6000, keys=6, clients=16)
    began = time.monotonic()
    assert check(history) == []
    assert time.monotonic() - began < 30
    history[3000] = msgspec.structs.replace(history[3000], kind="get", outcome="ok", seen=Seen("v of nobody", -1))
    assert check(history)


def test_what_is_stuck_is_named() -> None:
    violation = check_key(KEY, [put(0, 1, "a"), get(2, 3, None, 0)])
    assert violation is not None
    assert "get saw None v0" in str(violation)


def test_a_history_comes_back_from_its_file(tmp_path: Path) -> None:
    history = Register(3, unknown_share=0.1).history(50)
    histories.save(tmp_path / "h", history)
    assert histories.load(tmp_path / "h") == history


# Revisions


def test_revisions_go_with_time() -> None:
    def at(operation: Operation, revision: int) -> Operation:
        return msgspec.structs.replace(operation, revision=revision)

    fine = [at(put(0, 1, "a"), 2), at(put(0.5, 2, "b"), 3), at(get(3, 4, "b"), 3), at(put(3, 4, "c"), 4)]
    assert check_revisions(fine) == []
    assert check_revisions([*fine, at(get(5, 6, "b"), 3)])
    assert check_revisions([*fine, at(put(5, 6, "d"), 4)])
    assert check_revisions([*fine, at(put(0, 9, "d"), 3)])
