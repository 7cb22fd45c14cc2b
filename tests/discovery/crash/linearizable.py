"""Is there an order of all operations, each between its call and its answer, that a single register could have had?

The search of Wing and Gong with Lowe's memory of configurations already seen, one key at a time (linearizability
is local: a history is linearizable exactly if each key's part is). What is answered has to be placed; what is
unknown may be placed anywhere after its call, or nowhere; what was refused must not have happened and takes no part,
so its effect, if seen, is a violation.

Two things keep it quick on thousands of operations. Only operations that were called before the earliest pending
answer can come next, so the search moves along in a narrow window. And unknown writes whose value nobody ever
mentions are alike: only the first called of them needs to be tried.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.discovery.crash.history import Operation, Seen

STEPS_MAX = 3_000_000

State = tuple[str | None, int]
"""A key's value and version."""
ABSENT: State = (None, 0)

_Place = tuple[int, int, int, State]
"""A configuration: first answered operation not yet placed, which after it are, which unknown ones are, the state."""


class Undecided(Exception):
    """The search took too long to say either."""


@dataclass(frozen=True)
class Violation:
    """A key whose operations no register can have answered; `stuck` are those around where every order ends."""

    key: str
    stuck: list[Operation]

    def __str__(self) -> str:
        shown = "\n".join(f"    {_show(operation)}" for operation in self.stuck)
        return f"key {self.key} is not linearizable; no order gets past:\n{shown}"


def check(history: Iterable[Operation], initial: dict[str, State] | None = None) -> list[Violation]:
    """Return the keys that violate linearizability; `initial` are the keys that are there at the start.

    Raises:
        Undecided: a key's search took more than `STEPS_MAX` steps.
    """
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        if operation.outcome != "refused":
            by_key[operation.key].append(operation)
    found = (check_key(key, part, (initial or {}).get(key, ABSENT)) for key, part in sorted(by_key.items()))
    return [violation for violation in found if violation is not None]


def check_key(key: str, operations: list[Operation], initial: State = ABSENT) -> Violation | None:
    """Check the operations of one key."""
    return _Search(key, operations).run(initial)


class _Search:
    def __init__(self, key: str, operations: list[Operation]) -> None:
        self._key = key
        self._known = sorted((o for o in operations if o.outcome == "ok"), key=lambda o: (o.start_s, o.end_s))
        self._unknown = sorted(
            (o for o in operations if o.outcome == "unknown" and o.is_write), key=lambda o: o.start_s
        )
        self._alike = _alike(operations, self._unknown)

    def run(self, initial: State) -> Violation | None:
        first: _Place = (0, 0, 0, initial)
        seen = {first}
        stack = [self._next(first)]
        deepest = first
        while stack:
            place = next(stack[-1], None)
            if place is None:
                stack.pop()
            elif place not in seen:
                if place[0] == len(self._known):
                    return None
                seen.add(place)
                if len(seen) > STEPS_MAX:
                    raise Undecided(f"key {self._key}: {len(self._known)} operations, {len(self._unknown)} unknown")
                if place[0] > deepest[0]:
                    deepest = place
                stack.append(self._next(place))
        return Violation(self._key, self._around(deepest)) if self._known else None

    def _next(self, place: _Place) -> Iterator[_Place]:
        """Yield the places that one more operation leads to."""
        low, placed, unknown_placed, state = place
        if low == len(self._known):
            return
        window, deadline_s = self._window(low, placed)
        for index in window:
            after = step(state, self._known[index])
            if after is not None:
                yield (*self._advance(low, placed | 1 << (index - low)), unknown_placed, after)
        tried = set()
        for index, operation in enumerate(self._unknown):
            if operation.start_s > deadline_s:
                break
            if unknown_placed >> index & 1 or self._alike[index] in tried:
                continue
            if self._alike[index] is not None:
                tried.add(self._alike[index])
            after = step(state, operation)
            if after is not None and after != state:
                yield (low, placed, unknown_placed | 1 << index, after)

    def _window(self, low: int, placed: int) -> tuple[list[int], float]:
        """Return the answered operations that may come next, and the time by which one has to."""
        window: list[int] = []
        deadline_s = math.inf
        for index in range(low, len(self._known)):
            operation = self._known[index]
            if operation.start_s > deadline_s:
                break
            if not placed >> (index - low) & 1:
                window.append(index)
                deadline_s = min(deadline_s, operation.end_s)
        return [index for index in window if self._known[index].start_s <= deadline_s], deadline_s

    def _advance(self, low: int, placed: int) -> tuple[int, int]:
        while placed & 1:
            low, placed = low + 1, placed >> 1
        return low, placed

    def _around(self, place: _Place) -> list[Operation]:
        window, _ = self._window(place[0], place[1])
        return [*self._known[max(0, place[0] - 4) : place[0]], *(self._known[index] for index in window)]


def step(state: State, operation: Operation) -> State | None:
    """Return the state after an operation, `None` if the operation cannot have been answered as it was."""
    value, version = state
    seen = operation.seen if operation.outcome == "ok" else None
    if operation.kind == "cas":
        holds = value == operation.expected
        if operation.outcome == "ok" and holds != operation.succeeded:
            return None
        if not holds and seen is not None and not _matches(state, seen):
            return None
        return (operation.value, version + 1) if holds else state
    if seen is not None and not _matches(state, seen):
        return None
    if operation.kind == "put":
        return operation.value, version + 1
    return ABSENT if operation.kind == "delete" else state


def _matches(state: State, seen: Seen) -> bool:
    return state[0] == seen.value and seen.version in (-1, state[1])


def _alike(operations: list[Operation], unknown: list[Operation]) -> list[object]:
    """Return for each unknown operation what it is like: those that are equal do the same to everybody who looks."""
    mentioned = {operation.seen.value for operation in operations if operation.seen is not None}
    mentioned |= {operation.expected for operation in operations if operation.kind == "cas"}
    alike: list[object] = []
    for operation in unknown:
        if operation.kind == "delete":
            alike.append("delete")
        elif operation.value in mentioned:
            alike.append(None)
        else:
            alike.append((operation.kind, operation.expected))
    return alike


def _show(operation: Operation) -> str:
    seen = "" if operation.seen is None else f" saw {operation.seen.value!r} v{operation.seen.version}"
    what = f"{operation.kind} {operation.value!r}" if operation.is_write else "get"
    if operation.kind == "cas":
        what += f" if {operation.expected!r}: {operation.succeeded}"
    times = f"{operation.start_s:.4f}..{operation.end_s:.4f}"
    return (
        f"{times} client {operation.client} {operation.asked} {what}{seen} ({operation.outcome}, r{operation.revision})"
    )
