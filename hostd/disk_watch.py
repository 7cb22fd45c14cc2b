"""Says in a job's log, once, that its temp disk is full, and has disks that are written much go direct.

The job itself hears only ENOSPC. Looks at all disks of running jobs every few seconds, and at each job's once more when
it ends. Made by `daemon`, asked by `lifecycle`. Refuses nothing; a job that deletes something and fills its disk again
is told again.

Source: Documentation/admin-guide/iostats.rst.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

from hostd.runtime.disks import DiskUsage
from hostd.types import MIB, JobSpec

PERIOD_S = 2.0
CALM_TURNS = 5
"""A disk that was less than half full is only looked at in one of so many turns."""
HEAVY_BYTES = 128 * MIB
"""A disk to which so much was written goes direct."""
_SECTOR_BYTES = 512


class Measuring(Protocol):
    """`hostd.runtime.files.FilesStep`, as far as it is needed here."""

    def usage(self, job_id: str) -> DiskUsage | None:
        """Return how full a job's disk is."""

    def device(self, job_id: str) -> str:
        """Return its device."""

    def go_direct(self, job_id: str) -> None:
        """Have it written past the host's page cache; blocking."""


class DiskWatch:
    """Remembers which jobs have been told."""

    def __init__(self, files: Measuring, say: Callable[[str, str], None]) -> None:
        self._files = files
        self._say = say
        self._full: set[str] = set()
        self._calm: set[str] = set()
        self._direct: set[str] = set()
        self._written_before: dict[str, int] = {}

    def look(self, spec: JobSpec) -> bool:
        """Say it if the job's disk is full now and was not before; return whether it is full."""
        usage = self._files.usage(spec.id)
        is_calm = usage is None or usage.used_bytes < usage.free_bytes
        (self._calm.add if is_calm else self._calm.discard)(spec.id)
        if usage is None or not usage.is_full:
            self._full.discard(spec.id)
            return False
        if spec.id not in self._full:
            self._full.add(spec.id)
            size = spec.resources.temp_disk_bytes // MIB
            text = f"its temp disk of {size} MiB is full: writing outside of volumes fails (resources.temp_disk_bytes)"
            if spec.has_log:
                self._say(spec.id, text)
        return True

    async def run(self, running: Callable[[], list[JobSpec]]) -> None:
        """Look at the jobs that `running` returns, for ever."""
        async with asyncio.TaskGroup() as group:
            for turn in itertools.count():
                await asyncio.sleep(PERIOD_S)
                specs = running()
                for spec in specs:
                    if turn % CALM_TURNS == 0 or spec.id not in self._calm:
                        self.look(spec)
                ids = {spec.id for spec in specs}
                self._full &= ids
                self._calm &= ids
                for job_id in self.heavy(ids, written_bytes(Path("/proc/diskstats").read_text())):
                    group.create_task(asyncio.to_thread(self._files.go_direct, job_id))

    def heavy(self, ids: AbstractSet[str], written: Mapping[str, int]) -> list[str]:
        """Return, once, whose disk was written much since it was first seen here, by what each device ever wrote."""
        found = []
        for job_id in self._written_before.keys() - ids:
            del self._written_before[job_id]
        self._direct &= ids
        for job_id in ids - self._direct:
            now = written.get(self._files.device(job_id), 0)
            if now - self._written_before.setdefault(job_id, now) >= HEAVY_BYTES:
                self._direct.add(job_id)
                found.append(job_id)
        return found


def written_bytes(diskstats: str) -> dict[str, int]:
    """Read how much was ever written to each loop device that was written at all, by `MAJOR:MINOR`."""
    found = {}
    for line in diskstats.splitlines():
        if " loop" in line:
            fields = line.split()
            if fields[9] != "0":
                found[f"{fields[0]}:{fields[1]}"] = int(fields[9]) * _SECTOR_BYTES
    return found
