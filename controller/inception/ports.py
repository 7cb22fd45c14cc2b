"""Sees who listens on the ports that the router needs, before anything is started.

Reads /proc only. A port that a router job of ours holds is fine: bootstrap may run again at any time.
Source: proc(5) for /proc/net/tcp (state 0A listens) and /proc/PID/fd.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.errors import HostPortTaken

_LISTENS = "0A"


@dataclass(frozen=True)
class Holder:
    """A listening process as far as /proc tells; `pid` 0 when it does not."""

    port: int
    pid: int = 0
    name: str = ""
    cgroups: str = ""

    def is_ours(self, cgroup_parent: str) -> bool:
        """Return whether it runs inside a router job of this node."""
        return f"/{cgroup_parent}/router-" in self.cgroups

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid else "another process"


def listening(proc: Path = Path("/proc")) -> dict[int, set[str]]:
    """Return the listening TCP ports of this network namespace with their sockets' inodes."""
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS:
                found.setdefault(int(fields[1].rpartition(":")[2], 16), set()).add(fields[9])
    return found


def _processes_with(inodes: set[str], proc: Path) -> Iterator[int]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(str(link.readlink()) in wanted for link in (entry / "fd").iterdir()):
                yield int(entry.name)
        except OSError:
            continue  # it ended, or is not ours to see


def holder_of(port: int, inodes: set[str], proc: Path = Path("/proc")) -> Holder:
    """Find the process that listens on a port."""
    for pid in _processes_with(inodes, proc):
        try:
            name = (proc / str(pid) / "comm").read_text().strip()
            return Holder(port, pid, name, (proc / str(pid) / "cgroup").read_text())
        except OSError:
            continue
    return Holder(port)


def check(ports: Sequence[int], environment: Mapping[str, str], proc: Path = Path("/proc")) -> None:
    """Refuse ports that somebody else holds.

    Raises:
        HostPortTaken: names the port and, where /proc tells, the process.
    """
    parent = environment.get("HOSTD_CGROUP_PARENT", "hostd")
    busy = listening(proc)
    for port in ports:
        if port in busy:
            holder = holder_of(port, busy[port], proc)
            if not holder.is_ours(parent):
                raise HostPortTaken(
                    f"port {port} is taken by {holder}",
                    hint="the router needs it: stop that process, or move it to another port",
                    port=port,
                    pid=holder.pid,
                )
