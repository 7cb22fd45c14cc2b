"""The p99 of a well-behaved service beside five hostile jobs, against the same service alone, in turn in one run.

All are default jobs of one node. The hostile ones are started for each round and stopped after it: the service must
answer every request of both.
"""

from __future__ import annotations

import sys
import time

from bench.measure import Row, check_stop, row
from tests.hostd import neighbours
from tests.hostd.node import node as new_node

ROUND_S = 8.0
SETTLE_S = 5.0
RATE = 100.0


def measure(rounds: int) -> list[Row]:
    """Return the row.

    Raises:
        RuntimeError: a request was not answered with 200.
    """
    alone_ms: list[float] = []
    beside_ms: list[float] = []
    with new_node(has_discovery=False) as node:
        node.up()
        service = neighbours.start_service(node)
        neighbours.measure(node, service, 1.0, RATE)
        for _ in range(rounds):
            check_stop()
            alone = neighbours.measure(node, service, ROUND_S, RATE)
            specs = neighbours.hostile(node, ROUND_S + 60, prefix=f"n{len(alone_ms)}-")
            for spec in specs:
                node.start(spec)
            time.sleep(SETTLE_S)
            beside = neighbours.measure(node, service, ROUND_S, RATE)
            for spec in specs:
                node.stop(spec.id)
            if alone.failed or beside.failed:
                raise RuntimeError(f"{alone.failed + beside.failed} requests were not answered")
            alone_ms.append(alone.percentile(99))
            beside_ms.append(beside.percentile(99))
            print(f"p50 {alone.percentile(50):.2f} -> {beside.percentile(50):.2f}", end=" ", file=sys.stderr)
            print(f"p99 {alone_ms[-1]:.2f} -> {beside_ms[-1]:.2f} ms", file=sys.stderr, flush=True)
        node.stop("service")
    return [row("neighbours_p99", beside_ms, alone_ms, "alone", "ms p99")]
