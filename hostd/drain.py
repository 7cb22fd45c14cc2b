"""Look at a job's sockets: wait until nobody speaks to it any more, before it is told to stop; see it listen.

The job is out of discovery by then, so no new connection should come; what is open may finish.
Read from the job's own `/proc/<pid>/net/tcp{,6}`, because only there its connections appear (the
host's table shows none of what NAT sent on). Called by `lifecycle`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path

from discovery.wire import clock

LEAST_S = 0.3
"""Time for discovery's watchers to hear of it: a connection that the router opens meanwhile counts."""
_POLL_S = 0.05
_ESTABLISHED, _LISTEN = "01", "0A"


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


def listens(pids: Iterable[int], port: int, proc: Path = Path("/proc")) -> bool:
    """Tell whether one of these processes holds a socket that listens on the port of its network."""
    sockets: set[str] | None = None
    for pid in pids:
        if sockets is None:
            sockets = _listening(proc / str(pid), port)
        with contextlib.suppress(OSError):
            if any(str(fd.readlink()) in sockets for fd in (proc / str(pid) / "fd").iterdir()):
                return True
    return False


def _listening(process: Path, port: int) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (process / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
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
