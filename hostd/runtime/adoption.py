"""Find again what a spawner that died has left behind: its jobs by their cgroups, plain processes by their command.

A job is known by the process that is pid 1 of the job's pid namespace and sits in the job's own cgroup. A
child that had not yet become its program still has the spawner's command line, or the executable that `seed`
has given it: it is a straggler, and is killed before a new spawner starts, so that whatever is in a job's
cgroup after that is the job. Called by `process` and the daemon.
Refuses to guess: what it cannot tell for sure it does not find.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from hostd.runtime import ending

STRAGGLER_END_S = 2.0
_PROC = Path("/proc")
_STREAM_FDS = {"stdin": (0, os.O_WRONLY), "stdout": (1, os.O_RDONLY), "stderr": (2, os.O_RDONLY)}


class Adoption(msgspec.Struct, frozen=True, kw_only=True):
    """A process as a new spawner is told of it; `streams` name the fds that come with it, `pidfd` first.

    One that has ended comes without a pidfd; its `status` may be unknown (`None`). Times are seconds since the epoch.
    """

    id: str
    pid: int
    streams: tuple[str, ...]
    job_id: str = ""
    netns: str = ""
    uid_base: int = 0
    started_at: float = 0
    status: int | None = None
    ended_at: float = 0


class Living(NamedTuple):
    """A process held fast by its pidfd, which is the caller's to close."""

    pid: int
    pidfd: int

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return ending.is_over(self.pidfd)


def hold(pid: int) -> Living | None:
    """Hold a process fast; None if there is none of that number."""
    try:
        return Living(pid, os.pidfd_open(pid))
    except OSError:
        return None


def find_job(pids: Iterable[int]) -> Living | None:
    """Return the first process of a job's pid namespace, given the processes of the job's cgroup."""
    for pid in sorted(pids, key=lambda pid: len(_namespace_pids(pid))):  # the outermost namespace first
        if found := _hold_if(pid, lambda pid: _namespace_pids(pid)[1:][-1:] == [1]):
            return found
    return None


def has_command(pid: int, args: Sequence[str]) -> bool:
    """Tell whether a process has exactly this command line."""
    return _command_line(pid) == b"".join(os.fsencode(arg) + b"\0" for arg in args)


def find_command(args: Sequence[str]) -> Living | None:
    """Return the process whose command line begins with these."""
    wanted = b"".join(os.fsencode(arg) + b"\0" for arg in args)
    for pid in _all_pids():
        if found := _hold_if(pid, lambda pid: _command_line(pid).startswith(wanted)):
            return found
    return None


def open_streams(pid: int, names: Iterable[str]) -> dict[str, int]:
    """Open other ends of the pipes that a process has as its standard streams; those that are no pipes are left out."""
    found = {}
    for name in names:
        number, flags = _STREAM_FDS[name]
        with contextlib.suppress(OSError):
            path = _PROC / str(pid) / "fd" / str(number)
            if str(path.readlink()).startswith("pipe:"):
                found[name] = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    return found


def kill_stragglers(run_dir: Path) -> None:
    """Kill this node's spawner and all its children that have not become programs; wait until they are gone."""
    end = b"\0--run-dir\0%b\0" % os.fsencode(run_dir)
    executable = f"/memfd:hostd-child:{str(run_dir)[:200]} (deleted)"

    def is_straggler(pid: int) -> bool:
        line = _command_line(pid)
        return (b"/spawner.py\0" in line and line.endswith(end)) or _executable(pid) == executable

    found = [_hold_if(pid, is_straggler) for pid in _all_pids()]
    held = [living for living in found if living is not None]
    for living in held:  # all at once, then wait for each
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(living.pidfd, signal.SIGKILL)
    for living in held:
        kill(living)


def kill(living: Living) -> None:
    """Kill a process, wait until it is gone and let go of it."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(living.pidfd, signal.SIGKILL)
    ending.is_over(living.pidfd, STRAGGLER_END_S)
    os.close(living.pidfd)


def _hold_if(pid: int, is_it: Callable[[int], bool]) -> Living | None:
    """Hold a process fast and look whether it is the one: in this order, for its number may become another's."""
    if not is_it(pid):  # nearly all: no need to hold them
        return None
    living = hold(pid)
    if living is None:
        return None
    if is_it(pid) and not living.is_over:
        return living
    os.close(living.pidfd)
    return None


def _all_pids() -> Iterator[int]:
    yield from (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _command_line(pid: int) -> bytes:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def _executable(pid: int) -> str:
    try:
        return str((_PROC / str(pid) / "exe").readlink())
    except OSError:
        return ""


def _namespace_pids(pid: int) -> list[int]:
    """Return the process's numbers, from our own pid namespace to its innermost."""
    try:
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    except OSError:
        pass
    return []
