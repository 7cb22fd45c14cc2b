"""A job's limits on cgroup v1: one directory in each of the hierarchies memory, cpu, pids and blkio.

Beside a mounted v2 (a hybrid machine) the job gets a directory there, too: it carries no limits, but the kernel counts
CPU time and pressure in it and kills all of it at once, so `cpuacct` is only used where v2 is not mounted. In `cpu`
jobs are beside the host's own processes, not together in a directory: one that has to yield does so to both, and what
it takes is not held against the other jobs.
Not enforced by v1's kernel: io limits on buffered writes, which its flusher threads do (reads, O_DIRECT and O_SYNC
writes are), and the io weight with any disk scheduler but BFQ. Made by `hostd.runtime.cgroup.open_cgroups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hostd.runtime.cgroup_tree import (
    IO_WEIGHT_DEFAULT,
    CgroupStep,
    Incidents,
    field,
    io_limits,
    number,
    pressure_in,
    quota_us,
    read,
)
from hostd.types import Pressure, Resources, Usage

_THROTTLE = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}
_VISIBLE = ("memory", "cpu", "pids")
_LIMITING = ("memory", "cpu", "pids", "blkio")


class CgroupV1(CgroupStep):
    """`roots` are the hierarchies by controller; `device` is `MAJOR:MINOR` of the disk under the jobs' files."""

    version = 1
    has_fork_events = False
    weight_min = "2"

    def __init__(self, roots: dict[str, Path], unified: Path | None, parent: str, device: str = "") -> None:
        self._roots = {name: roots[name] for name in _LIMITING if name in roots}
        self._device = device
        self._unified = unified / parent if unified is not None and has_kill(unified) else None
        self._unified_prefix = f"{self._unified}/"
        hierarchies = list(self._roots.values())
        if self._unified is not None and unified is not None:
            hierarchies.append(unified)
        elif "cpuacct" in roots:
            hierarchies.append(roots["cpuacct"])
            self._roots["cpuacct"] = roots["cpuacct"]
        super().__init__(hierarchies, parent, flat=self._roots.get("cpu"))
        self._prefixes = {name: self._begin(root, parent) for name, root in self._roots.items()}
        self.missing = self._find_missing(roots)

    def _find_missing(self, roots: dict[str, Path]) -> tuple[str, ...]:
        found = [name for name in _LIMITING if name not in roots]
        if "memory" in roots and not (roots["memory"] / "memory.memsw.limit_in_bytes").exists():
            found.append("memory.memsw (swap is avoided, not bounded)")
        if "blkio" in roots:
            if not self._device:
                found.append("blkio device (no disk found under the state directory)")
            if not (roots["blkio"] / "blkio.throttle.read_bps_device").exists():
                found.append("blkio.throttle")
        if self._unified is None and "cpuacct" not in roots:
            found.append("cpuacct")
        return tuple(found)

    def _weight_file(self, job_id: str) -> Path:
        return Path(self._path("cpu", job_id) + "cpu.shares")

    def _pids_dir(self, job_id: str) -> str:
        return self._path("pids", job_id)

    def weight(self, cpu_millis: int) -> str:
        """Return the shares."""
        return str(max(2, cpu_millis * 1024 // 1000))

    def _path(self, controller: str, job_id: str) -> str:
        """Return the job's directory with a slash; one that does not exist if the machine lacks the controller."""
        return f"{self._prefixes.get(controller, '/nonexistent/')}{job_id}/"

    def _has(self, controller: str, job_id: str, name: str) -> bool:
        return controller in self._roots and Path(self._path(controller, job_id) + name).exists()

    def _limits(self, job_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        for controller, name, value in self._wanted(job_id, resources):
            if controller in self._roots:
                yield Path(self._path(controller, job_id) + name), value
        if self._device:
            yield from self._disk_limits(job_id, resources, self._device)

    def _disk_limits(self, job_id: str, resources: Resources, device: str) -> Iterator[tuple[Path, str]]:
        if "blkio" in self._roots:
            for name, value in io_limits(resources).items():
                yield Path(self._path("blkio", job_id) + _THROTTLE[name]), f"{device} {value}"

    def _wanted(self, job_id: str, resources: Resources) -> Iterator[tuple[str, str, str]]:
        yield "memory", "memory.limit_in_bytes", str(resources.memory_bytes)
        if self._has("memory", job_id, "memory.memsw.limit_in_bytes"):
            yield "memory", "memory.memsw.limit_in_bytes", str(resources.memory_bytes + resources.swap_bytes)
        elif not resources.swap_bytes:
            yield "memory", "memory.swappiness", "0"
        yield "cpu", "cpu.shares", self.weight(resources.cpu_millis)
        if resources.cpu_quota_millis:
            yield "cpu", "cpu.cfs_quota_us", str(quota_us(resources))
        yield "pids", "pids.max", str(resources.pids_max)
        if resources.io_weight != IO_WEIGHT_DEFAULT and self._has("blkio", job_id, "blkio.bfq.weight"):
            yield "blkio", "blkio.bfq.weight", str(resources.io_weight)

    def _view(self, job_id: str) -> dict[str, str]:
        return {name: self._path(name, job_id).rstrip("/") for name in _VISIBLE if name in self._roots}

    def unenforced(self, resources: Resources) -> tuple[str, ...]:
        """Return the fields that this job asks for and that this machine cannot enforce."""
        found = []
        if resources.io_weight != IO_WEIGHT_DEFAULT and not self._is_bfq():
            found.append("io_weight (the disk's scheduler is not BFQ)")
        if io_limits(resources):
            if "blkio" not in self._roots or not self._device:
                found.append("io limits")
            elif resources.io_write_bytes_per_s or resources.io_write_ops_per_s:
                found.append("io write limits for buffered writes (cgroup v1 throttles direct and synchronous ones)")
        if resources.swap_bytes and any(name.startswith("memory.memsw") for name in self.missing):
            found.append("swap_bytes")
        return tuple(found)

    def _is_bfq(self) -> bool:
        return "blkio" in self._roots and "[bfq]" in read(f"/sys/dev/block/{self._device}/queue/scheduler")

    def _kill_once(self, job_id: str) -> None:
        if "pids" in self._roots:
            with suppress(FileNotFoundError):
                Path(self._path("pids", job_id) + "pids.max").write_text("0")
        if self._unified is not None:
            with suppress(FileNotFoundError):
                (self._unified / job_id / "cgroup.kill").write_text("1")
        self._kill_each(job_id)

    def incidents(self, job_id: str) -> Incidents:
        """Read memory.oom_control, the highest memory use and pids.events."""
        memory = self._path("memory", job_id)
        kills = field(read(memory + "memory.oom_control"), "oom_kill")
        return Incidents(
            oom_kills=kills,
            is_host_oom=kills > 0 and not _was_full(memory),
            forks_refused=self.forks_refused(job_id),
        )

    def usage(self, job_id: str, *, has_quota: bool = True) -> Usage:
        """Return what the job uses now, without what `incidents` says; each file costs some 10 us."""
        memory, cpu, pids = (self._path(name, job_id) for name in ("memory", "cpu", "pids"))
        blkio = self._path("blkio", job_id)
        used = number(memory + "memory.usage_in_bytes")
        read_bytes, written_bytes = _io(read(blkio + "blkio.throttle.io_service_bytes"))
        reads, writes = _io(read(blkio + "blkio.throttle.io_serviced"))
        return Usage(
            memory_bytes=max(0, used - field(read(memory + "memory.stat"), "total_inactive_file")),
            cpu_s=self.cpu_s(job_id),
            cpu_throttled_s=field(read(cpu + "cpu.stat"), "throttled_time") / 1e9 if has_quota else 0.0,
            pids=number(pids + "pids.current"),
            io_read_bytes=read_bytes,
            io_write_bytes=written_bytes,
            io_read_ops=reads,
            io_write_ops=writes,
        )

    def cpu_s(self, job_id: str) -> float:
        """Read v2's cpu.stat, or cpuacct.usage."""
        if self._unified is not None:
            return field(read(f"{self._unified_prefix}{job_id}/cpu.stat"), "usage_usec") / 1e6
        return number(self._path("cpuacct", job_id) + "cpuacct.usage") / 1e9

    def pressure(self, job_id: str) -> dict[str, Pressure]:
        """Return how long the job's tasks waited, from the v2 directory beside."""
        return {} if self._unified is None else pressure_in(f"{self._unified_prefix}{job_id}/")

    def forks_refused(self, job_id: str) -> int:
        """Read pids.events."""
        return field(read(self._path("pids", job_id) + "pids.events"), "max")

    def watched(self, job_id: str) -> tuple[str, ...]:
        """Return nothing: v1's pids.events changes without a word to inotify."""
        return ()

    def oom_control(self, job_id: str) -> tuple[str, str] | None:
        """Return the files that tie an eventfd to memory that runs out."""
        if "memory" not in self._roots:
            return None
        memory = self._path("memory", job_id)
        return memory + "memory.oom_control", memory + "cgroup.event_control"


def _was_full(memory: str) -> bool:
    """Tell whether the limit was ever met, give or take what one charge may ask for (failcnt is 0 in Linux 6.18)."""
    limit = number(memory + "memory.limit_in_bytes")
    return number(memory + "memory.max_usage_in_bytes") >= limit - limit // 32


def has_kill(unified: Path) -> bool:
    """Tell whether v2 can kill whole cgroups (Linux 5.14) and count their CPU time; the root shows neither."""
    return (unified / "cgroup.procs").exists() and _release() >= (5, 14)


def _release() -> tuple[int, int]:
    major, minor = read("/proc/sys/kernel/osrelease").split(".")[:2]
    return int(major), int("".join(char for char in minor if char.isdigit()) or 0)


def _io(text: str) -> tuple[int, int]:
    """Add up `MAJOR:MINOR Read|Write NUMBER` over the devices."""
    read_total = written_total = 0
    for line in text.splitlines():
        if " Read " in line:
            read_total += int(line.rpartition(" ")[2])
        elif " Write " in line:
            written_total += int(line.rpartition(" ")[2])
    return read_total, written_total
