"""The one place that reads the clock, so that tests own the time."""

from __future__ import annotations

import time as _time


def now_s() -> float:
    """Return the wall clock, in seconds since the epoch."""
    return _time.time()  # noqa: TID251 — this is the place


def monotonic_s() -> float:
    """Return a clock that never jumps, in seconds."""
    return _time.monotonic()
