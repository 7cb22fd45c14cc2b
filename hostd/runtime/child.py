"""Write down how a new process becomes the program that a spawn request asks for: from clone3 to execve.

The result is a `table` of system calls. Read `table_of` top to bottom: that is the whole order, and the order matters:

    cgroup first (so that all that follows is counted, and the cgroup namespace begins there),
    namespaces, then the root, then the terminal (it comes from the new root's devpts),
    then everything that takes rights away: the user namespace, capabilities, seccomp last.

The root is built with the host's rights, so that the job's own can change none of its mounts, but what is
created on the way belongs to root of the job: the file ids (setfsuid) are those of its range, with the
capabilities kept by SECBIT_NO_SETUID_FIXUP, which the user namespace resets. That is also what lets overlayfs make
its work directory through an idmapped mount, where the host's uid 0 does not exist.

The child says little to the spawner, over one SEQPACKET socket: PTY with the terminal's master, and READY when it is
held back (then it reads one byte, or end of file and exits). End of file means that the program runs, for the socket
closes on exec, or that the child is dead, and then the table tells what failed.

Called by `spawner`. Refuses what cannot be right, such as capabilities that do not exist (`KernelError`).
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import termios
from collections.abc import Mapping
from typing import Any, NamedTuple

from hostd.runtime.root import AT_FDCWD, Places, Root
from hostd.runtime.table import FAILED_STATUS, Label, Table
from netns import syscalls
from netns.errors import KernelError

INIT_PATH = "/dev/.hostd-init"
PTY, READY = b"pty", b"ready"

_NAMESPACES = {
    "mount": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "uts": syscalls.CLONE_NEWUTS,
    "ipc": syscalls.CLONE_NEWIPC,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
_ALL_NAMESPACES = sum(_NAMESPACES.values())
_TIOCGPTPEER, _TIOCSPTLCK = 0x5441, 0x40045431
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_SIG_SETMASK = 2
_F_OK, _X_OK = os.F_OK, os.X_OK
_CAPABILITY_VERSION_3 = 0x20080522
_HALF = 0xFFFFFFFF
LOOSE_NETWORK = (
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"),
    ("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647"),
)
"""Lets every user of a new network namespace take low ports and ping: its root has no power over it."""


class Ends(NamedTuple):
    """The child's fds: its talk with the spawner, its standard streams, the netns and userns to enter (-1 = none).

    `job` is the pidfd of a process that it joins in all its namespaces (in its user namespace as `userns`). `note` gets
    one byte when there is no way back any more: so the program has begun, though nobody may be left to tell.
    """

    channel: int
    stdin: int
    stdout: int
    stderr: int
    netns: int
    job: int
    userns: int
    note: int


class Warm(NamedTuple):
    """What the spawner worked out once for all its children."""

    root_dir: str
    bounding_set: int
    known_capabilities: int
    has_lowered_oom_score: bool


class CannotBegin(Exception):
    """The request cannot be written down; `failure` is what hostd is told."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(str(error))
        target = getattr(error, "target", "")
        syscall = getattr(error, "syscall", "")
        self.failure: dict[str, Any] = {
            **{"step": step, "errno": error.errno or 0, "syscall": syscall, "target": target},
            "message": error.args[-1],
        }


def clone_flags(request: Mapping[str, Any]) -> int:
    """Return what clone3 itself must do: only the pid namespace; the child unshares the rest.

    So who makes the children is free again after that, and both cores work when many jobs start at once.
    """
    return syscalls.CLONE_NEWPID if "pid" in request["namespaces"] else 0


def table_of(request: Mapping[str, Any], ends: Ends, warm: Warm, program: bytes) -> Table:
    """Return the calls that make a new child the program of `request`; `program` is its seccomp filter, may be empty.

    Raises:
        CannotBegin: some part of the request is wrong.
    """
    table = Table()
    try:
        _fill(table, request, ends, warm, program)
    except KernelError as error:
        raise CannotBegin(table.step, error) from error
    return table


def _fill(table: Table, request: Mapping[str, Any], ends: Ends, warm: Warm, program: bytes) -> None:
    call = table.call
    is_inside = ends.job >= 0
    execute, gone = Label(), Label()
    call("rt_sigprocmask", _SIG_SETMASK, bytes(8), 0, 8)
    places = _take_places(table, ends)
    call("setsid")
    call("umask", 0)
    if warm.has_lowered_oom_score:
        _write(table, "/proc/self/oom_score_adj", b"0")
    table.step = "cgroup"
    for path in request["cgroup_procs"]:
        _join_cgroup(table, path)
    table.step = "namespaces"
    if is_inside:
        call("setns", ends.job, _ALL_NAMESPACES)
    else:
        _enter_namespaces(table, request, ends.netns)
    if request["mounts"] is not None or is_inside:
        table.step = "keyring"  # one of its own, so that no key of the host or of another job is at hand
        call("keyctl", syscalls.KEYCTL_JOIN_SESSION_KEYRING, 0, accept=-errno.ENOSYS)
    if ends.userns >= 0:
        call("prctl", syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
        call("setfsgid", request["uid_base"])
        call("setfsuid", request["uid_base"])
    if request["mounts"] is not None:
        table.step = "mount"
        root = Root(table, warm.root_dir, places, ends.userns)
        root.carry_out(request["mounts"])
        table.step = "pivot_root"
        root.enter()
    table.step = "tty" if request["has_tty"] else "streams"
    if request["has_tty"]:
        _take_terminal(table, request, ends.channel, places)
    else:
        _take_pipes(table, request, ends)
    table.step = "rlimits"
    for name, value in request["rlimits"].items():
        _limit(table, name, value)
    table.step = "working_dir"
    call("umask", 0o022)
    call("chdir", request["working_dir"], target=request["working_dir"])
    table.step = "privileges"
    _drop_privileges(table, request, ends.userns, warm)
    table.step = "exec"
    _find_program(table, request, execute)
    if request["waits"]:  # a spawner that went away means that nobody will release us
        call("sendto", ends.channel, READY, len(READY), socket.MSG_NOSIGNAL, 0, 0)
        call("recvfrom", ends.channel, table.own(bytes(8)), 1, 0, 0, 0, zero=gone)
    _end_without_spawner(table, ends.channel, gone)
    if ends.note >= 0:
        call("write", ends.note, b"\n", 1)
    call("close_range", 3, 0x7FFFFFFF, syscalls.CLOSE_RANGE_CLOEXEC)
    if program:
        table.step = "seccomp"
        filter_at = table.words(len(program) // 8, table.own(program))
        call("prctl", syscalls.PR_SET_SECCOMP, syscalls.SECCOMP_MODE_FILTER, filter_at)
    table.jump(execute)
    table.place(gone)
    call("exit_group", FAILED_STATUS)


def _take_places(table: Table, ends: Ends) -> Places:
    """Close the spawner's other fds (a held-back child must not keep another job's stdin open), take some numbers."""
    first, kept = 3, {fd for fd in ends if fd >= 3}
    for fd in sorted(kept):
        if fd > first:
            table.call("close_range", first, fd - 1, 0)
        first = fd + 1
    table.call("close_range", first, 0x7FFFFFFF, 0)
    free = [fd for fd in range(3, 32) if fd not in kept][: len(Places._fields)]
    for fd in free:  # so that no open gets one of them by chance
        table.call("dup3", 0, fd, os.O_CLOEXEC)
    return Places(*free)


def _write(table: Table, path: str, data: bytes, error: Label | None = None) -> None:
    """Write to a file of the kernel's; the fd stays open until exec."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    table.call("openat", AT_FDCWD, path, flags, target=path, store=table.next_argument(0), error=error)
    table.call("write", -1, data, len(data), target=path)


def _join_cgroup(table: Table, procs: str) -> None:
    """Move the child into a cgroup.

    On v1 through `tasks`: it has one thread, and moving just the calling thread skips the machine-wide
    lock that makes a write to `cgroup.procs` stall for up to 15 ms (cgroup_procs_write_start in
    kernel/cgroup/cgroup.c). v2 has no `tasks`.
    """
    folder, name = os.path.split(procs)
    if name != "cgroup.procs":
        return _write(table, procs, b"0")
    is_v2, done = Label(), Label()
    _write(table, folder + "/tasks", b"0", error=is_v2)
    table.jump(done)
    table.place(is_v2)
    _write(table, procs, b"0")
    table.place(done)


def _enter_namespaces(table: Table, request: Mapping[str, Any], netns: int) -> None:
    flags = 0
    for name in request["namespaces"]:
        flags |= _NAMESPACES.get(name, 0)
    if flags:
        table.call("unshare", flags, target=hex(flags))
    if netns >= 0:
        table.call("setns", netns, syscalls.CLONE_NEWNET)
    elif flags & syscalls.CLONE_NEWNET:
        for path, data in LOOSE_NETWORK:
            _write(table, path, data)
        _raise_loopback(table)
    if flags & syscalls.CLONE_NEWNS:
        table.call("mount", 0, "/", 0, syscalls.MS_REC | syscalls.MS_PRIVATE, 0, target="/")
    if flags & syscalls.CLONE_NEWUTS and request["hostname"]:
        name = request["hostname"].encode()
        table.call("sethostname", name, len(name), target=request["hostname"])


def _raise_loopback(table: Table) -> None:
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    table.call("socket", socket.AF_INET, kind, 0, store=table.next_argument(0))
    table.call("ioctl", -1, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP), target="lo")


def _take_pipes(table: Table, request: Mapping[str, Any], ends: Ends) -> None:
    """Put the standard streams at 0, 1 and 2: pipes, or /dev/null."""
    if request["mounts"] is not None or ends.job >= 0:  # so that the program can open its /dev/stdout
        for fd in {ends.stdin, ends.stdout, ends.stderr} - {-1}:
            table.call("fchown", fd, request["uid_base"] + request["uid"], -1)
    if ends.stdin >= 0:
        table.call("dup3", ends.stdin, 0, 0)
    else:
        flags = os.O_RDWR | os.O_CLOEXEC
        table.call("openat", AT_FDCWD, "/dev/null", flags, target="/dev/null", store=table.next_argument(0))
        table.call("dup3", -1, 0, 0)
    table.call("dup3", ends.stdout, 1, 0)
    table.call("dup3", ends.stderr, 2, 0)


def _take_terminal(table: Table, request: Mapping[str, Any], channel: int, places: Places) -> None:
    """Open a terminal of the job's own devpts, send its master to the spawner, and make its slave the streams."""
    call, found = table.call, Label()
    master = places.source
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    other = Label()
    call("openat", AT_FDCWD, "/dev/pts/ptmx", flags, store=table.argument(table.length + 2, 0), error=other, more=found)
    table.place(other)
    call("openat", AT_FDCWD, "/dev/ptmx", flags, target="/dev/ptmx", store=table.next_argument(0))
    table.place(found)
    call("dup3", -1, master, os.O_CLOEXEC)
    call("ioctl", master, _TIOCSPTLCK, bytes(8))
    call("ioctl", master, _TIOCGPTPEER, flags, store=table.next_argument(0))
    call("dup3", -1, 0, 0)
    call("ioctl", 0, termios.TIOCSWINSZ, struct.pack("HHHH", request["rows"], request["columns"], 0, 0))
    if request["uid"]:
        call("fchown", 0, request["uid_base"] + request["uid"], -1)
    control = struct.pack("QiiiI", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, master, 0)
    vector = table.words(table.keep(PTY), len(PTY))
    message = table.words(0, 0, table.keep(vector), 1, table.keep(control), len(control), 0)
    call("sendmsg", channel, message, socket.MSG_NOSIGNAL)
    call("dup3", 0, 1, 0)
    call("dup3", 0, 2, 0)
    call("ioctl", 0, termios.TIOCSCTTY, 0)


def _limit(table: Table, name: str, value: int) -> None:
    """Set a limit, soft and hard, at most the hard limit we have (we may lack CAP_SYS_RESOURCE)."""
    number = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(number)[1]
    wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
    table.call("prlimit64", 0, number, table.words(wanted, wanted), 0, target=name)


def _drop_privileges(table: Table, request: Mapping[str, Any], userns: int, warm: Warm) -> None:
    """Enter the user namespace, drop capabilities for good, become the user, and let nothing give rights back."""
    call = table.call
    uid, gid, names = request["uid"], request["gid"], request["capabilities"]
    has = warm.bounding_set
    if userns >= 0:
        call("setns", userns, syscalls.CLONE_NEWUSER)
        has = warm.known_capabilities  # all of them, over what the namespace owns
        if request["mounts"] is not None and names is not None and "SYS_ADMIN" in names:
            # These it may have as its own: copies, in which it can unmount nothing of what the plan mounted.
            call("unshare", syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS)
    keep = has if names is None else syscalls.capability_mask(names) & has
    drop = has & ~keep
    dropped = tuple((syscalls.PR_CAPBSET_DROP, number) for number in range(drop.bit_length()) if drop >> number & 1)
    table.calls("prctl", dropped)
    call("setgroups", 1, struct.pack("II", gid, 0))
    call("setresgid", gid, gid, gid)
    call("setresuid", uid, uid, uid)
    if names is not None:
        own = keep if uid == 0 else 0
        sets = struct.pack("6I", own & _HALF, own & _HALF, 0, own >> 32, own >> 32, 0)
        call("capset", struct.pack("Ii", _CAPABILITY_VERSION_3, 0), sets)
    if request["has_no_new_privs"]:
        call("prctl", syscalls.PR_SET_NO_NEW_PRIVS, 1)


def _find_program(table: Table, request: Mapping[str, Any], execute: Label) -> None:
    """Find the program as a shell would, in the new root and as the job's user; `execute` gets the execve itself."""
    args, env, after = list(request["args"]), request["env"], Label()
    name = args[0]
    first = [INIT_PATH, "--"] if request["has_init"] else []
    environment = table.pointers([f"{key}={value}" for key, value in env.items()])
    table.jump(after)
    table.place(execute)
    path_at = table.argument(table.length, 0)
    table.call("execve", first[0] if first else name, table.pointers([*first, *args]), environment, target=name)
    table.place(after)
    if "/" in name:
        denied = f'exec: "{name}": permission denied'
        missing = f'exec: "{name}": no such file or directory'
        found = Label()
        table.call("faccessat", AT_FDCWD, name, _F_OK, target=name, message=missing)
        table.call("faccessat", AT_FDCWD, name, _X_OK, target=name, message=denied)
        table.call("openat", AT_FDCWD, name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, error=found)
        table.fail(errno.EACCES, target=name, message=denied)
        table.place(found)
        return
    done = Label()
    for folder in env.get("PATH", "").split(":"):
        path, other, found = f"{folder or '.'}/{name}", Label(), Label()
        table.call("faccessat", AT_FDCWD, path, _X_OK, error=other)
        table.call("openat", AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, error=found, more=other)
        table.place(found)
        if not first:
            table.set_word(path, path_at)
        table.jump(done)
        table.place(other)
    table.fail(errno.ENOENT, target=name, message=f'exec: "{name}": executable file not found in $PATH')
    table.place(done)


def _end_without_spawner(table: Table, channel: int, gone: Label) -> None:
    """Go no further if the spawner is gone: nobody knows of a child that has not become its program yet."""
    running = Label()
    table.call("recvfrom", channel, table.own(bytes(8)), 1, socket.MSG_DONTWAIT, 0, 0, zero=gone, error=running)
    table.place(running)
