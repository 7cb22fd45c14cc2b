"""Find out how a process ended, also one that is not a child of ours: it was adopted from a spawner that died.

Its parent tells exactly. Of a stranger's end the kernel tells what it can: since Linux 6.15 to whoever
has held a pidfd, before that as long as its zombie lies about. Where neither says, nobody knows, and
that is the answer. Called by `spawner` and `adoption`; standard library and `netns.syscalls` only.
"""

from __future__ import annotations

import os
import select

from netns import syscalls

_STATE, _EXIT_CODE = 0, 49  # of the words after the name; proc_pid_stat(5) counts them from 3
_CAP_SYS_PTRACE = 19


def is_over(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Tell whether the process has ended, reaped or not; wait for that at most so long."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def status_of(pid: int, pidfd: int) -> tuple[bool, int | None]:
    """Return (has it ended, exit code or 128+N for signal N); reaps a child of ours. A status of None is unknown."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return (True, _of_stranger(pid, pidfd)) if is_over(pidfd) else (False, None)
    if result is None:
        return False, None
    return True, result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def _of_stranger(pid: int, pidfd: int) -> int | None:
    told = syscalls.pidfd_exit_status(pidfd)
    if told is None:
        told = _of_zombie(pid, pidfd)
    if told is None:
        told = syscalls.pidfd_exit_status(pidfd)  # reaped just now
    if told is None:
        return None
    return 128 + (told & 0x7F) if told & 0x7F else told >> 8


def _of_zombie(pid: int, pidfd: int) -> int | None:
    """Read the wait status of a process that its parent has not reaped yet."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            is_the_same = b"Pid:\t%d\n" % pid in file.read()  # -1 once it is reaped, and the number another's
    except OSError:
        return None
    is_told = is_the_same and words[_STATE] == b"Z" and _is_shown_exit_codes()
    return int(words[_EXIT_CODE]) if is_told else None


def _is_shown_exit_codes() -> bool:
    """Tell whether /proc shows us the exit code of strangers; without the right to trace it says 0 for all."""
    with open("/proc/self/status", "rb") as file:
        held = next(line for line in file if line.startswith(b"CapEff:"))
    return bool(int(held.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
