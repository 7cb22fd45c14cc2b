"""A job's limits on cgroup v2: one directory in the single hierarchy, controllers enabled on the way down.

Io limits hold for buffered writes, too, where the file system supports it (ext4, xfs, btrfs). The io weight needs
BFQ, or io.cost switched on for the disk. Made by `hostd.runtime.cgroup.open_cgroups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hostd.runtime.cgroup_tree import (
    CPU_PERIOD_US,
    IO_WEIGHT_DEFAULT,
    JOBS_WEIGHT,
    CgroupStep,
    Incidents,
    field,
    io_limits,
    number,
    pressure_in,
    quota_us,
    read,
    write,
)
from hostd.types import Pressure, Resources, Usage

_WANTED = ("memory", "cpu", "pids", "io")


class CgroupV2(CgroupStep):
    """`root` is where v2 is mounted; `device` is `MAJOR:MINOR` of the disk under the jobs' files."""

    version = 2
    has_fork_events = True
    weight_min = "1"

    def __init__(self, root: Path, parent: str, device: str = "") -> None:
        super().__init__((root,), parent)
        self._root = root
        self._prefix = f"{self._tops[0]}/"
        self._device = device
        has = controllers(root)
        self._enabled = tuple(name for name in _WANTED if name in has)
        missing = [name for name in _WANTED if name not in has]
        if "io" in has and not device:
            missing.append("io device (no disk found under the state directory)")
        self.missing = tuple(missing)

    def _ensure_tops(self) -> None:
        super()._ensure_tops()
        for directory in (self._root, self._tops[0]):
            delegated = (directory / "cgroup.subtree_control").read_text().split()
            for name in self._enabled:
                if name not in delegated:
                    write(directory / "cgroup.subtree_control", f"+{name}")
        if "cpu" in self._enabled:
            write(self._tops[0] / "cpu.weight", str(100 * JOBS_WEIGHT))

    def _weight_file(self, job_id: str) -> Path:
        return Path(self._path(job_id) + "cpu.weight")

    def _pids_dir(self, job_id: str) -> str:
        return self._path(job_id)

    def weight(self, cpu_millis: int) -> str:
        """Return cpu.weight."""
        return str(min(10_000, max(1, cpu_millis // 10)))

    def cpu_s(self, job_id: str) -> float:
        """Read cpu.stat."""
        return field(read(self._path(job_id) + "cpu.stat"), "usage_usec") / 1e6

    def _limits(self, job_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        directory = self._tops[0] / job_id
        if "memory" in self._enabled:
            yield directory / "memory.max", str(resources.memory_bytes)
            if (directory / "memory.swap.max").exists():
                yield directory / "memory.swap.max", str(resources.swap_bytes)
        if "cpu" in self._enabled:
            yield directory / "cpu.weight", self.weight(resources.cpu_millis)
            if resources.cpu_quota_millis:
                yield directory / "cpu.max", f"{quota_us(resources)} {CPU_PERIOD_US}"
        if "pids" in self._enabled:
            yield directory / "pids.max", str(resources.pids_max)
        if "io" in self._enabled:
            yield from self._io_limits(directory, resources)

    def _io_limits(self, directory: Path, resources: Resources) -> Iterator[tuple[Path, str]]:
        if resources.io_weight != IO_WEIGHT_DEFAULT:
            for name in ("io.weight", "io.bfq.weight"):
                if (directory / name).exists():
                    yield directory / name, str(resources.io_weight)
        if self._device:
            yield from self._disk_limits(directory.name, resources, self._device)

    def _disk_limits(self, job_id: str, resources: Resources, device: str) -> Iterator[tuple[Path, str]]:
        limits = io_limits(resources)
        if limits and "io" in self._enabled:
            words = " ".join(f"{name}={value}" for name, value in limits.items())
            yield Path(self._path(job_id) + "io.max"), f"{device} {words}"

    def _view(self, job_id: str) -> dict[str, str]:
        return {"": str(self._tops[0] / job_id)}

    def unenforced(self, resources: Resources) -> tuple[str, ...]:
        """Return the fields that this job asks for and that this machine cannot enforce."""
        found = []
        if resources.io_weight != IO_WEIGHT_DEFAULT and not self._has_weight():
            found.append("io_weight (neither BFQ nor io.cost is on for the disk)")
        if io_limits(resources) and not ("io" in self._enabled and self._device):
            found.append("io limits")
        return tuple(found)

    def _has_weight(self) -> bool:
        if "io" not in self._enabled:
            return False
        if "[bfq]" in read(f"/sys/dev/block/{self._device}/queue/scheduler"):
            return True
        lines = read(f"{self._root}/io.cost.qos").splitlines()
        return any(line.startswith(f"{self._device} enable=1") for line in lines)

    def _kill_once(self, job_id: str) -> None:
        try:
            (self._tops[0] / job_id / "cgroup.kill").write_text("1")
        except FileNotFoundError:  # before Linux 5.14, or gone
            self._kill_each(job_id)

    def _path(self, job_id: str) -> str:
        return f"{self._prefix}{job_id}/"

    def incidents(self, job_id: str) -> Incidents:
        """Read memory.events and pids.events."""
        memory = read(self._path(job_id) + "memory.events")
        kills = field(memory, "oom_kill")
        return Incidents(
            oom_kills=kills,
            is_host_oom=kills > 0 and field(memory, "oom") == 0,
            forks_refused=self.forks_refused(job_id),
        )

    def usage(self, job_id: str, *, has_quota: bool = True) -> Usage:
        """Return what the job uses now, without what `incidents` says."""
        path = self._path(job_id)
        cpu = read(path + "cpu.stat")
        io = _io(read(path + "io.stat"))
        return Usage(
            memory_bytes=max(0, number(path + "memory.current") - field(read(path + "memory.stat"), "inactive_file")),
            cpu_s=field(cpu, "usage_usec") / 1e6,
            cpu_throttled_s=field(cpu, "throttled_usec") / 1e6,
            pids=number(path + "pids.current"),
            io_read_bytes=io["rbytes"],
            io_write_bytes=io["wbytes"],
            io_read_ops=io["rios"],
            io_write_ops=io["wios"],
        )

    def pressure(self, job_id: str) -> dict[str, Pressure]:
        """Return how long the job's tasks waited."""
        return pressure_in(self._path(job_id))

    def forks_refused(self, job_id: str) -> int:
        """Read pids.events."""
        return field(read(self._path(job_id) + "pids.events"), "max")

    def watched(self, job_id: str) -> tuple[str, ...]:
        """Return the files in which kills and refused forks are counted."""
        names = [name for name in ("memory", "pids") if name in self._enabled]
        return tuple(f"{self._path(job_id)}{name}.events" for name in names)

    def oom_control(self, job_id: str) -> tuple[str, str] | None:
        """Return nothing: memory.events is watched like any other file."""
        return None


def controllers(root: Path) -> frozenset[str]:
    """Return what a v2 mount has to give."""
    return frozenset(read(f"{root}/cgroup.controllers").split())


def _io(text: str) -> dict[str, int]:
    """Add up the `name=number` words of io.stat over the devices."""
    totals = {"rbytes": 0, "wbytes": 0, "rios": 0, "wios": 0}
    for word in text.split():
        name, equals, value = word.partition("=")
        if equals and name in totals:
            totals[name] += int(value)
    return totals
