"""Decides when a process that keeps ending may start again; pure: the caller brings the time.

The ancestor's numbers, counted per wanted process: the first 5 at once, up to 15 after 10 s, then
every 30 s; 5 minutes up and the count is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

STEADY_S = 300.0
_STEPS = ((5, 0.0), (15, 10.0))
_SLOWEST_S = 30.0


@dataclass(frozen=True)
class Ends:
    """How often jobs of a group ended unasked, and when the last did."""

    count: int = 0
    last_at: float = 0.0


def delay_s(restarts: int) -> float:
    """Return how long to wait before start number `restarts` (1 = the first after a crash)."""
    for below, delay in _STEPS:
        if restarts < below:
            return delay
    return _SLOWEST_S


def after_end(ends: Ends, *, up_s: float, at: float) -> Ends:
    """Return the record after one more end of a job that had run for `up_s`."""
    return Ends(1 if up_s >= STEADY_S else ends.count + 1, max(at, ends.last_at))


def ready_at(ends: Ends, wanted: int) -> float:
    """Return when the group may start jobs again."""
    return ends.last_at + delay_s(ends.count // max(1, wanted))
