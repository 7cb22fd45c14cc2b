"""Measure what every living job and the machine use at this moment, from plain files of the kernel.

One turn over 500 jobs costs some 30 ms of CPU, in slices between which the loop serves others. Nothing is kept: rates
are for who asks twice. What the kernel or the machine cannot say is 0. Called by `hostd.api` and `hostd.metrics`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from discovery.wire import clock
from hostd.runtime.cgroup import Incidents
from hostd.runtime.cgroup_tree import field, pressure_in, read
from hostd.runtime.disks import DiskUsage
from hostd.store import Record
from hostd.types import JobStats, NodeStats, Pressure, Stats, Usage

_SLICE_JOBS = 25
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Cgroups(Protocol):
    """`hostd.runtime.cgroup.CgroupStep`, as far as measuring needs it."""

    def usage(self, job_id: str, *, has_quota: bool = True) -> Usage:
        """Return what a job uses now."""

    def pressure(self, job_id: str) -> dict[str, Pressure]:
        """Return how long its tasks waited."""


class Log(Protocol):
    """`hostd.joblog.JobLog`, as far as measuring needs it."""

    @property
    def position(self) -> int:
        """All bytes so far."""

    @property
    def bytes_dropped(self) -> int:
        """Those that found no room."""


class Logs(Protocol):
    """`hostd.logs.Logs`, as far as measuring needs it."""

    def opened(self, job_id: str) -> Log | None:
        """Return a living job's log."""


class Disks(Protocol):
    """`hostd.runtime.files.FilesStep`, as far as measuring needs it."""

    def usage(self, job_id: str) -> DiskUsage | None:
        """Return how full a job's disk is."""


class Limits(Protocol):
    """`hostd.limits.LimitWatch`, as far as measuring needs it."""

    def met(self, job_id: str) -> Incidents:
        """Return how often a job met its limits, as was last heard."""


class Network(Protocol):
    """`hostd.runtime.network.NetworkStep`, as far as measuring needs it."""

    @property
    def ready(self) -> int:
        """How many namespaces wait for a job."""


class Meter:
    """Measures; the pressure of each job costs half as much again as all the rest."""

    def __init__(
        self,
        *,
        cgroups: Cgroups,
        limits: Limits,
        logs: Logs,
        disks: Disks,
        network: Network,
        networks_wanted: int,
        state_dir: Path,
        spawner_pid: Callable[[], int],
    ) -> None:
        self._cgroups = cgroups
        self._limits = limits
        self._logs = logs
        self._disks = disks
        self._network = network
        self._networks_wanted = networks_wanted
        self._state_dir = state_dir
        self._spawner_pid = spawner_pid

    async def stats(self, records: Iterable[Record], *, has_pressure: bool) -> Stats:
        """Measure the machine and these jobs."""
        links = link_bytes(read_all("/proc/self/net/dev"))
        found = []
        for count, record in enumerate(records, 1):
            found.append(self._job(record, links, has_pressure=has_pressure))
            if count % _SLICE_JOBS == 0:
                await asyncio.sleep(0)
        return Stats(at=clock.now_s(), node=self._node(), jobs=tuple(found))

    def _job(self, record: Record, links: dict[str, tuple[int, int]], *, has_pressure: bool) -> JobStats:
        spec = record.job.spec
        name = record.network.netns_name if record.network is not None else None
        sent, received = links.get(name or "", (0, 0))  # what the host's end receives, the job has sent
        log, disk = self._logs.opened(spec.id), self._disks.usage(spec.id)
        met = self._limits.met(spec.id)
        usage = self._cgroups.usage(spec.id, has_quota=spec.resources.cpu_quota_millis > 0)
        return JobStats(
            id=spec.id,
            usage=msgspec.structs.replace(usage, oom_kills=met.oom_kills, forks_refused=met.forks_refused),
            memory_limit_bytes=spec.resources.memory_bytes,
            pids_limit=spec.resources.pids_max,
            started_at=record.job.started_at,
            restarts=record.restarts,
            network_received_bytes=received,
            network_sent_bytes=sent,
            log_bytes=0 if log is None else log.position,
            log_dropped_bytes=0 if log is None else log.bytes_dropped,
            temp_disk_bytes=0 if disk is None else disk.used_bytes,
            temp_disk_limit_bytes=0 if disk is None else spec.resources.temp_disk_bytes,
            pressure=self._cgroups.pressure(spec.id) if has_pressure else {},
        )

    def _node(self) -> NodeStats:
        memory = read("/proc/meminfo").replace(":", " ").replace("kB", "")
        disk = os.statvfs(self._state_dir)
        hostd_memory, hostd_cpu_s = process(os.getpid())
        spawner_memory, spawner_cpu_s = process(self._spawner_pid())
        return NodeStats(
            cpus=os.cpu_count() or 1,
            cpu_s=busy_s(read("/proc/stat")),
            memory_bytes=field(memory, "MemTotal") * 1024,
            memory_available_bytes=field(memory, "MemAvailable") * 1024,
            disk_bytes=disk.f_blocks * disk.f_frsize,
            disk_free_bytes=disk.f_bavail * disk.f_frsize,
            networks_ready=self._network.ready,
            networks_wanted=self._networks_wanted,
            hostd_memory_bytes=hostd_memory,
            hostd_cpu_s=hostd_cpu_s,
            spawner_memory_bytes=spawner_memory,
            spawner_cpu_s=spawner_cpu_s,
            pressure=pressure_in("/proc/pressure"),
        )


def read_all(file: str) -> str:
    """Return a whole file of any length, nothing if it is not there."""
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def link_bytes(text: str) -> dict[str, tuple[int, int]]:
    """Read /proc/net/dev: what each link received and sent, in bytes."""
    found = {}
    for line in text.splitlines()[2:]:
        name, _, numbers = line.partition(":")
        words = numbers.split(None, 9)
        found[name.strip()] = (int(words[0]), int(words[8]))
    return found


def busy_s(text: str) -> float:
    """Read /proc/stat: user, nice, system, irq, softirq and stolen time of all cores; guests are part of user."""
    words = text.partition("\n")[0].split()[1:]
    times = [int(word) for word in words]
    return (sum(times[:3]) + sum(times[5:8])) * _TICK_S


def process(pid: int) -> tuple[int, float]:
    """Return the resident bytes and the CPU time of a process; zeros when it is gone."""
    words = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(words) < 22:
        return 0, 0.0
    return int(words[21]) * _PAGE_BYTES, (int(words[11]) + int(words[12])) * _TICK_S
