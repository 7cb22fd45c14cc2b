"""Wait until nobody speaks to a job any more, before it is told to stop.

The job is out of discovery by then, so no new connection should come; what is open may finish.
Read from the job's own `/proc/<pid>/net/tcp{,6}`, because only there its connections appear (the
host's table shows none of what NAT sent on). Called by `lifecycle`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from discovery.wire import clock

LEAST_S = 0.3
"""Time for discovery's watchers to hear of it: a connection that the router opens meanwhile counts."""
_POLL_S = 0.05
_ESTABLISHED = "01"


def connections(pid: int, ports: Collection[int], proc: Path = Path("/proc")) -> int:
    """Count the established TCP connections to these ports of the process's network; 0 if it is gone."""
    found = 0
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / str(pid) / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            found += fields[3] == _ESTABLISHED and int(fields[1].rpartition(":")[2], 16) in ports
    return found


async def drain(pid: int, ports: Collection[int], timeout_s: float) -> int:
    """Wait for the connections to end, at least `LEAST_S`, at most `timeout_s`; return how many are left."""
    began = clock.monotonic_s()
    least = min(LEAST_S, timeout_s)
    while True:
        left = connections(pid, ports)
        waited = clock.monotonic_s() - began
        if (left == 0 and waited >= least) or waited >= timeout_s:
            return left
        await asyncio.sleep(_POLL_S)
