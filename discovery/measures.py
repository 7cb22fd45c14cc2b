"""Counts durations into buckets, as Prometheus' histograms have them. `journal` fills, `operating` shows.

Source: Prometheus exposition formats, text format 0.0.4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Times:
    """How often something took how long; one writer at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_s = 0.0
        self._counts = [0] * (len(BUCKETS_S) + 1)

    def add(self, took_s: float) -> None:
        """Note one duration."""
        self.count += 1
        self.sum_s += took_s
        self._counts[bisect_left(BUCKETS_S, took_s)] += 1

    def lines(self, name: str, about: str) -> Iterator[str]:
        """Yield the lines of a histogram."""
        yield f"# HELP {name} {about}"
        yield f"# TYPE {name} histogram"
        total = 0
        for limit_s, count in zip((*BUCKETS_S, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{limit_s}"}} {total}'
        yield f"{name}_sum {self.sum_s:.9g}"
        yield f"{name}_count {total}"
