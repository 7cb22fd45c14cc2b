"""Which commands have been applied lately, so that one that is in the log twice is applied once.

A proposer that does not know what became of its command sends it again under the same id. Exactness
needs no clock: a command says up to where its proposer had applied the log (`after`), an entry more
than `WINDOW` behind that is void on every member, and ids are remembered for `WINDOW` entries. So of
two entries with one id, the second either lies within the memory of the first or is void. Pure, the
same on all members, part of the snapshot; `raft` is the caller.
"""

from __future__ import annotations

from collections import deque

WINDOW = 50_000


class Requests:
    """The ids of the last `WINDOW` entries, oldest first."""

    def __init__(self, done: list[tuple[int, int]]) -> None:
        self._order = deque(done)
        self._ids = {id for _, id in done}

    def is_void(self, after: int, index: int) -> bool:
        """Tell whether an entry comes so late that its command must not be applied."""
        return bool(after) and index - after > WINDOW

    def is_done(self, id: int) -> bool:
        return id in self._ids

    def add(self, id: int, index: int) -> None:
        """Remember a command; forget those that no entry can repeat any more."""
        self._ids.add(id)
        self._order.append((index, id))
        while self._order[0][0] < index - WINDOW:
            self._ids.discard(self._order.popleft()[1])

    def image(self) -> list[tuple[int, int]]:
        """Return all as data, (index, id)."""
        return list(self._order)
