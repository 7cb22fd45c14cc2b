"""Launch step one: put limits on a job, on cgroup v1 or v2, whichever the machine has.

Touches nothing outside `<mount>/<parent>`. Controllers that the machine lacks are skipped and named in
`missing`. A job is killed by first forbidding it new processes (v1) or by the kernel (v2), so a fork bomb cannot
outrun it. Called by `hostd.runtime.launch` (apply, undo) and `hostd.daemon` (kill, usage, oom_count, teardown).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from errno import EBUSY, ENODEV, ETIMEDOUT
from pathlib import Path

import msgspec

from discovery.wire.clock import monotonic_s
from hostd.types import JobId, Resources, parse_job_id
from netns.errors import KernelError

_PERIOD_US = 100_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class CgroupState(msgspec.Struct, frozen=True, kw_only=True):
    """`procs` are the cgroup.procs files into which the job's first process writes `0` before anything else."""

    procs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a job uses now; 0 where the machine cannot say."""

    memory_bytes: int
    cpu_s: float
    pids: int


@dataclass(frozen=True, kw_only=True)
class Mounts:
    """Where this machine's cgroups are: v1 controllers by name (several may share a directory), v2's root."""

    v1: Mapping[str, Path]
    v2: Path | None


class CgroupStep(ABC):
    """The limits of this node's jobs, one directory a job below `<parent>` in each hierarchy."""

    version: int
    missing: tuple[str, ...]
    """Controllers that the machine lacks: their limits are not enforced."""

    def __init__(self, hierarchies: Iterable[Path], parent: str) -> None:
        if not _NAME.fullmatch(parent):
            raise ValueError(f"cgroup parent {parent!r}")
        self._tops = tuple(dict.fromkeys(hierarchy / parent for hierarchy in hierarchies))

    async def apply(self, job_id: str, resources: Resources) -> CgroupState:
        """Make the job's cgroups with their limits set.

        Raises:
            KernelError: a limit was refused; nothing is left.
        """
        made = self._directories(job_id)
        try:
            self._ensure_tops()
            for directory in made:
                _mkdir(directory)
            for file, value in self._limits(job_id, resources):
                _write(file, value)
        except BaseException:
            await self.undo(job_id)
            raise
        return CgroupState(procs=tuple(str(directory / "cgroup.procs") for directory in made))

    async def undo(self, job_id: str) -> None:
        """Kill what is left inside and remove the job's cgroups; may be called twice, or without apply.

        The kernel removes no cgroup that has a process or a cgroup inside, so trying is how to find out: there is
        nothing to kill in one that goes, and a job that ended by itself costs no look into each hierarchy.
        """
        if left := [directory for directory in self._directories(job_id) if not _is_removed(directory)]:
            await self.kill(job_id)
            for directory in left:
                await _remove_tree(directory)

    async def kill(self, job_id: str, timeout_s: float = 5.0) -> None:
        """Kill every process of the job and return when none is left.

        Raises:
            KernelError: (ETIMEDOUT) some did not die in time.
        """
        deadline = monotonic_s() + timeout_s
        pause_s = 0.001
        while self.pids(job_id):
            self._kill_once(job_id)
            if monotonic_s() > deadline:
                raise KernelError(ETIMEDOUT, "kill", f"job {job_id}, processes {self.pids(job_id)[:10]}")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    def pids(self, job_id: str) -> tuple[int, ...]:
        """Return the job's processes, as the host numbers them."""
        found = {pid for directory in self._directories(job_id) for pid in _pids_below(directory)}
        return tuple(sorted(found))

    def list(self) -> tuple[str, ...]:
        """Return the ids of all jobs that have a cgroup."""
        found = {child.name for top in self._tops for child in _children(top)}
        return tuple(sorted(found))

    async def teardown(self) -> None:
        """Kill all jobs that are left and remove `<parent>` itself."""
        for job_id in self.list():
            await self.undo(job_id)
        for top in self._tops:
            await _remove_tree(top)

    def _directories(self, job_id: str) -> tuple[Path, ...]:
        name: JobId = parse_job_id(job_id)
        return tuple(top / name for top in self._tops)

    def _ensure_tops(self) -> None:
        for top in self._tops:
            _mkdir(top)

    @abstractmethod
    def oom_count(self, job_id: str) -> int:
        """Return how many of the job's processes were killed for its memory limit."""

    @abstractmethod
    def usage(self, job_id: str) -> Usage:
        """Return what the job uses now."""

    @abstractmethod
    def _limits(self, job_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        """Say which files get which values, in order."""

    @abstractmethod
    def _kill_once(self, job_id: str) -> None:
        """Send SIGKILL to all processes there are now."""


class CgroupV1(CgroupStep):
    """One directory a job in each of the hierarchies memory, cpu, cpuacct and pids (cpu and cpuacct are often one)."""

    version = 1

    def __init__(self, mounts: Mounts, parent: str) -> None:
        wanted = ("memory", "cpu", "pids", "cpuacct")
        self._roots = {name: mounts.v1[name] for name in wanted if name in mounts.v1}
        self.missing = tuple(name for name in wanted if name not in mounts.v1)
        super().__init__(self._roots.values(), parent)
        self._parent = parent

    def _file(self, controller: str, job_id: str, name: str) -> Path | None:
        root = self._roots.get(controller)
        return None if root is None else root / self._parent / job_id / name

    def _limits(self, job_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        memory = str(resources.memory_bytes)
        wanted = [
            ("memory", "memory.limit_in_bytes", memory),
            ("memory", "memory.memsw.limit_in_bytes", memory),  # no way out into swap
            ("cpu", "cpu.shares", str(max(2, resources.cpu_millis * 1024 // 1000))),
            ("pids", "pids.max", str(resources.pids_max)),
        ]
        if resources.cpu_quota_millis:
            wanted.append(("cpu", "cpu.cfs_quota_us", str(_quota_us(resources))))
        for controller, name, value in wanted:
            file = self._file(controller, job_id, name)
            if file is not None and (name != "memory.memsw.limit_in_bytes" or file.exists()):
                yield file, value

    def _kill_once(self, job_id: str) -> None:
        if (pids_max := self._file("pids", job_id, "pids.max")) is not None:
            with suppress(FileNotFoundError):
                pids_max.write_text("0")
        for pid in self.pids(job_id):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def oom_count(self, job_id: str) -> int:
        """Return `oom_kill` of memory.oom_control."""
        return _field(self._file("memory", job_id, "memory.oom_control"), "oom_kill")

    def usage(self, job_id: str) -> Usage:
        """Return memory without the page cache that can be dropped at once, CPU time and the number of tasks."""
        used = _number(self._file("memory", job_id, "memory.usage_in_bytes"))
        cache = _field(self._file("memory", job_id, "memory.stat"), "total_inactive_file")
        return Usage(
            memory_bytes=max(0, used - cache),
            cpu_s=_number(self._file("cpuacct", job_id, "cpuacct.usage")) / 1e9,
            pids=_number(self._file("pids", job_id, "pids.current")),
        )


class CgroupV2(CgroupStep):
    """One directory a job in the single hierarchy, with memory, cpu and pids enabled on the way down."""

    version = 2

    def __init__(self, root: Path, parent: str) -> None:
        super().__init__((root,), parent)
        self._root = root
        has = _controllers(root)
        self._enabled = tuple(name for name in ("memory", "cpu", "pids") if name in has)
        self.missing = tuple(name for name in ("memory", "cpu", "pids") if name not in has)

    def _ensure_tops(self) -> None:
        super()._ensure_tops()
        for directory in (self._root, self._tops[0]):
            delegated = (directory / "cgroup.subtree_control").read_text().split()
            for name in self._enabled:
                if name not in delegated:
                    _write(directory / "cgroup.subtree_control", f"+{name}")

    def _limits(self, job_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        directory = self._tops[0] / job_id
        if "memory" in self._enabled:
            yield directory / "memory.max", str(resources.memory_bytes)
            if (directory / "memory.swap.max").exists():
                yield directory / "memory.swap.max", "0"
        if "cpu" in self._enabled:
            yield directory / "cpu.weight", str(min(10_000, max(1, resources.cpu_millis // 10)))
            if resources.cpu_quota_millis:
                yield directory / "cpu.max", f"{_quota_us(resources)} {_PERIOD_US}"
        if "pids" in self._enabled:
            yield directory / "pids.max", str(resources.pids_max)

    def _kill_once(self, job_id: str) -> None:
        directory = self._tops[0] / job_id
        try:
            (directory / "cgroup.kill").write_text("1")
        except FileNotFoundError:  # before Linux 5.14, or gone
            for pid in self.pids(job_id):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def oom_count(self, job_id: str) -> int:
        """Return `oom_kill` of memory.events."""
        return _field(self._tops[0] / job_id / "memory.events", "oom_kill")

    def usage(self, job_id: str) -> Usage:
        """Return memory without the page cache that can be dropped at once, CPU time and the number of tasks."""
        directory = self._tops[0] / job_id
        cache = _field(directory / "memory.stat", "inactive_file")
        return Usage(
            memory_bytes=max(0, _number(directory / "memory.current") - cache),
            cpu_s=_field(directory / "cpu.stat", "usage_usec") / 1e6,
            pids=_number(directory / "pids.current"),
        )


def find_mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> Mounts:
    """Read where cgroups are mounted; the first mount of a controller counts."""
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        place = Path(before.split()[4])
        if kind == "cgroup2" and v2 is None:
            v2 = place
        elif kind == "cgroup":
            for option in options.split(","):
                v1.setdefault(option, place)
    return Mounts(v1=v1, v2=v2)


def open_cgroups(parent: str, mounts: Mounts | None = None) -> CgroupStep:
    """Choose v2 when it carries the memory and pids controllers, else v1, else v2 without limits.

    Raises:
        KernelError: neither is mounted.
    """
    found = mounts or find_mounts()
    if found.v2 is not None and {"memory", "pids"} <= _controllers(found.v2):
        return CgroupV2(found.v2, parent)
    if {"memory", "pids", "cpu"} & set(found.v1):
        return CgroupV1(found, parent)
    if found.v2 is not None:
        return CgroupV2(found.v2, parent)
    raise KernelError(ENODEV, "mount", "no cgroup hierarchy is mounted")


def _quota_us(resources: Resources) -> int:
    return max(1000, resources.cpu_quota_millis * _PERIOD_US // 1000)


def _controllers(root: Path) -> frozenset[str]:
    try:
        return frozenset((root / "cgroup.controllers").read_text().split())
    except OSError:
        return frozenset()


def _mkdir(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise KernelError(error.errno or 0, "mkdir", str(directory)) from error


def _write(file: Path, value: str) -> None:
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError(error.errno or 0, "write", f"{file} = {value}") from error


def _children(directory: Path) -> tuple[Path, ...]:
    try:
        return tuple(Path(entry.path) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return ()


def _pids_below(directory: Path) -> Iterator[int]:
    """Yield the processes of a cgroup and of those below it; none when it is gone."""
    with suppress(FileNotFoundError, OSError):
        yield from (int(pid) for pid in (directory / "cgroup.procs").read_text().split())
    for child in _children(directory):
        yield from _pids_below(child)


def _is_removed(directory: Path) -> bool:
    """Remove a cgroup that nothing is in; tell whether it is gone."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # busy, or something that `_remove_tree` will name
        return False
    return True


async def _remove_tree(directory: Path, timeout_s: float = 2.0) -> None:
    """Remove a cgroup and those below it; one that is not there is fine.

    The kernel may need a moment after the last process was killed, until it has let go of it.
    """
    for child in _children(directory):
        await _remove_tree(child, timeout_s)
    deadline = monotonic_s() + timeout_s
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != EBUSY or monotonic_s() > deadline:
                raise KernelError(error.errno or 0, "rmdir", str(directory)) from error
            await asyncio.sleep(0.002)
        else:
            return


def _number(file: Path | None) -> int:
    try:
        return int(file.read_text()) if file is not None else 0
    except OSError:
        return 0


def _field(file: Path | None, name: str) -> int:
    """Return the number beside a name in a file of `name number` lines, 0 without."""
    try:
        lines = file.read_text().splitlines() if file is not None else []
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + " ")), 0)
