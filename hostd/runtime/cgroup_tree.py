"""What both cgroup versions share: one directory a job below `<mount>/<parent>` in each hierarchy, and its files.

In a hierarchy that is `flat` it is `<mount>/<parent>~<job>`. Touches nothing else. A job is killed by first forbidding
it new processes (v1) or by the kernel (v2, and v1 beside a mounted v2), so a fork bomb cannot outrun it. Refuses a
parent name that could lead elsewhere. Called by `hostd.runtime.cgroup_v1` and `hostd.runtime.cgroup_v2`, which know
the files.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from errno import EBUSY, EOPNOTSUPP, ETIMEDOUT
from pathlib import Path

import msgspec

from discovery.wire.clock import monotonic_s
from hostd.types import JobId, Pressure, Resources, Usage, parse_job_id
from netns.errors import KernelError

CPU_PERIOD_US = 100_000
IO_WEIGHT_DEFAULT = 100
DYING_MILLIS = 1000
JOBS_WEIGHT = 10
"""All jobs together weigh as much as so many ordinary processes of the host, among which they would else be one."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_READ_BYTES = 16 * 1024


class CgroupState(msgspec.Struct, frozen=True, kw_only=True):
    """`procs` are the cgroup.procs files into which the job's first process writes `0` before anything else.

    `view` is what the job may look at: its own directories by controller, on cgroup v2 the one, by "".
    """

    procs: tuple[str, ...]
    view: dict[str, str] = {}


class Incidents(msgspec.Struct, frozen=True, kw_only=True):
    """How often a job met its limits. `is_host_oom`: it lost processes although it never met its own memory limit."""

    oom_kills: int = 0
    is_host_oom: bool = False
    forks_refused: int = 0


class CgroupStep(ABC):
    """The limits of this node's jobs."""

    version: int
    missing: tuple[str, ...]
    """Controllers, or parts of them, that the machine lacks: these limits are not enforced."""

    def __init__(self, hierarchies: Iterable[Path], parent: str, flat: Path | None = None) -> None:
        if not _NAME.fullmatch(parent):
            raise ValueError(f"cgroup parent {parent!r}")
        every = tuple(dict.fromkeys(hierarchies))
        self._flat, self._flat_begin = flat, f"{parent}~"
        self._tops = tuple(hierarchy / parent for hierarchy in every if hierarchy != flat)
        self._begins = tuple(self._begin(hierarchy, parent) for hierarchy in every)
        self._older = f"{flat}/{parent}"
        self._has_tops = False
        self._still: dict[str, set[str]] = {}
        """Why jobs are held still: `freeze` and `hold` may both want it, and it ends when nobody does."""

    async def apply(self, job_id: str, resources: Resources) -> CgroupState:
        """Make the job's cgroups with their limits set.

        Raises:
            KernelError: a limit was refused; nothing is left.
        """
        made = self._names_of(job_id)
        try:
            if not self._has_tops or not self._make(made):
                self._ensure_tops()
                self._has_tops = True
                for directory in made:
                    mkdir(Path(directory))
            for directory in made:
                os.chmod(directory, 0o755)  # noqa: PTH101, S103 — whatever the daemon's umask: the job may look at it
            for file, value in self._limits(job_id, resources):
                write(file, value)
        except BaseException:
            await self.undo(job_id)
            raise
        return CgroupState(procs=self.procs(job_id), view=self._view(job_id))

    def _begin(self, hierarchy: Path, parent: str) -> str:
        """Return what, with a job's id behind it, is the job's directory."""
        return f"{hierarchy}/{self._flat_begin}" if hierarchy == self._flat else f"{hierarchy}/{parent}/"

    @staticmethod
    def _make(directories: Iterable[str]) -> bool:
        """Make a job's cgroups; return whether what they are in is there."""
        try:
            for directory in directories:
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o755)  # noqa: PTH102 — each start makes five
        except FileNotFoundError:
            return False
        except OSError as error:
            raise KernelError(error.errno or 0, "mkdir", directory) from error
        return True

    def procs(self, job_id: str) -> tuple[str, ...]:
        """Return the files into which a process writes `0` to be one of the job's."""
        return tuple(f"{directory}/cgroup.procs" for directory in self._names_of(job_id))

    async def undo(self, job_id: str) -> None:
        """Kill what is left inside and remove the job's cgroups; may be called twice, or without apply.

        The kernel removes no cgroup that has a process or a cgroup inside, so trying is how to find out: there is
        nothing to kill in one that goes, and a job that ended by itself costs no look into each hierarchy.
        """
        if left := [directory for directory in self._names_of(job_id) if not _is_removed(directory)]:
            await self.kill(job_id)
            for directory in left:
                await _remove_tree(Path(directory))
        if self._flat is not None:
            _is_removed(f"{self._older}/{job_id}")  # where an older hostd had it

    async def kill(self, job_id: str, timeout_s: float = 5.0) -> None:
        """Kill every process of the job and return when none is left.

        Raises:
            KernelError: (ETIMEDOUT) some did not die in time.
        """
        deadline = monotonic_s() + timeout_s
        pause_s = 0.001
        while self.pids(job_id):
            if pause_s == 0.001 and self.is_demoted(job_id):  # it needs the CPU to die, and idle it may wait for long
                self.promote(job_id, DYING_MILLIS)
            self._kill_once(job_id)
            if monotonic_s() > deadline:
                raise KernelError(ETIMEDOUT, "kill", f"job {job_id}, processes {self.pids(job_id)[:10]}")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    async def freeze(self, job_id: str, timeout_s: float = 5.0) -> None:
        """Hold all processes of the job still until `thaw`, with v2's freezer.

        Raises:
            KernelError: (EOPNOTSUPP) there is no freezer; (ETIMEDOUT) some did not stop, and all go on.
        """
        if not any(directory.exists() for directory in self._directories(job_id)):  # it has just ended
            return
        if not (file := self._hold_for(job_id, "freeze")):
            raise KernelError(EOPNOTSUPP, "freeze", f"job {job_id}: no cgroup v2 is mounted")
        deadline = monotonic_s() + timeout_s
        while not field(read(str(file.with_name("cgroup.events"))), "frozen"):
            if monotonic_s() > deadline:
                self.thaw(job_id)
                raise KernelError(ETIMEDOUT, "freeze", f"job {job_id}")
            await asyncio.sleep(0.002)

    def thaw(self, job_id: str) -> None:
        """Let a frozen job go on, unless it is on `hold`; one that is not frozen, or gone, is fine."""
        self._let_go_for(job_id, "freeze")

    def hold(self, job_id: str) -> None:
        """Hold all processes of a job still until `let_go`, as soon as each gets there; without v2 nothing happens."""
        with suppress(KernelError):
            self._hold_for(job_id, "hold")

    def let_go(self, job_id: str) -> None:
        """Take `hold` back; of a job that is not held, or gone, is fine."""
        self._let_go_for(job_id, "hold")

    def _hold_for(self, job_id: str, why: str) -> Path | None:
        """Freeze a job for one more reason; return the file, None without a freezer."""
        for directory in self._directories(job_id):
            if (file := directory / "cgroup.freeze").exists():
                self._still.setdefault(job_id, set()).add(why)
                write(file, "1")
                return file
        return None

    def _let_go_for(self, job_id: str, why: str) -> None:
        reasons = self._still.get(job_id, set())
        reasons.discard(why)
        if reasons:
            return
        self._still.pop(job_id, None)
        for directory in self._directories(job_id):
            with suppress(OSError):
                file = directory / "cgroup.freeze"
                if file.read_text().strip() == "1":
                    file.write_text("0")

    def is_at_pids_limit(self, job_id: str) -> bool:
        """Tell whether a job has as many processes and threads as it may have."""
        limit, now = (read(f"{self._pids_dir(job_id)}{name}").strip() for name in ("pids.max", "pids.current"))
        return limit.isdigit() and now.isdigit() and int(now) >= int(limit)

    @abstractmethod
    def _pids_dir(self, job_id: str) -> str:
        """Return where the job's number of processes is, with a slash."""

    def pids(self, job_id: str) -> tuple[int, ...]:
        """Return the job's processes, as the host numbers them."""
        found = {pid for directory in self._directories(job_id) for pid in _pids_below(directory)}
        return tuple(sorted(found))

    def list(self) -> tuple[str, ...]:
        """Return the ids of all jobs that have a cgroup."""
        found = {name for top in self._tops for name in _names(top)}
        if self._flat is not None:
            begin = self._flat_begin
            found |= {name[len(begin) :] for name in _names(self._flat) if name.startswith(begin)}
        return tuple(sorted(found))

    async def teardown(self) -> None:
        """Kill all jobs that are left and remove `<parent>` itself."""
        for job_id in self.list():
            await self.undo(job_id)
        for top in self._tops:
            await _remove_tree(top)
        if self._flat is not None:
            _is_removed(self._older)

    def _directories(self, job_id: str) -> tuple[Path, ...]:
        return tuple(Path(name) for name in self._names_of(job_id))

    def _names_of(self, job_id: str) -> tuple[str, ...]:
        name: JobId = parse_job_id(job_id)
        return tuple(begin + name for begin in self._begins)

    def _ensure_tops(self) -> None:
        for top in self._tops:
            mkdir(top)

    def _kill_each(self, job_id: str) -> None:
        for pid in self.pids(job_id):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @abstractmethod
    def _view(self, job_id: str) -> dict[str, str]:
        """Return the directories in which programs look for their limits, by controller."""

    def limit_disk(self, job_id: str, resources: Resources, device: str) -> None:
        """Set the job's io limits for one more disk, such as its own.

        Raises:
            KernelError: they were refused.
        """
        for file, value in self._disk_limits(job_id, resources, device):
            write(file, value)

    @abstractmethod
    def _disk_limits(self, job_id: str, resources: Resources, device: str) -> Iterator[tuple[Path, str]]:
        """Say which files get which io limits."""

    def demote(self, job_id: str) -> None:
        """Have the job's tasks run only when nobody else wants to, or (before Linux 5.15) with the least weight."""
        file = self._weight_file(job_id)
        with suppress(KernelError):
            if (file.parent / "cpu.idle").exists():
                write(file.parent / "cpu.idle", "1")
            elif file.exists():
                write(file, self.weight_min)

    def promote(self, job_id: str, cpu_millis: int) -> None:
        """Take `demote` back."""
        file = self._weight_file(job_id)
        with suppress(KernelError):
            if (file.parent / "cpu.idle").exists():
                write(file.parent / "cpu.idle", "0")
            if file.exists():
                write(file, self.weight(cpu_millis))

    def is_demoted(self, job_id: str) -> bool:
        """Tell whether a job was demoted, maybe by an earlier hostd."""
        file = self._weight_file(job_id)
        return read(f"{file.parent}/cpu.idle").strip() == "1" or read(str(file)).strip() == self.weight_min

    @abstractmethod
    def _weight_file(self, job_id: str) -> Path:
        """Return the file that holds the job's CPU weight."""

    weight_min: str

    @abstractmethod
    def weight(self, cpu_millis: int) -> str:
        """Return what belongs into that file."""

    @abstractmethod
    def cpu_s(self, job_id: str) -> float:
        """Return how long the job's tasks have run; one small file."""

    @abstractmethod
    def incidents(self, job_id: str) -> Incidents:
        """Return how often the job met its limits."""

    @abstractmethod
    def usage(self, job_id: str, *, has_quota: bool = True) -> Usage:
        """Return what the job uses now, without what `incidents` says.

        Memory is without the page cache that can be dropped at once. Without `has_quota` nothing can be throttled.
        """

    @abstractmethod
    def pressure(self, job_id: str) -> dict[str, Pressure]:
        """Return how long the job's tasks waited for `cpu`, `memory` and `io`; without a v2 mount nothing."""

    has_fork_events: bool
    """Whether the kernel tells (through `watched`) of refused forks; else `forks_refused` has to be asked."""

    @abstractmethod
    def forks_refused(self, job_id: str) -> int:
        """Return how many processes and threads the limit forbade; one small file."""

    @abstractmethod
    def watched(self, job_id: str) -> tuple[str, ...]:
        """Return the files in which the kernel reports (to inotify) that a limit was met."""

    @abstractmethod
    def oom_control(self, job_id: str) -> tuple[str, str] | None:
        """Return v1's pair of files with which an eventfd is told of memory that ran out; v2 needs none."""

    @abstractmethod
    def unenforced(self, resources: Resources) -> tuple[str, ...]:
        """Return the fields that this job asks for and that this machine cannot enforce."""

    @abstractmethod
    def _limits(self, job_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        """Say which files get which values, in order."""

    @abstractmethod
    def _kill_once(self, job_id: str) -> None:
        """Send SIGKILL to all processes there are now."""


def quota_us(resources: Resources) -> int:
    """Return how long the job may run in a period."""
    return max(1000, resources.cpu_quota_millis * CPU_PERIOD_US // 1000)


def io_limits(resources: Resources) -> dict[str, int]:
    """Return the limits that are set, by v2's names."""
    found = {
        "rbps": resources.io_read_bytes_per_s,
        "wbps": resources.io_write_bytes_per_s,
        "riops": resources.io_read_ops_per_s,
        "wiops": resources.io_write_ops_per_s,
    }
    return {name: value for name, value in found.items() if value}


# files


def read(file: str) -> str:
    """Return the beginning of a file that may be gone: then it is empty. Much cheaper than `Path.read_text`."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, _READ_BYTES).decode()
    except OSError:  # ENODEV: it went between open and read
        return ""
    finally:
        os.close(fd)


def number(file: str) -> int:
    """Return the number in a file, 0 without."""
    text = read(file)
    return int(text) if text else 0


def field(text: str, name: str) -> int:
    """Return the number beside a name in lines of `name number`, 0 without."""
    at = 0 if text.startswith(name + " ") else text.find(f"\n{name} ") + 1
    if at == 0 and not text.startswith(name + " "):
        return 0
    begin = at + len(name) + 1
    end = text.find("\n", begin)
    return int(text[begin:] if end < 0 else text[begin:end])


def pressure_in(directory: str) -> dict[str, Pressure]:
    """Read PSI of a v2 cgroup, or of the host from `/proc/pressure` (`directory` + `NAME`)."""
    found = {}
    for name in ("cpu", "memory", "io"):
        some, _, full = read(f"{directory}{name}{'.pressure' if directory[-1:] == '/' else ''}").partition("\n")
        if some:
            found[name] = Pressure(some_s=_total_s(some), full_s=_total_s(full))
    return found


def _total_s(line: str) -> float:
    total = line.rpartition("total=")[2].strip()
    return int(total) / 1e6 if total else 0.0


def mkdir(directory: Path) -> None:
    """Make a cgroup; one that is there is fine.

    Raises:
        KernelError
    """
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise KernelError(error.errno or 0, "mkdir", str(directory)) from error


def write(file: Path, value: str) -> None:
    """Write one value.

    Raises:
        KernelError: it is refused; `target` names file and value.
    """
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError(error.errno or 0, "write", f"{file} = {value}") from error


def _names(directory: Path) -> tuple[str, ...]:
    """Return the names of the cgroups in one; asked for all jobs once a minute, hence not as paths."""
    try:
        return tuple(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return ()


def _children(directory: Path) -> tuple[Path, ...]:
    return tuple(directory / name for name in _names(directory))


def _pids_below(directory: Path) -> Iterator[int]:
    """Yield the processes of a cgroup and of those below it; none when it is gone."""
    with suppress(FileNotFoundError, OSError):
        yield from (int(pid) for pid in (directory / "cgroup.procs").read_text().split())
    for child in _children(directory):
        yield from _pids_below(child)


def _is_removed(directory: str) -> bool:
    """Remove a cgroup that nothing is in; tell whether it is gone."""
    try:
        os.rmdir(directory)  # noqa: PTH106 — each end removes five
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
