"""The p99 of a well-behaved service beside five hostile jobs, against the same service alone, in turn in one run.

All are default jobs of one node. The hostile ones are started for each round and stopped after it: the service must
answer every request of both. Asked by a job beside it, as the router is, and by a process of the host.
"""

from __future__ import annotations

import sys
import time

from bench.measure import Row, check_stop, row
from hostd.types import Job
from tests.hostd import neighbours
from tests.hostd.node import Node
from tests.hostd.node import node as new_node

ROUND_S = 8.0
SETTLE_S = 5.0
RATE = 100.0


CLIENTS = {"neighbours_p99": neighbours.measure, "neighbours_host_p99": neighbours.measure_outside}


def measure(rounds: int) -> list[Row]:
    """Return the rows.

    Raises:
        RuntimeError: a request was not answered with 200.
    """
    alone_ms: dict[str, list[float]] = {name: [] for name in CLIENTS}
    beside_ms: dict[str, list[float]] = {name: [] for name in CLIENTS}
    with new_node(has_discovery=False) as node:
        node.up()
        service = neighbours.start_service(node)
        neighbours.measure(node, service, 1.0, RATE)
        for number in range(rounds):
            check_stop()
            ask(node, service, alone_ms)
            specs = neighbours.hostile(node, 2 * ROUND_S + 60, prefix=f"n{number}-")
            for spec in specs:
                node.start(spec)
            time.sleep(SETTLE_S)
            ask(node, service, beside_ms)
            for spec in specs:
                node.stop(spec.id)
            for name in CLIENTS:
                print(f"{name} {alone_ms[name][-1]:.2f} -> {beside_ms[name][-1]:.2f} ms", file=sys.stderr, flush=True)
        node.stop("service")
    return [row(name, beside_ms[name], alone_ms[name], "alone", "ms p99") for name in CLIENTS]


def ask(node: Node, service: Job, found_ms: dict[str, list[float]]) -> None:
    """Measure each client in turn."""
    for name, client in CLIENTS.items():
        measured = client(node, service, ROUND_S, RATE)
        if measured.failed:
            raise RuntimeError(f"{measured.failed} requests were not answered")
        found_ms[name].append(measured.percentile(99))
