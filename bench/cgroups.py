"""The cgroups of the arms that make their own: memory, cpu and pids limits of a job, on cgroup v1 or v2."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from hostd.runtime.cgroup import find_mounts

_V1 = (
    ("memory", "memory.limit_in_bytes", "268435456"),
    ("cpu", "cpu.shares", "512"),
    ("pids", "pids.max", "100"),
)
_V2 = (("memory.max", "268435456"), ("cpu.weight", "50"), ("pids.max", "100"))


class Cgroups:
    """One directory a job in each hierarchy, below a directory of this benchmark's own."""

    def __init__(self, parent: str) -> None:
        mounts = find_mounts()
        self.groups: list[tuple[Path, tuple[tuple[str, str], ...]]] = []
        if all(name in mounts.v1 for name, _, _ in _V1):
            self.groups = [(mounts.v1[name] / parent, ((file, value),)) for name, file, value in _V1]
        else:
            assert mounts.v2 is not None, "neither cgroup v1's memory, cpu and pids nor v2 is mounted"
            self.groups = [(mounts.v2 / parent, _V2)]
        for top, _ in self.groups:
            top.mkdir()
            if len(self.groups) == 1:
                for directory in (top.parent, top):
                    (directory / "cgroup.subtree_control").write_text("+memory +cpu +pids")

    def add(self, job_id: str) -> tuple[str, ...]:
        """Make a job's cgroups and return the files that its first process writes 0 to."""
        for top, limits in self.groups:
            os.mkdir(f"{top}/{job_id}")
            for file, value in limits:
                with open(f"{top}/{job_id}/{file}", "wb", buffering=0) as limit:
                    limit.write(value.encode())
        return tuple(f"{top}/{job_id}/cgroup.procs" for top, _ in self.groups)

    def remove(self, job_id: str) -> None:
        for top, _ in self.groups:
            os.rmdir(f"{top}/{job_id}")

    def text(self) -> str:
        """Return what floor.c reads: a line per hierarchy, its directory and then file and value of each limit."""
        return "".join(
            "\t".join([str(top), *(word for limit in limits for word in limit)]) + "\n" for top, limits in self.groups
        )

    def close(self) -> None:
        """Remove all, also the cgroups of a job that was cut short; their processes are dead."""
        deadline = time.monotonic() + 5
        for top, _ in self.groups:
            while top.exists() and time.monotonic() < deadline:
                for path in (*(each for each in top.iterdir() if each.is_dir()), top):
                    with suppress(OSError):  # the kernel has not let go of its last process yet
                        path.rmdir()
