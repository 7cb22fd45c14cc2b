"""Become the process that a spawn request asks for: from the first instruction after clone3 to execve.

Runs in a copy-on-write child of the spawner and never returns. Standard library and
`netns.syscalls` only. Read `become` top to bottom: that is the whole order, and the order matters:

    cgroup first (so that all that follows is counted, and the cgroup namespace begins there),
    namespaces, then the root, then the terminal (it comes from the new root's devpts),
    then everything that takes rights away: the user namespace, capabilities, seccomp last.

The root is built with the host's rights, so that the job's own can change none of its mounts, but what is
created on the way belongs to root of the job: the file ids (setfsuid) are those of its range, with the
capabilities kept by SECBIT_NO_SETUID_FIXUP, which the user namespace resets. That is also what lets overlayfs make
its work directory through an idmapped mount, where the host's uid 0 does not exist.

Talks with the spawner over one SEQPACKET socket: `{"pty": 1}` with the terminal's master,
`{"ready": 1}` when held back (then reads one byte `g`, or end of file and exits),
`{"error": {step, errno, syscall, target, message}}` before it exits with 127. End of file without
an error means that the program runs: the socket closes on exec.

Refuses a root it cannot build exactly as told: every path of a mount step is resolved inside the
new root with openat2(RESOLVE_IN_ROOT), so no symbolic link of an image can point a mount at the host.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import stat
import struct
import termios
from typing import Any, NamedTuple, NoReturn

from netns import syscalls
from netns.errors import KernelError

INIT_PATH = "/dev/.hostd-init"
FAILED_STATUS = 127

_NAMESPACES = {
    "mount": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "uts": syscalls.CLONE_NEWUTS,
    "ipc": syscalls.CLONE_NEWIPC,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
_PLAN_VERBS = ("idmap", "attach", "mount", "mask", "mkdir", "file", "symlink", "mknod", "umount")
_TIOCGPTPEER, _TIOCSPTLCK = 0x5441, 0x40045431
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_PAGE_BYTES = 4096
_PER_MOUNT = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_RESET_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Ends(NamedTuple):
    """The child's fds: its talk with the spawner, its standard streams, the netns and userns to enter (-1 = none).

    `job` is the pidfd of a process that it joins in all its namespaces (in its user namespace as `userns`). `note` gets
    one byte when there is no way back any more: so the program has begun, though nobody may be left to tell.
    """

    channel: socket.socket
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


def clone_flags(request: dict[str, Any]) -> int:
    """Return what clone3 itself must do: only the pid namespace; the child unshares the rest.

    So the spawner is free again after the copy, and both cores work when many jobs start at once.
    """
    return syscalls.CLONE_NEWPID if "pid" in request["namespaces"] else 0


def become(request: dict[str, Any], ends: Ends, warm: Warm, program: bytes) -> NoReturn:
    """Turn this child into the program of `request`; `program` is its seccomp filter, may be empty."""
    step = "start"
    try:
        _close_all_but(ends)
        os.setsid()
        os.umask(0)
        for number in _RESET_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if warm.has_lowered_oom_score:
            _write("/proc/self/oom_score_adj", b"0")
        step = "cgroup"
        for path in request["cgroup_procs"]:
            _join_cgroup(path)
        step = "namespaces"
        if ends.job >= 0:
            _join(ends.job)
        else:
            _enter_namespaces(request, ends.netns)
        if request["mounts"] is not None or ends.job >= 0:
            step = "keyring"
            _leave_keyring()
        if ends.userns >= 0:
            syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
            syscalls.set_file_ids(request["uid_base"], request["uid_base"])
        if request["mounts"] is not None:
            step = "mount"
            root = Root(warm.root_dir, ends.userns)
            for mount_step in request["mounts"]:
                root.carry_out(mount_step)
            step = "pivot_root"
            root.enter()
        step = "tty" if request["has_tty"] else "streams"
        _take_streams(request, ends)
        step = "rlimits"
        for name, value in request["rlimits"].items():
            _limit(name, value)
        step = "working_dir"
        os.umask(0o022)
        os.chdir(request["working_dir"])
        step = "privileges"
        _drop_privileges(request, ends.userns, warm)
        step = "exec"
        path, args = _command(request)
        if request["waits"]:
            _hold(ends.channel)
        _end_without_spawner(ends.channel)
        if ends.note >= 0:
            os.write(ends.note, b"\n")
        syscalls.close_range(3, 0x7FFFFFFF, syscalls.CLOSE_RANGE_CLOEXEC)
        if program:
            step = "seccomp"
            syscalls.seccomp_load(program)
            step = "exec"
        os.execve(path, args, request["env"])
    except BaseException as error:
        with contextlib.suppress(BaseException):
            ends.channel.send(json.dumps({"error": _told(step, error)}).encode())
    os._exit(FAILED_STATUS)


class Refused(Exception):
    """A failure whose message is meant for the person who wrote the job."""

    def __init__(self, number: int, target: str, message: str) -> None:
        super().__init__(message)
        self.errno = number
        self.target = target


def _told(step: str, error: BaseException) -> dict[str, Any]:
    number = getattr(error, "errno", None) or 0
    target = getattr(error, "target", None) or getattr(error, "filename", None) or ""
    syscall = getattr(error, "syscall", "")
    if isinstance(error, KernelError | Refused):
        message = error.args[-1]
    elif isinstance(error, OSError):
        message = f"{step} {target}: {os.strerror(number)}" if target else f"{step}: {os.strerror(number)}"
    else:
        message = f"{type(error).__name__}: {error}"
    return {"step": step, "errno": number, "syscall": syscall, "target": str(target), "message": message}


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def _close_all_but(ends: Ends) -> None:
    """Close the spawner's other fds now: a held-back child must not keep another job's stdin open."""
    first = 3
    for fd in sorted({ends.channel.fileno(), *ends[1:]}):
        if fd >= first:
            if fd > first:
                syscalls.close_range(first, fd - 1, 0)
            first = fd + 1
    syscalls.close_range(first, 0x7FFFFFFF, 0)


def _join_cgroup(procs: str) -> None:
    """Move this process into a cgroup.

    On v1 through `tasks`: we have one thread, and moving just the calling thread skips the machine-wide
    lock that makes a write to `cgroup.procs` stall for up to 15 ms (cgroup_procs_write_start in
    kernel/cgroup/cgroup.c; facts/baselines.md). v2 has no `tasks`, and CLONE_INTO_CGROUP is a later gain.
    """
    folder, name = os.path.split(procs)
    if name == "cgroup.procs":
        try:
            return _write(folder + "/tasks", b"0")
        except FileNotFoundError:
            pass
    _write(procs, b"0")


def _enter_namespaces(request: dict[str, Any], netns: int) -> None:
    flags = 0
    for name in request["namespaces"]:
        flags |= _NAMESPACES.get(name, 0)
    if flags:
        syscalls.unshare(flags)
    if netns >= 0:
        syscalls.setns(netns, syscalls.CLONE_NEWNET)
        os.close(netns)
    elif flags & syscalls.CLONE_NEWNET:
        loosen_network()
        _raise_loopback()
    if flags & syscalls.CLONE_NEWNS:
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    if flags & syscalls.CLONE_NEWUTS and request["hostname"]:
        socket.sethostname(request["hostname"])


def _join(job: int) -> None:
    """Enter every namespace of a living process; its pid namespace is where we were born, its root is ours now."""
    flags = 0
    for flag in _NAMESPACES.values():
        flags |= flag
    syscalls.setns(job, flags)


def _leave_keyring() -> None:
    """Get a keyring of its own, so that no key of the host or of another job is at hand."""
    try:
        syscalls.keyctl_join_session_keyring()
    except KernelError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys has none to leak
            raise


def loosen_network() -> None:
    """Let every user of a new network namespace take low ports and ping: its root has no power over it.

    The namespace is the host's, and only the caller's network is touched.
    """
    _write("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0")
    _write("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        old = fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack("16sh22x", old)[1]
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


class Root:
    """The root directory under construction, in the child's own mount namespace."""

    def __init__(self, directory: str, userns: int = -1) -> None:
        """Use the (empty) `directory` as the place where the first mount puts the root itself."""
        self._directory = directory
        self._userns = userns
        self._fd = -1
        self._parent_fd = -1
        self._parent_path: str | None = None

    def carry_out(self, step: list[Any]) -> None:
        """Do one step of the plan; the shapes are those of `rootfs.mounts`."""
        verb, rest = step[0], step[1:]
        act = getattr(self, f"_{verb}", None) if verb in _PLAN_VERBS else None
        if act is None:
            raise KernelError(errno.EINVAL, "mount plan", str(verb))
        try:
            act(*rest)
        except KernelError:
            raise
        except OSError as error:  # it knows only the last part of the path
            target = rest[1] if verb == "symlink" else rest[0]
            raise KernelError(error.errno or 0, verb, target) from error

    def enter(self) -> None:
        """Make it the root and let go of the old one: pivot_root(".", "."), as in pivot_root(2)."""
        self._forget_parent()
        os.fchdir(self._fd)
        syscalls.pivot_root(".", ".")
        syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")
        os.close(self._fd)

    def _open(self, path: str, flags: int = os.O_PATH) -> int:
        return syscalls.openat2(self._fd, path, flags, 0, syscalls.RESOLVE_IN_ROOT)

    def _at(self, path: str, act: Any) -> None:
        """Call `act` with a path of ours that leads to exactly what `path` means inside the root."""
        fd = self._open(path)
        try:
            act(f"/proc/self/fd/{fd}")
        except KernelError as error:
            raise KernelError(error.errno or 0, error.syscall, path) from None
        finally:
            os.close(fd)

    def _idmap(self, path: str) -> None:
        """Lay a mapped copy of a mount of the host over itself; later steps find it under the same path."""
        tree = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
        try:
            syscalls.mount_setattr_idmap(tree, self._userns, path)
            syscalls.move_mount(tree, path)
        finally:
            os.close(tree)

    def _attach(self, source: str, place: str, is_mapped: bool) -> None:
        """Hang up a mount that another process holds: `source` leads to it through /proc, `place` is the HOST's."""
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if is_mapped and self._userns >= 0:
                syscalls.mount_setattr_idmap(fd, self._userns, source)
            syscalls.move_mount(fd, place)
        finally:
            os.close(fd)

    def _mount(self, source: str | None, target: str, fstype: str | None, flags: int, data: str | None) -> None:
        self._forget_parent()
        if data is not None and len(data) >= _PAGE_BYTES:  # the kernel would cut it without a word
            raise KernelError(errno.E2BIG, "mount", f"{target}: options of {len(data)} bytes")
        if self._fd < 0:
            syscalls.mount(source, self._directory, fstype, flags, data)
            self._fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            return
        is_bind = bool(flags & syscalls.MS_BIND and not flags & syscalls.MS_REMOUNT)

        def act(path: str) -> None:
            # A bind of nothing is a bind onto itself, to give a path inside flags of its own.
            syscalls.mount(path if is_bind and source is None else source, path, fstype, flags, data)

        self._at(target, act)
        if is_bind and flags & _PER_MOUNT:  # the kernel ignores these flags on the bind itself
            again = syscalls.MS_REMOUNT | syscalls.MS_BIND | (flags & _PER_MOUNT)
            self._at(target, lambda path: syscalls.mount(None, path, None, again))

    def _mask(self, target: str) -> None:
        """Hide a file behind the root's own /dev/null."""
        self._forget_parent()
        self._at(
            "/dev/null", lambda null: self._at(target, lambda path: syscalls.mount(null, path, None, syscalls.MS_BIND))
        )

    def _umount(self, target: str) -> None:
        self._forget_parent()
        self._at(target, lambda path: syscalls.umount2(path, syscalls.MNT_DETACH))

    def _parent(self, target: str) -> tuple[int, str]:
        """Return an fd of the directory that holds `target`, made where it is missing, and the last name.

        The fd is kept for the next step (most steps come in runs below /dev) until something is mounted.
        """
        directory, name = os.path.split(target.rstrip("/"))
        if directory != self._parent_path:
            self._forget_parent()
            self._parent_fd, self._parent_path = self._open_directory(directory or "/"), directory
        return self._parent_fd, name

    def _open_directory(self, path: str) -> int:
        """Open a directory inside, made with its parents where it is missing."""
        try:
            return self._open(path, os.O_PATH | os.O_DIRECTORY)
        except KernelError as error:
            if error.errno != errno.ENOENT or path == "/":
                raise
        above, name = os.path.split(path)
        parent = self._open_directory(above)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        return self._open(path, os.O_PATH | os.O_DIRECTORY)

    def _forget_parent(self) -> None:
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
        self._parent_fd, self._parent_path = -1, None

    def _mkdir(self, target: str, mode: int) -> None:
        parent, name = self._parent(target)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=parent)

    def _symlink(self, to: str, target: str) -> None:
        parent, name = self._parent(target)
        with contextlib.suppress(FileExistsError):
            os.symlink(to, name, dir_fd=parent)

    def _mknod(self, target: str, mode: int, major: int, minor: int) -> None:
        parent, name = self._parent(target)
        kind = 0 if stat.S_IFMT(mode) else stat.S_IFCHR
        os.mknod(name, mode | kind, os.makedev(major, minor), dir_fd=parent)

    def _file(self, target: str, mode: int = 0o644) -> None:
        """Create an empty file unless there is one; a dangling link in its place gives way."""
        try:
            return self._at(target, lambda _: None)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        parent, name = self._parent(target)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=parent))


def _take_streams(request: dict[str, Any], ends: Ends) -> None:
    """Put the standard streams at 0, 1 and 2: pipes, /dev/null, or the slave of a fresh terminal."""
    if request["has_tty"]:
        slave = _open_terminal(request, ends.channel)
        streams = (slave, slave, slave)
    else:
        if request["mounts"] is not None or ends.job >= 0:  # so that the program can open its /dev/stdout
            for pipe in (ends.stdin, ends.stdout, ends.stderr):
                if pipe >= 0:
                    os.fchown(pipe, request["uid_base"] + request["uid"], -1)
        stdin = ends.stdin if ends.stdin >= 0 else os.open("/dev/null", os.O_RDWR)
        streams = (stdin, ends.stdout, ends.stderr)
    for number, fd in enumerate(streams):
        os.dup2(fd, number, inheritable=True)
    if request["has_tty"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _open_terminal(request: dict[str, Any], channel: socket.socket) -> int:
    """Open a terminal of the job's own devpts, send its master to the spawner, return its slave."""
    try:
        master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", request["rows"], request["columns"], 0, 0))
    if request["uid"]:
        os.fchown(slave, request["uid_base"] + request["uid"], -1)
    channel.sendmsg([b'{"pty": 1}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
    os.close(master)
    return slave


def _limit(name: str, value: int) -> None:
    """Set a limit, soft and hard, at most the hard limit we have (we may lack CAP_SYS_RESOURCE)."""
    number = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(number)[1]
    wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (wanted, wanted))


def _drop_privileges(request: dict[str, Any], userns: int, warm: Warm) -> None:
    """Enter the user namespace, drop capabilities for good, become the user, and let nothing give rights back."""
    uid, gid, names = request["uid"], request["gid"], request["capabilities"]
    has = warm.bounding_set
    if userns >= 0:
        syscalls.setns(userns, syscalls.CLONE_NEWUSER)
        has = warm.known_capabilities  # all of them, over what the namespace owns
        if request["mounts"] is not None and names is not None and "SYS_ADMIN" in names:
            # These it may have as its own: copies, in which it can unmount nothing of what the plan mounted.
            syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS)
    keep = has if names is None else syscalls.capability_mask(names) & has
    number, drop = 0, has & ~keep
    while drop >> number:
        if drop >> number & 1:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
        number += 1
    os.setgroups([gid])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if names is not None:
        own = keep if uid == 0 else 0
        syscalls.capset(own, own, 0)
    if request["has_no_new_privs"]:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def _command(request: dict[str, Any]) -> tuple[str, list[str]]:
    """Find the program as a shell would, in the new root and as the job's user."""
    args = request["args"]
    path = _find(args[0], request["env"].get("PATH", ""))
    return (INIT_PATH, [INIT_PATH, "--", *args]) if request["has_init"] else (path, args)


def _find(name: str, search: str) -> str:
    if "/" in name:
        if not os.path.exists(name):
            raise Refused(errno.ENOENT, name, f'exec: "{name}": no such file or directory')
        if os.path.isdir(name) or not os.access(name, os.X_OK):
            raise Refused(errno.EACCES, name, f'exec: "{name}": permission denied')
        return name
    for folder in search.split(":"):
        path = f"{folder or '.'}/{name}"
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise Refused(errno.ENOENT, name, f'exec: "{name}": executable file not found in $PATH')


def _hold(channel: socket.socket) -> None:
    """Wait to be released; a spawner that went away means that nobody will."""
    channel.send(b'{"ready": 1}')
    if channel.recv(1) != b"g":
        os._exit(FAILED_STATUS)


def _end_without_spawner(channel: socket.socket) -> None:
    """Go no further if the spawner is gone: nobody knows of a child that has not become its program yet."""
    with contextlib.suppress(BlockingIOError):
        if channel.recv(1, socket.MSG_DONTWAIT) == b"":
            os._exit(FAILED_STATUS)
