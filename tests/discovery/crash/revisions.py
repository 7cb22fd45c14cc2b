"""Do the store's revisions go with time? A check across all keys, beside the one of `linearizable` within each.

Every change has a revision of its own; whoever asks after somebody was answered may not be shown an older store.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from tests.discovery.crash.history import Operation


def check_revisions(history: Iterable[Operation]) -> list[str]:
    """Return what contradicts time; operations without a revision take no part."""
    answered = sorted((o for o in history if o.outcome == "ok" and o.revision), key=lambda o: o.start_s)
    return [*_shared(answered), *_backwards(answered)]


def has_changed(operation: Operation) -> bool:
    """Tell whether an answered operation made a revision."""
    if operation.kind == "cas":
        return operation.succeeded
    if operation.kind == "delete":
        return operation.seen is None or operation.seen.version != 0
    return operation.kind == "put"


def _shared(answered: list[Operation]) -> list[str]:
    made: dict[int, Operation] = {}
    found = []
    for operation in answered:
        if has_changed(operation):
            other = made.setdefault(operation.revision, operation)
            if other is not operation:
                found.append(f"revision {operation.revision} was made twice: {other} and {operation}")
    return found


def _backwards(answered: list[Operation]) -> list[str]:
    """Sweep by start, taking in whatever has ended before it."""
    found: list[str] = []
    ending = [(operation.end_s, number) for number, operation in enumerate(answered)]
    heapq.heapify(ending)
    newest: Operation | None = None
    for operation in answered:
        while ending and ending[0][0] < operation.start_s:
            ended = answered[heapq.heappop(ending)[1]]
            if newest is None or ended.revision > newest.revision:
                newest = ended
        if newest is None:
            continue
        is_late = (
            operation.revision <= newest.revision if has_changed(operation) else operation.revision < newest.revision
        )
        if is_late:
            found.append(
                f"revision {operation.revision} after {newest.revision} was answered: {operation} after {newest}"
            )
    return found
